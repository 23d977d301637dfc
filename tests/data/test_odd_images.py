"""Files that are no files, too large, endless or of other kinds: told before they are read, and never waited for."""

import os
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data import decode, suffixes
from data.datasets import BadImage, open_source
from data.decode import Reading, decode_array, decode_pil
from data.preprocess import eval_transform
from data.quiet import without_remarks
from evaluation.features import batches
from tests.data.helpers import encoded, one_process, photograph, write_folder, write_list

# ---- what is passed over --------------------------------------------------------------------------------------------


def test_files_of_other_kinds_are_counted_and_more_than_the_images_are_a_warning(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(suffixes, "HAS_HEIF", False)
    monkeypatch.setattr(suffixes, "EXTENSIONS", tuple(set(suffixes.EXTENSIONS) - set(suffixes.HEIF)))
    root = write_folder(tmp_path / "set", [f"a/{number}.png" for number in range(4)])
    (root / "a" / "notes.txt").touch()
    open_source(str(root))
    assert caplog.messages == [f"{root}: 1 files that are no images passed over: .txt (1)"]
    for number in range(200):
        (root / "a" / f"{number}.HEIC").touch()
    (root / "a" / "README").touch()
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
        for file in sorted(root.rglob("*.*")):
            archive.write(file, file.relative_to(root))
    caplog.clear()
    for path in (root, root, tmp_path / "set.zip"):
        assert len(open_source(str(path))) == 4
    first, second = caplog.messages
    assert "warning: 202 files that are no images passed over: .heic (200), .txt (1), no suffix (1)" in first
    assert "more than the 4 images" in first and "convert" in first and "pillow-heif" in first
    assert "set.zip: warning: 201 files" in second


@pytest.mark.skipif(not suffixes.HAS_HEIF, reason="pillow-heif is not installed")
def test_apples_images_are_read_where_the_package_is_installed(tmp_path):
    root = write_folder(tmp_path / "set", ["a/1.png"])
    Image.fromarray(photograph(0, 24, 32)).save(root / "a" / "2.heic", "HEIF")
    assert open_source(str(root)).array(1).shape == (24, 32, 3)


# ---- what is no file, or no file of this size -----------------------------------------------------------------------


def within(seconds: float, function, *arguments):
    """What ``function`` raises; a process of its own would be needed to end it, so the time is only looked at."""
    began = time.monotonic()
    with pytest.raises(BadImage) as caught:
        function(*arguments)
    assert time.monotonic() - began < seconds
    return caught.value


def test_pipes_devices_and_sparse_giants_in_a_list_are_unreadable_images(tmp_path):
    listed = write_list(tmp_path, ["pipe.jpg", "endless.png", "big.tif", "a.png", "b.png", "c.png"])
    for name in ("pipe.jpg", "endless.png"):
        (tmp_path / name).unlink()
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "endless.png").symlink_to("/dev/zero")
    os.truncate(tmp_path / "big.tif", 300 * 10**9)
    source = open_source(str(listed))
    for index, words in enumerate(("pipe, socket or device", "pipe, socket or device", "300000000000 bytes on disk")):
        error = within(5, source.array, index)
        assert words in error.reason and source.image_name(index) == error.name


def test_an_entry_of_a_zip_that_unfolds_without_end_is_an_unreadable_image(tmp_path):
    with zipfile.ZipFile(tmp_path / "z.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("1.png", bytes(2**22))
    source = open_source(str(tmp_path / "z.zip"))
    source.reading = Reading(max_pixels=1)
    source.index.places = np.array([[0, 10, 2**40, zipfile.ZIP_DEFLATED, 0]])
    assert "more than any image" in within(5, source.array, 0).reason


@pytest.mark.parametrize("function", [decode_pil, decode_array])
def test_memory_that_runs_out_makes_an_unreadable_image(monkeypatch, function):
    def full(*_):
        raise MemoryError

    monkeypatch.setattr(decode, "_decoded", full)
    error = within(5, function, encoded(photograph(0, 24, 32)), "a.png")
    assert (error.name, error.reason) == ("a.png", "it does not fit into memory")


def test_a_line_of_pixels_that_resizing_makes_huge_is_an_unreadable_image(tmp_path):
    write_folder(root := tmp_path / "set", ["a/1.png"])
    Image.new("L", (1, 20000)).save(root / "a" / "2.png")
    found = []
    options = {"batch_size": 2, "num_workers": 0, "device": torch.device("cpu"), "world": one_process()}
    for indices, _ in batches(open_source(str(root)), eval_transform(480, 548), unreadable=found, **options):
        assert indices.tolist() == [0]
    (image,) = found
    assert image.name == f"{root}/a/2.png" and "1 x 20000 pixels would be 548 x 10960000" in image.reason


def test_libjpegs_remarks_are_silenced_and_nothing_else_is(capfd):
    data = encoded(photograph(0), "JPEG")
    start = data.index(b"\xff\xda")
    damaged = data[:start] + b"\0\1\2" + data[start:]
    os.write(2, b"before\n")
    for _ in range(2):
        assert decode_array(damaged, "a.jpg").shape == (90, 120, 3)
    with without_remarks():
        os.write(2, b"Corrupt JPEG data: 3 extraneous bytes\nmeanwhile\n")
    os.write(2, b"after\n")
    assert capfd.readouterr().err == "before\nmeanwhile\nafter\n"


# ---- what hangs -----------------------------------------------------------------------------------------------------

HANGS = """
import os, sys, signal, threading, time
from data import waiting
waiting.PATIENCE, waiting.POLL, waiting.GRACE = 0.5, 0.2, 0.5
import numpy as np
from data.loader import TrainLoader
from data.source import Source
from tests.data.helpers import one_process
from utils import RunStopped

class Gone(Source):  # as a network mount that does not answer
    name, labels, class_names = "gone", np.zeros(4, np.int64), []
    def array(self, index):
        open(sys.argv[1]).read()
    pil = array

class Views:
    augment = "fast"

stop = []
signal.signal(signal.SIGTERM, lambda *_: stop.append(1))
threading.Timer(2.0, lambda: os.kill(os.getpid(), signal.SIGTERM)).start()
options = dict(batch_size=2, num_workers=int(sys.argv[2]), world=one_process())
if sys.argv[3] == "features":
    from evaluation.features import batches
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    list(batches(Gone(), None, device=one_process().device, unreadable=[], **options))
options |= dict(seed=0, epochs=1, stop_requested=lambda: bool(stop))
try:
    list(TrainLoader(Gone(), Views(), **options))
except RunStopped as error:
    print(error)
    sys.exit(error.exit_code)
"""


@pytest.mark.parametrize(
    ("workers", "what", "code"),
    [(1, "training", 75), (0, "training", 75), (1, "features", -signal.SIGTERM)],
)
def test_whatever_hangs_in_a_loading_process_is_said_and_sigterm_still_ends_the_run(tmp_path, workers, what, code):
    os.mkfifo(tmp_path / "pipe")
    script = [sys.executable, "-c", HANGS, str(tmp_path / "pipe"), str(workers), what]
    run = subprocess.run(script, capture_output=True, text=True, timeout=90, cwd=Path(__file__).parents[2])
    assert run.returncode == code, run.stderr
    who = "worker 0" if workers else "the loading of images"
    assert f"{who} has waited" in run.stderr and "of gone" in run.stderr
    assert what == "features" or "stopped on request while waiting for images" in run.stdout + run.stderr
