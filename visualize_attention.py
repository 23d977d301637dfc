"""Pictures of where a vision transformer looks: the class token's attention to every patch in the last block.

    python visualize_attention.py --pretrained_weights checkpoint.pth --image_path photo.jpg --threshold 0.6
    python visualize_attention.py --pretrained_weights checkpoint.pth            on the bundled photographs

For every image: ``img.png`` (what the network saw), ``attn-head<j>.png`` for each head, with ``--threshold`` also
``mask_th<threshold>_head<j>.png`` (the patches that hold this share of the head's attention), and ``sheet.png``, a
contact sheet of them. Of two class tokens (UDI) the second has files of its own, ``attn-cls+-head<j>.png`` and
``mask-cls+_th<threshold>_head<j>.png``, and its own rows below. Several images get a folder each; of those in a folder
an unreadable one is left out, and the script ends with exit code 1 and its name. What this script wrote is marked as
such inside the file, so that a folder of images may hold --output_dir. DINO (2104.14294), figures 1 and 3; its script
of this name.
"""

import argparse
from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torchvision import transforms

from data.bundled import photograph_paths
from data.datasets import EXTENSIONS
from data.decode import PLAIN, BadImage, Reading, add_reading_arguments, decode_pil, reading_from
from data.listing import is_hidden, is_image
from data.preprocess import MEAN, STD, to_pixels
from evaluation.features import evaluating
from evaluation.network import add_network_arguments, network_from_options
from randomness import counted_uniforms
from utils import Parser, RunStopped, UsageError, check_writable, escape, init_world, log, make_folder, run_cli

