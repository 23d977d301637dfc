"""What DeiT would train on, for every crop: EsViT's other recipe (--aug-opt deit_aug)."""

from collections.abc import Sequence

import torch
from PIL import Image

from data.finetune_views import FinetuneViews
from data.preprocess import MEAN, STD
from data.views import seeded_generators, seeded_numpy
from randomness import counted_seed


class DeiTCropViews:
    """Two global crops, then ``local_crops`` (number, size), each through timm's training transform of its size.

    Pillow images -> {"crops": list of (3, size, size) float32, normalised}: erased pixels are drawn after that.
    ``augmentation``: further arguments of ``FinetuneViews``.
    """

    augment = "pil"  # which images the loader hands over

    def __init__(self, global_crops_size: int, local_crops: Sequence[tuple[int, int]], **augmentation: object):
        kinds = [(2, global_crops_size), *local_crops]
        transforms = {size: FinetuneViews(size, MEAN, STD, **augmentation).transform for _, size in kinds}
        self.transforms = [transforms[size] for number, size in kinds for _ in range(number)]

    def __repr__(self) -> str:
        return "\n".join([type(self).__name__, *(f"  {transform}" for transform in self.transforms)])

    def __call__(self, image: Image.Image, key: tuple[int, ...]) -> dict[str, list[torch.Tensor]]:
        seed = counted_seed(*key)
        with seeded_generators(seed), seeded_numpy(seed):
            return {"crops": [transform(image) for transform in self.transforms]}
