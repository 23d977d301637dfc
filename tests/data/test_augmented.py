"""A box of a changed image holds the bits that changing the whole puts there, and is made without the whole."""

from itertools import product

import numpy as np
import pytest
from PIL import Image

from data import augmented
from data.augment import Box
from data.augmented import Changed, Flipped, Original, changed
from data.randaugment import INCREASING, INTERPOLATIONS, Operation, argument, carry_out, moves_pixels
from tests.data.helpers import photograph

HEIGHT, WIDTH = 61, 84
IMAGE = photograph(2, HEIGHT, WIDTH)


def drawn(name: str, random: np.random.Generator, level: float | None = None) -> Operation:
    level = random.uniform(3, 10) if level is None else level
    how = INTERPOLATIONS[random.integers(2)] if moves_pixels(name) else None
    return Operation(name, argument(name, level, negate=random.random() < 0.5), how)


def box(random: np.random.Generator, height: int = HEIGHT, width: int = WIDTH) -> Box:
    sides = [int(random.integers(1, side + 1)) for side in (height, width)]
    place = [int(random.integers(0, side - part + 1)) for side, part in zip((height, width), sides, strict=True)]
    return Box(*place, *sides)


def whole(image: np.ndarray, operations: list[Operation], flipped: bool = False) -> np.ndarray:
    picture = Image.fromarray(np.ascontiguousarray(image[:, ::-1] if flipped else image))
    for operation in operations:
        picture = carry_out(picture, operation)
    return np.asarray(picture)


def cut(image: np.ndarray, part: Box) -> np.ndarray:
    return image[part.top : part.top + part.height, part.left : part.left + part.width]


def assert_box_is_of_the_whole(image: np.ndarray, operations: list[Operation], part: Box, flipped: bool) -> None:
    source = Flipped(Original(image)) if flipped else Original(image)
    got, expected = changed(source, operations).pixels(part), cut(whole(image, operations, flipped), part)
    assert got.dtype == np.uint8 and np.array_equal(got, expected), (operations, part)


@pytest.mark.parametrize("level", [None, 9.0, 10.0])
def test_a_box_after_any_two_operations_has_the_bits_of_the_whole(level):
    """Round levels put many places exactly between two pixels, where the last bit of a sum decides."""
    random = np.random.default_rng(0)
    for number, names in enumerate(product(INCREASING, INCREASING)):
        operations = [drawn(name, random, level) for name in names]
        assert_box_is_of_the_whole(IMAGE, operations, box(random), flipped=number % 2 == 1)


def test_three_operations_and_colours_after_them_have_the_bits_of_the_whole():
    random = np.random.default_rng(1)
    for number in range(60):
        names = random.choice(INCREASING, 3, replace=False)
        colours = [Operation("Contrast", 1.3), Operation("Hue", -0.07), Operation("Color", 0.8), Operation("Grayscale")]
        operations = [drawn(str(name), random) for name in names] + colours[: number % 5]
        assert_box_is_of_the_whole(IMAGE, operations, box(random), flipped=number % 2 == 0)


@pytest.mark.parametrize(
    "image",
    [
        np.full((9, 11, 3), 200, np.uint8),  # one level: nothing to stretch
        np.zeros((9, 11, 3), np.uint8),
        photograph(1, 8, 12)[:1],  # a row
        photograph(1, 8, 12)[:, :1],
        photograph(1, 8, 12)[:2, :2],
        np.repeat(photograph(4, 6, 9) // 200 * 255, 3, axis=0),  # two levels: an equalised one overflows
    ],
    ids=["even", "black", "row", "column", "four pixels", "two levels"],
)
def test_even_and_tiny_images_have_the_bits_of_the_whole(image):
    random = np.random.default_rng(2)
    for name, other in zip(INCREASING, (*INCREASING[5:], *INCREASING[:5]), strict=True):
        for operations in ([drawn(name, random)], [drawn(other, random), drawn(name, random)]):
            assert_box_is_of_the_whole(np.ascontiguousarray(image), operations, box(random, *image.shape[:2]), False)


def test_a_box_that_looks_beyond_the_image_holds_the_fill():
    left = Operation("TranslateXRel", -0.4312345, "bicubic")
    pixels = changed(Original(IMAGE), [left]).pixels(Box(10, 0, 20, 30))
    assert (pixels == np.array([124, 116, 104])).all()


@pytest.mark.parametrize("name", INCREASING)
def test_a_box_is_made_without_the_whole(name, monkeypatch):
    """Of the changed image not more is made than the box, or what an affine map makes of it, with a rim. The mean that
    contrast needs is the original's, or takes the whole."""
    monkeypatch.setattr(Changed, "whole", property(lambda self: pytest.fail("the whole was made")))
    asked = []
    monkeypatch.setattr(Original, "pixels", lambda self, part: asked.append(part) or cut(self.image, part))
    operation = drawn(name, np.random.default_rng(3))
    before = [] if name == "ContrastIncreasing" else [Operation("Invert")]
    changed(Original(IMAGE), [*before, operation]).pixels(Box(20, 30, 10, 12))
    (part,) = asked
    assert part.height * part.width < HEIGHT * WIDTH / 3


def test_large_images_are_counted_to_the_last_pixel(monkeypatch):
    expected = augmented.histogram_of(IMAGE)
    monkeypatch.setattr(augmented, "COUNTED_IN_FLOATS", 10)
    assert np.array_equal(augmented.histogram_of(IMAGE), expected)
