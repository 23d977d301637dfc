"""Evaluations that train: what exists once per run, its images, what is written epoch by epoch, and continued."""

import argparse
import contextlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from data.device import to_device_ahead
from data.loader import TrainLoader
from evaluation.compared import compared, rows_to_compare
from evaluation.features import batches
from evaluation.sets import Sets
from evaluation.unreadable import NAMED, Unreadable, UnreadableImages, leave_out, named, readable, refuse
from lock import hold
from models.checkpoints import Network
from utils import UsageError, World, all_gather_objects, all_reduce_sum, log, make_folder, save_atomically, save_torch

RESULT = "top-1"  # of the best test, for --compare


@dataclass(kw_only=True)
class Run:
    """What exists once per run, and what it has reached."""

    args: argparse.Namespace
    world: World
    network: Network
    sets: Sets
    best: dict | None = None  # epoch and test of the highest accuracy so far
    replaced: dict[str, str] = field(default_factory=dict)  # training images that cannot be read: name -> reason
    left_out: list[Unreadable] = field(default_factory=list)  # test images that could not be read in the last test
    right: np.ndarray | None = None  # (test images that can be read,): which ones are, at the best test so far
    untested: object = None  # what the last epoch found in training, where its test was refused

    @property
    def tested(self) -> int:
        """Test images that the accuracy is of."""
        return len(self.sets.test) - len(self.left_out)

    @property
    def unreadable(self) -> dict[str, int]:
        return {"train": len(self.replaced), "test": len(self.left_out)}


def conduct(run: Run, what: Callable[[Run], None], report: Callable[[Run], None], trains: bool) -> None:
    """Do ``what`` and report it; a run that ``trains`` has its folder for itself meanwhile."""
    if getattr(run.args, "compare", None):  # before anything is trained
        rows_to_compare(run.args.compare, {RESULT: run.sets.test.fingerprint})
    folder = Path(run.args.output_dir)
    if not trains:
        make_folder(folder)
    with hold(folder, run.world) if trains else contextlib.nullcontext():
        what(run)
        report(run)


# ---------------------------------------------------------------------------------------------------------------------
# Images
# ---------------------------------------------------------------------------------------------------------------------


def training_pieces(
    run: Run, views: Callable, start: int, pieces: int = 1, drop_last: bool = True
) -> tuple[TrainLoader, Iterator[dict]]:
    """The training images from epoch ``start`` on, on the device; ``pieces`` batches of every process make a step."""
    args = run.args
    loader = TrainLoader(
        run.sets.train,
        views,
        batch_size=args.batch_size_per_gpu * pieces,
        pieces=pieces,
        world=run.world,
        seed=args.seed,
        epochs=args.epochs,
        num_workers=args.num_workers,
        start_epoch=start,
        drop_last=drop_last,
        repeated=getattr(args, "repeated_aug", False),
    )
    return loader, to_device_ahead(loader, run.world.device) if start < args.epochs else iter(())


def tell_replaced(run: Run, bad: dict[str, str], times: float) -> None:
    """At the end of an epoch: name what any process could not read (name -> reason), once in a run, and count it.

    ``times``: how often, over all processes.
    """
    if not times:
        return
    new = {name: reason for part in all_gather_objects(bad) for name, reason in part.items()}
    new = {name: new[name] for name in sorted(new.keys() - run.replaced.keys())}
    if new:
        show = max(0, NAMED - len(run.replaced))
        names = named(new.items(), show)
        log.warning(f"warning: {run.sets.train.name}: {len(new)} of its images cannot be read: {names}")
        run.replaced |= new
    log.warning(f"warning: {times:.0f} times an image could not be read and another one took its place")


