"""Marks of one colour are one point of the image, in whichever crop they are."""

import numpy as np
import pytest
import torch
from PIL import Image

from data.sampling_picture import GAP, SIDE, hue_of, sampling_picture
from data.udi_views import UDIViews
from tests.data.helpers import photograph
from tests.launch import make_images, run_here

HEIGHT, WIDTH = 120, 160


def cell(picture: np.ndarray, row: int, column: int) -> np.ndarray:
    top, left = (GAP + number * (SIDE + GAP) for number in (row, column))
    return picture[top : top + SIDE, left : left + SIDE]


def in_image(picture: np.ndarray, token: int, coordinates: np.ndarray) -> np.ndarray | None:
    """Where in the image a crop's picture has the mark of ``token``, as shares of height and width."""
    found = np.argwhere((picture == hue_of(token)).all(axis=-1))
    if len(found):
        return coordinates[:2] + found.mean(axis=0) / SIDE * (coordinates[2:] - coordinates[:2])


@pytest.mark.parametrize("number", range(6))
def test_marks_of_one_colour_are_one_point_of_the_image(number):
    views = UDIViews((0.4, 1.0), (0.05, 0.25), 2, 64, 32, 8)
    key = (0, 0, number)
    batch = views.collate([views(photograph(0, HEIGHT, WIDTH), key)])
    batch["crops"] = [torch.zeros(1, *crop.shape[1:]) for crop in batch["crops"]]  # one grey: all colours are marks
    picture, (_, coordinates) = sampling_picture(batch, 8), views.draw(key, HEIGHT, WIDTH)
    first, second, local = coordinates[:3]
    rows = [
        (first, [second], batch["source"][0, :1], batch["valid"][0, :1], 8**2),
        (local, [second, first], batch["local_source"][0, 0], batch["local_valid"][0, 0], 4**2),
    ]
    for row, (source, targets, tokens, valid, grid) in enumerate(rows):
        drawn = [set(found[:count].tolist()) for found, count in zip(tokens, valid, strict=True)]
        for token in range(grid):
            at = in_image(cell(picture, row, 0), token, source)
            assert (at is not None) == any(token in found for found in drawn)
            for column, (target, found) in enumerate(zip(targets, drawn, strict=True), 1):
                place = in_image(cell(picture, row, column), token, target)
                assert (place is not None) == (token in found)
                assert place is None or np.abs(place - at).max() < 0.03, (row, token, column, at, place)


def test_a_dry_run_draws_them_where_places_are_sampled(tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO", "tutelage")
    images = make_images(tmp_path / "images", 16)
    options = {"method": "udi", "data_path": images, "dry_run": True, "warmup_teacher_temp_epochs": 0}
    options |= {"global_sampling_window_size": 2, "precision": "bf16"}
    assert run_here(monkeypatch, output_dir=tmp_path / "places", **options) == 0
    path = tmp_path / "places" / "sampling.png"
    assert str(path) in caplog.text
    assert np.array(Image.open(path)).shape == (2 * (SIDE + GAP) + GAP, 3 * (SIDE + GAP) + GAP, 3)
    options |= {"include_patch": "false", "number_cls_token": 1}
    assert run_here(monkeypatch, output_dir=tmp_path / "none", **options) == 0
    assert [path.name for path in (tmp_path / "none").iterdir()] == ["first_batch.png"]
