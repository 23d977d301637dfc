"""A run of linear probing: what exists once, and what of it is written and read again."""

import argparse
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from evaluation.confidence import interval_of
from evaluation.features import CLS, Feature
from evaluation.linear_heads import Probe, Recipe, best_head, cosine_factor, rate_at, restore_heads, saved_heads
from evaluation.results import write_result
from evaluation.run import Run, compared_run, log_before, notes, refuse_another_run, save_run, take_notes
from evaluation.unreadable import remark
from models.checkpoints import weights_hash
from models.safe_load import load_file
from utils import barrier, log


class Sweep(NamedTuple):
    """A grid of recipes: every rate with every weight decay and every optimiser, the last of them fastest."""

    lrs: list[float]
    decays: tuple[float, ...]
    optimizers: tuple[str, ...] = ("sgd", "lars")

    def recipes(self, lr_only: bool) -> list[Recipe]:
        """Of ``lr_only`` the rates alone, without decay, by SGD."""
        if lr_only:
            return [Recipe(lr) for lr in self.lrs]
        return [Recipe(lr, wd, name) for lr in self.lrs for wd in self.decays for name in self.optimizers]

    @property
    def beside(self) -> int:
        """Heads of the whole grid that have one rate."""
        return len(self.decays) * len(self.optimizers)


def _digits(exponents: range) -> list[float]:
    return [digit * 10.0**exponent for exponent in exponents for digit in range(1, 10)]


SWEEPS = {
    "ibot": Sweep(_digits(range(-4, 1)), (0.0, 1e-6)),
    "mugs": Sweep(_digits(range(-4, 0)), (0.0, 1e-6, 1e-5, 1e-4, 1e-3)),
}
LATEST = "checkpoint.pth.tar"
OTHER_HEADS = {"heads": "other heads (--lr, --n_last_blocks, --avgpool_patchtokens, ...)"}


