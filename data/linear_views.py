"""What Mugs's linear probe sees of a training image: the strong chain of its crops, erased after it was normalised."""

import torch
from PIL import Image

from data.augment import CropRecipe
from data.preprocess import MEAN, STD
from data.randaugment import parse_policy
from data.strong_crops import StrongTransform
from data.views import seeded_generators, seeded_numpy
from randomness import counted_seed

POLICY, ERASE = "rand-m9-mstd0.5-inc1", 0.25


class StrongLinearViews:
    """Flip, RandAugment, a crop of 8 to 100 % of the area, a box of noise in a quarter of them (Mugs 2203.14415).

    Pillow images -> {"crops": [(3, crop_size, crop_size) float32, normalised]}, by the original's own steps.
    """

    augment = "pil"  # which images the loader hands over

    def __init__(self, crop_size: int = 224):
        recipe = CropRecipe(crop_size, (0.08, 1.0), jitter=0.0, grayscale=0.0)
        self.transform = StrongTransform(recipe, parse_policy(POLICY), ERASE)
        self.mean, self.std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))

    def __call__(self, image: Image.Image, key: tuple[int, ...]) -> dict[str, list[torch.Tensor]]:
        seed = counted_seed(*key)
        with seeded_generators(seed), seeded_numpy(seed):
            pixels, erased = self.transform(image)
        crop = (pixels / 255 - self.mean) / self.std
        if erased is not None:
            top, left, height, width = erased.box
            crop[:, top : top + height, left : left + width] = erased.values
        return {"crops": [crop]}
