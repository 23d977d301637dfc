"""Start main_pretrain.py as a user does, small: in this process, as a process of its own, or under torchrun."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import main_pretrain

ROOT = Path(__file__).resolve().parent.parent

# 40 images in batches of 8: five steps per epoch. Double precision, so that sums in another order agree to 1e-9.
SMALL = {
    "arch": "vit_micro",
    "patch_size": 8,
    "out_dim": 48,
    "batch_size_per_gpu": 8,
    "epochs": 2,
    "warmup_epochs": 1,
    "lr": 0.05,
    "momentum_teacher": 0.9,
    "global_crops_size": 32,
    "local_crops_size": 16,
    "local_crops_number": 2,
    "num_workers": 0,
    "knn_every": 0,
    "print_freq": 1,
    "precision": "fp64",
    "device": "cpu",
}


def make_images(folder: Path, count: int = 40, classes: int = 4) -> Path:
    """Class folders of small pictures with some structure."""
    rng = np.random.default_rng(0)
    for index in range(count):
        coarse = rng.integers(0, 256, (5, 6, 3), dtype=np.uint8)
        path = folder / f"class{index % classes}" / f"{index:03}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(coarse).resize((60, 50), Image.Resampling.BICUBIC).save(path, quality=95)
    return folder


def argv(**options) -> list[str]:
    """``SMALL`` with changes, as a command line; True is a flag, None leaves an option out."""
    words = []
    for name, value in {**SMALL, **options}.items():
        if value is None:
            continue
        words += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    return words


def run_here(monkeypatch, **options) -> int:
    """In this process: quick, and open to monkeypatching."""
    handlers = {name: signal.getsignal(name) for name in (signal.SIGTERM, signal.SIGUSR1)}
    monkeypatch.setattr(sys, "argv", ["main_pretrain.py", *argv(**options)])
    try:
        return main_pretrain.main()
    finally:
        for name, handler in handlers.items():
            signal.signal(name, handler)


def start(nproc: int = 1, script: list[str] | None = None, **options) -> subprocess.Popen:
    """A process of its own, or ``nproc`` of them under torchrun; ``script`` replaces main_pretrain.py."""
    script = script or [str(ROOT / "main_pretrain.py")]
    launcher = []
    if nproc > 1:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--local_addr", "127.0.0.1"]
        launcher += ["--nproc_per_node", str(nproc)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(
        [sys.executable, *launcher, *script, *argv(**options)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=env,
        cwd=ROOT,
    )


def finish(process: subprocess.Popen, code: int = 0) -> str:
    """Wait for the end; everything it printed. Fails with that text when the exit code is another."""
    output, _ = process.communicate(timeout=300)
    assert process.returncode == code, f"exit code {process.returncode} instead of {code}\n{output}"
    return output


def wait_for_line(process: subprocess.Popen, text: str) -> str:
    """Read until a line contains ``text``; what was read."""
    read = ""
    for line in process.stdout:
        read += line
        if text in line:
            return read
    raise AssertionError(f"ended without {text!r}:\n{read}")


def load(folder: Path) -> dict:
    return torch.load(folder / "checkpoint.pth", weights_only=True)


def tensorboard_of(folder: Path) -> EventAccumulator:
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return events


def flatten(value, prefix: str = "") -> dict:
    """Nested dicts and lists -> one dict of leaves."""
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, (list, tuple)):
        items = enumerate(value)
    else:
        return {prefix: value}
    return {name: leaf for key, inner in items for name, leaf in flatten(inner, f"{prefix}/{key}").items()}


def assert_same_run(one: Path, other: Path, rtol: float = 0.0, atol: float = 0.0, first_epoch: int = 0) -> None:
    """Weights, teacher, centres, moments and counters of two runs: bit for bit, log.txt too, or within a tolerance.

    No field of log.txt differs by nature: times and throughputs (training.monitor.CLOCKS) are not written there.
    ``first_epoch``: with which ``other`` began, where it went on with a checkpoint of another folder.
    """
    if rtol == atol == 0.0:
        theirs, ours = ((folder / "log.txt").read_text().splitlines() for folder in (one, other))
        assert ours == theirs[first_epoch:]
    a, b = ({k: v for k, v in load(folder).items() if k not in ("args", "tutelage")} for folder in (one, other))
    a, b = flatten(a), flatten(b)
    assert a.keys() == b.keys()
    for name, value in a.items():
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(
                b[name], value, rtol=rtol, atol=atol, msg=lambda text, name=name: f"{name}: {text}"
            )
        else:
            assert b[name] == value, name
