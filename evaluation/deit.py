"""DeiT's recipe (2012.12877) as iBOT, AttMask, Mugs and UDI fine-tune networks with few labels or on other sets."""

import math

import torch
import torch.nn.functional as F

from evaluation.finetune_steps import soft_cross_entropy


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
    cross-entropy with the teacher's class. ``student``: the logits that are compared with the teacher's.
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
