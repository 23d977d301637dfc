"""What a run will need of a GPU, from some of its steps on one that does not exist (simulation/)."""

import argparse
import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from data.device import to_device_ahead
from data.loader import TrainLoader
from data.source import Source
from methods import method_class
from simulation.gpu import DEVICE, GPU, fake_gpu, fake_world, obstacle
from simulation.watch import Record
from training.options import resolve_precision
from utils import World, batch_dtype, log

STEPS = 3
DRAWN = 4  # images whose views are really made; the batch repeats their shapes
GB = 2**30
RESERVED = 1.0  # GB of a card that are not for tensors: CUDA's context, libraries' workspaces, gaps between blocks
MEMORIES = (16, 24, 40, 80)  # GB


class Card(NamedTuple):
    """Peak rates in 10^12 operations per second, dense, from the makers' data sheets; 0 where there is no such unit."""

    name: str
    bf16: float
    fp16: float
    fp32: float


CARDS = (
    Card("A100", 312, 312, 19.5),
    Card("H100 SXM", 989, 989, 67),
    Card("V100", 0, 125, 15.7),
    Card("RTX 4090", 165, 165, 82.6),
    Card("L4", 121, 121, 30.3),
)


@dataclass(frozen=True)
class Plan:
    """Of one process and one step, in which everything is in place: optimiser state, prototypes that are trained."""

    images: int  # of this process
    peak: int  # bytes
    parts: Counter  # what holds them at the peak
    where: str  # the line that asked for the last of them
    flops: float
    sent: int  # bytes handed to collectives
    processes: int


class Noise(Source):
    """Pictures of the usual size in which nothing is to be seen."""

    class_names: list[str] = []  # noqa: RUF012
    name, fingerprint = "noise", "noise"

    def __init__(self, images: int):
        self.labels = np.full(images, -1)

    def image_name(self, index: int) -> str:
        return f"noise/{index}"

    def array(self, index: int) -> np.ndarray:
        return np.random.default_rng(index % DRAWN).integers(0, 256, (375, 500, 3), np.uint8)

    def pil(self, index: int) -> Image.Image:
        return Image.fromarray(self.array(index))


def simulate(args: argparse.Namespace, devices: int, build: Callable, train_one_epoch: Callable) -> Plan:
    """The second of ``three_steps``."""
    _, (_, record, _), sent = three_steps(args, devices, build, train_one_epoch)
    sent += sum(record.collectives.values())
    parts = (record.peak, record.peak_parts, record.peak_where)
    return Plan(args.batch_size_per_gpu, *parts, record.flops, sent, devices)


def three_steps(
    args: argparse.Namespace, devices: int, build: Callable, train_one_epoch: Callable
) -> tuple[object, list[Record], int]:
    """An epoch of three steps, the last of ``args`` (precision resolved for a GPU), as one of ``devices`` processes.

    The first step makes what lasts, the second is like all others, with the third the epoch ends. ``build`` and
    ``train_one_epoch``: main_pretrain.py's. Returns the run, what happened in every step, and the bytes of the
    gradients that are exchanged.
    """
    world, records = World(0, devices, 0, DEVICE), []
    source, small = Noise(STEPS * args.batch_size_per_gpu * devices), draw_few(args)
    with fake_gpu(devices) as gpu, fake_world(devices):
        with gpu.watch.holding("weights"):
            dtype = batch_dtype(args.precision)
            run = build(args, world, source, lambda make: gpu.build(make, dtype), share=lambda method, world: method)
        sent = gpu.keep_gradients_in_buckets(run.method) if devices > 1 else 0
        run.monitor.world = dataclasses.replace(world, rank=1)  # which writes nothing
        book_moments(gpu, run.optimizer)
        pieces = to_device_ahead(lengthened(small, args, gpu), DEVICE, dtype)
        train_one_epoch(run, args.epochs - 1, note_steps(pieces, args.accum_iter, gpu, records))
    return run, records, sent


def note_steps(pieces: Iterator[dict], per_step: int, gpu: GPU, records: list[Record]) -> Iterator[dict]:
    """The same pieces; what happens after the first one of a step is noted in a record of its own."""
    for number, piece in enumerate(pieces):
        if number % per_step == 0:
            gpu.watch.record = Record()
            records.append(gpu.watch.record)
        yield piece


def book_moments(gpu: GPU, optimizer: torch.optim.Optimizer) -> None:
    """What is made while the optimiser steps is its own."""
    before = gpu.watch.holder

    def begin(*_: object) -> None:
        gpu.watch.holder = "optimiser"

    def end(*_: object) -> None:
        gpu.watch.holder = before

    optimizer.register_step_pre_hook(begin)
    optimizer.register_step_post_hook(end)


