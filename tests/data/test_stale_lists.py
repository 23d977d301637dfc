"""A list of images that was kept is not trusted blindly, and what stems from it says which file keeps it."""

import logging
import os
import time
from pathlib import Path

import pytest

from data import index as index_module
from data.datasets import BadImage, open_source
from data.index import index_file, refresh_indices
from tests.data.helpers import write_folder, write_image
from utils import log


@pytest.fixture(autouse=True)
def trusting():
    yield
    refresh_indices(False)


@pytest.fixture
def folder(tmp_path) -> Path:
    return write_folder(tmp_path / "images", [f"{kind}/{number}.png" for kind in ("cat", "dog") for number in range(3)])


def as_if_nothing_had_happened(folder: Path, change) -> None:
    """``change`` the folder, and give every folder the time it had: as network file systems and backups do."""
    times = {place: place.stat().st_mtime_ns for place in (folder, *folder.iterdir())}
    change()
    for place, nanoseconds in times.items():
        os.utime(place, ns=(nanoseconds, nanoseconds))


def test_images_added_removed_or_renamed_while_times_stay_are_seen(folder):
    assert len(open_source(str(folder))) == 6
    as_if_nothing_had_happened(folder, lambda: [write_image(folder / f"cat/{number}.png") for number in (7, 8)])
    assert len(open_source(str(folder))) == 8
    as_if_nothing_had_happened(folder, lambda: (folder / "dog/2.png").rename(folder / "dog/3.png"))
    source = open_source(str(folder))
    assert len(source) == 8 and source.image_name(7).endswith("dog/3.png")
    as_if_nothing_had_happened(folder, lambda: (folder / "dog/3.png").unlink())
    assert len(open_source(str(folder))) == 7


def test_a_missing_file_is_listed_again_where_folders_are_too_large_to_be_read_at_every_start(folder, monkeypatch):
    monkeypatch.setattr(index_module, "ENTRIES", 1)
    open_source(str(folder))
    as_if_nothing_had_happened(folder, lambda: write_image(folder / "cat/7.png"))
    assert len(open_source(str(folder))) == 6  # the rest of the promise is --refresh_index
    as_if_nothing_had_happened(folder, lambda: (folder / "dog/2.png").unlink())
    assert len(open_source(str(folder))) == 6 and open_source(str(folder)).image_name(3).endswith("cat/7.png")


def test_all_is_listed_anew_once_where_it_is_asked_for(folder, monkeypatch):
    monkeypatch.setattr(index_module, "ENTRIES", 1)
    open_source(str(folder))
    as_if_nothing_had_happened(folder, lambda: write_image(folder / "cat/7.png"))
    refresh_indices(True)
    assert len(open_source(str(folder))) == 7
    as_if_nothing_had_happened(folder, lambda: write_image(folder / "cat/8.png"))
    assert len(open_source(str(folder))) == 7  # as at the start of this process
    refresh_indices(False)
    assert len(open_source(str(folder))) == 7


def test_what_stems_from_the_list_names_the_file_that_keeps_it_and_its_age(folder, caplog):
    caplog.set_level(logging.INFO, logger=log.name)
    source = open_source(str(folder))
    assert not caplog.records
    kept = index_file(folder)
    os.utime(kept, (time.time() - 3 * 86400 - 60,) * 2)
    source = open_source(str(folder))
    assert caplog.messages == [
        f"{folder}: images as in the list kept in {kept}, made 3 days ago (--refresh_index lists them anew)"
    ]
    (folder / "dog/1.png").unlink()
    with pytest.raises(BadImage, match=rf"No such file.*{kept}, made 3 days ago; --refresh_index lists anew"):
        source.array(4)
