"""libjpeg's remarks: it prints them to the process's standard error, without a name, for every damaged image again."""

import contextlib
import os
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_REMARKS = (b"JPEG", b"JFIF", b"SOS parameters", b"progression sequence", b"scanlines", b"marker")
_lock = threading.Lock()
_paper: tuple[int, int] | None = None  # the process that opened it, and the file that is written to meanwhile


@contextmanager
def without_remarks() -> Iterator[None]:
    """Let nothing of libjpeg's through; what else is written meanwhile, by other threads, is written afterwards."""
    if not _lock.acquire(blocking=False):
        yield
        return
    try:
        with contextlib.ExitStack() as stack:
            with contextlib.suppress(OSError):  # there may be no standard error
                stderr = os.dup(2)
                stack.callback(os.close, stderr)
                paper = _own_paper()
                os.dup2(paper, 2)
                stack.callback(_give_back, paper, stderr)
            yield
    finally:
        _lock.release()


def _own_paper() -> int:
    """One file for a process and its end; forked ones would share the position of their parent's."""
    global _paper
    if _paper is None or _paper[0] != os.getpid():
        file = tempfile.TemporaryFile()  # noqa: SIM115 (stays open)
        _paper = os.getpid(), os.dup(file.fileno())
        file.close()
    return _paper[1]


def _give_back(paper: int, stderr: int) -> None:
    os.dup2(stderr, 2)
    size = os.lseek(paper, 0, os.SEEK_CUR)
    if not size:
        return
    text = os.pread(paper, size, 0)
    os.lseek(paper, 0, os.SEEK_SET)
    os.ftruncate(paper, 0)
    others = [line for line in text.splitlines(keepends=True) if not any(remark in line for remark in _REMARKS)]
    if others:
        os.write(stderr, b"".join(others))
