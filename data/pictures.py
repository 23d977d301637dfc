"""Pictures for people: normalised crops in their own colours, on one sheet; and the files they are written to."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from data.preprocess import to_pixels
from utils import UsageError

MARK = b"tEXtSoftware\0Tutelage"  # near the beginning of every picture that was written here
HIDDEN = np.array([214, 39, 140])  # over what the student does not see, and around what is marked
OPACITY = 0.75
FRAME = 4  # pixels


def crops_grid(
    crops: list[torch.Tensor],
    masks: Sequence[np.ndarray] = (),
    images: int = 8,
    gap: int = 4,
    framed: torch.Tensor | None = None,
) -> np.ndarray:
    """Normalised crops of (batch, 3, height, width) -> uint8 (height, width, 3); a row per image, a column per crop.

    ``masks``: (batch, rows, columns) bool for each of the first crops. ``framed``: which get a frame, (batch, crops).
    """
    columns = [to_pixels(crop[:images]) for crop in crops]
    for column, mask in zip(columns, masks, strict=False):
        cell = column.shape[1] // mask.shape[1]
        hidden = mask[:images].repeat(cell, axis=1).repeat(cell, axis=2)
        column[hidden] = (OPACITY * HIDDEN + (1 - OPACITY) * column[hidden]).astype(np.uint8)
    for column, chosen in zip(columns, framed[:images].T.cpu().numpy() if framed is not None else (), strict=False):
        inside = np.zeros(column.shape[1:3], bool)
        inside[FRAME:-FRAME, FRAME:-FRAME] = True
        column[chosen[:, None, None] & ~inside] = HIDDEN
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


def save_picture(picture: np.ndarray, path: Path) -> None:
    """Write a PNG with MARK. Raises UsageError."""
    mark = PngInfo()
    mark.add_text("Software", "Tutelage")
    try:
        Image.fromarray(picture).save(path, pnginfo=mark)
    except OSError as error:
        raise UsageError(f"--output_dir {path.parent}: {path.name} cannot be written: {error}") from error


def was_written_here(path: Path) -> bool:
    """Whether ``save_picture`` made this file."""
    try:
        with open(path, "rb") as file:
            return MARK in file.read(256)
    except OSError:
        return False
