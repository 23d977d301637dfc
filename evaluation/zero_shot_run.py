"""Zero-shot accuracy of a student in the space of a teacher that shares one with texts: images, features, result."""

import argparse
from dataclasses import dataclass

import torch

from data.datasets import Source, open_source, testing_path
from data.decode import reading_from
from data.preprocess import eval_transform
from evaluation.features import extract_features, labels_of
from evaluation.network import network_from_options
from evaluation.results import write_result
from evaluation.sets import crop_and_resize
from evaluation.unreadable import leave_out, readable, refuse, remark
from evaluation.zero_shot import accuracies, read_projection, read_texts
from models.checkpoints import Network
from utils import UsageError, World, log


@dataclass
class TestImages:
    """The images of an evaluation that learns from none; ``data``: which they are, for results."""

    source: Source
    labels: torch.Tensor
    sides: tuple[int, int]  # crop, shorter side before it

    @property
    def data(self) -> str:
        return self.source.name


def open_test_images(args: argparse.Namespace, network: Network) -> TestImages:
    source = open_source(None if args.data_path is None else testing_path(args.data_path), split="test")
    source = source.read_as(reading_from(args))
    labels = labels_of(source)
    if (labels < 0).any():
        raise UsageError(f"{source.name}: images without a class; needs one folder per class")
    return TestImages(source, labels, crop_and_resize(args, network))


def evaluate(args: argparse.Namespace, world: World) -> None:
    network = network_from_options(args)
    images = open_test_images(args, network)
    projection = read_projection(args.projection, network.model.dim)
    texts = read_texts(args.texts, projection.shape[0], len(images.source.class_names))
    crop, resize = images.sides
    log.info(f"zero-shot: {images.data}; crop {crop} of {resize} pixels; {len(texts)} texts, {texts.shape[1]} wide")
    features, unreadable = extract_features(
        network.model.to(world.device),
        images.source,
        eval_transform(crop, resize),
        world=world,
        batch_size=args.batch_size_per_gpu,
        num_workers=args.num_workers,
        device=world.device,
    )
    if not args.skip_unreadable:
        refuse(images.source, unreadable)
    leave_out(images.source, unreadable)
    if not features.isfinite().all():
        raise UsageError(f"{network.label}: features that are not finite numbers; its weights are damaged or diverged")
    labels = images.labels[readable(len(images.labels), unreadable)]
    device, dtype = world.device, features.dtype
    matrices = (matrix.to(device, dtype) for matrix in (features, projection, texts))
    numbers = accuracies(labels.to(device), *matrices)
    counts = {"train": 0, "test": len(unreadable)}
    shown = ", ".join(f"{name.capitalize()}: {value}" for name, value in numbers.items())
    log.info(f"zero-shot result: {shown}{remark(counts)}")
    if world.rank == 0:
        write_result(args, "eval_zero_shot", network, images, counts, numbers)
