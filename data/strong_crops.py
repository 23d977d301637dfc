"""Crops of an image that was flipped and changed by RandAugment as a whole, and of which a box is erased (Mugs)."""

import math
import random
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torchvision import transforms

from data.augment import Box, Crop, CropRecipe, resized_crop, to_planes
from data.augmented import Flipped, Original, changed
from data.randaugment import Operation, Policy, carry_out, draw_generators
from randomness import counted_seed

AREA, ASPECT, ATTEMPTS = (0.02, 1 / 3), (0.3, 1 / 0.3), 10  # of what is erased; timm's RandomErasing
UNIFORMS_PER_ERASING = 3 + 2 * ATTEMPTS
_OPERATIONS = {"brightness": "Brightness", "contrast": "Contrast", "saturation": "Color", "hue": "Hue"}


class Erased(NamedTuple):
    """A box of a crop, and what stands there instead of its pixels: (3, height, width) float32."""

    box: Box
    values: torch.Tensor


class StrongTransform:
    """Pillow image -> crop, (3, size, size) uint8, and what is erased of it.

    parity: draws from the generators of torch, NumPy and ``random`` in the original's order, and calls what it calls.
    """

    def __init__(self, recipe: CropRecipe, policy: Policy, erase: float):
        """``recipe``: its jitter and greyscale, if it has any, come after RandAugment. ``erase``: a probability."""
        self.policy, self.erase, self.size = policy, erase, recipe.size
        self.flip = transforms.RandomHorizontalFlip(recipe.flip)
        jitter = transforms.RandomApply([transforms.ColorJitter(*recipe.jitter_strength)], recipe.jitter)
        self.colours = [jitter, transforms.RandomGrayscale(recipe.grayscale)] if recipe.jitter else []
        self.crop = transforms.RandomResizedCrop(
            recipe.size, recipe.scale, recipe.aspect, transforms.InterpolationMode(recipe.interpolation)
        )

    def __call__(self, image: Image.Image) -> tuple[torch.Tensor, Erased | None]:
        image = self.flip(image)
        for operation in draw_generators(self.policy):
            image = carry_out(image, operation)
        for colour in self.colours:
            image = colour(image)
        pixels = torch.from_numpy(np.array(self.crop(image))).permute(2, 0, 1).contiguous()
        return pixels, self._erased()

    def _erased(self) -> Erased | None:
        if random.random() > self.erase:
            return None
        for _ in range(ATTEMPTS):
            share, log_aspect = random.uniform(*AREA), random.uniform(*map(math.log, ASPECT))
            if (sides := erased_sides(share, log_aspect, self.size)) is not None:
                top, left = (random.randint(0, self.size - side) for side in sides)
                return Erased(Box(top, left, *sides), torch.empty((3, *sides)).normal_())
        return None


def render_strong(
    original: Original, crop: Crop, operations: Sequence[Operation], size: int, interpolation: str = "bicubic"
) -> torch.Tensor:
    """``crop`` of the image after its flip, ``operations`` and colours -> (3, size, size) uint8."""
    operations = [*operations, *(Operation(_OPERATIONS[name], amount) for name, amount in crop.jitter)]
    operations += [Operation("Grayscale")] * crop.grayscale
    image = changed(Flipped(original) if crop.flip else original, operations)
    whole = Box(0, 0, crop.box.height, crop.box.width)
    return to_planes(resized_crop(image.pixels(crop.box), whole, size, interpolation))


def draw_erased(erase: float, uniforms: Sequence[float], size: int, key: tuple[int, ...]) -> Erased | None:
    """The same distribution from UNIFORMS_PER_ERASING uniform numbers; ``key`` is that of the noise."""
    chance, top, left, *attempts = uniforms
    if chance >= erase:
        return None
    low, high = map(math.log, ASPECT)
    for share, log_aspect in zip(attempts[:ATTEMPTS], attempts[ATTEMPTS:], strict=True):
        sides = erased_sides(AREA[0] + (AREA[1] - AREA[0]) * share, low + (high - low) * log_aspect, size)
        if sides is not None:
            place = (int(u * (size - side + 1)) for u, side in zip((top, left), sides, strict=True))
            noise = torch.empty((3, *sides)).normal_(generator=torch.Generator().manual_seed(counted_seed(*key)))
            return Erased(Box(*place, *sides), noise)
    return None


def erased_sides(share: float, log_aspect: float, size: int) -> tuple[int, int] | None:
    """Height and width of a share of a crop's area; None where they do not fit into it, with something left."""
    area, aspect = share * size * size, math.exp(log_aspect)
    height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
    return (height, width) if height < size and width < size else None
