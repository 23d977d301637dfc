import os

import pytest

from training.checkpointing import _keep_as


def test_a_second_name_replaces_the_file_that_had_it(tmp_path):
    latest, previous = tmp_path / "latest", tmp_path / "previous"
    latest.write_text("new")
    previous.write_text("old")
    _keep_as(latest, previous)
    assert (latest.read_text(), previous.read_text()) == ("new", "new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "previous"]


def test_two_names_of_one_file_stay_as_they_are(tmp_path):
    latest, previous = tmp_path / "latest", tmp_path / "previous"
    latest.write_text("same")
    os.link(latest, previous)
    for _ in range(2):
        _keep_as(latest, previous)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "previous"]


@pytest.mark.parametrize("links", [True, False])
def test_what_a_killed_process_left_does_not_matter(tmp_path, monkeypatch, links):
    latest, previous = tmp_path / "latest", tmp_path / "previous"
    latest.write_text("new")
    rest = tmp_path / f"previous.tmp{os.getpid()}"
    os.link(latest, rest)
    if not links:

        def no_links(*_):
            raise OSError("this file system has no links")

        monkeypatch.setattr(os, "link", no_links)
    _keep_as(latest, previous)
    assert (latest.read_text(), previous.read_text()) == ("new", "new")
    assert not rest.exists()
