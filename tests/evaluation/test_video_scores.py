"""J and F against their definitions, written out pixel by pixel."""

import numpy as np
import pytest

from evaluation.video_scores import (
    boundary,
    boundary_accuracy,
    region_similarity,
    score_frame,
    statistics,
    summarise,
)


def blob(seed: int, shape: tuple[int, int] = (60, 80)) -> np.ndarray:
    rows, columns = np.mgrid[: shape[0], : shape[1]]
    row, column, radius = np.random.default_rng(seed).integers((20, 20, 8), (40, 60, 18))
    return (rows - row) ** 2 + (columns - column) ** 2 < radius**2


def f_by_definition(found: np.ndarray, truth: np.ndarray, radius: int) -> float:
    edges = [np.argwhere(boundary(mask)) for mask in (found, truth)]
    distances = np.sqrt(((edges[0][:, None] - edges[1]) ** 2).sum(-1))
    precision, recall = (distances.min(1) <= radius).mean(), (distances.min(0) <= radius).mean()
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


@pytest.mark.parametrize("seed", range(6))
def test_regions_and_boundaries_by_definition(seed):
    found, truth = blob(seed), blob(seed + 10)
    assert region_similarity(found, truth) == (found & truth).sum() / (found | truth).sum()
    assert boundary_accuracy(found, truth) == pytest.approx(f_by_definition(found, truth, 1))  # 0.8 % of 100 pixels
    shifted = np.roll(truth, 1, axis=1)
    assert boundary_accuracy(shifted, truth) == 1 and region_similarity(shifted, truth) < 1
    assert boundary_accuracy(np.roll(truth, 4, axis=0), truth) < 1


def test_a_boundary_is_where_the_next_pixel_differs():
    mask = np.zeros((4, 5), bool)
    mask[1:3, 2:] = True
    assert boundary(mask).astype(int).tolist() == [[0, 1, 1, 1, 1], [0, 1, 0, 0, 0], [0, 1, 1, 1, 1], [0, 0, 0, 0, 0]]
    assert not boundary(np.ones((3, 3), bool)).any()


def test_nothing_there_and_nothing_found_is_right():
    nothing, something = np.zeros((60, 80), bool), blob(0)
    assert region_similarity(nothing, nothing) == boundary_accuracy(nothing, nothing) == 1
    for pair in ((nothing, something), (something, nothing)):
        assert region_similarity(*pair) == boundary_accuracy(*pair) == 0


def test_void_pixels_do_not_count():
    truth = blob(1).astype(np.uint8)
    found = truth.copy()
    found[:, :40] = 1 - found[:, :40]
    assert score_frame(found, truth, 1)[0][0] < 1
    truth[:, :40] = 255
    assert score_frame(found, truth, 1) == [(1.0, 1.0)]


def test_mean_recall_and_decay_of_an_object():
    numbers = statistics([1.0, 0.8, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1])
    # quarters of eight frames end at the places 1, 3, 5 (2.75, 4.5 and 6.25 of 1 to 8, rounded), 8, and share them
    assert numbers == pytest.approx({"mean": 3.9 / 8, "recall": 3 / 8, "decay": 2.4 / 3 - 0.6 / 3})
    long = statistics(np.linspace(1, 0, 600))  # more frames than the original's counter of 8 bits holds
    assert long["decay"] == pytest.approx(0.75, abs=0.01)
    assert statistics([0.7])["decay"] == 0


def test_objects_are_averaged_not_videos():
    numbers = summarise([{"J": [1.0] * 8, "F": [0.6] * 8}, {"J": [0.2] * 8, "F": [0.4] * 8}])
    assert numbers["J-Mean"] == pytest.approx(60) and numbers["J-Recall"] == 50 and numbers["F-Mean"] == 50
    assert numbers["J&F-Mean"] == pytest.approx(55) and numbers["J-Decay"] == 0
