"""An image after operations of RandAugment, of which only those pixels are made that somebody asks for.

A crop reads a box of an image that was changed as a whole. What an operation puts into a box depends on less than the
whole: a table from levels to levels on the same box, an affine map on the box that its output looks at, sharpening on
the box and a pixel around it. So ``Original``, ``Flipped`` and ``Changed`` answer ``pixels(box)`` by asking what lies
beneath them; only a histogram (of autocontrast, equalisation) or a mean (of contrast) needs the whole, and a histogram
goes through a table without the pixels.

The pixels are Pillow's to the bit (``carry_out`` of data/randaugment.py on the whole, then cut), as
tests/data/test_augmented.py holds them.
"""

from collections.abc import Sequence
from functools import cached_property

import cv2
import numpy as np
from PIL import Image

from data.augment import Box
from data.randaugment import FILL, Operation, affine_matrix, carry_out, moves_pixels, plain_name

COUNTED_IN_FLOATS = 2**24  # pixels, until which float32, OpenCV's, counts exactly
_LEVELS = np.arange(256)
_RAMP = Image.fromarray(_LEVELS.astype(np.uint8)[None])
_SMOOTH = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]]) / 13  # Pillow's; a thirteenth is never a tie
_MARGIN = 3  # pixels that bicubic interpolation reads around a place, and one for rounding


class Original:
    """A decoded image (height, width, 3) uint8."""

    def __init__(self, image: np.ndarray):
        self.image = image
        self.size = image.shape[:2]  # height, width

    def pixels(self, box: Box) -> np.ndarray:
        """(box.height, box.width, 3) uint8."""
        top, left, height, width = box
        return self.image[top : top + height, left : left + width]

    @cached_property
    def histogram(self) -> np.ndarray:
        """How often every level occurs in the whole image: (3, 256)."""
        return histogram_of(self.image)

    @cached_property
    def luma(self) -> int:
        """The mean grey level of the whole image, rounded."""
        return luma_of(self.image)


class Flipped:
    """``source`` from right to left."""

    def __init__(self, source: Original):
        self.source, self.size = source, source.size

    def pixels(self, box: Box) -> np.ndarray:
        mirrored = box._replace(left=self.size[1] - box.left - box.width)
        return cv2.flip(self.source.pixels(mirrored), 1)

    @property
    def histogram(self) -> np.ndarray:
        return self.source.histogram

    @property
    def luma(self) -> int:
        return self.source.luma


class Changed:
    """``source`` after ``operation``."""

    def __init__(self, source: "Original | Flipped | Changed", operation: Operation, fill: tuple[int, int, int] = FILL):
        self.source, self.operation, self.fill = source, operation, fill
        self.size = source.size
        self.name = plain_name(operation.name)

    def pixels(self, box: Box) -> np.ndarray:
        if "whole" in self.__dict__:
            top, left, height, width = box
            return self.whole[top : top + height, left : left + width]
        if self.table is not None:
            table = self.table.astype(np.uint8, order="C")
            return cv2.LUT(self.source.pixels(box), table if table.ndim == 1 else table[None])
        if moves_pixels(self.name):
            return self._moved(box)
        if self.name == "Sharpness":
            return self._sharpened(box)
        return np.asarray(carry_out(Image.fromarray(np.ascontiguousarray(self.source.pixels(box))), self.operation))

    @cached_property
    def whole(self) -> np.ndarray:
        return self.pixels(Box(0, 0, *self.size))

    @cached_property
    def table(self) -> np.ndarray | None:
        """The level that replaces every level, (256,), or every level of a channel, (256, 3); None where more than a
        pixel's own level counts."""
        value = self.operation.argument
        match self.name:
            case "Invert":
                return 255 - _LEVELS
            case "Posterize":
                return _LEVELS & (256 - 2 ** (8 - int(value)))
            case "Solarize":
                return np.where(value > _LEVELS, _LEVELS, 255 - _LEVELS)
            case "SolarizeAdd":
                return np.where(_LEVELS < 128, np.minimum(255, _LEVELS + int(value)), _LEVELS)
            case "Brightness" | "Contrast":
                grey = self.source.luma if self.name == "Contrast" else 0
                return np.asarray(Image.blend(Image.new("L", _RAMP.size, grey), _RAMP, value))[0]
            case "AutoContrast" | "Equalize":
                to_table = autocontrast_table if self.name == "AutoContrast" else equalize_table
                return np.stack([to_table(counts) for counts in self.source.histogram], axis=-1)
        return None

    @cached_property
    def histogram(self) -> np.ndarray:
        if self.table is None:
            return histogram_of(self.whole)
        pairs = zip(np.broadcast_to(self.table.T, (3, 256)), self.source.histogram, strict=True)
        return np.stack([np.bincount(table, counts, 256) for table, counts in pairs]).astype(int)

    @cached_property
    def luma(self) -> int:
        return luma_of(self.whole)

    def _sharpened(self, box: Box) -> np.ndarray:
        """The box further from what smoothing makes of it, or nearer. Smoothing leaves the image's own rim alone."""
        reach = grown(box, 1, self.size)
        part = self.source.pixels(reach)
        smooth = cv2.filter2D(part, -1, _SMOOTH)
        smooth[[0, -1]], smooth[:, [0, -1]] = part[[0, -1]], part[:, [0, -1]]
        top, left = box.top - reach.top, box.left - reach.left
        cut = (slice(top, top + box.height), slice(left, left + box.width))
        pair = (Image.fromarray(np.ascontiguousarray(pixels[cut])) for pixels in (smooth, part))
        return np.asarray(Image.blend(*pair, self.operation.argument))

    def _moved(self, box: Box) -> np.ndarray:
        """The box by an affine map, from the part of the source that it looks at.

        Sums of the part's coordinates differ in their last bit from those of the whole's, which decides where a place
        lies exactly between pixels. Arguments of few decimals have many such places; the whole is made for them.
        """
        height, width = self.size
        a, b, c, d, e, f = affine_matrix(self.operation, width, height)
        reach, cut = Box(0, 0, height, width), box
        if is_round(self.operation.argument):
            box = reach
        else:
            x = np.array([box.left, box.left + box.width])[:, None]
            y = np.array([box.top, box.top + box.height])
            reach = reached(a * x + b * y + c, d * x + e * y + f, self.size)
            if reach is None:
                return np.full((box.height, box.width, 3), self.fill, np.uint8)
        c += a * box.left + b * box.top - reach.left
        f += d * box.left + e * box.top - reach.top
        part = Image.fromarray(np.ascontiguousarray(self.source.pixels(reach)))
        resample = Image.Resampling[self.operation.interpolation.upper()]
        size = (box.width, box.height)
        moved = part.transform(size, Image.Transform.AFFINE, (a, b, c, d, e, f), resample, fillcolor=self.fill)
        top, left = cut.top - box.top, cut.left - box.left
        return np.asarray(moved)[top : top + cut.height, left : left + cut.width]


