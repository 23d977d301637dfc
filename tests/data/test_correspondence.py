"""Boxes, coordinates and maps between crops against exact rational arithmetic."""

from fractions import Fraction

import numpy as np
import pytest

from data.augment import Box
from data.correspondence import (
    crop_coordinates,
    image_maps,
    reference_box,
    sampling_maps,
    shift_towards,
    strata,
    stratified_sample,
)

FLIPS = [(False, False), (False, True), (True, False), (True, True)]


def random_box(random: np.random.Generator, height: int, width: int, smallest: float = 0.0) -> Box:
    sides = [int(random.integers(max(1, int(smallest * side)), side + 1)) for side in (height, width)]
    return Box(*(int(random.integers(0, n - m + 1)) for n, m in zip((height, width), sides, strict=True)), *sides)


# ---- points ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("grid", "window"), [(14, 3), (6, 2), (7, 7), (5, 1), (9, 4)])
def test_one_token_of_every_stratum_is_drawn(grid, window):
    random = np.random.default_rng(0)
    per_side, rest = divmod(grid, window)
    selections = random.integers(0, window**2, (200, strata(grid, window)))
    corners = random.integers(0, 4, 200)
    drawn = stratified_sample(selections, corners, grid, window)
    for tokens, selection, corner in zip(drawn.tolist(), selections, corners.tolist(), strict=True):
        top, left = rest * (corner in (2, 3)), rest * (corner in (1, 3))
        expected = [
            (top + i * window + selection[i * per_side + j] // window) * grid
            + (left + j * window + selection[i * per_side + j] % window)
            for i in range(per_side)
            for j in range(per_side)
        ]
        assert tokens == sorted(expected)


@pytest.mark.parametrize(("grid", "window"), [(6, 7), (14, 0), (0, 2)])
def test_a_window_that_does_not_fit_is_refused_with_its_value(grid, window):
    with pytest.raises(ValueError, match=rf"window {window}: has to be in 1\.\.{grid}, .* {grid} x {grid}"):
        strata(grid, window)


# ---- maps -----------------------------------------------------------------------------------------------------------


def exact_places(source, target, size, tokens, grid) -> list[tuple[int, list[Fraction], Fraction]]:
    """For every token its place in the target (0 at its first pixels, 1 at its last), and how far it is inside."""
    places = []
    for token in tokens.tolist():
        place, margin = [], Fraction(1)
        for axis, count in enumerate(divmod(token, grid)):
            ends = []
            for box, flip in (source, target):
                first = Fraction(box[axis], max(size[axis] - 1, 1))
                last = Fraction(box[axis] + box[axis + 2] - 1, max(size[axis] - 1, 1))
                ends.append((last, first) if flip and axis else (first, last))
            (a, b), (c, d) = ends
            position = a + Fraction(count, max(grid - 1, 1)) * (b - a)
            margin = min(margin, position - min(c, d), max(c, d) - position)
            place.append((position - c) / (d - c) if c != d else Fraction(0))
        places.append((token, place, margin))
    return places


def check_maps(source, target, size, tokens, grid, target_grid, doubt: float) -> None:
    """Compare with exact arithmetic; tokens nearer than ``doubt`` to the border may be on either side of it."""
    coordinates = [crop_coordinates(box, flip, *size) for box, flip in (source, target)]
    maps = sampling_maps(*coordinates, tokens, grid, target_grid)
    assert [part.dtype for part in maps] == [np.int64, np.int64, np.float32, np.int64]
    found = maps.source[: maps.valid].tolist()
    exact = exact_places(source, target, size, tokens, grid)
    certain = {token for token, _, margin in exact if margin > doubt}
    possible = {token for token, _, margin in exact if margin > -doubt} if doubt else certain
    assert certain <= set(found) <= possible and found == sorted(found)
    for part in maps[:3]:
        assert not part[maps.valid :].any()
    places = {token: place for token, place, _ in exact}
    for token, index, weight in zip(found, maps.index, maps.weight, strict=False):
        last = target_grid - 1
        row, column = np.divmod(index, target_grid)
        assert (weight >= 0).all() and index.min() >= 0 and index.max() < target_grid**2
        assert (row[0], column[0]) == (row[1], column[2]) and (row[2], column[1]) == (row[3], column[3])
        assert (row[2], column[1]) == (min(row[0] + 1, last), min(column[0] + 1, last))
        if token not in certain:
            continue
        assert weight.sum() == pytest.approx(1, abs=1e-6)
        place = [float(weight @ row), float(weight @ column)]
        assert place == pytest.approx([float(x * last) for x in places[token]], abs=5e-4)


def test_maps_of_random_boxes_are_those_of_exact_arithmetic():
    random = np.random.default_rng(1)
    for number in range(2000):
        size = tuple(random.integers(16, 500, 2).tolist())
        grid, window = ((14, 3), (6, 2))[number % 2]
        tokens = stratified_sample(random.integers(0, window**2, strata(grid, window)), 1, grid, window)
        source = (random_box(random, *size, 0.2), bool(number & 2))
        target = (random_box(random, *size, 0.4), bool(number & 4))
        check_maps(source, target, size, tokens, grid, 14, doubt=1e-6)


def test_borders_belong_to_the_outside():
    """Sides and grids of powers of two plus one: positions are exact in single precision, and there is no doubt."""
    random = np.random.default_rng(2)
    on_border = 0
    for number in range(600):
        size, grid = (257, 129), (5, 9)[number % 2]
        # few different boxes, so that many positions are on borders
        boxes = [Box(*(random.integers(0, 3, 2) * 32).tolist(), *(random.integers(1, 3, 2) * 32 + 1).tolist())] * 2
        if number % 4:
            boxes[1] = Box(*(random.integers(0, 3, 2) * 32).tolist(), *(random.integers(1, 3, 2) * 32 + 1).tolist())
        flips = FLIPS[number // 4 % 4]
        tokens = np.arange(grid**2)
        source, target = zip(boxes, flips, strict=True)
        check_maps(source, target, size, tokens, grid, 5, doubt=0)
        on_border += sum(margin == 0 for _, _, margin in exact_places(source, target, size, tokens, grid))
    assert on_border > 500


def test_identical_crops_share_all_but_their_borders_and_disjoint_ones_nothing():
    tokens, coordinates = np.arange(196), crop_coordinates(Box(16, 8, 65, 33), False, 129, 65)
    maps = sampling_maps(coordinates, coordinates, tokens, 14, 14)
    assert maps.valid == 144
    inner = np.arange(196).reshape(14, 14)[1:-1, 1:-1].ravel()
    assert np.array_equal(maps.source[:144], inner)
    nearest = np.take_along_axis(maps.index, maps.weight.argmax(1)[:, None], 1)[:144, 0]
    assert np.array_equal(nearest, inner)
    mirrored = sampling_maps(coordinates, coordinates[[0, 3, 2, 1]], tokens, 14, 14)
    nearest = np.take_along_axis(mirrored.index, mirrored.weight.argmax(1)[:, None], 1)[:144, 0]
    assert np.array_equal(nearest, np.arange(196).reshape(14, 14)[1:-1, -2:0:-1].ravel())
    other = crop_coordinates(Box(81, 8, 40, 33), False, 129, 65)
    assert sampling_maps(coordinates, other, tokens, 14, 14).valid == 0


@pytest.mark.filterwarnings("error")
def test_crops_of_a_single_row_column_or_pixel_share_nothing():
    for size in ((1, 1), (1, 300), (300, 1)):
        whole = crop_coordinates(Box(0, 0, *size), True, *size)
        assert np.isfinite(whole).all()
        maps = sampling_maps(whole, whole, np.arange(36), 6, 14)
        assert maps.valid == 0 and not any(part.any() for part in maps)


def test_maps_of_an_image_are_those_of_its_pairs():
    random = np.random.default_rng(3)
    boxes = [random_box(random, 100, 140, 0.3) for _ in range(7)]
    coordinates = crop_coordinates(boxes, random.random(7) < 0.5, 100, 140)
    tokens, local_tokens = np.arange(3, 196, 12), np.arange(0, 36, 4)
    between, local = image_maps(coordinates, [tokens, local_tokens], (14, 6))
    assert local.valid.shape == (5, 2) and 0 < local.valid.sum() < 90

    def same(stacked, place, single) -> bool:
        return all(np.array_equal(part[place], other) for part, other in zip(stacked, single, strict=True))

    for view in range(2):
        target = coordinates[1 - view]
        assert same(between, view, sampling_maps(coordinates[view], target, tokens, 14, 14))
        for crop in range(5):
            assert same(local, (crop, view), sampling_maps(coordinates[2 + crop], target, local_tokens, 6, 14))
    assert image_maps(coordinates[:2], [tokens], (14, 6))[1] is None


# ---- boxes ----------------------------------------------------------------------------------------------------------


def exact_shift(box: Box, near: Box, height: int, width: int) -> Box:
    """The rule in rational numbers."""
    moved = []
    for axis, side in enumerate((height, width)):
        start, length, first, last = box[axis], box[axis + 2], near[axis], near[axis] + near[axis + 2] - 1
        end, other = start + length - 1, last - first
        both = max(end, last) - min(box.top, first)  # the top on both axes
        half = Fraction(min(other, length), 2)
        shift = (both - length - other if both > length + other else 0) + (half if both >= length + other - half else 0)
        away = Fraction(first + last - start - end, 2)
        moved.append(min(max(start + round(away / (abs(away) + Fraction(1, 10**5)) * shift), 0), side - length))
    return Box(*moved, *box[2:])


def test_shifts_of_random_boxes_are_those_of_exact_arithmetic():
    random = np.random.default_rng(4)
    moved = 0
    for number in range(4000):
        height, width = random.integers(1, 600, 2).tolist()
        box, near = random_box(random, height, width), random_box(random, height, width)
        reference = crop_coordinates(near, bool(number % 2), height, width)
        shifted = shift_towards(box, reference, height, width)
        assert shifted == exact_shift(box, near, height, width)
        assert shifted[2:] == box[2:] and 0 <= shifted.top <= height - box.height
        assert 0 <= shifted.left <= width - box.width
        moved += shifted != box
    assert moved > 1000


def test_a_box_that_overlaps_enough_stays_and_a_far_one_comes_to_overlap():
    reference = crop_coordinates(Box(0, 0, 51, 51), False, 201, 201)
    assert shift_towards(Box(0, 0, 60, 60), reference, 201, 201) == Box(0, 0, 60, 60)
    assert shift_towards(Box(150, 0, 40, 40), reference, 201, 201) == exact_shift(
        Box(150, 0, 40, 40), Box(0, 0, 51, 51), 201, 201
    )
    assert shift_towards(Box(150, 0, 40, 40), reference, 201, 201).top == 150 - (189 - 40 - 50) - 20


def test_the_reference_of_local_crops_takes_flipped_coordinates_as_they_are():
    boxes = [Box(10, 20, 41, 31), Box(30, 40, 61, 51)]  # columns 20..50 and 40..90, rows 10..50 and 30..90

    def pixels(*flips: bool) -> list[int]:
        return np.rint(reference_box(*crop_coordinates(boxes, flips, 101, 101)) * 100).astype(int).tolist()

    assert pixels(False, False) == [10, 20, 90, 90]
    assert pixels(True, True) == [10, 50, 90, 40]  # 40..50, seen from the right
    assert pixels(False, True) == [10, 20, 90, 50]  # the first
    assert pixels(True, False) == [10, 40, 90, 90]  # the second
