"""A picture of matched regions: a student's crop beside the teacher's view, and lines from its regions to theirs."""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw

from data.pictures import sheet
from data.preprocess import to_pixels
from data.sampling_picture import SIDE, hue_of, marked

GAP = 12
LINES = 10  # of the most similar pairs


def matches_picture(
    crops: Sequence[torch.Tensor], student: Sequence[torch.Tensor], teacher: Sequence[torch.Tensor]
) -> np.ndarray:
    """Crops (1, 3, side, side) of one image with the unit tokens (n, dim) of both networks, uint8 (height, width, 3).

    A row for the second global crop and for a local one of every size: on the left the student's crop, on the right the
    first global crop, which the teacher sees. A mark on the right is a region that is matched; of its colour are the
    regions on the left that match it, and lines join the most similar pairs.
    """
    view = to_pixels(crops[0])[0]
    seen, rows = set(), []
    for crop, tokens in list(zip(crops, student, strict=True))[1:]:
        if crop.shape[-1] not in seen:
            rows.append([row_of(to_pixels(crop)[0], view, tokens, teacher[0])])
            seen.add(crop.shape[-1])
    return sheet(rows, GAP)


def row_of(crop: np.ndarray, view: np.ndarray, tokens: torch.Tensor, theirs: torch.Tensor) -> np.ndarray:
    similarities, matches = (tokens @ theirs.t()).max(dim=1)
    matches = matches.tolist()
    grids = [round(len(part) ** 0.5) for part in (tokens, theirs)]
    places = [centres(np.arange(len(tokens)), grids[0]), centres(np.array(matches), grids[1])]
    pictures = [marked(crop, places[0], map(hue_of, matches)), marked(view, places[1], map(hue_of, matches))]
    joined = sheet([pictures], GAP)
    best = similarities.argsort(descending=True, stable=True)[:LINES].tolist()
    shapes, ends = [picture.shape[:2] for picture in pictures], [part[best] for part in places]
    return with_lines(joined, shapes, ends, matches, best)


def centres(tokens: np.ndarray, grid: int) -> np.ndarray:
    """Rows and columns (tokens, 2) of the middle of every token's cell, from 0 to 1."""
    return (np.stack(np.divmod(tokens, grid), axis=-1) + 0.5) / grid


def with_lines(joined, shapes, ends, matches, best) -> np.ndarray:
    """Lines from places (rows and columns from 0 to 1) in the left picture of a sheet to those in its right one."""
    picture = Image.fromarray(joined)
    draw = ImageDraw.Draw(picture)
    left = GAP
    points = []
    for (height, width), shares in zip(shapes, ends, strict=True):
        top = (joined.shape[0] - height) // 2
        points.append(shares[:, ::-1] * (width, height) + (left, top))
        left += width + GAP
    for start, end, index in zip(*points, best, strict=True):
        draw.line([tuple(start), tuple(end)], fill=hue_of(matches[index]), width=max(1, SIDE // 200))
    return np.array(picture)
