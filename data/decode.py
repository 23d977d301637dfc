"""Image files to RGB with 8 bits per channel.

``decode_pil`` is what the original pipelines do, ``decode_array`` the same pixels sooner: plain JPEG files go through
OpenCV, everything else through Pillow. Conventions, where a file leaves a choice:

- more than 8 bits per channel are scaled to 8, by a white that data/depth.py finds (Pillow alone would clip grey
  images); with 8 bits the pixels are Pillow's;
- transparency is dropped, not blended, as Pillow's ``convert("RGB")`` does;
- of an animation the first frame is taken, as the original pipelines do;
- EXIF orientation is ignored. parity: so does torchvision's ImageFolder (but TIFF files are turned, by Pillow itself).
  ``Reading(exif=True)`` turns every format.

Whatever is wrong with a file raises BadImage, with the reason in one line.
"""

import argparse
import contextlib
import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import cv2
import numpy as np
from PIL import Image, UnidentifiedImageError

from data.depth import GREYS, colour_levels, grey_levels
from data.quiet import without_remarks
from data.suffixes import HAS_HEIF
from utils import bool_flag, escape

# Remarks on metadata and on sizes that are still accepted would be printed by every worker, for every image
_set_log_level = cv2.setLogLevel if hasattr(cv2, "setLogLevel") else cv2.utils.logging.setLogLevel  # OpenCV 4, 5
_set_log_level(0)
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\..*")

MAX_IMAGE_PIXELS = 178_956_970  # Pillow's own limit: half a gigabyte of RGB


class Reading(NamedTuple):
    """How files are read where the user has a choice; a source carries it to the processes that decode.

    ``exif``: turn an image as its EXIF orientation says. ``max_pixels``: a larger image is refused, since a small file
    may claim a size that no memory holds.
    """

    exif: bool = False
    max_pixels: int = MAX_IMAGE_PIXELS

    @property
    def max_bytes(self) -> int:
        """A larger file is no image that is accepted: 8 bytes for every pixel, and room for what else it holds."""
        return 8 * self.max_pixels + 2**28

    @property
    def mark(self) -> str:
        """What a fingerprint of images adds when they are not read as by default."""
        return "-exif" * self.exif + f"-{self.max_pixels}px" * (self.max_pixels != MAX_IMAGE_PIXELS)


PLAIN = Reading()

if HAS_HEIF:
    import pillow_heif

    pillow_heif.register_heif_opener()


def add_reading_arguments(parser: argparse._ActionsContainer) -> None:
    """The options from which ``reading_from`` makes a Reading."""
    add = parser.add_argument
    add("--exif", default=False, type=bool_flag, help="true: turn photographs as EXIF says; the originals do not")
    add("--refresh_index", action="store_true", help="list the images anew, whatever list was kept of them")
    add("--max_image_pixels", default=MAX_IMAGE_PIXELS, type=_pixels, help="a larger image counts as unreadable")


def reading_from(args: argparse.Namespace) -> Reading:
    return Reading(args.exif, args.max_image_pixels)


def _pixels(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: a number of pixels, at least 1 (default {MAX_IMAGE_PIXELS})")
    return int(text)


def check_resized(size: tuple[int, int], shorter: int, name: str = "", most: int = MAX_IMAGE_PIXELS) -> None:
    """Raises BadImage for an image (width, height) of more than ``most`` pixels once its shorter side is ``shorter``.

    A line of 1 x 20000 pixels is small until then.
    """
    width, height = (round(side * shorter / min(size)) for side in size)
    if width * height > most:
        raise BadImage(
            name,
            f"{size[0]} x {size[1]} pixels would be {width} x {height} with a shorter side of {shorter}, more than "
            f"--max_image_pixels {most}",
        )


class BadImage(Exception):
    """An image that cannot be read: ``name`` says which one, ``reason`` why, in one line that may be shown."""

    def __init__(self, name: str, reason: str):
        name, reason = escape(name), escape(reason)
        super().__init__(name, reason)
        self.name, self.reason = name, reason

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


def decode_pil(data: bytes, name: str, reading: Reading = PLAIN) -> Image.Image:
    """The image in ``data`` in Pillow's mode RGB. Raises BadImage."""
    with _bad_image_on_error(data, name, reading):
        return _decoded(Image.open(io.BytesIO(data)), data, name, reading)


def decode_array(data: bytes, name: str, reading: Reading = PLAIN) -> np.ndarray:
    """The same pixels as ``decode_pil``, (height, width, 3) uint8. Raises BadImage."""
    with _bad_image_on_error(data, name, reading):
        image = Image.open(io.BytesIO(data))  # reads the header and refuses decompression bombs
        # OpenCV does not tell when the end of a file is missing; Pillow judges those that do not end as they should
        if image.format in ("JPEG", "MPO") and image.mode in ("RGB", "L") and data.endswith(_JPEG_END):
            pixels = None
            with contextlib.suppress(cv2.error), without_remarks():  # it has limits of its own
                pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION)
            if pixels is not None:
                pixels = cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB, dst=pixels)
                turn = _turn(image, reading)
                return pixels if turn is None else np.array(Image.fromarray(pixels).transpose(turn))
        return np.array(_decoded(image, data, name, reading))


_JPEG_END = b"\xff\xd9"


@contextmanager
def _bad_image_on_error(data: bytes, name: str, reading: Reading) -> Iterator[None]:
    before = Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = reading.max_pixels / 2  # Pillow warns from there on, and refuses above twice of it
    try:
        yield
    except Exception as error:  # damaged bytes make decoders raise almost anything
        if isinstance(error, MemoryError):
            reason = "it does not fit into memory"
        elif not data:
            reason = "the file is empty"
        elif isinstance(error, UnidentifiedImageError):
            reason = "not an image in a known format"
        elif isinstance(error, Image.DecompressionBombError):
            pixels = re.search(r"\d+", str(error))[0]
            reason = (
                f"{pixels} pixels, more than --max_image_pixels {reading.max_pixels}: it may be a decompression "
                "bomb, so raise the limit only for files you trust"
            )
        else:
            reason = f"{type(error).__name__}: {error}"
        raise BadImage(name, " ".join(reason.split())) from error
    finally:
        Image.MAX_IMAGE_PIXELS = before


def _decoded(image: Image.Image, data: bytes, name: str, reading: Reading) -> Image.Image:
    image.load()  # a TIFF is turned here, and loses its orientation
    rgb, turn = _to_rgb(image, data, name), _turn(image, reading)
    return rgb if turn is None else rgb.transpose(turn)


def _to_rgb(image: Image.Image, data: bytes, name: str) -> Image.Image:
    if image.mode in GREYS:
        return Image.fromarray(grey_levels(image, data, name)).convert("RGB")
    if image.mode == "P" and "transparency" in image.info:
        return image.convert("RGBA").convert("RGB")  # spares a warning per image; the colours are the same
    return colour_levels(image, image.convert("RGB"), data, name)


def _turn(image: Image.Image, reading: Reading) -> Image.Transpose | None:
    """What makes an image stand as its EXIF orientation says; None where it does already, or says nothing."""
    if not reading.exif:
        return None
    try:
        return _TURNS.get(image.getexif().get(_ORIENTATION))
    except Exception:  # what cannot be read says nothing
        return None


_ORIENTATION = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
