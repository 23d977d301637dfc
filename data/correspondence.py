"""Which places of one crop lie where in another crop of the same image, and crops that are drawn near another one.

Coordinates of a crop are (top, left, bottom, right) of its outermost pixels, as shares of the image's height - 1 and
width - 1, float32. A horizontal flip exchanges left and right, so that a crop with left > right is a flipped one, and
positions are projected through flips without further ado. Tokens of a grid are counted row by row; the outermost tokens
of a crop lie on its outermost pixels.

Source     UDI (2407.17671), the sampling of patches and the second view
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from data.augment import Box

CORNERS = 4


def strata(grid: int, window: int) -> int:
    """How many strata of ``window`` x ``window`` tokens a grid of ``grid`` x ``grid`` has: one point is drawn of each.

    Raises ValueError when there is none.
    """
    if not 1 <= window <= grid:
        raise ValueError(f"sampling window {window}: has to be in 1..{grid}, the side of the grid of {grid} x {grid}")
    return (grid // window) ** 2


def stratified_sample(selections: np.ndarray, corners: ArrayLike, grid: int, window: int) -> np.ndarray:
    """One token of every stratum of a grid, in ascending order.

    Shapes     ``selections`` (..., strata) which of the window**2 tokens, row by row, for the strata row by row;
               ``corners`` (...) where the strata lie if they do not fill the grid: top left, top right, bottom left,
               bottom right -> (..., strata) int64
    """
    per_side, rest = divmod(grid, window)
    row, column = np.divmod(np.arange(strata(grid, window)), per_side)
    down, right = np.divmod(np.asarray(corners)[..., None], 2)
    row = row * window + selections // window + down * rest
    column = column * window + selections % window + right * rest
    return np.sort(row * grid + column, axis=-1)


def crop_coordinates(boxes: ArrayLike, flips: ArrayLike, height: int, width: int) -> np.ndarray:
    """Coordinates of crops of an image of ``height`` x ``width`` pixels.

    Shapes     ``boxes`` (..., 4) top, left, height, width in pixels; ``flips`` (...) bool -> (..., 4) float32
    """
    boxes = np.asarray(boxes)
    # in an image of one row, or column, all positions are 0
    sides = np.maximum([height - 1, width - 1], 1)
    first, last = boxes[..., :2] / sides, (boxes[..., :2] + boxes[..., 2:] - 1) / sides
    coordinates = np.concatenate([first, last], axis=-1).astype(np.float32)
    return np.where(np.asarray(flips)[..., None], coordinates[..., [0, 3, 2, 1]], coordinates)


def reference_box(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """The coordinates near which local crops are drawn, from those of the two global ones: (..., 4) each.

    parity: flipped coordinates are taken as they are. So it is the union of both if none is flipped, but from left to
    right their intersection if both are, and if one is, usually what the other one covers.
    """
    return np.concatenate(
        [np.minimum(first[..., :2], second[..., :2]), np.maximum(first[..., 2:], second[..., 2:])], axis=-1
    )


def shift_towards(box: Box, reference: np.ndarray, height: int, width: int) -> Box:
    """Move ``box`` towards the crop with the coordinates ``reference`` (4,) if they are far apart, inside the image.

    parity: how far apart they are from left to right is judged by the box's top instead of its left.
    """
    sides = np.array([height - 1, width - 1] * 2, np.float32)
    ends = np.rint(reference * sides).astype(int).reshape(2, 2)
    (top, left), (bottom, right) = ends.min(0).tolist(), ends.max(0).tolist()
    down = _shift(box.top, box.height, top, bottom, box.top)
    aside = _shift(box.left, box.width, left, right, box.top)
    return box._replace(
        top=min(max(box.top + down, 0), height - box.height), left=min(max(box.left + aside, 0), width - box.width)
    )


def _shift(start: int, length: int, first: int, last: int, start_of_both: int) -> int:
    """By how many pixels a stretch is moved towards the one from ``first`` to ``last``: the gap between them, and half
    of the shorter one if they overlap by less than that."""
    end, other = start + length - 1, last - first
    both = max(end, last) - min(start_of_both, first)
    half = 0.5 * min(other, length)
    distance = max(both - length - other, 0) + (half if both >= length + other - half else 0)
    towards = (first + last) / 2 - (start + end) / 2
    return round(towards / (abs(towards) + 1e-5) * distance)


class SamplingMaps(NamedTuple):
    """Points of source crops and the places of target crops that show the same.

    The valid points come first, in the order of their tokens; the rest is zero.

    ``source``    (..., points) int64         token of the source
    ``index``     (..., points, 4) int64      tokens of the target around the place
    ``weight``    (..., points, 4) float32    their bilinear weights
    ``valid``     (...) int64                 number of valid points
    """

    source: np.ndarray
    index: np.ndarray
    weight: np.ndarray
    valid: np.ndarray


def sampling_maps(
    source: np.ndarray, target: np.ndarray, tokens: np.ndarray, grid: int, target_grid: int
) -> SamplingMaps:
    """Where the ``tokens`` of crops at ``source`` lie in crops at ``target``; those strictly inside are valid.

    Shapes     ``source`` and ``target`` (..., 4) coordinates, broadcast against each other; ``tokens`` (points,)
               ascending, on the source's ``grid`` x ``grid``; the target has ``target_grid`` x ``target_grid`` tokens

    parity: a place so near the far border that rounding puts it on the border is valid, and its weights are zero.
    """
    place, inside = project(source, target, tokens, grid)
    order = np.argsort(~inside, axis=-1, kind="stable")
    inside = np.take_along_axis(inside, order, -1)
    place = np.take_along_axis(place, order[..., None], -2)
    place = np.where(inside[..., None], place, 0) * np.float32(target_grid - 1)

    near = np.floor(place)
    far = np.minimum(near + 1, np.float32(target_grid - 1))
    weights = np.stack([far - place, place - near], axis=-1)  # (..., points, row or column, near or far)
    weight = weights[..., 0, :, None] * weights[..., 1, None, :] * inside[..., None, None]
    corners = np.stack([near, far], axis=-1).astype(np.int64)
    index = (corners[..., 0, :, None] * target_grid + corners[..., 1, None, :]) * inside[..., None, None]
    shape = (*inside.shape, 4)
    source_token = np.where(inside, np.asarray(tokens, np.int64)[order], 0)
    return SamplingMaps(source_token, index.reshape(shape), weight.reshape(shape), inside.sum(-1))


def token_shares(tokens: np.ndarray, grid: int) -> np.ndarray:
    """Tokens of a grid -> rows and columns (..., 2) float32, 0 for the first ones and 1 for the last."""
    return np.stack(np.divmod(np.asarray(tokens), grid), axis=-1).astype(np.float32) / np.float32(max(grid - 1, 1))


def project(source: np.ndarray, target: np.ndarray, tokens: np.ndarray, grid: int) -> tuple[np.ndarray, np.ndarray]:
    """Places of the source's ``tokens`` in the target, (..., points, 2) float32 row and column, 0 at its top left token
    and 1 at its bottom right one, and whether they are strictly inside, (..., points) bool. Those outside may be
    anything."""
    source, target = np.broadcast_arrays(source.astype(np.float32), target.astype(np.float32))
    source, target = source[..., None, :], target[..., None, :]
    position = source[..., :2] + token_shares(tokens, grid) * (source[..., 2:] - source[..., :2])
    first, last = target[..., :2], target[..., 2:]
    inside = (np.minimum(first, last) < position) & (position < np.maximum(first, last))
    with np.errstate(divide="ignore", invalid="ignore"):
        return (position - first) / (last - first), inside.all(-1)


def image_maps(
    coordinates: np.ndarray, tokens: Sequence[np.ndarray], grids: Sequence[int]
) -> tuple[SamplingMaps, SamplingMaps | None]:
    """The maps of an image whose crops are two global ones and any number of local ones, in this order.

    Shapes     ``coordinates`` (2 + local crops, 4); ``tokens`` (points,) of both global crops and (local points,) of
               all local ones, ascending, on ``grids``
    Returns    from global crops to each other, (2, ...): first to second, second to first; from local crops to global
               ones, (local crops, 2, ...): to the second, to the first; None without local crops
    """
    targets = coordinates[[1, 0]]
    between = sampling_maps(coordinates[:2], targets, tokens[0], grids[0], grids[0])
    if len(coordinates) == 2:
        return between, None
    return between, sampling_maps(coordinates[2:, None], targets, tokens[1], grids[1], grids[0])
