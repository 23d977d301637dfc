"""The operations that crops are made of, twice: with Pillow as the original pipelines, and fast on uint8 arrays.

A ``CropRecipe`` is one row of a method's table of augmentations. Both families are built from it:

- ``pil_transform(recipe)``: torchvision's transforms of Pillow images in the documented order. They draw from the
  global generators of torch and ``random``; seeded alike they repeat the originals bit for bit.
- ``draw_crop(recipe, uniforms, ...)``, then ``render(image, crop, size)``: the same distribution from counted uniform
  numbers, drawn before any pixel is touched, so that a recipe can look at boxes and flips (maps between crops, masks).
  ``render_pil`` carries the same decisions out with Pillow.

The fast operations take and return (height, width, 3) uint8 RGB arrays; after ``grayscale`` (height, width), until
``to_planes``. They round as Pillow does. Differences in levels of 255, as tests/data/test_augment.py holds them: flip
and solarise none; brightness, contrast, saturation and greyscale 1 in at most 3 % of the values, hue 1 in hardly any;
resize 1 in under 1 %, but up to 3 (mean 0.25) at ratios whose weights leave many values halfway between two levels;
blur none for over 90 % of the radii, and for the like reason 2 (mean 0.2) at the rest, among them 0.5 and 1.
"""

import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import permutations
from typing import NamedTuple

import cv2
import numpy as np
import torch
from PIL import Image, ImageFilter, ImageOps
from torchvision import transforms
from torchvision.transforms import functional as F

from randomness import counted_uniforms


@dataclass(frozen=True)
class CropRecipe:
    """How one kind of crop is made: random resized crop to ``size`` pixels, flip, colours, greyscale, blur, solarise.

    ``scale``: area relative to the image. ``jitter_strength``: brightness, contrast, saturation, hue. ``blur_radius``:
    uniform range, in pixels (Pillow's radius is the standard deviation). ``interpolation``: bicubic or bilinear, with
    antialiasing. The others are probabilities.
    """

    size: int
    scale: tuple[float, float]
    aspect: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5
    jitter: float = 0.8
    jitter_strength: tuple[float, float, float, float] = (0.4, 0.4, 0.2, 0.1)
    grayscale: float = 0.2
    blur: float = 0.0
    blur_radius: tuple[float, float] = (0.1, 2.0)
    solarize: float = 0.0
    interpolation: str = "bicubic"


# ---------------------------------------------------------------------------------------------------------------------
# The Pillow family
# ---------------------------------------------------------------------------------------------------------------------


class PILGaussianBlur:
    """With probability ``p``, blur by a radius drawn uniformly. Draws from ``random``."""

    def __init__(self, p: float, radius: tuple[float, float]):
        self.p, self.radius = p, radius

    def draw(self) -> float | None:
        return None if random.random() > self.p else random.uniform(*self.radius)

    def __call__(self, image: Image.Image) -> Image.Image:
        radius = self.draw()
        return image if radius is None else image.filter(ImageFilter.GaussianBlur(radius))


class PILSolarize:
    """With probability ``p``, invert the values from 128 on. Draws from ``random``."""

    def __init__(self, p: float):
        self.p = p

    def __call__(self, image: Image.Image) -> Image.Image:
        return ImageOps.solarize(image) if random.random() < self.p else image


def pil_transform(recipe: CropRecipe) -> transforms.Compose:
    """Pillow image -> Pillow image of ``recipe.size``. Draws in the originals' order (DINO, DataAugmentationDINO)."""
    steps = [
        transforms.RandomResizedCrop(
            recipe.size, recipe.scale, recipe.aspect, transforms.InterpolationMode(recipe.interpolation)
        ),
        transforms.RandomHorizontalFlip(recipe.flip),
        transforms.RandomApply([transforms.ColorJitter(*recipe.jitter_strength)], recipe.jitter),
        transforms.RandomGrayscale(recipe.grayscale),
    ]
    if recipe.blur:
        steps.append(PILGaussianBlur(recipe.blur, recipe.blur_radius))
    if recipe.solarize:
        steps.append(PILSolarize(recipe.solarize))
    return transforms.Compose(steps)


