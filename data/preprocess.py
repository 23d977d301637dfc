"""What an image goes through before a frozen network looks at it."""

from collections.abc import Callable

import torch
from PIL import Image
from torchvision import transforms

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's pixels in [0, 1], per colour channel


def eval_transform(crop_size: int = 224, resize_size: int = 256) -> Callable[[Image.Image], torch.Tensor]:
    """The shorter side to ``resize_size`` (bicubic, Pillow's antialiasing), centre crop, normalisation.

    PIL RGB image -> float32 (3, crop_size, crop_size). Bit for bit what DINO eval_knn.py does.
    """
    return transforms.Compose(
        [
            transforms.Resize(resize_size, interpolation=transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(crop_size),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
        ]
    )
