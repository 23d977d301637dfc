"""The teacher that follows its student: its options, how it starts, how it moves, and the rest of the prototypes."""

import argparse

import torch
import torch.nn as nn

from methods.base import Clock, ema_update_
from utils import UsageError, bool_flag


def add_teacher_arguments(parser: argparse._ArgumentGroup) -> None:
    add = parser.add_argument
    add(
        "--norm_last_layer",
        default=True,
        type=bool_flag,
        help="freeze the prototypes' norms at 1; false trains better, true is safer with ViT-B and small batches",
    )
    add(
        "--momentum_teacher",
        default=0.996,
        type=float,
        help="first EMA momentum of the teacher, rising to 1; higher for small batches (0.9995 at 256)",
    )
    add(
        "--warmup_teacher_temp", default=0.04, type=float, help="first teacher temperature; lower it if the loss stalls"
    )
    add("--teacher_temp", default=0.04, type=float, help="final teacher temperature; above 0.07 is unstable")
    add("--warmup_teacher_temp_epochs", default=0, type=int, help="epochs of linear warm-up of that temperature")
    add(
        "--freeze_last_layer",
        default=1,
        type=int,
        help="epochs during which the prototypes stay fixed; raise it if the loss does not decrease",
    )


def check_teacher_arguments(args: argparse.Namespace) -> None:
    """Raises UsageError for temperatures and warm-ups that cannot work."""
    if args.warmup_teacher_temp_epochs > args.epochs:
        raise UsageError(
            f"--warmup_teacher_temp_epochs {args.warmup_teacher_temp_epochs} is longer than --epochs {args.epochs}"
        )
    for name in ("warmup_teacher_temp", "teacher_temp", "warmup_teacher_patch_temp", "teacher_patch_temp"):
        if getattr(args, name, 1.0) <= 0:
            raise UsageError(f"--{name} {getattr(args, name)}: a temperature must be positive")


def start_teacher(teacher: nn.Module, student: nn.Module) -> None:
    """Give the teacher what it has in common with the student, and no gradients."""
    teacher.load_state_dict(student.state_dict(), strict=False)
    teacher.requires_grad_(False)


class Follower:
    """teacher <- momentum * teacher + (1 - momentum) * student, over the parameters that both have by name."""

    def __init__(self, teacher: nn.Module, student: nn.Module):
        ours, theirs = dict(teacher.named_parameters()), dict(student.named_parameters())
        self.pairs = [(ours[name], theirs[name]) for name in theirs if name in ours]

    def step(self, momentum: float, gate: torch.Tensor | None) -> None:
        teacher, student = zip(*self.pairs, strict=True)
        ema_update_(teacher, student, momentum, gate)


def rest_last_layer(student: nn.Module, clock: Clock, epochs: int) -> None:
    """In the first ``epochs`` the prototypes have no gradient: neither moments nor weight decay touch them."""
    if clock.epoch < epochs:
        for name, parameter in student.named_parameters():
            if "last_layer" in name:
                parameter.grad = None
