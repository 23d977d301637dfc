"""Pretrain a student network from a teacher, without labels.

    python main_pretrain.py --output_dir out                        # the bundled photographs, on this machine
    torchrun --nproc_per_node=8 main_pretrain.py --method dino --arch vit_small \\
        --data_path /imagenet/train --output_dir out                # one node of eight GPUs

A run that is found in --output_dir is continued exactly where it stopped. ``train_one_epoch`` is the step.
"""

import argparse
import contextlib
import itertools
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic matrix products; read when CUDA starts
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # threads that wait must not take the loading processes' time

import numpy as np
import torch

from data.datasets import Source, open_training
from data.decode import reading_from
from data.device import to_device_ahead
from data.index import refresh_indices
from data.loader import TrainLoader, steps_per_epoch
from data.published import DATASET_OPTIONS, place_from
from lock import hold
from methods import method_class
from methods.base import Clock, Method
from models.batch_norm import synchronise_batch_norm
from randomness import counted_seed
from training.blackbox import BlackBox, replay
from training.checkpointing import save_checkpoint
from training.consensus import Consensus
from training.dry_run import dry_run
from training.frozen import measure_frozen
from training.monitor import Monitor
from training.online_knn import OnlineKNN
from training.optim import build_optimizer, optimizer_step, overflow, set_schedules
from training.options import check_options, compare_with_presets, options_named, parse_options, unused_arguments
from training.planner import describe_plan
from training.prepare import prepare_blocks, prepare_device, refuse_pieces_of_batch_norm
from training.preview import attention_pictures
from training.pseudo_labels import PseudoLabels
from training.start import begin
from utils import (
    EXIT_REQUEUE,
    RunStopped,
    World,
    autocast,
    barrier,
    batch_dtype,
    distributed,
    escape,
    git_revision,
    half_dtype,
    init_world,
    leave_world,
    log,
    run_cli,
)

QUIET_EPOCHS = 2  # of the warm-up, before a run's health is judged


@dataclass
class Run:
    """Everything that exists once per run."""

    args: argparse.Namespace
    world: World
    source: Source
    method: Method
    model: torch.nn.Module  # the method, wrapped where there are several processes
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler | None
    niter: int  # steps per epoch
    global_batch: int  # images per step of all processes
    schedules: dict[str, np.ndarray]  # one value per iteration
    monitor: Monitor
    consensus: Consensus
    blackbox: BlackBox
    pseudo_labels: PseudoLabels
    start: dict | None = None  # the run that this one began with
    saved_at: float = field(default_factory=time.monotonic)

    def clock(self, epoch: int, step: int, first_sample: int = 0) -> Clock:
        iteration = epoch * self.niter + step
        now = {name: float(values[iteration]) for name, values in self.schedules.items()}
        place = {"seed": self.args.seed, "first_sample": first_sample, "global_batch": self.global_batch}
        return Clock(epoch=epoch, iteration=iteration, **place, **now)

    def time_to_save(self) -> bool:
        minutes = self.args.save_every_minutes
        return minutes > 0 and time.monotonic() - self.saved_at > 60 * minutes


def train_one_epoch(run: Run, epoch: int, pieces: Iterator[dict], first_step: int = 0) -> None:
    """The epoch from ``first_step`` on. Raises RunStopped, state saved, when asked to stop or unable to go on."""
    for step in range(first_step, run.niter):
        clock = run.clock(epoch, step)
        set_schedules(run.optimizer, clock)
        torch.manual_seed(counted_seed(run.args.seed, clock.iteration, run.world.rank))  # for library backbones

        losses, batch = forward_backward(run, pieces, epoch, step)
        if run.scaler is not None:
            run.scaler.unscale_(run.optimizer)
        norms = run.method.clip_gradients(run.args.clip_grad, clock)
        run.method.after_backward(clock)

        finite, overflowed = losses["loss"].isfinite(), None
        if run.scaler is None:
            finite = finite & norms.isfinite().all()
        else:  # parity: a gradient too large for fp16 stops the optimiser alone, not teacher and centre (main_dino.py)
            overflowed = overflow(run.optimizer, run.scaler)
        tag, due = (clock, batch["indices"]), run.time_to_save()
        gate = run.consensus.agree(finite, batch["bad_images"], tag, save=due, overflow=overflowed)
        verdict = run.consensus.verdict()
        if verdict:
            run.blackbox.record(run.method, verdict)

        optimizer_step(run.optimizer, run.scaler, gate)
        run.method.after_step(clock, gate)
        run.monitor.step(losses, run.method.health() if run.monitor.wants_health(step) else {}, clock, batch["waited"])
        if verdict:
            save_or_stop(run, epoch, step + 1, stop=verdict.stop, due=verdict.save)
    settle(run)


