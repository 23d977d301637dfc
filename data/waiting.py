"""Whoever waits long for an image says so: a network mount that is gone looks like a slow training.

A read that hangs cannot be ended from within its process, so a thread beside it tells which one it is.
"""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from utils import log

PATIENCE = 60.0  # seconds until it is said
POLL = 1.0  # seconds between two looks at whether a stop was asked for
GRACE = 10.0  # seconds that a piece may take to arrive after that


class Reading:
    """Which image a process reads, and since when."""

    def __init__(self, name_of: Callable[[int], str]):
        self.name_of = name_of
        self.now: tuple[int, float] | None = None

    @contextmanager
    def of(self, index: int) -> Iterator[None]:
        self.now = index, time.monotonic()
        try:
            yield
        finally:
            self.now = None


def watch(reading: Reading, who: str) -> threading.Event:
    """Start a thread that tells once for every image for which ``who`` has waited PATIENCE; the event ends it."""
    ended = threading.Event()
    threading.Thread(target=_tell, args=(reading, who, ended), daemon=True).start()
    return ended


def _tell(reading: Reading, who: str, ended: threading.Event) -> None:
    told = None
    while not ended.wait(PATIENCE / 10):
        now = reading.now
        if now is None or now == told:
            continue
        seconds = time.monotonic() - now[1]
        if seconds >= PATIENCE:
            log.error("%s has waited %.0f s for %s", who, seconds, reading.name_of(now[0]))
            told = now
