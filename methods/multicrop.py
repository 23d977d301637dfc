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


def add_crop_arguments(parser: argparse._ArgumentGroup, several: bool = False, also: Sequence[str] = ()) -> None:
    """``several``: there may be local crops of several sizes, so their numbers and sizes are lists (EsViT). ``also``:
    further names of the option that says their size."""
    add = parser.add_argument
    many = {"nargs": "+"} if several else {}
    number, size = ([8], [96]) if several else (8, 96)
    every = ", of every size" if several else ""
    add("--global_crops_scale", default=(0.4, 1.0), type=float, nargs=2, help="area share of the global crops")
    add(
        "--local_crops_number",
        default=number,
        type=int,
        help=f"local crops per image{every}; 0 leaves the global ones",
        **many,
    )
    add("--local_crops_scale", default=(0.05, 0.4), type=float, nargs=2, help="area share of the local crops")
    add("--global_crops_size", default=224, type=int, help="pixels")
    add("--local_crops_size", *also, default=size, type=int, help=f"pixels{every}", **many)


def local_crops(args: argparse.Namespace) -> list[tuple[int, int]]:
    """(number, size in pixels) of every kind of local crops; none where no crop is made."""
    numbers, sizes = args.local_crops_number, args.local_crops_size
    if isinstance(numbers, int):
        numbers, sizes = [numbers], [sizes]
    return [(number, size) for number, size in zip(numbers, sizes, strict=True) if number]


def crop_kinds(args: argparse.Namespace) -> list[tuple[str, int]]:
    """("global" or "local", size in pixels) of every kind of crops that are made."""
    return [("global", args.global_crops_size), *(("local", size) for _, size in local_crops(args))]


def check_crop_arguments(args: argparse.Namespace) -> None:
    """Raises UsageError for shares outside (0, 1] and for sizes that the patches do not divide."""
    numbers, sizes = args.local_crops_number, args.local_crops_size
    if not isinstance(numbers, int) and len(numbers) != len(sizes):
        raise UsageError(f"--local_crops_number {_spaced(numbers)} --local_crops_size {_spaced(sizes)}: one size each")
    for number, _ in local_crops(args):
        if number < 0:
            raise UsageError(f"--local_crops_number {number}: must be 0 (two views) or more")
    family = family_of(args.arch)
    for kind, size in crop_kinds(args):
        low, high = getattr(args, f"{kind}_crops_scale")
        if not 0 < low <= high <= 1:
            raise UsageError(f"--{kind}_crops_scale {low} {high}: two shares of the area with 0 < low <= high <= 1")
        if size < 1:
            raise UsageError(f"--{kind}_crops_size {size}: must be at least 1 pixel")
        family.check_size(f"--{kind}_crops_size", size, family.arguments(vars(args)))


def _spaced(values: Sequence[int]) -> str:
    return " ".join(map(str, values))


def crop_settings(args: argparse.Namespace) -> dict:
    """What every recipe of global and local crops is told (data/views.py, data/udi_views.py)."""
    names = ("global_crops_scale", "local_crops_scale", "global_crops_size", "augment")
    return {name: getattr(args, name) for name in names}


def multi_crop_views(args: argparse.Namespace) -> MultiCropViews:
    globals_ = getattr(args, "global_crops_number", 2)
    return MultiCropViews(**crop_settings(args), local_crops=local_crops(args), global_crops_number=globals_)


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
