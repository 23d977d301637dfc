"""Evaluations that train for a number of steps: the loop, its log, what is saved, and what a run is continued from.

Segmentation and detection train so: tested every so many steps, of which the last test counts.
"""

import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch

from data.device import to_device_ahead
from data.loader import TrainLoader, steps_per_epoch
from evaluation.run import Run, notes, refuse_another_run, save_run, take_notes, tell_replaced
from models.safe_load import load_file
from utils import RunStopped, all_reduce_sum, barrier, log, world_size

LATEST = "checkpoint.pth"
LINES_EVERY = 50  # iterations


@dataclass(kw_only=True)
class IterationRun(Run):
    optimizer: torch.optim.Optimizer | None  # None: nothing is trained
    batch: int  # images of a step and process
    iterations: int
    lr: float
    last: dict | None = None  # the latest test
    lines: list[dict] = field(default_factory=list)  # of log.txt


class Work(NamedTuple):
    """What an evaluation does in the loop. ``iterate`` returns sums of ``measures`` over this process's images."""

    options: dict  # what a run must have in common with the one it continues
    state: Callable[[], dict]  # tensors to be saved
    load: Callable[[dict], object]
    pieces: Callable[[int], Iterator[dict]]  # batches from an iteration on
    iterate: Callable[[dict, int], torch.Tensor]
    measures: tuple[str, ...]
    rate: Callable[[int], float]  # learning rate of an iteration
    see: Callable[[], None]  # look at the test images before anything is trained
    test: Callable[[], dict]
    eval_every: int


def pieces_from(run: IterationRun, views: Callable, start: int) -> Iterator[dict]:
    """Batches from iteration ``start`` on, on the device."""
    args = run.args
    common = {"batch_size": run.batch, "world": run.world, "seed": args.seed, "num_workers": args.num_workers}
    niter = steps_per_epoch(len(run.sets.train), run.batch * run.world.size)
    epoch, step = divmod(start, niter)
    epochs = -(-run.iterations // niter)
    loader = TrainLoader(run.sets.train, views, **common, epochs=epochs, start_epoch=epoch, start_step=step)
    return to_device_ahead(loader, run.world.device)


def only_read(image: object) -> torch.Tensor:
    """The transform of test images that are looked at before anything is trained."""
    return torch.zeros(1)


def train_by_iterations(run: IterationRun, work: Work) -> None:
    args, start = run.args, resume(run, work)
    if start == 0:
        work.see()
    sums, bad, every = torch.zeros(len(work.measures) + 1, device=run.world.device), {}, work.eval_every
    pieces = work.pieces(start)
    if start and run.last is None and start % every == 0:  # stopped between a save and its test
        end_with_test(run, work, start)
    since, begun = time.monotonic(), start
    for iteration in range(start, run.iterations):
        done, piece = iteration + 1, next(pieces)
        sums[:-1] += work.iterate(piece, iteration)
        sums[-1] += len(piece["bad"])
        bad |= dict(piece["bad"])
        is_tested = done % every == 0 or done == run.iterations
        is_saved = is_tested or done % args.save_every == 0
        if is_saved or done % LINES_EVERY == 0:
            tell(run, work, done, sums, bad, (done - begun) / (time.monotonic() - since))
            sums, bad = torch.zeros_like(sums), {}
        if is_tested:
            run.last = None
        if is_saved:
            save(run, work, done)
        if is_tested:
            end_with_test(run, work, done)
    if run.last is None:
        end_with_test(run, work, run.iterations)


def end_with_test(run: IterationRun, work: Work, iteration: int) -> None:
    run.last = {"iteration": iteration} | work.test()
    run.lines.append(run.last)
    save(run, work, iteration)


def tell(run: IterationRun, work: Work, done: int, sums: torch.Tensor, bad: dict[str, str], speed: float) -> None:
    """A line of log.txt about the iterations since the last one, and one for people."""
    before = next((line["iteration"] for line in reversed(run.lines)), 0)
    *values, replaced = all_reduce_sum(sums).tolist()
    count = (done - before) * run.world.size
    if not all(map(math.isfinite, values)):
        raise RunStopped(f"the loss is not finite before step {done}; lower --lr; nothing of it was saved")
    means = {name: value / count for name, value in zip(work.measures, values, strict=True)}
    run.lines.append({"iteration": done, **means, "lr": work.rate(done - 1)})
    said = "  ".join(f"{name}: {value:.4f}" for name, value in means.items())
    log.info(f"[{done}/{run.iterations}]  {said}  {speed * run.batch * run.world.size:.1f} images/s")
    tell_replaced(run, bad, replaced)


def average_gradients(optimizer: torch.optim.Optimizer) -> None:
    """Means over processes, whose shares of a batch are equal, in one message; all have gradients of the same."""
    if world_size() == 1:
        return
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    flat = all_reduce_sum(torch.cat([gradient.flatten() for gradient in gradients])).div_(world_size())
    parts = flat.split([gradient.numel() for gradient in gradients])
    torch._foreach_copy_(gradients, [part.view_as(g) for part, g in zip(parts, gradients, strict=True)])


def save(run: IterationRun, work: Work, iteration: int) -> None:
    """log.txt, then what the run is continued from."""
    if run.world.rank == 0:
        file = {"state_dict": work.state(), "optimizer": run.optimizer.state_dict(), "iteration": iteration}
        file["tutelage"] = {"options": work.options, "last": run.last, **notes(run)}
        save_run(Path(run.args.output_dir), run.lines, file, [LATEST])
    barrier()


def resume(run: IterationRun, work: Work) -> int:
    """Continue the run in --output_dir: the iteration to begin with.

    Raises UsageError when that run is another one, naming every difference.
    """
    folder = Path(run.args.output_dir)
    path = folder / LATEST
    if not path.exists():
        return 0
    file = load_file(path)
    record = file.get("tutelage", {})
    refuse_another_run(path, record.get("options", {}), work.options)
    work.load(file["state_dict"])
    run.optimizer.load_state_dict(file["optimizer"])
    run.last = record["last"]
    take_notes(run, record)
    lines = map(json.loads, (folder / "log.txt").read_text().splitlines())
    reached = file["iteration"], run.last is not None and run.last["iteration"] == file["iteration"]
    run.lines = [line for line in lines if (line["iteration"], "lr" not in line) <= reached]
    log.info(f"continuing {path} at iteration {file['iteration']} of {run.iterations}")
    return file["iteration"]