def draw_few(args: argparse.Namespace) -> dict:
    """A piece of a few images, as the loader makes it in the last epoch."""
    images, alone = min(args.batch_size_per_gpu // args.accum_iter, DRAWN), World(0, 1, 0, torch.device("cpu"))
    views = method_class(args.method).views(args)
    options = {"batch_size": images, "world": alone, "seed": 0, "epochs": args.epochs, "num_workers": 0}
    return TrainLoader(Noise(images), views, **options).piece(args.epochs - 1, 0)


def lengthened(small: dict, args: argparse.Namespace, gpu: GPU) -> Iterator[dict]:
    """The pieces of all steps: the small one, with tensors as long as those of so many images."""
    images, drawn = args.batch_size_per_gpu // args.accum_iter, len(small["indices"])
    for number in range(STEPS * args.accum_iter):
        piece = longer(small, images, drawn) | {"first_sample": number % args.accum_iter * images, "bad": []}
        gpu.pin(piece)
        yield piece


def longer(value: object, images: int, drawn: int) -> object:
    """Tensors whose first axis counts ``drawn`` images, or what these have, with an axis for ``images``."""
    if isinstance(value, torch.Tensor) and value.ndim:
        rows = len(value) * images // drawn
        return value.new_empty((rows, *value.shape[1:]))
    if isinstance(value, dict):
        return {name: longer(part, images, drawn) for name, part in value.items()}
    if isinstance(value, list):
        return [longer(part, images, drawn) for part in value]
    return value


# ---------------------------------------------------------------------------------------------------------------------
# What is said of it
# ---------------------------------------------------------------------------------------------------------------------


def describe_plan(
    args: argparse.Namespace, devices: int, images: int, build: Callable, train_one_epoch: Callable
) -> None:
    """Simulate the run on GPUs, and another batch of it, and say what it needs. ``images``: in the training data."""
    if why := obstacle():
        log.info("memory and time on GPUs are not simulated: %s", why)
        return
    with fake_gpu(devices):
        resolve_precision(args, DEVICE)

    def plan_of(batch: int) -> Plan:
        asked = argparse.Namespace(**{**vars(args), "batch_size_per_gpu": batch})
        return simulate(asked, devices, build, train_one_epoch)

    batch = args.batch_size_per_gpu
    fewer = max(1, batch // 2 // args.accum_iter) * args.accum_iter
    plan, smaller = plan_of(batch), plan_of(fewer if fewer < batch else 2 * batch)
    for line in lines_of(plan, smaller, args, images):
        log.info("%s", line)


def lines_of(plan: Plan, other: Plan, args: argparse.Namespace, images: int) -> list[str]:
    pieces = f" in {args.accum_iter} pieces" if args.accum_iter > 1 else ""
    parts = ", ".join(f"{name} {size / GB:.2f}" for name, size in plan.parts.most_common() if size > 0.005 * GB)
    fits = ", ".join(
        f"{memory} GB: {largest_batch(plan, other, memory, args.accum_iter) or 'none'}" for memory in MEMORIES
    )
    return [
        f"simulated on a GPU, {args.precision}, {plan.images} images per process{pieces}: memory at most "
        f"{plan.peak / GB:.2f} GB of tensors ({parts}), in {plan.where}",
        f"largest --batch_size_per_gpu, {RESERVED:g} GB left to the driver: {fits}",
        f"{plan.flops / plan.images / 1e9:.1f} GFLOP per image; {least_time(plan, args.precision, images)}",
        *traffic(plan),
    ]


def largest_batch(plan: Plan, other: Plan, memory: float, pieces: int) -> int:
    """Images per process that fit; memory grows with the images of a piece. A multiple of ``pieces``."""
    per_image = (plan.peak - other.peak) / (plan.images - other.images)
    room = (memory - RESERVED) * GB - plan.peak
    return max(0, int((plan.images + room / per_image) // pieces * pieces))


def least_time(plan: Plan, precision: str, images: int) -> str:
    """Products alone, at the rate no program reaches: a bound from below, and named so."""
    times = []
    for card in CARDS:
        rate = getattr(card, precision, 0)
        if rate:
            seconds = plan.flops / plan.images * images / (rate * 1e12) / plan.processes
            times.append(f"{card.name} {seconds / 60:.1f}")
    if not times:
        return f"no table of rates for {precision}"
    on = f"{plan.processes} processes on " if plan.processes > 1 else ""
    return f"at the very least (a bound, at peak rates) minutes per epoch of {images} images, {on}{', '.join(times)}"


def traffic(plan: Plan) -> list[str]:
    if plan.processes == 1:
        return []
    each = plan.images
    return [
        f"{plan.processes} processes: {each} images each, {each * plan.processes} per step; each hands "
        f"{plan.sent / 2**20:.1f} MB to collectives in every step"
    ]
