"""A run of segmentation: what exists once, and what of it is written and read again."""

import argparse
import json
from dataclasses import dataclass, field
from pathlib import Path

import torch

from data.ade20k import Splits
from evaluation.results import write_result
from evaluation.run import Run, notes, refuse_another_run, save_run, take_notes
from evaluation.segmentation import Segmenter, Window
from evaluation.segmentation_protocols import Protocol
from evaluation.unreadable import remark
from models.safe_load import load_file
from utils import barrier, log

LATEST = "checkpoint.pth"


@dataclass(kw_only=True)
class SegmentationRun(Run):
    sets: Splits
    head: str  # one of PROTOCOLS
    protocol: Protocol
    segmenter: Segmenter
    optimizer: torch.optim.Optimizer | None  # None: a given head is tested
    window: Window | None
    start: str  # what the network's weights were before
    batch: int  # images of a step and process
    iterations: int
    lr: float
    last: dict | None = None  # the latest test
    lines: list[dict] = field(default_factory=list)  # of log.txt


def options_of_trajectory(run: SegmentationRun) -> dict:
    """What a run must have in common with the one it continues."""
    args, sets = run.args, run.sets
    return {
        "network": f"{run.network.label} {run.start}",
        "training images": sets.train.fingerprint,
        "test images": sets.test.fingerprint,
        "head": run.head,
        "blocks": list(run.segmenter.blocks),
        "images per step": run.batch * run.world.size,
        "iterations": run.iterations,
        "learning rate": run.lr,
        "window": None if run.window is None else [list(part) for part in run.window],
        **{f"--{name}": getattr(args, name) for name in ("num_classes", "crop_size", "seed", "warmup")},
    }


def trained_state(run: SegmentationRun) -> dict[str, torch.Tensor]:
    """Tensors by name: of the head alone where the network is frozen."""
    state = run.segmenter.state_dict()
    if run.segmenter.frozen:
        state = {name: tensor for name, tensor in state.items() if name.startswith("decode_head.")}
    return state


def save(run: SegmentationRun, iteration: int) -> None:
    """log.txt, then what the run is continued from, in the layout of the published heads."""
    if run.world.rank == 0:
        file = {"state_dict": trained_state(run), "optimizer": run.optimizer.state_dict(), "iteration": iteration}
        file["tutelage"] = {"options": options_of_trajectory(run), "last": run.last, **notes(run)}
        save_run(Path(run.args.output_dir), run.lines, file, [LATEST])
    barrier()


def resume(run: SegmentationRun) -> int:
    """Continue the run in --output_dir: the iteration to begin with.

    Raises UsageError when that run is another one, naming every difference.
    """
    folder = Path(run.args.output_dir)
    path = folder / LATEST
    if not path.exists():
        return 0
    file = load_file(path)
    record = file.get("tutelage", {})
    refuse_another_run(path, record.get("options", {}), options_of_trajectory(run))
    run.segmenter.load_state_dict(run.segmenter.state_dict() | file["state_dict"])
    run.optimizer.load_state_dict(file["optimizer"])
    run.last = record["last"]
    take_notes(run, record)
    lines = map(json.loads, (folder / "log.txt").read_text().splitlines())
    reached = file["iteration"], run.last is not None and run.last["iteration"] == file["iteration"]
    run.lines = [line for line in lines if (line["iteration"], "mIoU" in line) <= reached]
    log.info(f"continuing {path} at iteration {file['iteration']} of {run.iterations}")
    return file["iteration"]


def report(run: SegmentationRun) -> None:
    """The JSON, and the last line."""
    numbers = run.last | {"head": run.head, "blocks": list(run.segmenter.blocks), "classes": run.sets.classes}
    if run.optimizer is not None:
        numbers |= {"iterations": run.iterations, "lr": run.lr}
    if run.world.rank == 0:
        write_result(run.args, "eval_segmentation", run.network, run.sets, run.unreadable, numbers)
    log.info(f"mIoU: {run.last['mIoU']:.2f}{remark(run.unreadable)}")


def per_process(args: argparse.Namespace, protocol: Protocol, processes: int) -> int:
    """Images of a step and process: as asked, else the protocol's batch shared among the processes."""
    return args.batch_size_per_gpu or max(1, protocol.batch // processes)
