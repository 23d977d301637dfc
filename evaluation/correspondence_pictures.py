"""Pictures of which place of one image is which of another: uint8 (height, width, 3) RGB."""

from collections.abc import Sequence

import cv2
import numpy as np

from data.pictures import sheet
from evaluation.attention import bright_colour

GAP = 5  # pixels between two views
MARK = 7  # half a mark's side
BLUE, RED, YELLOW = (30, 90, 255), (230, 40, 40), (255, 225, 30)
Point = tuple[int, int]  # x, y


def beside(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Two views of one height with white between them."""
    white = np.full((first.shape[0], GAP, 3), 255, np.uint8)
    return np.concatenate((first, white, second), axis=1)


def joined(
    views: tuple[np.ndarray, np.ndarray],
    pairs: Sequence[tuple[Point, Point]],
    right: Sequence[bool] | None = None,
    numbered: bool = False,
) -> np.ndarray:
    """Both views, and a line from every place of the first to its match; one that is wrong ends in a red cross.

    ``numbered``: lines in yellow with their numbers, as EsViT draws them; else every line has a colour of its own.
    """
    picture, shift = beside(*views), views[0].shape[1] + GAP
    for number, (here, there) in enumerate(pairs):
        colour, end = YELLOW if numbered else bright_colour(number), (there[0] + shift, there[1])
        cv2.line(picture, here, end, colour, 1, cv2.LINE_AA)
        for point in (here, end):
            cv2.circle(picture, point, 3, colour, -1, cv2.LINE_AA)
        if right is not None and not right[number]:
            cv2.drawMarker(picture, end, RED, cv2.MARKER_TILTED_CROSS, 2 * MARK, 2)
        if numbered:
            _write(picture, str(number), (here[0] + 4, here[1] - 4))
    return picture


def marked(picture: np.ndarray, circles: Sequence[Point], triangles: Sequence[Point]) -> np.ndarray:
    """Blue circles and red triangles at places of ``picture``, in place."""
    for x, y in circles:
        cv2.circle(picture, (x, y), MARK, BLUE, 2, cv2.LINE_AA)
    for x, y in triangles:
        corners = np.array([[x, y - MARK], [x - MARK, y + MARK], [x + MARK, y + MARK]], np.int32)
        cv2.polylines(picture, [corners], True, RED, 2, cv2.LINE_AA)
    return picture


def dotted(picture: np.ndarray, place: Point) -> np.ndarray:
    """A copy with a red dot where a query is."""
    return cv2.circle(picture.copy(), place, max(3, picture.shape[0] // 50), RED, -1, cv2.LINE_AA)


def grid_of(pictures: Sequence[np.ndarray], columns: int = 4) -> np.ndarray:
    return sheet([pictures[start : start + columns] for start in range(0, len(pictures), columns)], 4)


def shorter_side(picture: np.ndarray, pixels: int) -> np.ndarray:
    """No larger than that."""
    scale = pixels / min(picture.shape[:2])
    if scale >= 1:
        return picture
    size = tuple(max(1, round(side * scale)) for side in picture.shape[1::-1])
    return cv2.resize(picture, size, interpolation=cv2.INTER_AREA)


def _write(picture: np.ndarray, text: str, place: Point) -> None:
    for colour, thickness in (((0, 0, 0), 3), ((255, 255, 255), 1)):
        cv2.putText(picture, text, place, cv2.FONT_HERSHEY_SIMPLEX, 0.4, colour, thickness, cv2.LINE_AA)
