"""What the memory of a Mugs run finds for an image: the stored rows nearest to it, and the images they are of."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageOps

from evaluation.drawing import INK, PALE, font, shortened
from models.layouts.table import recorded_arguments
from models.safe_load import load_file
from models.vit import VisionTransformer
from utils import UsageError


class Rows(NamedTuple):
    """The rows of a memory that hold an image.

    ``keys`` (rows, dim) of unit length; ``images`` (rows,) int64, their numbers among the run's images; ``size``: rows
    of the memory, written or not; ``data``: the fingerprint of the run's images; ``arguments``: its options.
    """

    keys: torch.Tensor
    images: torch.Tensor
    size: int
    data: str
    arguments: dict


def stored_rows(path: str | Path, side: str) -> Rows:
    """The memory of the ``side`` (teacher, student) of a run's checkpoint. Raises UsageError where there is none."""
    file = load_file(path, mapped=True)
    keys = _within(file, f"{side}_mem", "block.queue_q")
    if not isinstance(keys, torch.Tensor) or keys.ndim != 2:
        raise UsageError(
            f"{path}: holds no memory of the {side}; pass a checkpoint of main_pretrain.py --method mugs, and "
            "--checkpoint_key teacher or student"
        )
    images = _within(file, "tutelage", "epoch_state", "memories", f"{side}_mem", "images")
    data = _within(file, "tutelage", "data")
    if not isinstance(images, torch.Tensor) or images.shape != keys.shape[:1] or not isinstance(data, str):
        raise UsageError(f"{path}: its memory does not say which images its rows are of; only runs made here do")
    written = images >= 0
    if not written.any():
        raise UsageError(f"{path}: no row of its memory has been written yet; pass a later checkpoint")
    return Rows(F.normalize(keys[written].float()), images[written], len(keys), data, recorded_arguments(file))


def _within(file: object, *names: str) -> object:
    for name in names:
        file = file.get(name) if isinstance(file, dict) else None
    return file


@torch.no_grad()
def mean_tokens(model: VisionTransformer, images: torch.Tensor) -> torch.Tensor:
    """What a memory is asked with: the mean of all tokens, the class token too, before the final norm. (batch, dim)."""
    return model.get_intermediate_layers(images, 1, norm=False)[0].mean(dim=1)


def nearest_rows(rows: Rows, queries: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines, and images, of the ``k`` rows nearest to every query, or of all there are: (queries, k) each."""
    cosines, index = (F.normalize(queries.float()) @ rows.keys.T).topk(min(k, len(rows.keys)), dim=1)
    return cosines, rows.images[index]


# ---------------------------------------------------------------------------------------------------------------------
# The contact sheet: uint8 (height, width, 3)
# ---------------------------------------------------------------------------------------------------------------------

CELL, GAP, MARGIN, LINE = 190, 10, 26, 22  # pixels of a picture, between two, around the sheet, of a line of text
BETWEEN = 34  # between a query and what it finds
RING = (214, 39, 140)  # around a query


class Found(NamedTuple):
    """A picture of the sheet, and the lines below it."""

    image: Image.Image
    lines: Sequence[str]


def contact_sheet(title: str, rows: Sequence[tuple[Found, Sequence[Found]]]) -> np.ndarray:
    """A row for every query: it, ringed, and what it finds from the nearest on."""
    columns = max(len(found) for _, found in rows)
    below = max(len(cell.lines) for query, found in rows for cell in (query, *found)) * LINE
    top, height = MARGIN + 2 * LINE, CELL + below + 2 * GAP
    width = 2 * MARGIN + CELL + BETWEEN + columns * (CELL + GAP) - GAP
    sheet = Image.new("RGB", (width, top + len(rows) * height + MARGIN - GAP), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((MARGIN, MARGIN - 6), shortened(title, 22, width - 2 * MARGIN), fill=INK, font=font(22))
    for number, (query, found) in enumerate(rows):
        upper = top + number * height
        _put(sheet, draw, query, MARGIN, upper, INK)
        draw.rectangle((MARGIN - 4, upper - 4, MARGIN + CELL + 3, upper + CELL + 3), outline=RING, width=4)
        for place, cell in enumerate(found):
            _put(sheet, draw, cell, MARGIN + CELL + BETWEEN + place * (CELL + GAP), upper, PALE)
    return np.asarray(sheet)


def _put(sheet: Image.Image, draw: ImageDraw.ImageDraw, cell: Found, left: int, top: int, ink: tuple) -> None:
    sheet.paste(ImageOps.fit(cell.image, (CELL, CELL), Image.Resampling.LANCZOS), (left, top))
    for number, line in enumerate(cell.lines):
        draw.text((left, top + CELL + 6 + number * LINE), shortened(line, 16, CELL), fill=ink, font=font(16))
