"""What images and label maps go through for semantic segmentation, in the numbers of mmsegmentation's pipelines.

Images are (height, width, 3) uint8 RGB, label maps (height, width) uint8 with IGNORED where there is no class.
"""

from collections.abc import Sequence
from typing import NamedTuple

import cv2
import numpy as np
import torch

from data.preprocess import MEAN, STD
from randomness import counted_uniforms

IGNORED = 255
LARGEST_SHARE = 0.75  # of one class in a training crop
TRIES = 10
BRIGHTNESS, CONTRAST, HUE = 32, (0.5, 1.5), 18  # of the photometric distortion; saturation is drawn as contrast is


class Photometric(NamedTuple):
    """What is done to the colours of an image; None: nothing. ``contrast_first``: before saturation and hue."""

    brightness: float | None = None  # added
    contrast_first: bool = False
    contrast: float | None = None  # multiplied
    saturation: float | None = None  # multiplied
    hue: int | None = None  # added, in units of two degrees


def rescaled(width: int, height: int, long_side: int, short_side: int) -> tuple[int, int]:
    """The largest width and height in these proportions whose sides are within the two bounds."""
    factor = min(long_side / max(width, height), short_side / min(width, height))
    return int(width * factor + 0.5), int(height * factor + 0.5)


def resize_image(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """parity: bilinear without antialiasing, also where an image is made much smaller (mmcv)."""
    return cv2.resize(image, size, interpolation=cv2.INTER_LINEAR)


def resize_labels(labels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The label at floor(place * old / new), by index arithmetic."""
    rows, columns = (
        np.minimum(np.floor(np.arange(new) * (old / new)).astype(np.int64), old - 1)
        for new, old in zip((size[1], size[0]), labels.shape, strict=True)
    )
    return labels[rows[:, None], columns]


def classes_of(raw: np.ndarray) -> np.ndarray:
    """Labels as ADE20K stores them, 0 where there is none -> classes from 0 on, IGNORED where there is none."""
    return np.where((raw == 0) | (raw == IGNORED), IGNORED, raw - 1).astype(np.uint8)


def is_varied(labels: np.ndarray) -> bool:
    """Whether a crop has several classes, none of them with LARGEST_SHARE of what is labelled."""
    counts = np.bincount(labels.reshape(-1), minlength=IGNORED + 1)[:IGNORED]
    return np.count_nonzero(counts) > 1 and counts.max() < LARGEST_SHARE * counts.sum()


def distort(image: np.ndarray, how: Photometric) -> np.ndarray:
    """parity: after every step the colours are cut to 0 ... 255 and to whole numbers, which loses some each time."""
    if how.brightness is not None:
        image = _cut(image + np.float32(how.brightness))
    if how.contrast_first and how.contrast is not None:
        image = _cut(image * np.float32(how.contrast))
    if how.saturation is not None or how.hue is not None:
        image = _distort_hue(image, how)
    if not how.contrast_first and how.contrast is not None:
        image = _cut(image * np.float32(how.contrast))
    return image


def _distort_hue(image: np.ndarray, how: Photometric) -> np.ndarray:
    """Saturation, then hue; between them the colours are RGB of 8 bits again, as in the original."""
    if how.saturation is not None:
        hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV)
        hsv[..., 1] = _cut(hsv[..., 1] * np.float32(how.saturation))
        image = cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)
    if how.hue is not None:
        hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV)
        hsv[..., 0] = (hsv[..., 0].astype(np.int64) + how.hue) % 180
        image = cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)
    return image


def _cut(values: np.ndarray) -> np.ndarray:
    return values.clip(0, 255).astype(np.uint8)


def normalised(image: np.ndarray) -> torch.Tensor:
    """(3, height, width) float32, zero mean and unit variance over ImageNet."""
    pixels = torch.from_numpy(image.transpose(2, 0, 1).copy()).float().div_(255)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    return pixels.sub_(mean).div_(std)


class SegmentationViews:
    """One training crop of an image and its labels: scaled, cut out, flipped, distorted.

    Returns ``crops`` [(3, side, side)] uint8, padded with anything, ``labels`` (side, side) uint8, padded with IGNORED,
    and ``extent``, the rows and columns that are no padding: normalised pixels beyond them are 0 (``blank``).
    """

    augment = "fast"

    def __init__(self, side: int = 512, ratios: Sequence[float] = (0.5, 2.0), long_side: int = 99_999_999):
        self.side, self.ratios, self.long_side = side, tuple(ratios), long_side

    def __call__(self, pair: tuple[np.ndarray, np.ndarray], key: tuple[int, ...]) -> dict:
        image, labels = pair
        ratio, flip, *draws = counted_uniforms(*key, np.arange(12 + 2 * (TRIES + 1)))
        ratio = self.ratios[0] + ratio * (self.ratios[1] - self.ratios[0])
        size = rescaled(image.shape[1], image.shape[0], int(self.long_side * ratio), int(self.side * ratio))
        image, labels = resize_image(image, size), resize_labels(labels, size)
        rows, columns = self._place(labels, draws[10:])
        image, labels = image[rows, columns], labels[rows, columns]
        if flip < 0.5:
            image, labels = image[:, ::-1], labels[:, ::-1]
        image = distort(np.ascontiguousarray(image), drawn_photometric(draws[:10]))
        crop = np.zeros((self.side, self.side, 3), np.uint8)
        padded = np.full((self.side, self.side), IGNORED, np.uint8)
        height, width = labels.shape
        crop[:height, :width], padded[:height, :width] = image, labels
        crop = torch.from_numpy(crop).permute(2, 0, 1).contiguous()
        return {"crops": [crop], "labels": torch.from_numpy(padded), "extent": torch.tensor([height, width])}

    def _place(self, labels: np.ndarray, draws: Sequence[float]) -> tuple[slice, slice]:
        """The first of TRIES places whose labels are varied, else one more, whatever is there."""
        for top, left in zip(draws[::2], draws[1::2], strict=True):
            starts = [
                int(draw * (max(old - self.side, 0) + 1)) for draw, old in zip((top, left), labels.shape, strict=True)
            ]
            place = tuple(slice(start, start + self.side) for start in starts)
            if is_varied(labels[place]):
                break
        return place


def drawn_photometric(draws: Sequence[float]) -> Photometric:
    """From ten uniform numbers: each of the four with probability 1/2, contrast first or last with 1/2."""
    coins, values = [draw < 0.5 for draw in draws[:5]], draws[5:]
    low, high = CONTRAST
    return Photometric(
        brightness=(2 * values[0] - 1) * BRIGHTNESS if coins[0] else None,
        contrast_first=coins[1],
        contrast=low + values[1] * (high - low) if coins[2] else None,
        saturation=low + values[2] * (high - low) if coins[3] else None,
        hue=int(values[3] * 2 * HUE) - HUE if coins[4] else None,
    )


def blank(images: torch.Tensor, extent: torch.Tensor) -> torch.Tensor:
    """Normalised crops (batch, 3, side, side) with zeros beyond the rows and columns of ``extent`` (batch, 2)."""
    places = torch.arange(images.shape[-1], device=images.device)
    rows, columns = (places < count[:, None] for count in extent.unbind(1))
    return torch.where((rows[:, :, None] & columns[:, None])[:, None], images, 0.0)


class TestScale:
    """Pillow RGB image -> normalised (3, height, width), shorter side at ``short_side``."""

    def __init__(self, short_side: int = 512, long_side: int = 99_999_999):
        self.short_side, self.long_side = short_side, long_side

    def __call__(self, image: object) -> torch.Tensor:
        pixels = np.asarray(image)
        return normalised(resize_image(pixels, rescaled(*pixels.shape[1::-1], self.long_side, self.short_side)))
