"""Labels of a video's first frame carried from frame to frame by what its features resemble.

Every token of a frame takes the labels of the tokens that are most like it in the first frame and in the last few, near
its own place; nothing is trained (Space-time correspondence, 2006.14613; DINO, 2104.14294, section 4.2.2).
"""

from collections import deque
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

TEMPERATURE = 0.1  # of the affinity exp(cosine / temperature)
BAND = 4  # columns of tokens whose labels are computed at a time
MULTIPLE = 64  # pixels of which the longer side of a frame is a multiple
MEAN, STD = (0.485, 0.456, 0.406), (0.228, 0.224, 0.225)  # parity: 0.228, where every other script has 0.229


class Settings(NamedTuple):
    """As the originals' options of the same names say it."""

    n_last_frames: int = 7  # frames that labels are taken from, besides the first
    size_mask_neighborhood: int = 12  # tokens farther than this in rows or columns are not looked at; 0: all are
    topk: int = 5  # tokens that labels are taken from


# ---------------------------------------------------------------------------------------------------------------------
# Frames and masks
# ---------------------------------------------------------------------------------------------------------------------


def frame_size(height: int, width: int, short_side: int, multiple: int = MULTIPLE) -> tuple[int, int]:
    """(height, width) of a frame as the network sees it: a short side, and the other one floored to a multiple."""
    longer = int(short_side * max(height, width) / min(height, width)) // multiple * multiple
    return (longer, short_side) if height > width else (short_side, longer)


def frame_tensor(pixels: np.ndarray, size: tuple[int, int]) -> torch.Tensor:
    """uint8 (height, width, 3) RGB -> normalised float32 (3, *size), resized by OpenCV without antialiasing."""
    resized = cv2.resize(pixels, size[::-1], interpolation=cv2.INTER_LINEAR)
    scaled = resized.astype(np.float32).transpose(2, 0, 1) / 255
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    return (torch.from_numpy(scaled) - mean) / std


def resized_indices(mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A mask (height, width) of indices, uint8, at another size (height, width): every index is that of a pixel."""
    return np.asarray(Image.fromarray(mask).resize(size[::-1], Image.Resampling.NEAREST))


def one_hot_labels(mask: np.ndarray, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Indices (rows, columns) -> (classes, rows, columns); the highest index that is left decides how many classes."""
    return F.one_hot(torch.from_numpy(mask.astype(np.int64))).movedim(-1, 0).to(dtype)


def stretch(soft: torch.Tensor) -> torch.Tensor:
    """Every class of (classes, height, width) from its least to its most, unless it has nothing.

    parity: a class that is the same everywhere becomes NaN, and wins: it is the only one there.
    """
    flat = soft.flatten(1)
    shifted = flat - flat.amin(dim=1, keepdim=True)
    stretched = shifted / shifted.amax(dim=1, keepdim=True)
    return torch.where(flat.amax(dim=1, keepdim=True) > 0, stretched, flat).view_as(soft)


def hard_mask(soft: torch.Tensor, patch_size: int, size: tuple[int, int] | None = None) -> np.ndarray:
    """Soft labels (classes, rows, columns) -> indices uint8, (rows, columns) * patch_size pixels or ``size``."""
    pixels = F.interpolate(soft[None], scale_factor=patch_size, mode="bilinear", recompute_scale_factor=False)[0]
    mask = stretch(pixels).argmax(dim=0).to(torch.uint8).cpu().numpy()
    return mask if size is None else resized_indices(mask, size)


# ---------------------------------------------------------------------------------------------------------------------
# Propagation
# ---------------------------------------------------------------------------------------------------------------------


def neighbourhood(
    rows: int, targets: range, sources: range, radius: int, device: torch.device | str = "cpu"
) -> torch.Tensor:
    """Which tokens of ``sources`` those of ``targets`` may look at, both ranges of columns: at most ``radius`` away.

    bool (targets, rows, sources, rows); a radius of 0 is no limit.
    """
    if radius == 0:
        return torch.ones(len(targets), rows, len(sources), rows, dtype=torch.bool, device=device)
    row, target, source = (torch.arange(r.start, r.stop, device=device) for r in (range(rows), targets, sources))
    near_rows = (row[:, None] - row).abs() <= radius
    near_columns = (target[:, None] - source).abs() <= radius
    return near_columns[:, None, :, None] & near_rows[None, :, None, :]


def propagate(features: Iterable[torch.Tensor], first: torch.Tensor, settings: Settings) -> Iterator[torch.Tensor]:
    """Soft labels (classes, rows, columns) of every frame after the first.

    ``features``: of every frame, tokens row by row (rows * columns, dim), taken one after the other; ``first``: labels
    of the first frame (classes, rows, columns). Labels travel as they were computed, without being made hard.
    """
    _, rows, columns = first.shape
    recent: deque = deque(maxlen=settings.n_last_frames)
    start = None
    for tokens in features:
        # columns come first, so that a band of them, and what its tokens may look at, are pieces of memory
        unit = F.normalize(tokens, dim=1).view(rows, columns, -1).transpose(0, 1)
        if start is None:
            start = unit, first.to(unit).permute(2, 1, 0)
            continue
        labels = _labels(unit, [start, *recent], settings)
        recent.append((unit, labels))
        yield labels.permute(2, 1, 0)


def _labels(unit: torch.Tensor, context: list[tuple[torch.Tensor, torch.Tensor]], settings: Settings) -> torch.Tensor:
    """Labels (columns, rows, classes) of tokens (columns, rows, dim) from those of frames that have some."""
    columns, rows, _ = unit.shape
    known, labels = (torch.stack(part, dim=1) for part in zip(*context, strict=True))  # (columns, frames, rows, ...)
    reach, found = settings.size_mask_neighborhood or columns, []
    for begin in range(0, columns, BAND):
        targets = range(begin, min(begin + BAND, columns))
        sources = range(max(0, begin - reach), min(targets.stop + reach, columns))
        near = neighbourhood(rows, targets, sources, settings.size_mask_neighborhood, unit.device).to(unit)
        looked_at = known[sources.start : sources.stop].flatten(0, 2)
        sharpened = unit[begin : targets.stop].flatten(0, 1) / TEMPERATURE
        affinity = (sharpened @ looked_at.T).exp_()  # (targets, sources)
        affinity.view(*near.shape[:3], len(context), rows).mul_(near[..., None, :])
        least = affinity.topk(min(settings.topk, affinity.shape[1]), dim=1).values[:, -1:]
        kept = affinity.masked_fill_(affinity < least, 0)  # those that equal the last one stay, too
        mixed = kept @ labels[sources.start : sources.stop].flatten(0, 2) / kept.sum(dim=1, keepdim=True)
        found.append(mixed.view(len(targets), rows, -1))
    return torch.cat(found)