# ---------------------------------------------------------------------------------------------------------------------
# Fast family: what is drawn
# ---------------------------------------------------------------------------------------------------------------------

ATTEMPTS = 10
_AREA, _ASPECT = range(ATTEMPTS), range(ATTEMPTS, 2 * ATTEMPTS)
(_TOP, _LEFT, _FLIP, _JITTER, _ORDER, _BRIGHTNESS, _CONTRAST, _SATURATION, _HUE, _GRAYSCALE, _BLUR, _RADIUS, _SOLARIZE,
 UNIFORMS_PER_CROP) = range(2 * ATTEMPTS, 2 * ATTEMPTS + 14)  # fmt: skip
_ORDERS = list(permutations(("brightness", "contrast", "saturation", "hue")))


class Box(NamedTuple):
    """A rectangle of pixels."""

    top: int
    left: int
    height: int
    width: int


class Crop(NamedTuple):
    """All decisions about one crop. ``jitter``: (operation, amount) in order; ``blur``: radius or None."""

    box: Box
    flip: bool
    jitter: tuple[tuple[str, float], ...]
    grayscale: bool
    blur: float | None
    solarize: bool


def crop_uniforms(key: tuple[int, ...], crops: int) -> list[list[float]]:
    """The uniform numbers of an image's crops: (crops, UNIFORMS_PER_CROP), a function of ``key`` and the crop only."""
    return counted_uniforms(*key, np.arange(crops)[:, None], np.arange(UNIFORMS_PER_CROP)).tolist()


def draw_crop(recipe: CropRecipe, uniforms: Sequence[float], height: int, width: int) -> Crop:
    """Decide about one crop of an image of ``height`` x ``width`` pixels from UNIFORMS_PER_CROP uniform numbers."""
    u = uniforms
    return Crop(
        box=draw_box(recipe, u, height, width),
        flip=u[_FLIP] < recipe.flip,
        jitter=draw_jitter(recipe, u) if u[_JITTER] < recipe.jitter else (),
        grayscale=u[_GRAYSCALE] < recipe.grayscale,
        blur=_between(*recipe.blur_radius, u[_RADIUS]) if u[_BLUR] < recipe.blur else None,
        solarize=u[_SOLARIZE] < recipe.solarize,
    )


def draw_box(recipe: CropRecipe, uniforms: Sequence[float], height: int, width: int) -> Box:
    """A box of random area and log-uniform aspect; after ten that do not fit, a central one.

    parity: torchvision's RandomResizedCrop.get_params, with the numbers of every attempt given.
    """
    low, high = math.log(recipe.aspect[0]), math.log(recipe.aspect[1])
    attempts = (
        (_between(*recipe.scale, uniforms[area]), _between(low, high, uniforms[aspect]))
        for area, aspect in zip(_AREA, _ASPECT, strict=True)
    )
    return fitting_box(attempts, (uniforms[_TOP], uniforms[_LEFT]), height, width, recipe.aspect)


