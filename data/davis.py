"""Videos whose objects are marked: the layout of DAVIS 2017, frames, and masks of indices.

    ImageSets/2017/<split>.txt                  a name on every line
    JPEGImages/480p/<name>/00000.jpg, ...       frames in the order of their names
    Annotations/480p/<name>/00000.png, ...      index images: 0 is the background, and a number every object

The PNG file of a mask has as its colours those of PASCAL VOC: the bits of an index, three by three, are the highest
bits of red, green and blue.
"""

import hashlib
import io
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from data.decode import PLAIN, BadImage, Reading, decode_array
from data.encoded import read_regular
from utils import UsageError, escape

PUBLISHED = {"train": 60, "val": 30, "test-dev": 30, "test-challenge": 30}  # videos of every split
MODES = ("P", "L")  # of images of indices, as Pillow calls them


class Video(NamedTuple):
    name: str
    frames: list[Path]
    masks: list[Path | None]  # of every frame; None where it has none, which the first one never is

    @property
    def fingerprint(self) -> str:
        """A hash of the names and sizes of all files."""
        files = [file for file in (*self.frames, *self.masks) if file]
        told = "\n".join(f"{file.name} {file.stat().st_size}" for file in files)
        return hashlib.sha256(told.encode(errors="surrogateescape")).hexdigest()


def open_davis(data_path: str, split: str) -> list[Video]:
    """The videos of a split, in the order of its file. Raises UsageError, which names what is missing."""
    root, listed = Path(data_path), Path(data_path) / "ImageSets" / "2017" / f"{split}.txt"
    try:
        names = [line.strip() for line in listed.read_text().splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UsageError(
            f"--data_path {escape(data_path)}: ImageSets/2017/{escape(split)}.txt cannot be read ({reason}); pass the "
            "folder DAVIS of DAVIS-2017-trainval-480p.zip (davischallenge.org)"
        ) from None
    if not names:
        raise UsageError(f"{escape(listed)}: no video in this list")
    for name in names:
        if name != Path(name).name or name.startswith(".") or names.count(name) > 1:
            raise UsageError(f"{escape(listed)}: {escape(name)}: wants names of folders, each of them once")
    return [_open_video(root, name) for name in names]


def _open_video(root: Path, name: str) -> Video:
    folders = [root / kind / "480p" / name for kind in ("JPEGImages", "Annotations")]
    frames = sorted(folders[0].glob("*.jpg"))
    if len(frames) < 2:
        raise UsageError(f"{escape(folders[0])}: {len(frames)} frames (*.jpg) there; a video has two or more")
    masks = [folders[1] / f"{frame.stem}.png" for frame in frames]
    masks = [mask if mask.exists() else None for mask in masks]
    if masks[0] is None:
        raise UsageError(
            f"{escape(folders[1] / frames[0].stem)}.png: not there; the mask of a video's first frame says what to "
            "follow"
        )
    return Video(name, frames, masks)


def read_frame(path: Path, reading: Reading = PLAIN) -> np.ndarray:
    """uint8 (height, width, 3) RGB. Raises UsageError."""
    try:
        return decode_array(_bytes(path, reading), str(path), reading)
    except BadImage as error:
        raise UsageError(f"{error.name}: cannot be read as an image ({error.reason}); mend it") from None


def read_mask(path: Path, size: tuple[int, int] | None = None, reading: Reading = PLAIN) -> np.ndarray:
    """Indices, uint8 (height, width). Raises UsageError, also where they are not of ``size``."""
    try:
        with Image.open(io.BytesIO(_bytes(path, reading))) as image:
            if image.width * image.height > reading.max_pixels:
                raise BadImage(str(path), f"{image.width} x {image.height} pixels")
            mode, mask = image.mode, np.array(image)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError, BadImage) as error:
        reason = error.reason if isinstance(error, BadImage) else escape(str(error))
        raise UsageError(f"{escape(path)}: cannot be read as a mask ({reason}); mend it") from None
    if mode not in MODES:
        raise UsageError(
            f"{escape(path)}: a picture of mode {mode}; wants an index image (mode P), a number per object"
        )
    if size is not None and mask.shape != tuple(size):
        raise UsageError(
            f"{escape(path)}: {mask.shape[1]} x {mask.shape[0]} pixels, and {size[1]} x {size[0]} the frame"
        )
    return mask


def _bytes(path: Path, reading: Reading) -> bytes:
    try:
        return read_regular(path, reading.max_bytes)
    except (OSError, ValueError, MemoryError) as error:
        raise BadImage(str(path), getattr(error, "strerror", None) or str(error)) from error


def palette() -> np.ndarray:
    """The colour of every index: uint8 (256, 3)."""
    indices, colours = np.arange(256)[:, None], np.zeros((256, 3), np.uint8)
    for bit in range(8):  # three bits of the index for every bit of the colours
        colours |= ((indices >> (3 * bit + np.arange(3)) & 1) << (7 - bit)).astype(np.uint8)
    return colours


def save_mask(mask: np.ndarray, path: Path) -> None:
    """An index image with DAVIS's colours. Raises UsageError."""
    image = Image.fromarray(mask).convert("P")
    image.putpalette(palette().tobytes())
    try:
        image.save(path)
    except OSError as error:
        raise UsageError(f"--output_dir {escape(path.parent)}: {path.name} cannot be written: {error}") from error
