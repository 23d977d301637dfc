"""Pictures of what a network is shown and what it looks at."""

import numpy as np
import torch

from data.preprocess import to_pixels
from visualize_attention import attention_maps, attention_sheet


def crops_grid(crops: list[torch.Tensor], images: int = 8, gap: int = 4) -> np.ndarray:
    """Normalised crops of (batch, 3, height, width) -> uint8 (height, width, 3); a row per image, a column per crop."""
    columns = [to_pixels(crop[:images]) for crop in crops]
    rows, cell = columns[0].shape[0], max(column.shape[1] for column in columns)
    sheet = np.full((rows * (cell + gap) + gap, sum(c.shape[2] + gap for c in columns) + gap, 3), 255, np.uint8)
    left = gap
    for column in columns:
        _, height, width, _ = column.shape
        for row, picture in enumerate(column):
            top = gap + row * (cell + gap) + (cell - height) // 2
            sheet[top : top + height, left : left + width] = picture
        left += width + gap
    return sheet


def attention_pictures(backbone: torch.nn.Module, images: torch.Tensor) -> np.ndarray | None:
    """Every image beside its class token's attention, one row each; None for a network without such attention."""
    if not hasattr(backbone, "get_last_selfattention"):
        return None
    with torch.no_grad():
        maps = attention_maps(backbone, images)
    sheets = [attention_sheet(picture, m) for picture, m in zip(to_pixels(images), maps, strict=True)]
    return np.concatenate(sheets)
