"""What a network has to beat: features that nothing was learnt for."""

import torch
import torch.nn.functional as F

from data.preprocess import MEAN, STD

RAW_SIDE = 32  # pixels
BINS = 4  # per colour channel


def raw_pixels(images: torch.Tensor) -> torch.Tensor:
    """Normalised crops (batch, 3, size, size), averaged over areas down to at most 32 x 32: (batch, 3072)."""
    return F.adaptive_avg_pool2d(images, min(RAW_SIDE, images.shape[-1])).flatten(1)


def colour_histogram(images: torch.Tensor) -> torch.Tensor:
    """Share of a crop's pixels in each of 4 x 4 x 4 cells of the RGB cube: (batch, 64)."""
    mean, std = (torch.tensor(values, device=images.device).view(3, 1, 1) for values in (MEAN, STD))
    cells = ((images * std + mean) * BINS).long().clamp(0, BINS - 1).flatten(2)  # (batch, 3, pixels)
    cells = (cells[:, 0] * BINS + cells[:, 1]) * BINS + cells[:, 2]
    counts = torch.zeros(len(images), BINS**3, device=images.device)
    return counts.scatter_add_(1, cells, torch.ones_like(cells, dtype=counts.dtype)) / cells.shape[1]
