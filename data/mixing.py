"""Mixup and CutMix as timm has them: images of a batch are mixed with each other, by draws that a key decides."""

import argparse
from collections.abc import Callable

import torch

from data.views import seeded_numpy
from randomness import counted_seed

_MIXING = 0x317  # what a draw is for


def build_mixup(args: argparse.Namespace, classes: int) -> Callable | None:
    """What ``mix`` takes, from options of timm's names; None where nothing is mixed."""
    if not (args.mixup > 0 or args.cutmix > 0 or args.cutmix_minmax):
        return None
    from timm.data import Mixup

    return Mixup(
        mixup_alpha=args.mixup,
        cutmix_alpha=args.cutmix,
        cutmix_minmax=args.cutmix_minmax,
        prob=args.mixup_prob,
        switch_prob=args.mixup_switch_prob,
        mode=args.mixup_mode,
        label_smoothing=args.smoothing,
        num_classes=classes,
    )


def mix(
    mixup: Callable, images: torch.Tensor, labels: torch.Tensor, key: tuple[int, ...]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mixed images (in place) and soft targets (batch, classes), with draws that ``key`` decides."""
    with seeded_numpy(counted_seed(*key, _MIXING)):
        return mixup(images, labels)
