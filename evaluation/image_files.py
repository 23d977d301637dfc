"""Images that a user points at, for pictures of each of them: found, read, and told when they cannot be read."""

import argparse
from pathlib import Path

import torch
from PIL import Image
from torchvision import transforms

from data.bundled import photograph_paths
from data.datasets import EXTENSIONS
from data.decode import PLAIN, BadImage, Reading, add_reading_arguments, check_resized, decode_pil
from data.encoded import read_regular
from data.listing import is_hidden
from data.pictures import was_written_here
from data.preprocess import MEAN, STD
from data.suffixes import is_image
from utils import RunStopped, UsageError, escape, log

SHOWN = 20  # names of unreadable images


def add_file_arguments(parser: argparse._ActionsContainer, *also: str) -> None:
    """Which images, and how they are read; ``also``: further names of the first option."""
    what = "image, or folder of images; left out: bundled photographs"
    parser.add_argument("--image_path", *also, default=None, help=what)
    add_reading_arguments(parser)


def image_files(path: str | None) -> list[Path]:
    """The image at ``path``, those below a folder but for what ``save_picture`` wrote, or the bundled photographs."""
    if path is None:
        return photograph_paths()
    place = Path(path)
    if place.is_file():
        return [place]
    named = [f for f in place.rglob("*") if is_image(f.name) and not any(map(is_hidden, f.relative_to(place).parts))]
    images = [file for file in named if file.is_file() or not file.exists()]  # a link to nowhere is not passed over
    found = sorted(file for file in images if not was_written_here(file))
    left_out = f"{len(images) - len(found)} pictures that were made by Tutelage are left out"
    if not found:
        what = "no image in this folder" if place.is_dir() else "no such file or folder"
        what += f" ({left_out})" * (len(images) > 0)
        raise UsageError(
            f"--image_path {escape(place)}: {what}; pass an image ({', '.join(EXTENSIONS[:3])}, ...) or a folder"
        )
    if len(images) > len(found):
        log.info(f"{escape(place)}: {left_out}")
    return found


def read_image(path: Path, size: list[int], reading: Reading = PLAIN) -> torch.Tensor:
    """The normalised image (3, height, width) at ``size`` (height, width), or with its shorter side at one number.

    Raises BadImage.
    """
    image = read_pil(path, reading)
    if len(size) == 1:
        check_resized(image.size, size[0], str(path), reading.max_pixels)
    steps = [transforms.Resize(size if len(size) == 2 else size[0]), transforms.ToTensor()]
    return transforms.Compose([*steps, transforms.Normalize(MEAN, STD)])(image)


def read_pil(path: Path, reading: Reading = PLAIN) -> Image.Image:
    """The image as it is in the file, RGB. Raises BadImage."""
    try:
        data = read_regular(path, reading.max_bytes)
    except (OSError, ValueError, MemoryError) as error:
        raise BadImage(str(path), getattr(error, "strerror", None) or str(error)) from error
    return decode_pil(data, str(path), reading)


def refuse_unreadable(errors: list[BadImage], path: str | None, images: int) -> None:
    """Raise UsageError where there are any; pictures of the others have been written."""
    if not errors:
        return
    if path is not None and Path(path).is_file():
        raise UsageError(f"{errors[0].name}: cannot be read as an image ({errors[0].reason}); mend or remove it")
    names = "; ".join(f"{error.name} ({error.reason})" for error in errors[:SHOWN])
    names += f"; and {len(errors) - SHOWN} more" * (len(errors) > SHOWN)
    raise RunStopped(f"{len(errors)} of {images} images cannot be read, mend or remove them: {names}")


def result_folders(files: list[Path], output_dir: str) -> list[Path]:
    """Where the pictures of every file go: ``output_dir`` itself for one, a folder of its name for each of several."""
    root = Path(output_dir)
    if len(files) == 1:
        return [root]
    names = [file.stem for file in files]
    repeated = {name for name in names if names.count(name) > 1}
    return [root / (f"{number:04d}_{name}" if name in repeated else name) for number, name in enumerate(names)]
