"""The one crop of UNIC (2408.05088), which the student and all its teachers see.

The original works on tensors with torchvision's second family of transforms, which round otherwise than Pillow does,
and blurs and solarises after the conversion to floating point. Both families here carry out the same decisions:

- ``render_floats``: the original's operations, bit for bit;
- ``render_levels``: the same on uint8, rounded once before the blur, as the original is, and once after it.

Differences of the fast operations in levels of 255, as tests/data/test_unic_views.py holds them: crop, flip and
solarise none; brightness, contrast and hue 1 in at most 5 % of the values, saturation in 20 % (at round factors; on
the average in 8 %), greyscale in 1 %, blur in 0.1 %.
"""

from collections.abc import Callable

import cv2
import numpy as np
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from data.augment import (
    Crop,
    CropRecipe,
    adjust_brightness,
    crop_uniforms,
    draw_crop,
    flip,
    resized_crop,
    solarize,
    to_planes,
)
from data.preprocess import MEAN, STD

BLUR_KERNEL = 9  # pixels, whatever the standard deviation


class UNICViews:
    """One crop (UNIC, the training transform):

    | size       | area   | aspect  | flip | jitter 0.4 0.4 0.2 0.1 | greyscale | blur 0.1-5.0, 9 pixels | solarise |
    |------------|--------|---------|------|------------------------|-----------|------------------------|----------|
    | image_size | 0.08-1 | 3/4-4/3 | 0.5  | 0.8                    | 0.2       | 0.2                    | 0.2      |

    ``augment``: "fast" wants arrays (height, width, 3) uint8, "pil" Pillow images, from which it makes the original's
    floating point crops. Both make the same decisions for a key and carry them out in their own way.
    """

    def __init__(self, image_size: int = 224, augment: str = "fast"):
        if augment not in ("fast", "pil"):
            raise ValueError(f"augment {augment!r}: has to be fast or pil")
        self.recipe = CropRecipe(image_size, (0.08, 1.0), blur=0.2, blur_radius=(0.1, 5.0), solarize=0.2)
        self.augment = augment

    def __repr__(self) -> str:
        return f"UNICViews ({self.augment})\n  {self.recipe}, blur with {BLUR_KERNEL} pixels"

    def __call__(self, image: np.ndarray | Image.Image, key: tuple[int, ...]) -> dict[str, list[torch.Tensor]]:
        """{"crops": [crop]}: (3, image_size, image_size), uint8 if "fast", else normalised float32."""
        width, height = image.size if self.augment == "pil" else image.shape[1::-1]
        crop = draw_crop(self.recipe, crop_uniforms(key, 1)[0], height, width)
        carry_out = render_floats if self.augment == "pil" else render_levels
        return {"crops": [carry_out(image, crop, self.recipe.size)]}


# ---------------------------------------------------------------------------------------------------------------------
# The original's operations
# ---------------------------------------------------------------------------------------------------------------------


def render_floats(image: Image.Image, crop: Crop, size: int) -> torch.Tensor:
    """Cut ``crop`` out of ``image`` and carry out what it decided -> (3, size, size) float32, normalised."""
    return smoothed(coloured(F.pil_to_tensor(image), crop, size), crop).contiguous()


def coloured(image: torch.Tensor, crop: Crop, size: int) -> torch.Tensor:
    """The first half, on (3, height, width) uint8: crop, flip, jitter, greyscale -> (3, size, size) uint8."""
    pixels = F.resized_crop(image, *crop.box, [size, size], InterpolationMode.BICUBIC, antialias=True)
    pixels = F.horizontal_flip(pixels) if crop.flip else pixels
    for name, amount in crop.jitter:
        pixels = TENSOR_COLOUR_OPERATIONS[name](pixels, amount)
    return F.rgb_to_grayscale(pixels, 3) if crop.grayscale else pixels