def labelled_batches(
    run: Run, transform: Callable, batch_size: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """This process's share of the test images: their indices, and on the device they and their labels; without those
    that cannot be read.

    At the end these are known: ``run.left_out``. Raises UnreadableImages, unless --skip_unreadable.
    """
    sets, device, unreadable = run.sets, run.world.device, []
    options = {"batch_size": batch_size, "num_workers": run.args.num_workers, "device": device}
    for indices, images in batches(sets.test, transform, world=run.world, **options, unreadable=unreadable):
        yield indices, images, sets.test_labels[indices].to(device)
    settle(run, unreadable)


def settle(run: Run, unreadable: list[Unreadable]) -> None:
    """Raise UnreadableImages for test images, or with --skip_unreadable name them: ``run.left_out``."""
    if not run.args.skip_unreadable:
        refuse(run.sets.test, unreadable)
    leave_out(run.sets.test, unreadable, told=run.left_out)
    run.left_out = unreadable


def see_test_images(run: Run, transform: Callable) -> None:
    """Read the test images before anything is trained: what cannot be read is refused, or named, now."""
    for _ in labelled_batches(run, transform, run.args.batch_size_per_gpu):
        pass


def tested_or_saved(test: Callable[[], object], save: Callable[[], None]) -> object:
    """What ``test`` finds. Where it refuses the test images, the epoch it follows is saved, so that it is not lost."""
    try:
        return test()
    except UnreadableImages as error:
        save()
        raise UnreadableImages(f"{error}: the epoch is saved, and the same command goes on with its test") from None


def no_hits(run: Run, *heads: int) -> torch.Tensor:
    """(*heads, test images) for a test to say in which ones are right, each process of its share."""
    return torch.zeros(*heads, len(run.sets.test), dtype=torch.uint8, device=run.world.device)


def all_hits(run: Run, hits: torch.Tensor) -> np.ndarray:
    """From ``no_hits`` (test images,) with this process's share: all test images that can be read."""
    whole = all_reduce_sum(hits).bool().cpu()
    return whole[readable(len(whole), run.left_out)].numpy()


def compared_run(run: Run, evaluation: str) -> dict:
    """For the JSON: how the best test compares with that of another network; called by the first process."""
    if run.right is None:
        if run.args.compare:
            raise UsageError(f"--compare: {run.args.output_dir} was begun before images were noted; test it again")
        return {}
    return compared(run.args, evaluation, run.sets.test.fingerprint, {RESULT: run.right})


def means_over_images(run: Run, sums: torch.Tensor) -> dict:
    """From sums over this process's images of loss, true class first, and among the first five (a row each): their
    means over all that can be read, shares in percent. Of less than five classes there is no acc5.
    """
    loss, first, five = (all_reduce_sum(sums) / run.tested).unbind()
    return {"loss": loss, "acc1": 100 * first} | ({"acc5": 100 * five} if run.sets.classes >= 5 else {})


# ---------------------------------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------------------------------


def save_run(folder: Path, lines: Sequence[dict], file: dict, names: Sequence[str]) -> None:
    """log.txt with ``lines``, then ``file`` under every one of ``names``, what is continued last: a run that dies in
    between repeats the epoch. Raises UsageError when the disk does not take it.
    """
    text = "".join(json.dumps(line) + "\n" for line in lines)
    try:
        save_atomically(folder / "log.txt", lambda temporary: temporary.write_text(text))
        for name in names:
            save_torch(file, folder / name)
    except OSError as error:
        raise UsageError(f"--output_dir {folder}: cannot save ({error.strerror or error}); free some space") from None


def notes(run: Run) -> dict:
    """Of ``run``, for its file: what could not be read, and the epoch whose test is still due."""
    return {
        "untested": run.untested,
        "replaced": dict(run.replaced),
        "left_out": [list(image) for image in run.left_out],
        "right": None if run.right is None else torch.from_numpy(run.right),
    }


def take_notes(run: Run, record: dict) -> None:
    """The reverse; files of before have none."""
    run.untested, run.replaced = record.get("untested"), dict(record.get("replaced", {}))
    run.left_out = [Unreadable(*image) for image in record.get("left_out", ())]
    right = record.get("right")
    run.right = None if right is None else right.numpy()


def log_before(folder: Path, epoch: int) -> list[dict]:
    """The lines of log.txt that are of epochs before ``epoch``."""
    path = folder / "log.txt"
    lines = map(json.loads, path.read_text().splitlines()) if path.exists() else ()
    return [line for line in lines if line["epoch"] < epoch]


def refuse_another_run(path: Path, theirs: dict, ours: dict, said: Mapping[str, str] | None = None) -> None:
    """Raise UsageError, naming every difference, unless ``path`` belongs to a run with our options.

    ``said``: what to say of options whose values would fill pages.
    """
    differences = [
        (said or {}).get(name, f"{name}: {theirs.get(name)} there, {value} here")
        for name, value in ours.items()
        if theirs.get(name) != value
    ]
    if differences:
        raise UsageError(
            f"{path} belongs to another run ({'; '.join(differences)}); choose another --output_dir, or move it away"
        )
