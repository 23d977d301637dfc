"""A run of fine-tuning: what exists once, and what of it is written and read again (eval_finetuning.py)."""

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn as nn

from data.datasets import Source, open_source, training_path
from data.finetune_views import FinetuneViews
from data.preprocess import MEAN, STD, eval_transform
from evaluation.features import weights_hash
from evaluation.finetune_steps import Stepper
from evaluation.network import (
    common_labels,
    log_before,
    open_train_and_test,
    refuse_another_run,
    save_run,
    write_result,
)
from models import ALIASES, is_swin, is_vision_transformer
from models.adapt import load_to_finetune
from models.checkpoints import Network, choose_architecture, read_backbone
from models.finetuned import build_finetuned
from models.safe_load import load_file
from utils import UsageError, World, barrier, log, make_folder

LATEST, BEST = "checkpoint.pth", "checkpoint-best.pth"

# what does not change the numbers of a run
FREE = {"data_path", "eval_data_path", "data_set", "output_dir", "log_dir", "num_workers", "device", "dist_url", "eval"}
FREE |= {"local_rank", "backend", "finetune", "checkpoint_key", "model_key", "resume", "auto_resume", "dist_eval"}
FREE |= {"save_ckpt_freq", "batch_size_per_gpu", "update_freq", "model", "patch_size", "window_size", "input_size"}
FREE |= {"model_ema_force_cpu", "crop_pct"}


class Sets:
    """Training and test images, what happens to them, and their labels under common class numbers."""

    def __init__(self, args: argparse.Namespace, recorded_size: object):
        self.train, self.test = open_sets(args)
        self.train_labels, self.test_labels = common_labels(self.train, self.test)
        self.classes = args.nb_classes or len(self.train.class_names)
        if self.classes < len(self.train.class_names):
            raise UsageError(
                f"--nb_classes {self.classes}: {self.train.name} has {len(self.train.class_names)} classes"
            )
        self.size = args.input_size or (recorded_size if isinstance(recorded_size, int) else 224)
        whole = args.data_path is None or self.size >= 384  # a bundled tile has no border to cut off
        self.resize_size = int(self.size / (args.crop_pct or (1.0 if whole else 224 / 256)))
        self.mean, self.std = (MEAN, STD) if args.imagenet_default_mean_and_std else ((0.5,) * 3, (0.5,) * 3)

    def views(self, args: argparse.Namespace) -> FinetuneViews:
        jitter, policy = args.color_jitter or None, args.aa if args.aa.lower() not in ("", "none") else None
        options = (args.train_interpolation, args.reprob, args.remode, args.recount)
        return FinetuneViews(self.size, self.mean, self.std, jitter, policy, *options)

    def test_transform(self) -> Callable:
        return eval_transform(self.size, self.resize_size, "bilinear", self.mean, self.std)


def open_sets(args: argparse.Namespace) -> tuple[Source, Source]:
    if args.eval_data_path is None:
        return open_train_and_test(args.data_path, args.subset)
    if args.data_path is None:
        raise UsageError("--eval_data_path: names the test images of --data_path; pass that as well")
    train = open_source(training_path(args.data_path), args.subset)
    path = Path(args.eval_data_path)
    both = all((path / part).is_dir() for part in ("train", "val"))
    return train, open_source(str(path / "val" if both else path), split="val")


@dataclass
class Run:
    """Everything that exists once per run, and what it has reached."""

    args: argparse.Namespace
    world: World
    network: Network
    sets: Sets
    model: nn.Module  # the network, or what shares its work among processes
    stepper: Stepper
    niter: int
    lr: list[float]  # a value for every step of the run
    weight_decay: list[float]
    mixup: Callable | None = None
    ema: nn.Module | None = None
    start: str = ""  # what the weights at the start were
    best: dict | None = None  # epoch and test of the highest accuracy so far
    last: dict | None = None  # the latest test
    writer: object = None  # TensorBoard
    unreadable: set[str] = field(default_factory=set)  # names of training images that were told

    @property
    def n_parameters(self) -> int:
        return sum(p.numel() for p in self.network.model.parameters() if p.requires_grad)


# ---------------------------------------------------------------------------------------------------------------------
# The network
# ---------------------------------------------------------------------------------------------------------------------


