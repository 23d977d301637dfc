"""DeiT's recipe (2012.12877) as iBOT, AttMask, Mugs and UDI fine-tune networks with few labels or on other sets."""

import argparse
import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from evaluation.finetune_steps import soft_cross_entropy
from models.safe_load import load_file
from utils import UsageError


def lagged_rates(lr: float, epochs: int, warmup_epochs: int, warmup_lr: float, min_lr: float) -> list[float]:
    """Learning rate during every epoch: a line from ``warmup_lr``, then half a cosine to ``min_lr``.

    parity: it is moved on after an epoch with that epoch's number, so the first two are the same; the cosine does not
    begin anew after the warm-up; and ``min_lr`` is not scaled with the batch, so that in published recipes it is above
    ``lr``, and the rate rises.
    """

    def rate(epoch: int) -> float:
        if epoch < warmup_epochs:
            return warmup_lr + epoch * (lr - warmup_lr) / warmup_epochs
        return min_lr + (lr - min_lr) * (1 + math.cos(math.pi * epoch / epochs)) / 2

    return [rate(max(0, epoch - 1)) for epoch in range(epochs)]


DISTILLATIONS = ("none", "soft", "hard")


def distilled(
    logits: torch.Tensor,
    targets: torch.Tensor,
    student: torch.Tensor,
    teacher: torch.Tensor,
    kind: str,
    alpha: float,
    tau: float,
) -> torch.Tensor:
    """Soft-target cross-entropy, and ``alpha`` of it replaced by what a supervised teacher says.

    ``soft``: the divergence from the teacher at temperature ``tau``, times tau^2, the mean over all logits; ``hard``:
    cross-entropy with the teacher's class. ``student``: the logits that are compared with the teacher's; a second
    head's in the originals, whose networks have none; where there is one head, ``logits`` again.
    """
    base = soft_cross_entropy(logits, targets)
    if kind == "none":
        return base
    if kind == "soft":
        ours, theirs = F.log_softmax(student / tau, dim=1), F.log_softmax(teacher / tau, dim=1)
        other = F.kl_div(ours, theirs, reduction="sum", log_target=True) * tau**2 / student.numel()
    else:
        other = F.cross_entropy(student, teacher.argmax(dim=1))
    return base * (1 - alpha) + other * alpha


def add_distillation_arguments(parser: argparse._ActionsContainer) -> None:
    add = parser.add_argument
    what = (
        "what a supervised network says of the same images takes part of the labels' place: as a distribution, a class"
    )
    add("--distillation_type", "--distillation-type", default="none", choices=DISTILLATIONS, help=what)
    add("--distillation_alpha", "--distillation-alpha", default=0.5, type=float, help="how much of their place")
    add("--distillation_tau", "--distillation-tau", default=1.0, type=float, help="temperature of soft")
    add("--teacher_model", "--teacher-model", default="regnety_160", metavar="NAME", help="timm's name of that network")
    add("--teacher_path", "--teacher-path", default="", metavar="FILE", help="its weights, with their head")


def check_distillation(args: argparse.Namespace) -> None:
    """Raise UsageError for values that cannot work."""
    if (args.distillation_type == "none") == bool(args.teacher_path):
        raise UsageError(
            f"--distillation_type {args.distillation_type} --teacher_path {args.teacher_path or 'is not given'}: "
            "soft and hard need it, none has no use for it"
        )
    if not 0 <= args.distillation_alpha <= 1 or not 0 < args.distillation_tau < math.inf:
        raise UsageError(
            f"--distillation_alpha {args.distillation_alpha:g} --distillation_tau {args.distillation_tau:g}: between 0 "
            "and 1, and positive"
        )


def supervised_teacher(name: str, path: str, classes: int) -> nn.Module:
    """timm's network ``name`` with the weights of ``path`` (parity: its features are averaged over the image)."""
    import timm

    if not timm.is_model(name):
        raise UsageError(f"--teacher_model {name}: timm has no network of this name")
    model = timm.create_model(name, pretrained=False, num_classes=classes, global_pool="avg")
    file = load_file(path)
    state = file.get("model", file.get("state_dict", file))
    ours = {key: tensor.shape for key, tensor in model.state_dict().items()}
    theirs = {key: tensor.shape for key, tensor in state.items() if isinstance(tensor, torch.Tensor)}
    differing = [key for key in {**ours, **theirs} if ours.get(key) != theirs.get(key)]
    if differing:
        key = differing[0]
        there, here = (tuple(shape[key]) if key in shape else None for shape in (theirs, ours))
        raise UsageError(
            f"--teacher_path {path}: does not fit {name} with {classes} classes in {len(differing)} tensors, such as "
            f"{key} ({there} there, {here} here)"
        )
    model.load_state_dict(state)
    return model.eval().requires_grad_(False)
