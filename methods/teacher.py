"""A teacher that follows its student and gives it distributions over prototypes: what methods of that kind share."""

import argparse

import numpy as np
import torch
import torch.nn as nn

from methods.base import Clock, Method, ema_update_
from methods.centring import Centres
from methods.health import clustering_health
from utils import UsageError, all_reduce_sum, bool_flag, warmup_scheduler

TEMPERATURE = ("warmup_teacher_temp", "teacher_temp", "warmup_teacher_temp_epochs")


def add_following_arguments(parser: argparse._ArgumentGroup) -> None:
    """How the teacher follows its student, and what of the student's prototypes rests at the start."""
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
        "--freeze_last_layer",
        default=1,
        type=int,
        help="epochs during which the prototypes stay fixed; raise it if the loss does not decrease",
    )


def check_following_arguments(args: argparse.Namespace) -> None:
    """Raises UsageError for a momentum that leads away from the student, and for negative numbers of epochs."""
    if not 0 <= args.momentum_teacher <= 1:
        raise UsageError(f"--momentum_teacher {args.momentum_teacher}: from 0 (the student itself) to 1 (never moves)")
    if args.freeze_last_layer < 0:
        raise UsageError(f"--freeze_last_layer {args.freeze_last_layer}: must not be negative")


def add_temperature_arguments(parser: argparse._ArgumentGroup, prefix: str = "") -> None:
    """The teacher's temperature over the epochs; with a ``prefix`` (``group_``) that of one of several losses."""
    add, whose = parser.add_argument, f" of the {prefix.rstrip('_')} loss" if prefix else ""
    add(
        f"--{prefix}warmup_teacher_temp",
        default=0.04,
        type=float,
        help=f"first teacher temperature{whose}; lower it if the loss stalls",
    )
    add(
        f"--{prefix}teacher_temp",
        default=0.04,
        type=float,
        help=f"final teacher temperature{whose}; above 0.07 is unstable",
    )
    add(
        f"--{prefix}warmup_teacher_temp_epochs",
        default=0,
        type=int,
        help="epochs of linear warm-up of that temperature",
    )


def check_temperature_arguments(args: argparse.Namespace, prefix: str = "") -> None:
    """Raises UsageError for temperatures and warm-ups that cannot work."""
    check_temperatures(args, f"{prefix}warmup_teacher_temp", f"{prefix}teacher_temp")
    name = f"{prefix}warmup_teacher_temp_epochs"
    warmup = getattr(args, name)
    if warmup < 0:
        raise UsageError(f"--{name} {warmup}: must not be negative")
    if warmup > args.epochs:
        raise UsageError(f"--{name} {warmup} is longer than --epochs {args.epochs}")


def check_temperatures(args: argparse.Namespace, *names: str) -> None:
    """Raises UsageError for options that are to be temperatures and are not positive."""
    for name in names:
        if not getattr(args, name) > 0:
            raise UsageError(f"--{name} {getattr(args, name)}: a temperature must be positive")


def temperatures(args: argparse.Namespace, prefix: str = "") -> np.ndarray:
    """One teacher temperature per epoch, from the options of ``add_temperature_arguments``."""
    first, final, warmup = (getattr(args, f"{prefix}{name}") for name in TEMPERATURE)
    return warmup_scheduler(first, final, warmup, args.epochs)


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


class PrototypeMethod(Method):
    """Student and teacher are modules of ``backbone`` and ``head``; the teacher starts as the student and follows it.

    ``centres``: of the teacher's logits; None where a method was told to do without prototypes. ``used``: which of them
    were some image's first choice in this epoch, on this process; on any of them after ``health`` and ``epoch_state``.
    """

    def __init__(self, student: nn.Module, teacher: nn.Module, centres: Centres | None, freeze_last_layer: int):
        super().__init__()
        self.student, self.teacher, self.centres = student, teacher, centres
        start_teacher(teacher, student)
        self.follower = Follower(teacher, student)
        self.freeze_last_layer = freeze_last_layer
        prototypes = centres.center.shape[-1] if centres else 0
        self.register_buffer("used", torch.zeros(prototypes, dtype=torch.bool), persistent=False)
        self._seen: dict[str, torch.Tensor] = {}  # what health() looks at
        self._seen_epoch = -1

    @torch.no_grad()
    def note_prototypes(self, probs: torch.Tensor, clock: Clock) -> None:
        """Remember which prototypes the teacher's distributions (rows, prototypes) choose."""
        if clock.epoch != self._seen_epoch:
            self._seen_epoch = clock.epoch
            self.used.zero_()
        self.used.index_fill_(0, probs.argmax(dim=-1), True)

    def after_backward(self, clock: Clock) -> None:
        """In the first epochs the prototypes have no gradient: neither moments nor weight decay touch them."""
        if clock.epoch < self.freeze_last_layer:
            for name, parameter in self.student.named_parameters():
                if "last_layer" in name:
                    parameter.grad = None

    def after_step(self, clock: Clock, gate: torch.Tensor | None) -> None:
        self.follower.step(clock.momentum, gate)
        if self.centres:
            self.centres.commit(gate)

    def health(self) -> dict[str, torch.Tensor]:
        """Needs the teacher's ``probs`` and ``features`` and the ``loss`` among what was seen."""
        seen = self._seen
        self._share_used()
        return clustering_health(seen["probs"], seen["loss"], self.centres.center, self.used, seen["features"])

    def _share_used(self) -> None:
        self.used |= all_reduce_sum(self.used.int()) > 0

    def epoch_state(self) -> dict:
        self._share_used()
        return {"epoch": self._seen_epoch, "used": self.used}

    def load_epoch_state(self, state: dict) -> None:
        self._seen_epoch = state["epoch"]
        self.used.copy_(state["used"])

    def evaluation_backbone(self) -> nn.Module:
        return self.teacher.backbone
