"""The images of an evaluation: train and test, what happens to them, and their labels under common class numbers."""

import argparse
from pathlib import Path

import torch

from data.datasets import Place, Source, check_subset, open_source, testing_path, train_and_test_paths, training_path
from data.decode import Reading, add_reading_arguments
from data.published import Published, add_dataset_arguments, place_from
from evaluation.features import labels_of
from models.checkpoints import Network
from models.layouts.table import recorded_image_size
from utils import UsageError, check_writable, escape

SKIP_HELP = "leave out test images that cannot be read, and count them; left out: they are refused by their names"


def add_data_arguments(parser: argparse._ActionsContainer) -> None:
    """The options by which evaluations on a train and a test set are told what to look at it with."""
    add = parser.add_argument
    add_path_arguments(parser)
    add("--subset", default=None, type=int, help="training images per class; left out or -1: all")
    add_looking_arguments(parser)


def add_looking_arguments(parser: argparse._ActionsContainer) -> None:
    """How images are cut, decoded and read, whichever they are."""
    add = parser.add_argument
    add("--crop_size", default=None, type=int, help="pixels; left out: the checkpoint's own, else 224")
    add("--resize_size", default=None, type=int, help="shorter side before the crop; left out: crop * 256 / 224")
    add("--batch_size_per_gpu", default=128, type=int, help="images per forward pass and process")
    add("--num_workers", default=10, type=int, help="processes that decode images, per process")
    add_reading_arguments(parser)
    add("--skip_unreadable", action="store_true", help=SKIP_HELP)


def add_path_arguments(parser: argparse._ActionsContainer) -> None:
    add = parser.add_argument
    what = "folder, list (.txt), zip or tar archives with train/ and val/ or test/; left out: bundled tiles"
    add("--data_path", default=None, help=what)
    add("--eval_data_path", default=None, help="the test images, where they are elsewhere or could be one of several")
    add_dataset_arguments(parser)


def check_common_arguments(args: argparse.Namespace) -> None:
    """Raise UsageError for values that cannot work, before anything is read."""
    check_subset(args.subset)
    place_from(args)
    check_looking_arguments(args)


def check_looking_arguments(args: argparse.Namespace) -> None:
    for name in ("crop_size", "resize_size", "batch_size_per_gpu", "patch_size", "window_size"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UsageError(f"--{name} {value}: must be at least 1")
    if args.num_workers < 0:
        raise UsageError(f"--num_workers {args.num_workers}: must be 0 (decode in this process) or more")
    check_writable(Path(args.output_dir))


def crop_and_resize(args: argparse.Namespace, network: Network) -> tuple[int, int]:
    """Crop and shorter side in pixels: as asked, else as the network was trained, else 224 of 256."""
    recorded = recorded_image_size(network.report.info.arguments) if network.report else None
    crop = args.crop_size or recorded or 224
    margin = 1 if args.data_path is None else 256 / 224  # a bundled tile has no border to cut off
    resize, patch = args.resize_size or round(crop * margin), network.arguments.get("patch_size", 1)
    if not patch <= crop <= resize:
        raise UsageError(f"--crop_size {crop} --resize_size {resize}: need patch size ({patch}) <= crop <= resize")
    return crop, resize


def open_train_and_test(
    data_path: Place | None, subset: int | None, start: int = 0, eval_data_path: str | None = None
) -> tuple[Source, Source]:
    """Of ``data_path`` the training images, all or ``subset`` of every class, and the test images (data/splits.py).

    ``start``: which image of every class is the subset's first. ``eval_data_path``: where the test images are instead,
    stored as those of ``data_path``.
    None is the photographs.
    """
    if data_path is None:
        if eval_data_path is not None:
            raise UsageError("--eval_data_path: names the test images of --data_path; pass that as well")
        return open_source(None, subset, "train", start), open_source(None, split="test")
    if eval_data_path is None:
        train, test = train_and_test_paths(data_path)
    else:
        beside = data_path.beside(eval_data_path) if isinstance(data_path, Published) else eval_data_path
        train, test = training_path(data_path), testing_path(beside)
    return open_source(train, subset, "train", start), open_source(test, split="val")


def common_labels(train: Source, test: Source) -> tuple[torch.Tensor, torch.Tensor]:
    """Labels of both sets in the train set's numbering; classes are matched by name."""
    train_labels, test_labels = labels_of(train), labels_of(test)
    for source, labels in ((train, train_labels), (test, test_labels)):
        if (labels < 0).any():
            raise UsageError(f"{source.name}: images without a class; needs one folder per class")
    numbers = {name: number for number, name in enumerate(train.class_names)}
    unknown = [name for name in test.class_names if name not in numbers]
    if unknown:
        raise UsageError(f"{test.name}: {len(unknown)} classes are not in {train.name}, such as {escape(unknown[0])}")
    return train_labels, torch.tensor([numbers[name] for name in test.class_names])[test_labels]


class Sets:
    """Training and test images, their labels under common class numbers, and the sides of what is cut from them.

    ``reading``: how files are decoded. ``sides``: crop and shorter side before it, in pixels. ``classes``: what the
    user said of their number, and with which ``option``; None counts those of the training images. Raises UsageError
    when it is too low.
    """

    def __init__(
        self,
        images: tuple[Source, Source],
        reading: Reading,
        sides: tuple[int, int],
        classes: int | None = None,
        option: str = "--num_labels",
    ):
        self.train, self.test = (source.read_as(reading) for source in images)
        self.train_labels, self.test_labels = common_labels(self.train, self.test)
        self.crop_size, self.resize_size = sides
        self.classes = classes or len(self.train.class_names)
        if self.classes < len(self.train.class_names):
            raise UsageError(f"{option} {classes}: {self.train.name} has {len(self.train.class_names)} classes")

    def __str__(self) -> str:
        return f"{self.train.name}; test: {self.test.name}; crop {self.crop_size} of {self.resize_size} pixels"

    @property
    def data(self) -> str:
        """For results: which images these are."""
        return f"{self.train.name}; {self.test.name}"
