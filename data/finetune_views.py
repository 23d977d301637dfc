"""What fine-tuning sees of a training image: timm's augmentation, with all of its randomness from a key."""

import itertools
from collections.abc import Sequence

import torch
from PIL import Image, ImageOps

from data.views import seeded_generators, seeded_numpy
from randomness import counted_seed
from utils import UsageError


def posterize(image: Image.Image, bits: int, **_: object) -> Image.Image:
    """Keep so many bits of every channel. timm's strongest setting is 0, black, which newer Pillows refuse."""
    if bits < 1:
        return Image.new(image.mode, image.size)
    return image if bits >= 8 else ImageOps.posterize(image, bits)


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
        policy: str | None = "rand-m9-mstd0.5-inc1",
        interpolation: str = "bicubic",
        erase: float = 0.25,
        erase_mode: str = "pixel",
        erase_count: int = 1,
    ):
        from timm.data import auto_augment, create_transform

        try:
            self.transform = create_transform(
                crop_size,
                is_training=True,
                color_jitter=color_jitter,
                auto_augment=policy,
                interpolation=interpolation,
                re_prob=erase,
                re_mode=erase_mode,
                re_count=erase_count,
                mean=mean,
                std=std,
            )
        except (AssertionError, ValueError, KeyError, IndexError) as error:
            raise UsageError(f"--aa {policy}: timm knows no such policy; rand-m9-mstd0.5-inc1 is one") from error
        for step in self.transform.transforms:
            for op in (*getattr(step, "ops", ()), *itertools.chain(*getattr(step, "policy", ()))):
                if op.aug_fn is auto_augment.posterize:
                    op.aug_fn = posterize

    def __repr__(self) -> str:
        return f"{type(self).__name__}: {self.transform}"

    def __call__(self, image: Image.Image, key: tuple[int, ...]) -> dict[str, torch.Tensor]:
        seed = counted_seed(*key)
        with seeded_generators(seed), seeded_numpy(seed):
            return {"images": self.transform(image)}