# ---------------------------------------------------------------------------------------------------------------------
# From a network to maps and masks
# ---------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def attention_maps(model: torch.nn.Module, images: torch.Tensor, class_token: int = 0) -> torch.Tensor:
    """Last-block attention of a class token to every patch: (batch, 3, height, width) -> (batch, heads, rows, columns).

    Pixels beyond a multiple of the patch size are left out. Raises UsageError for a network without such attention.
    """
    check_has_attention(model)
    rows, columns = (size // model.patch_size for size in images.shape[-2:])
    images = images[..., : rows * model.patch_size, : columns * model.patch_size]
    attention = model.get_last_selfattention(images, queries=model.num_class_tokens)
    return patch_maps(attention, model.num_prefix_tokens, rows, columns, class_token)


def class_token_names(model: torch.nn.Module) -> list[str]:
    """What the class tokens of a vision transformer are called; one alone needs no name."""
    return ["cls", "cls+"] if model.num_class_tokens == 2 else [""]


def check_has_attention(model: torch.nn.Module) -> None:
    if not hasattr(model, "get_last_selfattention"):
        raise UsageError(
            f"{type(model).__name__}: no class token's attention to show; use one of our vision transformers (vit_*)"
        )


def patch_maps(
    attention: torch.Tensor, num_prefix_tokens: int, rows: int, columns: int, class_token: int = 0
) -> torch.Tensor:
    """Attention (batch, heads, queries, tokens) -> that of one query to the patches (batch, heads, rows, columns)."""
    return attention[:, :, class_token, num_prefix_tokens:].unflatten(-1, (rows, columns))


def keep_mass(attention: torch.Tensor, threshold: float) -> torch.Tensor:
    """The strongest patches that together hold ``threshold`` of each map's attention: bool (..., rows, columns)."""
    values, order = attention.flatten(-2).sort(dim=-1)
    cumulative = (values / values.sum(dim=-1, keepdim=True)).cumsum(dim=-1)
    kept = torch.empty_like(order, dtype=torch.bool).scatter_(-1, order, cumulative > 1 - threshold)
    return kept.view_as(attention)


def enlarge(maps: torch.Tensor, patch_size: int) -> torch.Tensor:
    """Every patch as ``patch_size`` x ``patch_size`` equal pixels: (..., rows, columns) -> (..., height, width)."""
    return maps.repeat_interleave(patch_size, dim=-2).repeat_interleave(patch_size, dim=-1)


# ---------------------------------------------------------------------------------------------------------------------
# From maps to pictures: uint8 (height, width, 3) RGB
# ---------------------------------------------------------------------------------------------------------------------

GAP, LABEL_HEIGHT = 6, 22  # pixels of a contact sheet
CELL = 240  # longer side of its pictures
ROW = 8  # pictures beside each other, at most


def heat(values: torch.Tensor | np.ndarray) -> np.ndarray:
    """A map (height, width) from its minimum, dark violet, to its maximum, yellow (viridis)."""
    values = np.asarray(values, dtype=np.float64)
    span = values.max() - values.min()
    index = np.minimum(255, np.floor(256 * (values - values.min()) / span)) if span > 0 else np.zeros_like(values)
    return cv2.applyColorMap(index.astype(np.uint8), cv2.COLORMAP_VIRIDIS)[..., ::-1].copy()


def stretched(image: torch.Tensor) -> np.ndarray:
    """A normalised image (3, height, width) with its values stretched to black and white, as DINO saves its input."""
    image = (image - image.min()) / (image.max() - image.min()).clamp(min=1e-5)
    return (image * 255 + 0.5).clamp(0, 255).to(torch.uint8).permute(1, 2, 0).cpu().numpy()


def blended(image: np.ndarray, mask: np.ndarray, colour: tuple[int, int, int]) -> np.ndarray:
    """``image`` half covered with ``colour`` where ``mask`` (height, width) is set, and the mask's outline."""
    picture = image.copy()
    picture[mask] = (picture[mask].astype(np.uint16) + np.array(colour, np.uint16)) // 2
    contours, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    return cv2.drawContours(picture, contours, -1, colour, thickness=max(1, max(mask.shape) // 240))


def bright_colour(number: int) -> tuple[int, int, int]:
    """A saturated colour with a random hue; the same number always has the same one."""
    hue = int(180 * counted_uniforms(0, number))
    return tuple(int(c) for c in cv2.cvtColor(np.uint8([[[hue, 255, 255]]]), cv2.COLOR_HSV2RGB)[0, 0])


def overlaid(image: np.ndarray, values: np.ndarray) -> np.ndarray:
    """``image`` lit where ``values`` (rows, columns) are large and dimmed where they are small.

    The largest fiftieth is lit alike: a few tokens that draw nearly all attention would leave the rest in the dark.
    """
    low, high = values.min(), np.quantile(values, 0.98)
    smooth = cv2.resize(values.astype(np.float32), image.shape[1::-1], interpolation=cv2.INTER_CUBIC)
    smooth = np.clip((smooth - low) / max(high - low, 1e-12), 0, 1)[..., None]
    return np.round(image * (0.25 + 0.75 * smooth)).astype(np.uint8)


def attention_sheet(
    image: np.ndarray, maps: torch.Tensor, masked: list[np.ndarray] | None = None, token: str = ""
) -> np.ndarray:
    """Contact sheet: the image, the image lit by the heads' mean attention, a map per head, a mask per head if given.

    ``image`` and ``masked`` uint8 (height, width, 3), ``maps`` (heads, rows, columns) of any resolution; ``token``: the
    class token's name, where there are several.
    """
    maps = np.nan_to_num(maps.detach().float().cpu().numpy())  # a failing run's pictures are black, not an error
    cells = [(f"image, {token}" if token else "image", image), ("mean of heads", overlaid(image, maps.mean(axis=0)))]
    cells += [(f"head {number}", heat(values)) for number, values in enumerate(maps)]
    cells += [(f"mask of head {number}", picture) for number, picture in enumerate(masked or ())]
    scale = CELL / max(image.shape[:2])
    size = tuple(max(1, round(side * scale)) for side in image.shape[1::-1])  # width, height
    smooth = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
    rows = -(-len(cells) // ROW)
    columns = -(-len(cells) // rows)
    height, width = size[1] + LABEL_HEIGHT + GAP, size[0] + GAP
    sheet = np.full((rows * height + GAP, columns * width + GAP, 3), 255, np.uint8)
    for number, (label, picture) in enumerate(cells):
        is_map = label.startswith("head")
        picture = cv2.resize(picture, size, interpolation=cv2.INTER_NEAREST if is_map else smooth)
        top, left = GAP + number // columns * height, GAP + number % columns * width
        cv2.putText(
            sheet,
            label,
            (left + 1, top + LABEL_HEIGHT - 7),
            cv2.FONT_HERSHEY_SIMPLEX,
            0.45,
            (40, 40, 40),
            1,
            cv2.LINE_AA,
        )
        sheet[top + LABEL_HEIGHT : top + LABEL_HEIGHT + size[1], left : left + size[0]] = picture
    return sheet


# ---------------------------------------------------------------------------------------------------------------------
# The script
# ---------------------------------------------------------------------------------------------------------------------


MARK = b"tEXtSoftware\0Tutelage"  # near the beginning of every picture that was written here
SHOWN = 20  # names of unreadable images


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


def was_written_here(path: Path) -> bool:
    """Whether ``save_picture`` made this file."""
    try:
        with open(path, "rb") as file:
            return MARK in file.read(256)
    except OSError:
        return False


def read_image(path: Path, size: list[int], reading: Reading = PLAIN) -> torch.Tensor:
    """The normalised image (3, height, width) at ``size`` (height, width), or with its shorter side at one number.

    Raises BadImage.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise BadImage(str(path), error.strerror or str(error)) from error
    image = decode_pil(data, str(path), reading)
    steps = [transforms.Resize(size if len(size) == 2 else size[0]), transforms.ToTensor()]
    return transforms.Compose([*steps, transforms.Normalize(MEAN, STD)])(image)


def save_picture(picture: np.ndarray, path: Path) -> None:
    """Write a PNG with MARK. Raises UsageError."""
    mark = PngInfo()
    mark.add_text("Software", "Tutelage")
    try:
        Image.fromarray(picture).save(path, pnginfo=mark)
    except OSError as error:
        raise UsageError(f"--output_dir {path.parent}: {path.name} cannot be written: {error}") from error


def visualise(model: torch.nn.Module, image: torch.Tensor, folder: Path, threshold: float | None) -> None:
    """All pictures of one normalised image (3, height, width), written to ``folder``."""
    patch, sheets = model.patch_size, []
    height, width = (size - size % patch for size in image.shape[-2:])
    seen = image[:, :height, :width].cpu()
    photograph = to_pixels(seen)
    save_picture(stretched(seen), folder / "img.png")
    for token, name in enumerate(class_token_names(model)):
        maps, mark = attention_maps(model, image[None], token)[0].float().cpu(), f"-{name}" if token else ""
        for head, values in enumerate(enlarge(maps, patch)):
            save_picture(heat(values), folder / f"attn{mark}-head{head}.png")
        masks = () if threshold is None else enlarge(keep_mass(maps, threshold), patch).numpy()
        masked = [blended(photograph, mask, bright_colour(head)) for head, mask in enumerate(masks)]
        for head, picture in enumerate(masked):
            save_picture(picture, folder / f"mask{mark}_th{threshold}_head{head}.png")
        sheets.append(attention_sheet(photograph, maps, masked, name))
    save_picture(np.concatenate(sheets), folder / "sheet.png")


def result_folders(files: list[Path], output_dir: str) -> list[Path]:
    """Where the pictures of every file go: ``output_dir`` itself for one, a folder of its name for each of several."""
    root = Path(output_dir)
    if len(files) == 1:
        return [root]
    names = [file.stem for file in files]
    repeated = {name for name in names if names.count(name) > 1}
    return [root / (f"{number:04d}_{name}" if name in repeated else name) for number, name in enumerate(names)]


def refuse_to_overwrite(files: list[Path], folders: list[Path]) -> None:
    """Raise UsageError for an image that has the place and the name of a picture that will be written."""
    places = {folder.resolve() for folder in folders}
    for file in files:
        ours = file.name in ("img.png", "sheet.png") or file.name.startswith(("attn-", "mask-", "mask_"))
        if ours and file.parent.resolve() in places:
            raise UsageError(
                f"--output_dir {escape(file.parent)}: {escape(file.name)} is an image to look at; choose another folder"
            )


def refuse_unreadable(errors: list[BadImage], path: str | None, images: int) -> None:
    """Raise UsageError where there are any; pictures of the others have been written."""
    if not errors:
        return
    if path is not None and Path(path).is_file():
        raise UsageError(f"{errors[0].name}: cannot be read as an image ({errors[0].reason}); mend or remove it")
    names = "; ".join(f"{error.name} ({error.reason})" for error in errors[:SHOWN])
    names += f"; and {len(errors) - SHOWN} more" * (len(errors) > SHOWN)
    raise RunStopped(f"{len(errors)} of {images} images cannot be read, mend or remove them: {names}")


def get_args_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="visualize_attention.py", description="Pictures of a vision transformer's attention.")
    add_network_arguments(parser.add_argument_group("which network"))
    group = parser.add_argument_group("which images")
    add = group.add_argument
    add("--image_path", "--data_path", default=None, help="image, or folder of images; left out: bundled photographs")
    add("--image_size", default=[480, 480], nargs="+", type=int, help="height and width, or one number: shorter side")
    add_reading_arguments(group)
    add = parser.add_argument_group("pictures").add_argument
    add("--threshold", default=None, type=float, help="also show the patches that hold this share of the attention")
    add("--output_dir", default=".", help="where pictures are written")
    add("--device", default="auto", choices=("auto", "cpu", "cuda"), help="auto: the GPU if there is one")
    return parser


def main() -> None:
    args = get_args_parser().parse_args()
    if len(args.image_size) > 2 or min(args.image_size) < 1:
        raise UsageError(f"--image_size {' '.join(map(str, args.image_size))}: one or two positive numbers of pixels")
    if args.threshold is not None and not 0 < args.threshold <= 1:
        raise UsageError(f"--threshold {args.threshold}: a share of the attention, above 0 and at most 1")
    check_writable(Path(args.output_dir))
    world = init_world(args.device)
    files = image_files(args.image_path)
    model = network_from_options(args).model.to(world.device)
    check_has_attention(model)
    if min(args.image_size) < model.patch_size:
        raise UsageError(f"--image_size {min(args.image_size)}: smaller than a patch ({model.patch_size} pixels)")
    unreadable, folders = [], result_folders(files, args.output_dir)
    refuse_to_overwrite(files, folders)
    with evaluating(model):
        for file, folder in zip(files, folders, strict=True):
            try:
                image = read_image(file, args.image_size, reading_from(args))
            except BadImage as error:
                unreadable.append(error)
                continue
            make_folder(folder)
            visualise(model, image.to(world.device), folder, args.threshold)
            log.info(f"{escape(file)} -> {escape(folder)}/")
    refuse_unreadable(unreadable, args.image_path, len(files))


if __name__ == "__main__":
    run_cli(main)