def build_network(args: argparse.Namespace) -> tuple[Network, Sets]:
    """The network to be fine-tuned, its weights from --finetune, and the images it will see."""
    state, info, recorded = {}, None, {}
    if args.finetune:
        state, info = read_backbone(args.finetune, key_of(args))
        recorded = info.arguments
    sets = Sets(args, recorded.get("global_crops_size"))
    arch, arguments = architecture(args, state, info)
    backbone = {name: arguments[name] for name in ("patch_size", "window_size") if name in arguments}
    backbone["drop_path_rate"] = args.drop_path
    if is_swin(arch):
        if args.drop or args.attn_drop_rate:
            raise UsageError(
                f"--drop {args.drop:g} --attn_drop_rate {args.attn_drop_rate:g}: not for a Swin; leave out"
            )
    elif sets.size % arguments["patch_size"]:
        raise UsageError(f"--input_size {sets.size}: patches of {arguments['patch_size']} pixels do not cover it")
    transformer = {
        "img_size": sets.size,
        "num_registers": arguments.get("num_registers", 0),
        "init_values": args.layer_scale_init_value,
        "use_mean_pooling": args.use_mean_pooling,
        "abs_pos_emb": args.abs_pos_emb,
        "rel_pos_bias": args.rel_pos_bias,
        "drop": args.drop,
        "attn_drop": args.attn_drop_rate,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(args.seed)
        model = build_finetuned(arch, sets.classes, args.init_scale, backbone, transformer)
    report = None
    if info is None:
        log.warning(f"NO --finetune: {arch} IS TRAINED FROM SCRATCH")
    else:
        report = load_to_finetune(model, state, info)
        log.info(f"{info.path}: {info.layout.name}, {arch}: {report}")
        for note in info.notes:
            log.info(f"{info.path}: {note}")
    return Network(model, arch, arguments, report), sets


def key_of(args: argparse.Namespace) -> str:
    """--checkpoint_key where the file has it, else the first of --model_key, as ``model|module``."""
    file = load_file(args.finetune, mapped=True)
    keys = [args.checkpoint_key, *args.model_key.split("|")]
    return next((key for key in keys if isinstance(file.get(key), dict)), args.checkpoint_key)


def architecture(args: argparse.Namespace, state: dict, info: object) -> tuple[str, dict]:
    """Name and arguments: of --model (timm's long names too), else of the file, else vit_small/16."""
    arch, patch_size = args.model, args.patch_size
    if arch and "_patch" in arch:  # deit_small_patch16_224, swin_tiny_patch4_window7_224
        arch, _, rest = arch.partition("_patch")
        number = rest.split("_")[0]
        if not number.isdecimal() or (patch_size or int(number)) != int(number):
            raise UsageError(f"--model {args.model}: contradicts --patch_size {patch_size}; pass one of them")
        patch_size = int(number)
    arch = ALIASES.get(arch, {"deit_base": "vit_base"}.get(arch, arch))
    if info is not None:
        return choose_architecture(state, info, arch, patch_size, args.window_size)
    arch = arch or "vit_small"
    if is_vision_transformer(arch):
        return arch, {"patch_size": patch_size or 16}
    return arch, {"patch_size": patch_size or 4, "window_size": args.window_size or 7}


# ---------------------------------------------------------------------------------------------------------------------
# Written and read again
# ---------------------------------------------------------------------------------------------------------------------


def options_of_trajectory(run: Run) -> dict:
    """What a run must have in common with the one it continues."""
    args, sets = run.args, run.sets
    options = {
        "network": run.network.label,
        "weights at the start": run.start,
        "training images": sets.train.fingerprint,
        "test images": sets.test.fingerprint,
        "classes": sets.classes,
        "input size": [sets.size, sets.resize_size],
        "images per step": args.batch_size_per_gpu * args.update_freq * run.world.size,
    }
    if run.mixup is not None:
        options["images mixed with each other"] = args.batch_size_per_gpu
    return options | {f"--{name}": value for name, value in sorted(vars(args).items()) if name not in FREE}


def save(run: Run, epoch: int, lines: list[dict], is_best: bool) -> None:
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
        }
        every = max(1, int(args.save_ckpt_freq * args.epochs / 100))
        numbered = (epoch + 1) % every == 0 or epoch + 1 == args.epochs
        names = [f"checkpoint-{epoch}.pth"] * numbered + [BEST] * is_best + [LATEST]
        save_run(Path(args.output_dir), lines, file, names)
    barrier()


def resume(run: Run) -> tuple[int, list[dict]]:
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
    start = file["epoch"] + 1
    log.info(f"continuing {path} at epoch {start} of {args.epochs}")
    return start, log_before(folder, start)


def load_to_test(run: Run) -> Path:
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


def start_hash(model: nn.Module) -> str:
    return weights_hash(model)[:16]


def open_writer(run: Run, epoch: int) -> None:
    """TensorBoard, on the first process; what a stopped run wrote of later steps is dropped."""
    if run.world.rank == 0:
        from torch.utils.tensorboard import SummaryWriter

        folder = run.args.log_dir or str(Path(run.args.output_dir) / "tensorboard")
        make_folder(Path(folder))
        run.writer = SummaryWriter(folder, purge_step=epoch * run.niter)


def write_scalars(run: Run, step: int, values: dict[str, float]) -> None:
    if run.writer is not None:
        for name, value in values.items():
            if math.isfinite(value):
                run.writer.add_scalar(name, value, step)


def report(run: Run) -> None:
    """The JSON, and the original's last line."""
    best = run.best
    numbers = {name: best[key] for name, key in (("top1", "acc1"), ("top5", "acc5")) if key in best}
    numbers |= {"epoch": best["epoch"], "epochs": run.args.epochs, "last_top1": run.last["acc1"]}
    numbers["n_parameters"] = run.n_parameters
    if run.world.rank == 0:
        data = f"{run.sets.train.name}; {run.sets.test.name}"
        path = write_result(run.args.output_dir, "eval_finetuning", run.network, run.args.checkpoint_key, data, numbers)
        log.info(f"written to {path}")
    log.info(f"Max accuracy: {best['acc1']:.2f}%")
