import os
import pickle
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

from data import index as index_module
from data.datasets import open_source
from data.index import Index, Strings, index_file
from data.splits import Splits
from tests.data.helpers import write_folder, write_image, write_list

REPOSITORY = Path(__file__).parent.parent.parent
NAMES = ["cat/1.png", "cat/deep/2.png", "dog/1.png"]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "tutelage"


@pytest.fixture
def folder(tmp_path) -> Path:
    return write_folder(tmp_path / "images", NAMES)


@pytest.fixture
def listings(monkeypatch) -> list:
    """The folders that have been listed."""
    seen, scandir = [], os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: seen.append(str(path)) or scandir(path))
    return seen


def names(source) -> list[str]:
    return [os.path.relpath(source.image_name(i), source.path) for i in range(len(source))]


def test_strings_come_back_as_they_were():
    strings = ["a", "", "täglich/ü.jpg", os.fsdecode(b"not utf-8 \xff.jpg"), "x" * 1000]
    packed = Strings.pack(strings)
    assert [packed[i] for i in range(len(packed))] == strings


def test_a_folder_is_listed_once(folder, listings, cache):
    first = open_source(str(folder))
    assert len(listings) == 4
    second = open_source(str(folder))
    assert len(listings) == 4
    assert names(first) == names(second) == NAMES
    assert np.array_equal(first.labels, second.labels) and first.fingerprint == second.fingerprint
    assert [file.suffix for file in cache.iterdir()] == [".index"]  # nothing temporary is left behind


def test_arrays_stay_in_the_file(folder):
    labels = open_source(str(folder)).index.labels
    while isinstance(labels, np.ndarray):
        labels = labels.base
    assert type(labels).__name__ == "mmap" or type(getattr(labels, "obj", None)).__name__ == "mmap"


@pytest.mark.parametrize("change", ["add", "add deep", "remove", "new class"])
def test_a_changed_folder_is_listed_again(folder, listings, change):
    before = open_source(str(folder))
    listings.clear()
    if change == "remove":
        (folder / "cat/deep/2.png").unlink()
    else:
        write_image(folder / {"add": "dog/2.png", "add deep": "cat/deep/3.png", "new class": "eel/1.png"}[change])
    after = open_source(str(folder))
    assert listings
    assert len(after) == len(before) + (-1 if change == "remove" else 1)
    assert after.fingerprint != before.fingerprint
    listings.clear()
    open_source(str(folder))
    assert not listings


def test_a_fingerprint_stays_what_it_was_for_runs_that_go_on(folder):
    assert open_source(str(folder)).fingerprint == "8ccd0e5c0c164ff6ad8d36b381306ebb"


def test_a_fingerprint_depends_on_names_and_not_on_the_place(folder, tmp_path):
    before = open_source(str(folder)).fingerprint
    folder.rename(tmp_path / "moved")
    assert open_source(str(tmp_path / "moved")).fingerprint == before


@pytest.mark.parametrize("damage", [b"", b"garbage", "half"])
def test_a_damaged_index_is_replaced(folder, listings, damage):
    open_source(str(folder))
    file = index_file(folder)
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2] if damage == "half" else damage)
    listings.clear()
    assert names(open_source(str(folder))) == NAMES
    assert listings
    listings.clear()
    open_source(str(folder))
    assert not listings


def test_an_index_of_an_older_rule_is_not_read(folder, listings):
    open_source(str(folder))
    file = index_file(folder)
    file.write_bytes(file.read_bytes().replace(index_module.MAGIC, b"tutelage index 1"))
    listings.clear()
    assert names(open_source(str(folder))) == NAMES and listings


def test_a_link_whose_target_appears_is_listed_again(folder, tmp_path):
    (folder / "cat" / "linked").symlink_to(tmp_path / "drive")
    assert names(open_source(str(folder))) == NAMES
    write_image(tmp_path / "drive" / "3.png")
    assert "cat/linked/3.png" in names(open_source(str(folder)))


def test_without_a_writable_cache_everything_works_and_it_says_so_once(folder, tmp_path, monkeypatch, caplog):
    blocker = tmp_path / "file"
    blocker.write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocker))  # a folder cannot be made below a file
    source = open_source(str(folder))
    assert names(source) == NAMES
    assert len([record for record in caplog.records if "cannot be kept" in record.message]) == 1
    assert names(pickle.loads(pickle.dumps(source))) == NAMES


def test_pickling_a_source_costs_a_path(tmp_path):
    lines = [f"images/{number:08}.jpg\tclass {number % 100}" for number in range(2000)]
    source = open_source(str(write_list(tmp_path, lines)))
    data = pickle.dumps(source)
    assert len(data) < 1000
    copy = pickle.loads(data)
    assert copy.image_name(1234) == source.image_name(1234) == str(tmp_path / "images/00001234.jpg")
    assert np.array_equal(copy.labels, source.labels) and copy.class_names == source.class_names


def test_an_index_that_was_replaced_meanwhile_is_an_error_and_no_other_list(folder):
    data = pickle.dumps(open_source(str(folder)))
    write_image(folder / "dog/2.png")
    open_source(str(folder))
    with pytest.raises(ValueError, match="has changed"):
        pickle.loads(data)


def test_an_index_comes_back_from_disk_as_it_was(tmp_path):
    names, stamps, places = Strings.pack(["b", "ä"]), np.array([[5, -1]]), np.arange(6).reshape(2, 3)
    splits = Splits("data", {"train": True, "val": False}, "")
    index = Index(names, np.array([0, -1]), ["x"], Strings.pack([""]), stamps, places, splits=splits, notes=["a note"])
    index.save(tmp_path / "i")
    back = Index.load(tmp_path / "i")
    assert [back.names[0], back.names[1], back.stamp_names[0]] == ["b", "ä", ""]
    for name in ("labels", "places", "stamps"):
        assert np.array_equal(getattr(back, name), getattr(index, name)) and not getattr(back, name).flags.writeable
    assert (back.class_names, back.fingerprint) == (["x"], index.fingerprint)
    assert (back.splits, back.notes) == (splits, ["a note"])


def test_on_a_node_only_the_first_process_lists_and_the_others_wait(folder, tmp_path):
    script = textwrap.dedent(
        f"""
        import os, sys, time
        import torch.distributed as dist
        dist.init_process_group("gloo", init_method="file://{tmp_path}/rendezvous", world_size=2, rank=int(sys.argv[1]))
        scandir, count = os.scandir, []
        def slow(path):
            count.append(path)
            time.sleep(0.2)
            return scandir(path)
        os.scandir = slow
        from data.datasets import open_source
        from utils import leave_world
        source = open_source({str(folder)!r})
        print(len(source), len(count))
        try:
            open_source({str(tmp_path / "cache")!r})
        except Exception as error:
            print(type(error).__name__)
        leave_world()
        """
    )
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", script, str(rank)],
            cwd=REPOSITORY,
            env={**os.environ, "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [process.communicate(timeout=60)[0].split() for process in processes]
    assert outputs == [["3", "4", "UsageError"], ["3", "0", "UsageError"]]


def test_an_index_lies_where_the_user_keeps_caches(monkeypatch, tmp_path):
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    assert index_module.index_file(Path("/images")).parent == tmp_path / ".cache" / "tutelage"
    assert index_file(Path("/images")) != index_file(Path("/other"))
