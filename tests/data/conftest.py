"""Indices of data sets are kept with the test, never in the home of whoever runs it."""

import logging

import pytest

from utils import log


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(autouse=True)
def as_at_the_start(caplog):
    """What a script that ran before in this process wanted to be told is not told here, unless a test asks for it."""
    caplog.set_level(logging.NOTSET, logger=log.name)