def fitting_box(
    attempts: Iterable[tuple[float, float]], place: Sequence[float], height: int, width: int, aspects: Sequence[float]
) -> Box:
    """The first of ``attempts`` (share of the area, logarithm of the aspect) that fits into the image, at ``place``
    (two uniform numbers); if none does, a central box with the aspect nearest to the image's."""
    for share, log_aspect in attempts:
        area, aspect = height * width * share, math.exp(log_aspect)
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return Box(int(place[0] * (height - h + 1)), int(place[1] * (width - w + 1)), h, w)
    w, h = width, height
    if width / height < aspects[0]:
        h = round(width / aspects[0])
    elif width / height > aspects[1]:
        w = round(height * aspects[1])
    return Box((height - h) // 2, (width - w) // 2, h, w)


def draw_jitter(recipe: CropRecipe, uniforms: Sequence[float]) -> tuple[tuple[str, float], ...]:
    """The four colour operations in random order with their amounts (torchvision's ColorJitter)."""
    brightness, contrast, saturation, hue = recipe.jitter_strength
    amounts = {
        "brightness": _between(max(0.0, 1 - brightness), 1 + brightness, uniforms[_BRIGHTNESS]),
        "contrast": _between(max(0.0, 1 - contrast), 1 + contrast, uniforms[_CONTRAST]),
        "saturation": _between(max(0.0, 1 - saturation), 1 + saturation, uniforms[_SATURATION]),
        "hue": _between(-hue, hue, uniforms[_HUE]),
    }
    return tuple((name, amounts[name]) for name in _ORDERS[int(uniforms[_ORDER] * len(_ORDERS))])


def _between(low: float, high: float, uniform: float) -> float:
    return low + (high - low) * uniform


def render_pil(image: Image.Image, crop: Crop, size: int, interpolation: str = "bicubic") -> torch.Tensor:
    """Carry out with Pillow what ``crop`` decided, flipped before resizing -> (3, size, size) uint8."""
    top, left, height, width = crop.box
    pixels = image.crop((left, top, left + width, top + height))
    pixels = F.hflip(pixels) if crop.flip else pixels
    pixels = F.resize(pixels, [size, size], transforms.InterpolationMode(interpolation))
    for name, amount in crop.jitter:
        pixels = PIL_COLOUR_OPERATIONS[name](pixels, amount)
    pixels = F.rgb_to_grayscale(pixels, 3) if crop.grayscale else pixels
    pixels = pixels if crop.blur is None else pixels.filter(ImageFilter.GaussianBlur(crop.blur))
    pixels = ImageOps.solarize(pixels) if crop.solarize else pixels
    return torch.from_numpy(np.array(pixels)).permute(2, 0, 1).contiguous()


PIL_COLOUR_OPERATIONS = {
    "brightness": F.adjust_brightness,
    "contrast": F.adjust_contrast,
    "saturation": F.adjust_saturation,
    "hue": F.adjust_hue,
}


# ---------------------------------------------------------------------------------------------------------------------
# Fast family: what is done
# ---------------------------------------------------------------------------------------------------------------------

_LEVELS = np.arange(256)


def render(image: np.ndarray, crop: Crop, size: int, interpolation: str = "bicubic") -> torch.Tensor:
    """Cut ``crop`` out of ``image`` (height, width, 3) and carry out what it decided -> (3, size, size) uint8."""
    pixels = resized_crop(image, crop.box, size, interpolation)
    if crop.flip:
        pixels = flip(pixels)
    for name, amount in crop.jitter:
        pixels = COLOUR_OPERATIONS[name](pixels, amount)
    if crop.grayscale:
        pixels = grayscale(pixels)
    if crop.blur is not None:
        pixels = gaussian_blur(pixels, crop.blur)
    if crop.solarize:
        pixels = solarize(pixels)
    return to_planes(pixels)


def resized_crop(image: np.ndarray, box: Box, size: int, interpolation: str = "bicubic") -> np.ndarray:
    """Cut out ``box`` and resize it with antialiasing to ``size`` x ``size`` pixels."""
    top, left, height, width = box
    # a copy with batch dimension in front is recognised as channels-last, which halves the time
    cut = torch.from_numpy(image[top : top + height, left : left + width].copy())[None].permute(0, 3, 1, 2)
    resized = torch.nn.functional.interpolate(cut, size=(size, size), mode=interpolation, antialias=True)
    return resized[0].permute(1, 2, 0).numpy()


def flip(image: np.ndarray) -> np.ndarray:
    return cv2.flip(image, 1)


def adjust_brightness(image: np.ndarray, factor: float) -> np.ndarray:
    return cv2.convertScaleAbs(image, alpha=factor, beta=_TRUNCATE)


def adjust_contrast(image: np.ndarray, factor: float) -> np.ndarray:
    mean = int(cv2.mean(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY))[0] + 0.5)
    return cv2.addWeighted(image, factor, image, 0, mean * (1 - factor) + _TRUNCATE)


def adjust_saturation(image: np.ndarray, factor: float) -> np.ndarray:
    grey = cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
    return cv2.addWeighted(image, factor, grey, 1 - factor, _TRUNCATE)


