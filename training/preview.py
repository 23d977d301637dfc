"""Pictures of what a network is shown and what it looks at."""

from collections.abc import Sequence

import numpy as np
import torch

from data.preprocess import to_pixels
from methods.base import Clock, Method
from visualize_attention import attention_maps, attention_sheet, class_token_names

HIDDEN = np.array([214, 39, 140])  # over what the student does not see
OPACITY = 0.75


def first_batch(method: Method, batch: dict, clock: Clock) -> np.ndarray:
    """The crops of a batch, and what is hidden of them, as one picture: uint8 (height, width, 3)."""
    masks = method.masks(batch, clock)
    return crops_grid(batch["crops"], () if masks is None else masks.cpu().numpy())


def crops_grid(
    crops: list[torch.Tensor], masks: Sequence[np.ndarray] = (), images: int = 8, gap: int = 4
) -> np.ndarray:
    """Normalised crops of (batch, 3, height, width) -> uint8 (height, width, 3); a row per image, a column per crop.

    ``masks``: (batch, rows, columns) bool for each of the first crops.
    """
    columns = [to_pixels(crop[:images]) for crop in crops]
    for column, mask in zip(columns, masks, strict=False):
        cell = column.shape[1] // mask.shape[1]
        hidden = mask[:images].repeat(cell, axis=1).repeat(cell, axis=2)
        column[hidden] = (OPACITY * HIDDEN + (1 - OPACITY) * column[hidden]).astype(np.uint8)
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
    """Every image beside its class tokens' attention, a row for each; None for a network without such attention."""
    if not hasattr(backbone, "get_last_selfattention"):
        return None
    with torch.no_grad():
        tokens = [(name, attention_maps(backbone, images, n)) for n, name in enumerate(class_token_names(backbone))]
    pictures = enumerate(to_pixels(images))
    return np.concatenate([attention_sheet(p, maps[n], token=name) for n, p in pictures for name, maps in tokens])
