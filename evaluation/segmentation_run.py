"""A run of segmentation: what exists once, and what of it is written."""

import argparse
from dataclasses import dataclass

import torch

from data.ade20k import Splits
from evaluation.iterations import IterationRun
from evaluation.results import write_result
from evaluation.segmentation import Segmenter, Window
from evaluation.segmentation_protocols import Protocol
from evaluation.unreadable import remark
from utils import log


@dataclass(kw_only=True)
class SegmentationRun(IterationRun):
    sets: Splits
    head: str  # one of PROTOCOLS
    protocol: Protocol
    segmenter: Segmenter
    window: Window | None
    start: str  # what the network's weights were before


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
