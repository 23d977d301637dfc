"""What a method's network sees of an image: one class per recipe, a table on top with the source of each number.

A recipe is called with a decoded image and a key, and returns a dict of tensors that the loader stacks over the batch
(or, where the recipe has a ``collate``, whatever that makes of the samples).
All its randomness comes from the key (seed, epoch, index): which worker calls it, when, and after what changes nothing.
"""

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from PIL import Image

from data.augment import CropRecipe, crop_uniforms, draw_crop, pil_transform, render
from randomness import counted_seed


class CropViews:
    """A crop of every recipe in ``recipes``.

    ``augment``: "fast" wants arrays (height, width, 3) uint8, "pil" Pillow images, which it treats as the original
    does, bit for bit. Both draw from the same distribution.
    """

    def __init__(self, recipes: list[CropRecipe], augment: str = "fast"):
        if augment not in ("fast", "pil"):
            raise ValueError(f"augment {augment!r}: has to be fast or pil")
        self.recipes, self.augment = recipes, augment
        self.transforms = [pil_transform(recipe) for recipe in recipes] if augment == "pil" else []

    def __repr__(self) -> str:
        return "\n".join([f"{type(self).__name__} ({self.augment})", *(f"  {recipe}" for recipe in self.recipes)])

    def __call__(self, image: np.ndarray | Image.Image, key: tuple[int, ...]) -> dict[str, list[torch.Tensor]]:
        """{"crops": list of (3, size, size) uint8}, in the order of the recipes."""
        if self.augment == "fast":
            return {"crops": self.fast_crops(image, key)}
        with seeded_generators(counted_seed(*key)):
            return {"crops": self.pil_crops(image)}

    def fast_crops(self, image: np.ndarray, key: tuple[int, ...]) -> list[torch.Tensor]:
        height, width = image.shape[:2]
        uniforms = crop_uniforms(key, len(self.recipes))
        crops = [draw_crop(recipe, u, height, width) for recipe, u in zip(self.recipes, uniforms, strict=True)]
        pairs = zip(self.recipes, crops, strict=True)
        return [render(image, crop, recipe.size, recipe.interpolation) for recipe, crop in pairs]

    def pil_crops(self, image: Image.Image) -> list[torch.Tensor]:
        """Crops from the present state of torch's and ``random``'s generators, which they advance."""
        crops = [np.array(transform(image)) for transform in self.transforms]
        return [torch.from_numpy(crop).permute(2, 0, 1).contiguous() for crop in crops]


class MultiCropViews(CropViews):
    """Two or more global crops, then ``local_crops``: how many of which size (DINO, main_dino.py,
    DataAugmentationDINO; EsViT for several sizes):

    | crop         | size | area                | flip | jitter 0.4 0.4 0.2 0.1 | greyscale | blur 0.1-2.0 | solarise |
    |--------------|------|---------------------|------|------------------------|-----------|--------------|----------|
    | global 1     | 224  | global_crops_scale  | 0.5  | 0.8                    | 0.2       | 1.0          | -        |
    | global 2 ... | 224  | global_crops_scale  | 0.5  | 0.8                    | 0.2       | 0.1          | 0.2      |
    | local        | 96   | local_crops_scale   | 0.5  | 0.8                    | 0.2       | 0.5          | -        |
    """

    def __init__(
        self,
        global_crops_scale: tuple[float, float] = (0.4, 1.0),
        local_crops_scale: tuple[float, float] = (0.05, 0.4),
        local_crops: Sequence[tuple[int, int]] = ((8, 96),),
        global_crops_size: int = 224,
        augment: str = "fast",
        global_crops_number: int = 2,
    ):
        first = CropRecipe(global_crops_size, tuple(global_crops_scale), blur=1.0)
        second = CropRecipe(global_crops_size, tuple(global_crops_scale), blur=0.1, solarize=0.2)
        local = [
            CropRecipe(size, tuple(local_crops_scale), blur=0.5) for number, size in local_crops for _ in range(number)
        ]
        super().__init__([first] + [second] * (global_crops_number - 1) + local, augment)


class LinearViews(CropViews):
    """One crop of 8 to 100 % of the area, resized with bilinear interpolation, and a flip (DINO eval_linear.py)."""

    def __init__(self, crop_size: int = 224, augment: str = "fast"):
        recipe = CropRecipe(crop_size, (0.08, 1.0), jitter=0.0, grayscale=0.0, interpolation="bilinear")
        super().__init__([recipe], augment)


@contextmanager
def seeded_generators(seed: int) -> Iterator[None]:
    """Torch's CPU generator and ``random`` start from ``seed`` inside, and go on as if nothing had been after it."""
    torch_state, random_state = torch.default_generator.get_state(), random.getstate()
    torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed the GPUs as well
    random.seed(seed)
    try:
        yield
    finally:
        torch.default_generator.set_state(torch_state)
        random.setstate(random_state)


@contextmanager
def seeded_numpy(seed: int) -> Iterator[None]:
    """The same for NumPy's global generator, from which timm's augmentation and mixing draw."""
    state = np.random.get_state()
    np.random.seed(seed % 2**32)
    try:
        yield
    finally:
        np.random.set_state(state)
