"""A run of fine-tuning: what exists once, and what of it is written and read again."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch.nn as nn

from data.published import DATASET_OPTIONS
from evaluation.confidence import interval_of
from evaluation.finetune_steps import Stepper
from evaluation.results import write_result
from evaluation.run import Run, compared_run, log_before, notes, refuse_another_run, save_run, take_notes
from evaluation.unreadable import remark
from models.checkpoints import weights_hash
from models.safe_load import load_file
from utils import UsageError, barrier, log, make_folder

LATEST, BEST = "checkpoint.pth", "checkpoint-best.pth"

# what does not change the numbers of a run
FREE = {"data_path", "eval_data_path", "data_set", "output_dir", "log_dir", "num_workers", "device", "dist_url", "eval"}
FREE |= {"local_rank", "backend", "finetune", "checkpoint_key", "model_key", "resume", "auto_resume", "dist_eval"}
FREE |= {"save_ckpt_freq", "batch_size_per_gpu", "update_freq", "model", "patch_size", "window_size", "input_size"}
FREE |= {"model_ema_force_cpu", "crop_pct", "skip_unreadable", "recipe", "evaluation", "target_list_path", "any_counts"}
FREE |= {"compare", "teacher_path"}
TEACHERS = {"distillation_type", "distillation_alpha", "distillation_tau", "teacher_model"}
FREE |= {*DATASET_OPTIONS, "refresh_index", "exif", "max_image_pixels"}  # they are in the fingerprints


@dataclass(kw_only=True)
class FinetuneRun(Run):
    model: nn.Module  # the network, or what shares its work among processes
    stepper: Stepper
    niter: int
    lr: list[float]  # a value for every step of the run
    weight_decay: list[float]
    mixup: Callable | None = None
    ema: nn.Module | None = None
    teacher: nn.Module | None = None  # supervised, of DeiT's distillation
    start: str = ""  # what the weights at the start were
    last: dict | None = None  # the latest test
    writer: object = None  # TensorBoard

    @property
    def n_parameters(self) -> int:
        return sum(p.numel() for p in self.network.model.parameters() if p.requires_grad)


def options_of_trajectory(run: FinetuneRun) -> dict:
    """What a run must have in common with the one it continues."""
    args, sets = run.args, run.sets
    options = {
        "network": run.network.label,
        "weights at the start": run.start,
        "training images": sets.train.fingerprint,
        "test images": sets.test.fingerprint,
        "classes": sets.classes,
        "input size": [sets.crop_size, sets.resize_size],
        "images per step": args.batch_size_per_gpu * args.update_freq * run.world.size,
    }
    if run.mixup is not None:
        options["images mixed with each other"] = args.batch_size_per_gpu
    options["teacher"] = run.teacher and weights_hash(run.teacher)[:16]
    free = FREE if run.teacher else FREE | TEACHERS  # so that runs before these options can be continued
    return options | {f"--{name}": value for name, value in sorted(vars(args).items()) if name not in free}


def save(run: FinetuneRun, epoch: int, lines: list[dict], is_best: bool) -> None:
    """log.txt, the numbered and the best checkpoint where it is time, and what the run is continued from, in order."""
    args = run.args
    if run.world.rank == 0:
        file = {
            "model": run.network.model.state_dict(),
            "optimizer": run.stepper.optimizer.state_dict(),
            "epoch": epoch,
            "args": dict(vars(args)),
        }
        if run.stepper.scaler is not None:
            file["scaler"] = run.stepper.scaler.state_dict()
        if run.ema is not None:
            file["model_ema"] = run.ema.module.state_dict()
        file["tutelage"] = {
            "arch": run.network.arch,
            "options": options_of_trajectory(run),
            "best": run.best,
            "last": run.last,
            **notes(run),
        }
        every = max(1, int(args.save_ckpt_freq * args.epochs / 100))
        numbered = (epoch + 1) % every == 0 or epoch + 1 == args.epochs
        names = [f"checkpoint-{epoch}.pth"] * numbered + [BEST] * is_best + [LATEST]
        save_run(Path(args.output_dir), lines, file, names)
    barrier()


def resume(run: FinetuneRun) -> tuple[int, list[dict]]:
    """Continue from --resume, else from the run in --output_dir: (epoch to begin with, lines of log.txt so far).

    Raises UsageError when that run is another one, naming every difference.
    """
    args, folder = run.args, Path(run.args.output_dir)
    path = Path(args.resume) if args.resume else folder / LATEST
    if not args.resume and not (args.auto_resume and path.exists()):
        return 0, []
    file = load_file(path)
    if not {"model", "optimizer", "epoch", "tutelage"} <= file.keys() or "options" not in file["tutelage"]:
        raise UsageError(f"{path}: not a checkpoint of this script; start from its weights with --finetune {path}")
    refuse_another_run(path, file["tutelage"]["options"], options_of_trajectory(run))
    run.network.model.load_state_dict(file["model"])
    run.stepper.optimizer.load_state_dict(file["optimizer"])
    if run.stepper.scaler is not None:
        run.stepper.scaler.load_state_dict(file["scaler"])
    if run.ema is not None:
        run.ema.module.load_state_dict(file["model_ema"])
    run.best, run.last = file["tutelage"]["best"], file["tutelage"]["last"]
    take_notes(run, file["tutelage"])
    start = file["epoch"] + 1
    log.info(f"continuing {path} at epoch {start} of {args.epochs}")
    return start, log_before(folder, start)


def load_to_test(run: FinetuneRun) -> Path:
    """Fill the network from --resume, else from the best of the run in --output_dir."""
    path = Path(run.args.resume) if run.args.resume else Path(run.args.output_dir) / BEST
    if not run.args.resume and not path.exists():
        raise UsageError(f"--eval: there is no {path}; name the checkpoint to be tested with --resume")
    state = load_file(path).get("model", {})
    ours = run.network.model.state_dict()
    differing = [name for name in {**ours, **state} if _shape(ours, name) != _shape(state, name)]
    if differing:
        name = differing[0]
        raise UsageError(
            f"{path}: does not fit the network in {len(differing)} tensors, such as {name} "
            f"({_shape(state, name)} there, {_shape(ours, name)} here); pass the options it was trained with"
        )
    run.network.model.load_state_dict(state)
    return path


def _shape(state: dict, name: str) -> tuple | None:
    return tuple(state[name].shape) if name in state else None


def open_writer(run: FinetuneRun, epoch: int) -> None:
    """TensorBoard, on the first process; what a stopped run wrote of later steps is dropped."""
    if run.world.rank == 0:
        from torch.utils.tensorboard import SummaryWriter

        folder = run.args.log_dir or str(Path(run.args.output_dir) / "tensorboard")
        make_folder(Path(folder))
        run.writer = SummaryWriter(folder, purge_step=epoch * run.niter)


def write_scalars(run: FinetuneRun, step: int, values: dict[str, float]) -> None:
    if run.writer is not None:
        for name, value in values.items():
            if math.isfinite(value):
                run.writer.add_scalar(name, value, step)


def report(run: FinetuneRun) -> None:
    """The JSON, and the original's last line."""
    best = run.best
    numbers = {name: best[key] for name, key in (("top1", "acc1"), ("top5", "acc5")) if key in best}
    numbers |= {"epoch": best["epoch"], "epochs": run.args.epochs, "last_top1": run.last["acc1"]}
    numbers["n_parameters"] = run.n_parameters
    numbers["interval"] = list(interval_of(best["acc1"], run.tested))
    if run.world.rank == 0:
        numbers |= compared_run(run, run.args.evaluation)
        write_result(run.args, run.args.evaluation, run.network, run.sets, run.unreadable, numbers)
    log.info(f"Max accuracy: {best['acc1']:.2f}%{remark(run.unreadable)}")
