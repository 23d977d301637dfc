"""Whoever waits long for an image says so: a network mount that is gone looks like a slow training.

A read that hangs cannot be ended from within its process, so a thread beside it tells which one it is, and ends the
process where that was asked for.
"""

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch.utils.data import get_worker_info

from utils import EXIT_REQUEUE, log

PATIENCE = 60.0  # seconds until it is said
POLL = 1.0  # seconds between two looks at whether a stop was asked for
GRACE = 10.0  # seconds that a piece may take to arrive after that
STOPPED = (
    "stopped on request while waiting for images that do not come; the same command continues from what was saved last"
)


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


def watch(reading: Reading, who: str, stop_requested: Callable[[], bool] = lambda: False) -> Callable[[], None]:
    """Start a thread that tells once for every image for which ``who`` has waited PATIENCE. What is returned ends it.

    It ends the process where ``stop_requested`` says so and one image has not come for GRACE since.
    """
    ended = threading.Event()
    thread = threading.Thread(target=_tell, args=(reading, who, stop_requested, ended), daemon=True)
    thread.start()

    def end() -> None:
        """Also waits for it: a thread that ends while Python does can abort the process."""
        ended.set()
        if threading.current_thread() is not thread:  # which may be the one that collects garbage
            thread.join()

    return end


def watch_worker(worker: int) -> None:
    """``watch`` in a loading process, whose data set has the Reading as ``reading``; a worker_init_fn.

    One that hangs when its run is gone ends itself.
    """
    parent = os.getppid()
    watch(get_worker_info().dataset.reading, f"worker {worker}", lambda: os.getppid() != parent)


def _tell(reading: Reading, who: str, stop_requested: Callable[[], bool], ended: threading.Event) -> None:
    told, asked, since = None, None, 0.0
    while not ended.wait(min(POLL, PATIENCE / 10)):
        now = reading.now
        if now is None:
            continue
        seconds = time.monotonic() - now[1]
        if seconds >= PATIENCE and now != told:
            log.error("%s has waited %.0f s for %s", who, seconds, reading.name_of(now[0]))
            told = now
        if not stop_requested():
            continue
        if now != asked:
            asked, since = now, time.monotonic()
        elif time.monotonic() - since >= GRACE:
            if get_worker_info() is None:
                log.error(STOPPED)
            sys.stdout.flush()
            os._exit(EXIT_REQUEUE)  # the thread that reads would never hear of an exception
