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
    return sheet(list(zip(*columns, strict=True)), gap)


def sheet(rows: Sequence[Sequence[np.ndarray]], gap: int) -> np.ndarray:
    """Pictures beside and below each other, on white; one lower than its row stands in the middle of it."""
    heights = [max(picture.shape[0] for picture in row) for row in rows]
    width = max(sum(picture.shape[1] + gap for picture in row) for row in rows) + gap
    canvas, top = np.full((sum(heights) + gap * (len(rows) + 1), width, 3), 255, np.uint8), gap
    for row, height in zip(rows, heights, strict=True):
        left = gap
        for picture in row:
            first = top + (height - picture.shape[0]) // 2
            canvas[first : first + picture.shape[0], left : left + picture.shape[1]] = picture
            left += picture.shape[1] + gap
        top += height + gap
    return canvas


def attention_pictures(backbone: torch.nn.Module, images: torch.Tensor) -> np.ndarray | None:
    """Every image beside its class tokens' attention, a row for each; None for a network without such attention."""
    if not hasattr(backbone, "get_last_selfattention"):
        return None
    with torch.no_grad():
        tokens = [(name, attention_maps(backbone, images, n)) for n, name in enumerate(class_token_names(backbone))]
    pictures = enumerate(to_pixels(images))
    return np.concatenate([attention_sheet(p, maps[n], token=name) for n, p in pictures for name, maps in tokens])
