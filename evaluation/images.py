"""Evaluations without training images: their options, and counts that have to be the published ones."""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from data.datasets import testing_path
from data.decode import add_reading_arguments
from data.source import Source
from evaluation.unreadable import Unreadable, leave_out, readable, refuse
from utils import UsageError, check_writable, log


def add_loading_arguments(parser: argparse._ActionsContainer, batch_size: int = 128) -> None:
    add = parser.add_argument
    add("--batch_size_per_gpu", "--batch_size", default=batch_size, type=int, help="images per pass and process")
    add("--num_workers", default=10, type=int, help="processes that decode images, per process")
    add("--partial", action="store_true", help="take a copy of a data set that has not its published number of images")
    add_reading_arguments(parser)


def check_loading_arguments(args: argparse.Namespace) -> None:
    """Raise UsageError for values that cannot work, before anything is read."""
    for name in ("batch_size_per_gpu", "patch_size", "window_size", "imsize", "crop_size", "resize_size"):
        value = getattr(args, name, None)
        if value is not None and value < 1:
            raise UsageError(f"--{name} {value}: must be at least 1")
    if args.num_workers < 0:
        raise UsageError(f"--num_workers {args.num_workers}: must be 0 (decode in this process) or more")
    check_writable(Path(args.output_dir))


def check_count(args: argparse.Namespace, what: str, found: int, published: int) -> None:
    """Raise UsageError unless there are as many of ``what`` as published, or --partial was said."""
    if found == published:
        return
    said = f"{what}: {found} there, {published} published"
    if not args.partial:
        raise UsageError(f"{said}; complete them, or pass --partial for numbers that compare with no others")
    log.warning(f"warning: {said}; numbers of such a part compare with no published ones")


def test_place(data_path: str) -> str:
    """Where the test images of ``data_path`` are, a root with or without training images, or these images alone."""
    place = testing_path(data_path)
    alone = [name for name in ("val", "test") if (Path(data_path) / name).is_dir()]
    return str(Path(data_path) / alone[0]) if place == data_path and alone else place


def settled(source: Source, unreadable: Sequence[Unreadable], skip: bool) -> torch.Tensor:
    """Indices of the images that could be read; the others are refused, or with ``skip`` named and left out."""
    named = [Unreadable(image.index, source.image_name(image.index), image.reason) for image in unreadable]
    if not skip:
        refuse(source, named)
    leave_out(source, named)
    return readable(len(source), named)


def check_finite(label: str, features: torch.Tensor) -> torch.Tensor:
    """Raise UsageError unless all ``features`` of the network are numbers."""
    if not torch.isfinite(features).all():
        raise UsageError(f"{label}: features that are not finite numbers; its weights are damaged or diverged")
    return features
