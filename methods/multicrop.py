"""Several crops of every image: the options that describe them, and a backbone with a head that is shown them all."""

import argparse
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn as nn

from data.views import MultiCropViews
from models import family_of
from models.vit import group_by_size
from utils import UsageError


def add_crop_arguments(parser: argparse._ArgumentGroup) -> None:
    add = parser.add_argument
    add("--global_crops_scale", default=(0.4, 1.0), type=float, nargs=2, help="area share of the global crops")
    add("--local_crops_number", default=8, type=int, help="local crops per image; 0 leaves the global ones")
    add("--local_crops_scale", default=(0.05, 0.4), type=float, nargs=2, help="area share of the local crops")
    add("--global_crops_size", default=224, type=int, help="pixels")
    add("--local_crops_size", default=96, type=int, help="pixels")


def check_crop_arguments(args: argparse.Namespace) -> None:
    """Raises UsageError for shares outside (0, 1] and for sizes that the patches do not divide."""
    if args.local_crops_number < 0:
        raise UsageError(f"--local_crops_number {args.local_crops_number}: must be 0 (two views) or more")
    kinds = ("global", "local") if args.local_crops_number else ("global",)
    family = family_of(args.arch)
    for kind in kinds:
        low, high = getattr(args, f"{kind}_crops_scale")
        if not 0 < low <= high <= 1:
            raise UsageError(f"--{kind}_crops_scale {low} {high}: two shares of the area with 0 < low <= high <= 1")
        size = getattr(args, f"{kind}_crops_size")
        if size < 1:
            raise UsageError(f"--{kind}_crops_size {size}: must be at least 1 pixel")
        family.check_size(f"--{kind}_crops_size", size, family.arguments(vars(args)))


def multi_crop_views(args: argparse.Namespace) -> MultiCropViews:
    return MultiCropViews(
        global_crops_scale=args.global_crops_scale,
        local_crops_scale=args.local_crops_scale,
        local_crops_number=args.local_crops_number,
        global_crops_size=args.global_crops_size,
        local_crops_size=args.local_crops_size,
        augment=args.augment,
        global_crops_number=getattr(args, "global_crops_number", 2),
    )


class MultiCropNetwork(nn.Module):
    """Backbone on all crops, head on all outputs; crops are ordered crop by crop, then image by image."""

    def __init__(self, backbone: nn.Module, head: nn.Module):
        super().__init__()
        self.backbone = backbone
        self.head = head

    def features(self, crops: Sequence[torch.Tensor], draws: np.ndarray | None = None) -> torch.Tensor:
        """Crops of (batch, 3, height, width), of any sizes -> (crops * batch, dim)."""
        if hasattr(self.backbone, "forward_crops"):
            return self.backbone.forward_crops(crops, draws)
        outputs = [self.backbone(group) for group in group_by_size(crops)]
        outputs = [output[0] if isinstance(output, tuple) else output for output in outputs]
        return torch.cat(outputs) if len(outputs) > 1 else outputs[0]

    def forward(self, crops: torch.Tensor | Sequence[torch.Tensor]) -> torch.Tensor:
        """(crops * batch, prototypes)."""
        return self.head(self.features([crops] if isinstance(crops, torch.Tensor) else crops))