@dataclass(kw_only=True)
class LinearRun(Run):
    features: list[Feature]
    recipes: list[Recipe]  # as asked for: learning rates at 256 images per step
    probe: Probe  # every feature with every recipe, in this order
    best_acc_sweep_lr_only: float = 0.0
    peaks: list[float] = field(default_factory=list)  # highest accuracy of every head so far

    @property
    def heads(self) -> list[dict]:
        """What tells the heads apart, in their order."""
        return [
            {"n_last_blocks": f.n_last_blocks, "avgpool_patchtokens": f.avgpool}
            | ({} if f.token == CLS else {"class_token": f.token})  # so that runs before the option can be continued
            | r._asdict()
            for f in self.features
            for r in self.recipes
        ]

    def describe(self, head: int) -> str:
        feature, recipe = self.features[head // len(self.recipes)], self.recipes[head % len(self.recipes)]
        extras = f", weight decay {recipe.weight_decay:g}" * (recipe.weight_decay > 0) + ", LARS" * (
            recipe.optimizer == "lars"
        )
        return f"{feature}, lr {recipe.lr:g}{extras}"


def log_line(run: LinearRun, epoch: int, losses: list[float], tests: list[dict] | None) -> dict:
    """A line of log.txt: DINO's keys, of the best head of this epoch; of several heads ``heads`` holds each one's."""
    factor = cosine_factor(epoch, run.args.epochs)
    rows = [
        {"train_loss": finite(loss), "train_lr": rate_at(recipe.lr, factor, run.probe.floor)}
        for loss, recipe in zip(losses, run.probe.recipes, strict=True)
    ]
    head = run.best["head"] if run.best else 0
    if tests is not None:
        head = best_head([result["acc1"] for result in tests])
        for row, result in zip(rows, tests, strict=True):
            row |= {f"test_{name}": finite(value) for name, value in result.items()}
    line = {name: value for name, value in rows[head].items() if name.startswith("train")} | {"epoch": epoch}
    line |= rows[head]
    if len(rows) > 1:
        line |= {"head": head, "heads": [h | row for h, row in zip(run.heads, rows, strict=True)]}
    return line


def finite(value: float) -> float | None:
    """JSON knows no NaN: the loss of a head that diverged is null."""
    return value if math.isfinite(value) else None


def options_of_trajectory(run: LinearRun) -> dict:
    """What a run must have in common with the one it continues."""
    args, sets = run.args, run.sets
    return {
        "network": f"{run.network.label} {weights_hash(run.network.model)[:16]}",
        "training images": sets.train.fingerprint,
        "test images": sets.test.fingerprint,
        "heads": run.heads,
        "classes": sets.classes,
        "images per step": args.batch_size_per_gpu * run.world.size,
        "crop and resize": [sets.crop_size, sets.resize_size],
        **{f"--{name}": getattr(args, name) for name in ("epochs", "seed", "val_freq", "augment")},
        **({"--lr_min": args.lr_min} if args.lr_min else {}),  # so that runs before the option can be continued
    }


def best_path(args: argparse.Namespace) -> Path:
    return Path(args.output_dir) / f"checkpoint_{args.checkpoint_key}_linear.pth"


def save(run: LinearRun, epoch: int, lines: list[dict], is_best: bool) -> None:
    """log.txt, the best heads where these are, and what the run is continued from, in this order."""
    if run.world.rank == 0:
        folder = Path(run.args.output_dir)
        file = saved_heads(run.probe, epoch, run.args.epochs)
        if run.best is not None:
            file["best_acc"] = run.best["acc1"]
        if len(run.probe) > 1 and run.best is not None:
            file |= {"best_acc_hidx": run.best["head"], "best_acc_sweep_lr_only": run.best_acc_sweep_lr_only}
        names = ("best", "best_acc_sweep_lr_only", "peaks", "heads")
        file["tutelage"] = {"options": options_of_trajectory(run), **{name: getattr(run, name) for name in names}}
        file["tutelage"] |= notes(run)
        save_run(folder, lines, file, [best_path(run.args).name] * is_best + [LATEST])
    barrier()


def resume(run: LinearRun) -> tuple[int, list[dict]]:
    """Continue from --load_from, else from the run in --output_dir: (epoch to begin with, lines of log.txt so far).

    Raises UsageError when that run is another one, naming every difference.
    """
    folder = Path(run.args.output_dir)
    path = folder / (run.args.load_from or LATEST)
    if run.args.load_from is None and not path.exists():
        return 0, []
    file = load_file(path)
    if record := file.get("tutelage"):
        refuse_another_run(path, record["options"], options_of_trajectory(run), OTHER_HEADS)
        run.best, run.peaks = record["best"], record["peaks"]
        run.best_acc_sweep_lr_only = record["best_acc_sweep_lr_only"]
        take_notes(run, record)
    else:
        log.warning(f"warning: {path} was written by the original code; its options and data are not checked")
    epoch = restore_heads(run.probe, file, path)
    if run.best is None and "best_acc" in file:
        run.best = {"head": file.get("best_acc_hidx", 0), "epoch": epoch - 1, "acc1": file["best_acc"]}
        run.best_acc_sweep_lr_only = file.get("best_acc_sweep_lr_only", 0.0)
        run.peaks = [file["best_acc"] * (head == run.best["head"]) for head in range(len(run.probe))]
    log.info(f"continuing {path} at epoch {epoch} of {run.args.epochs}")
    return epoch, log_before(folder, epoch)  # the line of an untested epoch is not there yet


def report(run: LinearRun) -> None:
    """The table of all heads, the JSON, and the originals' last line."""
    best = run.best
    if len(run.probe) > 1:
        log.info("highest top-1 accuracy of every head in percent\n" + table(run))
    numbers = {"top1": best["acc1"]} | ({"top5": best["acc5"]} if "acc5" in best else {})
    if "head" in best:
        peaks = zip(run.heads, run.peaks, strict=True)
        numbers |= {"epoch": best["epoch"], "head": run.heads[best["head"]], "epochs": run.args.epochs}
        numbers["heads"] = [head | {"top1": peak} for head, peak in peaks]
    interval = interval_of(best["acc1"], run.tested)
    numbers["interval"] = list(interval)
    if run.world.rank == 0:
        numbers |= compared_run(run, "eval_linear")
        write_result(run.args, "eval_linear", run.network, run.sets, run.unreadable, numbers)
    log.info(f"Top-1 test accuracy: {best['acc1']:.1f} ({interval}){remark(run.unreadable)}")


def table(run: LinearRun) -> str:
    """A line per head, best last."""
    order = sorted(range(len(run.probe)), key=lambda head: (run.peaks[head], head))
    names = {head: run.describe(head) for head in order}
    width = max(map(len, names.values()))
    return "\n".join(f"{names[head]:<{width}}{run.peaks[head]:9.2f}" for head in order)