def changed(
    image: Original | Flipped, operations: Sequence[Operation], fill: tuple[int, int, int] = FILL
) -> Original | Flipped | Changed:
    """``image`` after all operations, in their order."""
    for operation in operations:
        image = Changed(image, operation, fill)
    return image


def grown(box: Box, margin: int, size: tuple[int, int]) -> Box:
    """``box`` with so many pixels more on every side, as far as the image goes."""
    top, left = max(0, box.top - margin), max(0, box.left - margin)
    bottom, right = min(size[0], box.top + box.height + margin), min(size[1], box.left + box.width + margin)
    return Box(top, left, bottom - top, right - left)


def reached(x: np.ndarray, y: np.ndarray, size: tuple[int, int]) -> Box | None:
    """The part of an image that interpolation reads for places between these; None if all are beyond the image."""
    top, left = max(0, int(y.min()) - _MARGIN), max(0, int(x.min()) - _MARGIN)
    bottom, right = min(size[0], int(y.max()) + _MARGIN), min(size[1], int(x.max()) + _MARGIN)
    return Box(top, left, bottom - top, right - left) if bottom > top and right > left else None


def is_round(argument: float) -> bool:
    return argument == round(argument, 6)


def histogram_of(image: np.ndarray) -> np.ndarray:
    """(height, width, 3) uint8 -> (3, 256)."""
    if image.shape[0] * image.shape[1] > COUNTED_IN_FLOATS:
        return np.array(Image.fromarray(image).histogram()).reshape(3, 256)
    counts = [cv2.calcHist([image], [channel], None, [256], [0, 256]) for channel in range(3)]
    return np.reshape(counts, (3, 256)).astype(int)


def luma_of(image: np.ndarray) -> int:
    """The mean of Pillow's grey levels, rounded as its contrast does."""
    counts = np.array(Image.fromarray(image).convert("L").histogram())
    return int((counts * _LEVELS).sum() / counts.sum() + 0.5)


def autocontrast_table(counts: np.ndarray) -> np.ndarray:
    """The levels that occur, stretched from 0 to 255: (256,) how often each occurs -> (256,)."""
    low, *_, high = np.flatnonzero(counts)[[0, -1]]
    if high <= low:
        return _LEVELS
    scale = 255.0 / (high - low)
    return np.clip((_LEVELS * scale - low * scale).astype(int), 0, 255)


def equalize_table(counts: np.ndarray) -> np.ndarray:
    """The levels at which all occur as often as each other: (256,) how often each occurs -> (256,)."""
    occurring = counts[counts > 0]
    step = int(occurring.sum() - occurring[-1]) // 255
    if len(occurring) < 2 or not step:
        return _LEVELS
    return np.minimum(255, (step // 2 + np.cumsum(counts) - counts) // step)