def adjust_hue(image: np.ndarray, shift: float) -> np.ndarray:
    """Turn hues by ``shift`` of a full turn, in the 255 steps of hue and saturation that Pillow's 8-bit HSV has."""
    hsv = cv2.cvtColor(image.astype(np.float32), cv2.COLOR_RGB2HSV)  # 0..360, 0..1, 0..255
    hue, saturation, value = cv2.split(hsv)
    steps = _pillow_hue_steps(hue)
    saturation = cv2.convertScaleAbs(saturation, alpha=255, beta=_TRUNCATE)
    turned = ((_LEVELS + int(shift * 255)) % 256 * (360 / 255)).astype(np.float32)
    hsv = cv2.merge((cv2.LUT(steps, turned), cv2.LUT(saturation, (_LEVELS / 255).astype(np.float32)), value))
    return cv2.convertScaleAbs(cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB))


def grayscale(image: np.ndarray) -> np.ndarray:
    """ITU-R 601 luma: (height, width, 3) -> (height, width)."""
    return cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)


def gaussian_blur(image: np.ndarray, radius: float) -> np.ndarray:
    """Pillow's GaussianBlur: three box blurs along the rows, then three along the columns, each rounded to levels."""
    box = _pillow_blur_box(radius)
    for kernel in (box[None], box[:, None]):
        for _ in range(_BLUR_PASSES):
            image = cv2.filter2D(image, -1, kernel, delta=_HALF_DOWN, borderType=cv2.BORDER_REPLICATE)
    return image


def solarize(image: np.ndarray) -> np.ndarray:
    return cv2.LUT(image, _SOLARIZED)


def to_planes(image: np.ndarray) -> torch.Tensor:
    """(height, width, 3) or (height, width) -> (3, height, width), contiguous."""
    planes = torch.empty((3, *image.shape[:2]), dtype=torch.uint8)
    if image.ndim == 2:
        planes[:] = torch.from_numpy(image)
    else:
        cv2.split(image, list(planes.numpy()))
    return planes


COLOUR_OPERATIONS = {
    "brightness": adjust_brightness,
    "contrast": adjust_contrast,
    "saturation": adjust_saturation,
    "hue": adjust_hue,
}

_SOLARIZED = np.where(_LEVELS < 128, _LEVELS, 255 - _LEVELS).astype(np.uint8)
_TRUNCATE = -0.5 + 1e-4  # OpenCV rounds to the nearest level, Pillow truncates
_HALF_DOWN = -1e-5  # OpenCV rounds halves to even levels, Pillow's blur rounds them down
_BLUR_PASSES = 3


def _pillow_hue_steps(hue: np.ndarray) -> np.ndarray:
    """Hue in degrees -> Pillow's level, (hue / 360 * 255) truncated.

    Photographs have many hues exactly on a step (ratios of small numbers); there Pillow's rounding errors decide, for
    each step always in the same way. ``_hues_on_a_step`` knows which.
    """
    above = cv2.convertScaleAbs(hue, alpha=255 / 360, beta=_TRUNCATE)
    below = cv2.convertScaleAbs(hue, alpha=255 / 360, beta=-0.5 - 1e-4)  # differs from ``above`` on a step only
    return cv2.min(above, cv2.max(below, cv2.LUT(above, _hues_on_a_step())))


@lru_cache(maxsize=1)
def _hues_on_a_step() -> np.ndarray:
    """(256,) uint8: what Pillow makes of a colour whose hue is exactly k / 255, for every k. It is asked."""
    colours = np.zeros((1, 256, 3), np.uint8)
    for step in range(256):
        strongest = round(step / 85) % 3  # channel of the largest value, here 170
        offset = 4 * step - 340 * round(step / 85)  # of the two other channels, so that the hue is step / 255
        colours[0, step, strongest] = 170
        colours[0, step, (strongest + (1 if offset > 0 else 2)) % 3] = abs(offset)
    return np.asarray(Image.fromarray(colours).convert("HSV"))[0, :, 0].copy()


def _pillow_blur_box(radius: float) -> np.ndarray:
    """One pass in one direction: a box with soft edges (Gwosdek et al., 2011), (taps,) float32."""
    variance = radius * radius / _BLUR_PASSES
    whole = math.floor((math.sqrt(12 * variance + 1) - 1) / 2)
    edge = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance) / (6 * (variance - (whole + 1) ** 2))
    box = np.ones(2 * whole + 3)
    box[0] = box[-1] = edge
    return (box / box.sum()).astype(np.float32)
