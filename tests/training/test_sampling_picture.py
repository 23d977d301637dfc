"""Marks of one colour are one point of the image, in whichever crop they are."""

import numpy as np
import pytest
import torch
from PIL import Image

from data.udi_views import UDIViews
from tests.data.helpers import photograph
from tests.launch import make_images, run_here
from training.sampling_picture import GAP, SIDE, hue_of, sampling_picture

HEIGHT, WIDTH = 120, 160


def cell(picture: np.ndarray, row: int, column: int) -> np.ndarray:
    top, left = (GAP + number * (SIDE + GAP) for number in (row, column))
    return picture[top : top + SIDE, left : left + SIDE]


def in_image(found: np.ndarray, coordinates: np.ndarray) -> np.ndarray:
    """Centre of the pixels ``found`` of a crop's picture -> its place in the image, as shares of height and width."""
    share = np.argwhere(found).mean(axis=0) / SIDE
    return coordinates[:2] + share * (coordinates[2:] - coordinates[:2])


@pytest.mark.parametrize("number", range(6))
def test_marks_of_one_colour_are_one_point_of_the_image(number):
    views = UDIViews((0.4, 1.0), (0.05, 0.25), 2, 64, 32, 8)
    key = (0, 0, number)
    batch = views.collate([views(photograph(0, HEIGHT, WIDTH), key)])
    batch["crops"] = [torch.zeros(1, *crop.shape[1:]) for crop in batch["crops"]]  # one grey: all colours are marks
    picture, (_, coordinates) = sampling_picture(batch, 8), views.draw(key, HEIGHT, WIDTH)
    first, second = cell(picture, 0, 0), cell(picture, 0, 1)
    valid, tolerance = int(batch["valid"][0, 0]), 0.03
    assert valid, "another key, please: nothing to see"
    for point in range(4):
        masks = [(part == hue_of(point)).all(axis=-1) for part in (first, second)]
        assert [mask.any() for mask in masks] == [point < valid] * 2
        if point < valid:
            places = [in_image(mask, where) for mask, where in zip(masks, coordinates, strict=False)]
            assert np.abs(places[0] - places[1]).max() < tolerance, (point, places)
    local = coordinates[2]
    low, high = np.minimum(local[:2], local[2:]), np.maximum(local[:2], local[2:])
    for column, view in ((1, 0), (2, 1)):
        white = np.argwhere((cell(picture, 1, column) == 255).all(axis=-1))
        assert bool(len(white)) == bool(batch["local_valid"][0, 0, view])
        target = coordinates[1 - view]
        places = target[:2] + white / SIDE * (target[2:] - target[:2])
        assert ((places > low - tolerance) & (places < high + tolerance)).all()


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
