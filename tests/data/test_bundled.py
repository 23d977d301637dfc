import pickle
import re

import numpy as np
import pytest
from PIL import Image

from data import bundled
from data.bundled import FOLDER, LEVELS, BundledTiles, photograph_paths
from utils import UsageError

ALLOWED = {"public domain", "CC0 1.0", "CC BY 2.0", "CC BY 4.0"}


def attributions() -> dict[str, str]:
    """File name -> licence, from the table's rows."""
    rows = [line.split("|")[1:-1] for line in (FOLDER / "ATTRIBUTION.md").read_text().splitlines() if ".jpg |" in line]
    return {row[0].strip(): re.sub(r"[\[\]]|\(.*?\)", "", row[4]).strip() for row in rows}


def test_every_photograph_names_its_author_and_an_allowed_licence():
    licences = attributions()
    assert set(licences) == {path.name for path in photograph_paths()}
    assert set(licences.values()) <= ALLOWED


def test_the_photographs_are_few_and_small():
    paths = photograph_paths()
    assert 16 <= len(paths) <= 20
    assert sum(path.stat().st_size for path in paths) < 4.5e6
    for path in paths:
        with Image.open(path) as image:
            assert max(image.size) <= 1024
            assert min(image.width // 2, image.height) >= 64 * 2 ** (LEVELS - 1), f"{path.name} is too small for a tile"
            assert not image.getexif() and "icc_profile" not in image.info


def test_thousands_of_tiles_balanced_over_the_photographs():
    train, test = BundledTiles("train"), BundledTiles("test")
    assert len(train) > 3500 and len(test) > 1000
    for source in (train, test):
        assert source.labels.dtype == np.int64
        assert len(set(np.bincount(source.labels))) == 1
        assert len(source.class_names) == len(np.bincount(source.labels)) == len(photograph_paths())
        for index in (0, len(source) - 1):
            assert source.array(index).shape == (64, 64, 3)
            assert source.image_name(index).startswith(source.class_names[source.labels[index]])


@pytest.mark.parametrize("width", [451, 452, 453, 454])
def test_no_pixel_is_in_a_training_tile_and_in_a_test_tile(monkeypatch, width):
    columns = np.arange(width)

    def numbered(path):
        """Levels whose pixels hold the first and the last full-resolution column they were made of."""
        return [
            np.broadcast_to(
                np.stack([columns[:: 2**k], np.minimum(columns[:: 2**k] + 2**k, width) - 1, 0 * columns[:: 2**k]], -1),
                (300 >> k, len(columns[:: 2**k]), 3),
            )
            for k in range(LEVELS)
        ]

    monkeypatch.setattr(bundled, "_levels", numbered)
    train, test = BundledTiles("train"), BundledTiles("test")
    last_trained = max(train.array(i)[..., 1].max() for i in range(train.tiles))
    first_tested = min(test.array(i)[..., 0].min() for i in range(test.tiles))
    assert last_trained <= width // 2 <= first_tested and last_trained < first_tested


def test_tiles_reach_into_every_corner_of_their_half():
    for source, left in ((BundledTiles("train"), 0), (BundledTiles("test"), 320)):
        corners = np.array([source._corner(tile, 480, 640) for tile in range(source.tiles)])
        room = np.array([320 - 64, 480 - 64])
        cells = np.floor((corners - [left, 0]) / (room + 1) * 6).astype(int)
        assert len({tuple(cell) for cell in cells}) == 36


def test_few_tiles_are_the_first_of_many():
    few, many = BundledTiles("train", tiles=5), BundledTiles("train")
    assert len(few) == 5 * len(few.class_names)
    assert all(np.array_equal(few.array(5 + i), many.array(many.tiles + i)) for i in range(5))
    assert few.fingerprint != many.fingerprint


def test_a_tile_is_the_same_picture_every_time_and_in_every_form():
    source = BundledTiles("test")
    tile = source.array(7)
    tile[:] = 0  # what a caller does to his copy stays his
    assert source.array(7).any()
    assert np.array_equal(np.asarray(source.pil(7)), source.array(7))
    assert source.pil(7).mode == "RGB"


def test_half_resolution_shows_twice_the_field():
    source = BundledTiles("train")
    full, half = bundled._levels(source.paths[0])
    assert half.shape[0] == (full.shape[0] + 1) // 2
    x, y = source._corner(1, *half.shape[:2])
    seen = full[2 * y : 2 * y + 128, 2 * x : 2 * x + 128].reshape(64, 2, 64, 2, 3).mean(axis=(1, 3))
    assert np.abs(source.array(1) - seen).max() <= 0.5


def test_photographs_are_decoded_once(monkeypatch):
    bundled._levels.cache_clear()
    opened, original = [], Image.open
    monkeypatch.setattr(Image, "open", lambda path: opened.append(path) or original(path))
    for split in ("train", "test"):
        source = BundledTiles(split)
        for index in range(0, len(source), 16):
            source.array(index)
    assert len(opened) == len(photograph_paths())


def test_pickling_costs_nothing():
    source = BundledTiles("test", tiles=9)
    packed = pickle.dumps(source)
    copy = pickle.loads(packed)
    assert len(packed) < 200
    assert copy.fingerprint == source.fingerprint and np.array_equal(copy.array(11), source.array(11))


def test_val_is_another_name_for_test():
    assert BundledTiles("val").fingerprint == BundledTiles("test").fingerprint


def test_an_unknown_split_is_refused_with_the_valid_ones():
    with pytest.raises(UsageError, match=r"'dev'.*train and test"):
        BundledTiles("dev")
