"""Pictures of a batch: normalised crops in their own colours, on one sheet."""

from collections.abc import Sequence

import numpy as np
import torch

from data.preprocess import to_pixels

HIDDEN = np.array([214, 39, 140])  # over what the student does not see
OPACITY = 0.75


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