def forward_backward(run: Run, pieces: Iterator[dict], epoch: int, step: int) -> tuple[dict[str, torch.Tensor], dict]:
    """Teacher, student, loss and gradients of the batch, piece by piece; gradients are exchanged with the last one.

    Returns the mean of every loss, still on the device, and what is remembered of the batch.
    """
    run.optimizer.zero_grad(set_to_none=True)
    count = run.args.accum_iter
    means: dict[str, torch.Tensor] = {}
    batch = {"bad_images": 0, "indices": [], "waited": 0.0}
    for number in range(count):
        began = time.perf_counter()
        piece = next(pieces)
        batch["waited"] += time.perf_counter() - began
        batch["indices"].append(piece["indices"])
        batch["bad_images"] += piece.get("replaced", 0)
        for name, reason in piece["bad"]:
            log.error("unreadable image, replaced by another: %s (%s)", name, reason)

        exchange = number == count - 1 or run.model is run.method
        with contextlib.nullcontext() if exchange else run.model.no_sync():
            with autocast(run.args.precision, run.world.device):
                losses = run.model(piece, run.clock(epoch, step, piece["first_sample"]))
            loss = losses["loss"] / count
            (loss if run.scaler is None else run.scaler.scale(loss)).backward()
        run.pseudo_labels.add(piece["indices"], run.method.pseudo_labels())
        for name, value in losses.items():
            means[name] = means.get(name, 0.0) + value.detach() / count
    return means, batch


def settle(run: Run) -> None:
    """Hear the verdict on the latest step, too, which is still on its way on a GPU."""
    verdict = run.consensus.verdict(wait=True)
    if verdict:
        run.blackbox.record(run.method, verdict)


def save_or_stop(run: Run, epoch: int, step: int, stop: bool, due: bool) -> None:
    """Between two steps, ``step`` of the epoch being done: save when it is ``due``, stop when there is a reason."""
    reason = run.blackbox.reason_to_stop()
    if reason or stop or due:
        save(run, epoch, step)
    if reason or stop:
        barrier()  # whoever exits first must not take the process that still saves with it
    if reason:
        raise RunStopped(reason)
    if stop:
        raise RunStopped(
            f"stopped on request, saved at epoch {epoch}, step {step} of {run.niter}; the same command continues",
            exit_code=EXIT_REQUEUE,
        )


def save(run: Run, epoch: int, step: int, numbered: bool = False) -> None:
    settle(run)
    save_checkpoint(run, epoch, step, numbered)
    run.saved_at = time.monotonic()


def train(run: Run, knn: OnlineKNN) -> None:
    """From where the run stands to its end: epochs, checkpoints, online k-NN."""
    args = run.args
    first_epoch, step = begin(run)
    if first_epoch >= args.epochs:
        log.info("%s holds a finished run of %d epochs", args.output_dir, args.epochs)
        return
    run.consensus.listen()
    pieces = device_pieces(run, first_epoch, step)
    # the first one before anything is written, since images may be unreadable; none where only a test is left
    pieces = itertools.chain(list(itertools.islice(pieces, 1)), pieces)
    run.monitor.open(first_epoch, step)
    began = time.monotonic()
    for epoch in range(first_epoch, args.epochs):
        run.monitor.begin_epoch()
        if step == 0:
            run.blackbox.begin_epoch()
        train_one_epoch(run, epoch, show_first(run, pieces, epoch, step), step)
        step = 0
        run.monitor.note(run.pseudo_labels.end_epoch())
        results = {}
        if knn.due(epoch):
            save(run, epoch, run.niter)  # every step is done: a run that dies in the test begins with the test
            results = knn()
        run.monitor.end_epoch(epoch, results, knn.unreadable, run.blackbox.bad_images["epoch"])
        save(run, epoch + 1, 0, numbered=epoch % args.saveckp_freq == 0)
    run.monitor.close()
    log.info("training took %.1f minutes; %s", (time.monotonic() - began) / 60, run.blackbox.summary())


def show_first(run: Run, pieces: Iterator[dict], epoch: int, step: int) -> Iterator[dict]:
    """The same pieces; the first ones of some epochs also become pictures in TensorBoard."""
    for number, piece in enumerate(pieces):
        if number == 0 and run.monitor.writer is not None and (epoch % max(1, run.args.knn_every) == 0):
            clock = run.clock(epoch, step, piece["first_sample"])
            with autocast(run.args.precision, run.world.device):
                _, crops = next(iter(run.method.pictures(piece, clock)))
            run.monitor.add_image("crops", crops, clock.iteration)
            pictures = attention_pictures(run.method.evaluation_backbone(), piece["crops"][0][:4])
            if pictures is not None:
                run.monitor.add_image("attention", pictures, clock.iteration)
        yield piece


