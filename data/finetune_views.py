"""What fine-tuning sees of a training image: timm's augmentation, with all of its randomness from a key."""

from collections.abc import Sequence

import torch
from PIL import Image

from data.views import seeded_generators, seeded_numpy
from randomness import counted_seed


class FinetuneViews:
    """One crop of 8 to 100 % of the area, a flip, RandAugment or colour jitter, random erasing (BEiT, DeiT).

    Pillow images -> {"images": (3, crop_size, crop_size) float32, normalised}: erased pixels are drawn after that.
    """

    augment = "pil"  # which images the loader hands over

    def __init__(
        self,
        crop_size: int,
        mean: Sequence[float],
        std: Sequence[float],
        color_jitter: float | None = 0.4,
        auto_augment: str | None = "rand-m9-mstd0.5-inc1",
        interpolation: str = "bicubic",
        erase: float = 0.25,
        erase_mode: str = "pixel",
        erase_count: int = 1,
    ):
        from timm.data import create_transform

        self.transform = create_transform(
            crop_size,
            is_training=True,
            color_jitter=color_jitter,
            auto_augment=auto_augment,
            interpolation=interpolation,
            re_prob=erase,
            re_mode=erase_mode,
            re_count=erase_count,
            mean=mean,
            std=std,
        )

    def __repr__(self) -> str:
        return f"{type(self).__name__}: {self.transform}"

    def __call__(self, image: Image.Image, key: tuple[int, ...]) -> dict[str, torch.Tensor]:
        seed = counted_seed(*key)
        with seeded_generators(seed), seeded_numpy(seed):
            return {"images": self.transform(image)}
