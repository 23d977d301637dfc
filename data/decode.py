"""Image files to RGB with 8 bits per channel.

``decode_pil`` is what the original pipelines do, ``decode_array`` the same pixels sooner: plain JPEG files go through
OpenCV, everything else through Pillow. Conventions, where a file leaves a choice:

- more than 8 bits per channel are scaled to 8, by a white that data/depth.py finds (Pillow alone would clip grey
  images); with 8 bits the pixels are Pillow's;
- transparency is dropped, not blended, as Pillow's ``convert("RGB")`` does;
- EXIF orientation is ignored and of an animation the first frame is taken, as the original pipelines do.

Whatever is wrong with a file raises BadImage, with the reason in one line.
"""

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import cv2
import numpy as np
from PIL import Image, UnidentifiedImageError

from data.depth import GREYS, colour_levels, grey_levels
from utils import escape

# Remarks on metadata and on sizes that are still accepted would be printed by every worker, for every image
_set_log_level = cv2.setLogLevel if hasattr(cv2, "setLogLevel") else cv2.utils.logging.setLogLevel  # OpenCV 4, 5
_set_log_level(0)
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\..*")


class BadImage(Exception):
    """An image that cannot be read: ``name`` says which one, ``reason`` why, in one line that may be shown."""

    def __init__(self, name: str, reason: str):
        name, reason = escape(name), escape(reason)
        super().__init__(name, reason)
        self.name, self.reason = name, reason

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


def decode_pil(data: bytes, name: str) -> Image.Image:
    """The image in ``data`` in Pillow's mode RGB. Raises BadImage."""
    with _bad_image_on_error(data, name):
        return _to_rgb(Image.open(io.BytesIO(data)), data, name)


def decode_array(data: bytes, name: str) -> np.ndarray:
    """The same pixels as ``decode_pil``, (height, width, 3) uint8. Raises BadImage."""
    with _bad_image_on_error(data, name):
        image = Image.open(io.BytesIO(data))  # reads the header and refuses decompression bombs
        # OpenCV does not tell when the end of a file is missing; Pillow judges those that do not end as they should
        if image.format in ("JPEG", "MPO") and image.mode in ("RGB", "L") and data.endswith(_JPEG_END):
            pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION)
            if pixels is not None:
                return cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB, dst=pixels)
        return np.array(_to_rgb(image, data, name))


_JPEG_END = b"\xff\xd9"


@contextmanager
def _bad_image_on_error(data: bytes, name: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # damaged bytes make decoders raise almost anything
        if not data:
            reason = "the file is empty"
        elif isinstance(error, UnidentifiedImageError):
            reason = "not an image in a known format"
        elif isinstance(error, Image.DecompressionBombError):
            reason = f"refused, since it may be a decompression bomb: {error}"
        else:
            reason = f"{type(error).__name__}: {error}"
        raise BadImage(name, " ".join(reason.split())) from error


def _to_rgb(image: Image.Image, data: bytes, name: str) -> Image.Image:
    image.load()
    if image.mode in GREYS:
        return Image.fromarray(grey_levels(image, data, name)).convert("RGB")
    if image.mode == "P" and "transparency" in image.info:
        return image.convert("RGBA").convert("RGB")  # spares a warning per image; the colours are the same
    return colour_levels(image, image.convert("RGB"), data, name)