def device_pieces(run: Run, epoch: int, step: int) -> Iterator[dict]:
    """Batches from a position on, to the end of training, ready on the device."""
    args = run.args
    loader = TrainLoader(
        run.source,
        type(run.method).views(args),
        batch_size=args.batch_size_per_gpu,
        pieces=args.accum_iter,
        world=run.world,
        seed=args.seed,
        epochs=args.epochs,
        num_workers=args.num_workers,
        start_epoch=epoch,
        start_step=step,
        stop_requested=lambda: run.consensus.stop_requested,
    )
    return iter(to_device_ahead(loader, run.world.device, batch_dtype(args.precision)))


def share(method: Method, world: World) -> torch.nn.Module:
    """The method, or what exchanges its gradients where there are several processes."""
    return method if world.size == 1 else distributed(method, world.device)


def build(
    args: argparse.Namespace,
    world: World,
    source: Source | None = None,
    make: Callable[[Callable[[], Method]], Method] = lambda build_method: build_method(),
    share: Callable[[Method, World], torch.nn.Module] = share,
) -> Run:
    """Data, networks, optimiser, schedules. Raises UsageError for what only shows when they are built.

    The last three arguments are for a run that is only simulated: its images, where its method is made, and how its
    gradients are exchanged.
    """
    refresh_indices(args.refresh_index and source is None)
    source = source or open_training(place_from(args), args.subset, args.split).read_as(reading_from(args))
    global_batch = args.batch_size_per_gpu * world.size
    niter = steps_per_epoch(len(source), global_batch)

    method = make(lambda: build_method(args))
    method = method.place(world.device, batch_dtype(args.precision), half_dtype(args.precision))
    prepare_blocks(method, args)
    method = synchronise_batch_norm(method)
    model = share(method, world)
    quiet = max(1, min(args.warmup_epochs, QUIET_EPOCHS))
    monitor = Monitor(Path(args.output_dir), args.epochs, niter, args.print_freq, global_batch, world, quiet)
    return Run(
        args=args,
        world=world,
        source=source,
        method=method,
        model=model,
        optimizer=build_optimizer(args.optimizer, method.param_groups()),
        scaler=torch.amp.GradScaler(world.device.type) if args.precision == "fp16" else None,
        niter=niter,
        global_batch=global_batch,
        schedules=method.schedules(args, niter, global_batch),
        monitor=monitor,
        consensus=Consensus(world.device),
        blackbox=BlackBox(args, len(source), world),
        pseudo_labels=PseudoLabels(source.labels, world),
    )


def build_method(args: argparse.Namespace) -> Method:
    torch.manual_seed(args.seed)
    method = method_class(args.method).build(args)
    refuse_pieces_of_batch_norm(method, args)
    return method


def describe(run: Run) -> None:
    """The effective settings, what differs from the nearest preset, and what that preset reached."""
    log.info(
        "git: %s, torch %s, %d process(es) on %s", git_revision(), torch.__version__, run.world.size, run.world.device
    )
    for name, value in sorted(vars(run.args).items()):
        log.info("%s: %s", name, escape(str(value)))
    for line in (*unused_arguments(run.args), *compare_with_presets(run.args, run.world.size)):
        log.info("%s", escape(line))
    log.info(
        "%s: %d images per step, %d steps per epoch, peak learning rate %.3g",
        run.source.name,
        run.global_batch,
        run.niter,
        run.schedules["lr"].max(),
    )


def main() -> int:
    args = parse_options(sys.argv[1:])
    world = init_world(args.device, args.dist_url, args.backend)
    if args.replay:
        given = options_named(args, ("data_path", *DATASET_OPTIONS, "split", "precision"), sys.argv[1:])
        return replay(Path(args.replay), given, world)
    check_options(args, world)
    prepare_device(args, world)
    run = build(args, world)
    describe(run)
    measure_frozen(run)
    if args.dry_run:
        if args.init_from:
            begin(run)
        dry_run(run, device_pieces(run, 0, 0))
        images, devices = len(run.source), args.devices or world.size
        del run
        leave_world()
        if world.rank == 0:
            describe_plan(parse_options(sys.argv[1:]), devices, images, build, train_one_epoch)
        return 0
    knn = OnlineKNN(args, world, run.method.evaluation_backbone(), run.method.image_size(args))
    with hold(Path(args.output_dir), world):
        train(run, knn)
    return 0


if __name__ == "__main__":
    run_cli(main)