def smoothed(pixels: torch.Tensor, crop: Crop) -> torch.Tensor:
    """The second half: uint8 -> float32, blur, solarise, normalise."""
    values = F.to_dtype(pixels, torch.float32, scale=True)
    values = values if crop.blur is None else F.gaussian_blur(values, [BLUR_KERNEL] * 2, [crop.blur] * 2)
    values = F.solarize(values, 0.5) if crop.solarize else values
    return F.normalize(values, list(MEAN), list(STD))


TENSOR_COLOUR_OPERATIONS: dict[str, Callable] = {
    "brightness": F.adjust_brightness,
    "contrast": F.adjust_contrast,
    "saturation": F.adjust_saturation,
    "hue": F.adjust_hue,
}


# ---------------------------------------------------------------------------------------------------------------------
# The same on levels
# ---------------------------------------------------------------------------------------------------------------------


def render_levels(image: np.ndarray, crop: Crop, size: int) -> torch.Tensor:
    """Cut ``crop`` out of ``image`` (height, width, 3) and carry out what it decided -> (3, size, size) uint8."""
    pixels = resized_crop(image, crop.box, size)
    pixels = flip(pixels) if crop.flip else pixels
    for name, amount in crop.jitter:
        pixels = COLOUR_OPERATIONS[name](pixels, amount)
    pixels = grayscale(pixels) if crop.grayscale else pixels
    pixels = pixels if crop.blur is None else gaussian_blur(pixels, crop.blur)
    return to_planes(solarize(pixels) if crop.solarize else pixels)


def grayscale(image: np.ndarray) -> np.ndarray:
    """Luma, truncated where Pillow rounds: (height, width, 3) -> (height, width). parity: the weights sum to 0.9999."""
    return cv2.transform(image, np.array([[*_LUMA, _TRUNCATE]]))


def adjust_contrast(image: np.ndarray, factor: float) -> np.ndarray:
    mean = np.dot(_LUMA, cv2.mean(image)[:3]) - _TRUNCATED
    return cv2.addWeighted(image, factor, image, 0, mean * (1 - factor) + _TRUNCATE)


def adjust_saturation(image: np.ndarray, factor: float) -> np.ndarray:
    mix = np.eye(3, 4) * factor
    mix[:, :3] += (1 - factor) * _LUMA
    mix[:, 3] = _TRUNCATE - (1 - factor) * _TRUNCATED
    return cv2.transform(image, mix)


def adjust_hue(image: np.ndarray, shift: float) -> np.ndarray:
    """Turn hues by ``shift`` of a full turn, in floating point; Pillow has 255 steps of hue and saturation."""
    hsv = cv2.cvtColor(image.astype(np.float32), cv2.COLOR_RGB2HSV)  # 0..360, 0..1, 0..255
    hsv = cv2.add(hsv, (shift % 1 * 360, 0, 0, 0))  # OpenCV turns back what is beyond 360, not what is below 0
    return cv2.convertScaleAbs(cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB), alpha=255.999 / 255, beta=_TRUNCATE)


def gaussian_blur(image: np.ndarray, sigma: float) -> np.ndarray:
    """Summed up in floating point and rounded once; borders are mirrored."""
    kernel = cv2.getGaussianKernel(BLUR_KERNEL, sigma, cv2.CV_32F)
    kernel[kernel < 1e-9] = 0  # subnormal weights would take 20 times as long
    blurred = cv2.sepFilter2D(image, cv2.CV_32F, kernel, kernel, borderType=cv2.BORDER_REFLECT_101)
    return cv2.convertScaleAbs(blurred)


COLOUR_OPERATIONS: dict[str, Callable] = {
    "brightness": adjust_brightness,
    "contrast": adjust_contrast,
    "saturation": adjust_saturation,
    "hue": adjust_hue,
}

_TRUNCATE = -0.5 + 1e-4  # OpenCV rounds to the nearest level, torchvision truncates
_TRUNCATED = 0.5  # what torchvision's luma of contrast and saturation has lost, on the average of all levels
_LUMA = np.array([0.2989, 0.587, 0.114])
