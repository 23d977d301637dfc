"""What an image goes through before a frozen network looks at it, and back."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from PIL import Image
from torchvision import transforms

from data.decode import check_resized

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's pixels in [0, 1], per colour channel


def to_pixels(images: torch.Tensor) -> np.ndarray:
    """Normalised images (..., 3, height, width) in their own colours: uint8 (..., height, width, 3)."""
    mean, std = (torch.tensor(values, device=images.device).view(3, 1, 1) for values in (MEAN, STD))
    pixels = (images.float() * std + mean).clamp(0, 1).mul(255).round().to(torch.uint8)
    return pixels.movedim(-3, -1).cpu().numpy()


class _Checked:
    """The same image, unless it would be too large with this shorter side: then BadImage is raised, without a name."""

    def __init__(self, shorter: int):
        self.shorter = shorter

    def __call__(self, image: Image.Image) -> Image.Image:
        check_resized(image.size, self.shorter)
        return image


def eval_transform(
    crop_size: int = 224,
    resize_size: int = 256,
    interpolation: str = "bicubic",
    mean: Sequence[float] = MEAN,
    std: Sequence[float] = STD,
) -> Callable[[Image.Image], torch.Tensor]:
    """The shorter side to ``resize_size`` (Pillow's antialiasing), centre crop, normalisation.

    PIL RGB image -> float32 (3, crop_size, crop_size). Bit for bit what DINO eval_knn.py does.
    """
    return transforms.Compose(
        [
            _Checked(resize_size),
            transforms.Resize(resize_size, interpolation=transforms.InterpolationMode(interpolation)),
            transforms.CenterCrop(crop_size),
            transforms.ToTensor(),
            transforms.Normalize(mean, std),
        ]
    )
