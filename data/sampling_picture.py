"""A picture of sampled places: where they are in one crop, and where they were found in another."""

import colorsys
from collections.abc import Iterable

import numpy as np
import torch

from data.correspondence import token_shares
from data.pictures import sheet
from data.preprocess import to_pixels

SIDE = 448  # pixels of a global crop, about
GOLDEN = (5**0.5 - 1) / 2  # steps around the circle of hues that leave neighbours far apart
GAP = 6


def sampling_picture(batch: dict, patch_size: int, image: int = 0) -> np.ndarray:
    """Crops of one image of ``batch`` (``data.udi_views.UDIViews``) and valid places in them, uint8 (height, width, 3).

    Above: the first global crop with its sampled patches, and the second where these were found.
    Below: the first local crop with its sampled patches, and the second and the first global crop where these were
    found. Marks of one colour in a row are one patch of the row's first picture.
    """
    first, second = (to_pixels(crop[image]) for crop in batch["crops"][:2])
    maps = [batch[name][image] for name in ("source", "target_index", "target_weight", "valid")]
    rows = [row_of(first, [second], [part[:1] for part in maps], patch_size)]
    if "local_index" in batch:
        maps = [batch[f"local_{name}"][image, 0] for name in ("source", "index", "weight", "valid")]
        rows.append(row_of(to_pixels(batch["crops"][2][image]), [second, first], maps, patch_size))
    return sheet(rows, GAP)


def row_of(source: np.ndarray, targets: list[np.ndarray], maps: list[torch.Tensor], patch: int) -> list[np.ndarray]:
    """``source`` with the patches found in any of ``targets``, and these with where. ``maps``: a target's each."""
    grids, sampled, pictures = [crop.shape[0] // patch for crop in (source, targets[0])], set(), []
    for crop, tokens, index, weight, valid in zip(targets, *maps, strict=True):
        tokens = tokens[:valid].tolist()
        sampled.update(tokens)
        pictures.append(marked(crop, places(index[:valid], weight[:valid], grids[1]), map(hue_of, tokens)))
    tokens = sorted(sampled)
    return [marked(source, token_shares(np.array(tokens, int), grids[0]), map(hue_of, tokens)), *pictures]


def places(index: torch.Tensor, weight: torch.Tensor, grid: int) -> np.ndarray:
    """Tokens and bilinear weights (points, 4) -> rows and columns from 0 to 1 (points, 2); NaN without any weight."""
    index, weight = index.cpu().numpy(), weight.double().cpu().numpy()
    total = weight.sum(axis=1, keepdims=True)
    where = (token_shares(index, grid) * weight[..., None]).sum(axis=1)
    return np.divide(where, total, out=np.full_like(where, np.nan), where=total > 0)


def hue_of(number: int) -> tuple[int, ...]:
    return tuple(round(255 * part) for part in colorsys.hsv_to_rgb(number * GOLDEN % 1, 1, 1))


def marked(crop: np.ndarray, shares: np.ndarray, colours: Iterable[tuple[int, ...]]) -> np.ndarray:
    """``crop`` enlarged, with a coloured square in a black frame at every place (rows and columns from 0 to 1)."""
    scale = max(1, SIDE // crop.shape[0])
    picture = crop.repeat(scale, axis=0).repeat(scale, axis=1)
    half = max(2, SIDE // 90)
    for share, colour in zip(shares, colours, strict=True):
        if not np.isfinite(share).all():
            continue
        row, column = np.rint(share * (np.array(crop.shape[:2]) - 1) * scale + scale // 2).astype(int)
        for size, paint in ((half + 1, (0, 0, 0)), (half, colour)):
            picture[max(0, row - size) : row + size + 1, max(0, column - size) : column + size + 1] = paint
    return picture
