"""Clusters that nobody was told of, compared with classes: a head's prototypes, or k-means of frozen features."""

import argparse
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F

from data.datasets import open_source
from data.decode import reading_from
from data.preprocess import eval_transform
from data.source import Source
from evaluation.clustering import (
    adjusted_rand_index,
    assignment_accuracy,
    contingency,
    fowlkes_mallows,
    normalized_mutual_information,
)
from evaluation.confidence import interval_of
from evaluation.features import class_token, evaluating, extract_features, labels_of
from evaluation.images import check_finite, settled, test_place
from evaluation.kmeans import kmeans
from evaluation.network import chosen_features, network_from_options
from evaluation.prototypes import Prototypes
from evaluation.results import write_result
from evaluation.sets import crop_and_resize
from models.checkpoints import Network
from models.reading import read_backbone
from utils import UsageError, World, all_gather_objects, log

MEASURES = {
    "NMI": normalized_mutual_information,
    "ARI": adjusted_rand_index,
    "FMI": fowlkes_mallows,
    "ACC": assignment_accuracy,
}


def cluster(args: argparse.Namespace, world: World, append: bool) -> None:
    network = network_from_options(args)
    network.model.to(world.device)
    source = open_images(args)
    transform = eval_transform(*crop_and_resize(args, network))
    head = head_of(args, network, world) if args.assign != "kmeans" else None
    if head is not None:
        assigned, kept = of_prototypes(args, world, network, source, transform, head)
        how = f"the best of {head.prototypes} prototypes"
    else:
        assigned, kept, how = of_kmeans(args, world, network, source, transform)
    labels = labels_of(source)[kept]
    table = contingency(labels.numpy(), assigned.numpy())
    values = {name: 100 * float(measure(table)) for name, measure in MEASURES.items()}
    used, classes = len(table.cluster_sizes), len(table.class_sizes)
    log.info(f"{len(labels)} images, {classes} classes, {used} clusters that are used; an image's cluster: {how}")
    sure = interval_of(values["ACC"], len(labels))  # of the images; which cluster is which class stays as it is
    log.info(", ".join(f"{name} {value:.2f}" for name, value in values.items()) + f" ({sure})")
    if world.rank == 0:
        numbers = values | {
            "ACC_interval": list(sure),
            "clusters": used,
            "classes": classes,
            "images": len(labels),
            "assigned_by": how,
        }
        unreadable = {"train": 0, "test": len(source) - len(kept)}
        write_result(args, "eval_clustering", network, source.name, unreadable, numbers, append)


def open_images(args: argparse.Namespace) -> Source:
    if args.data_path is None:
        return open_source(None, split="test")
    source = open_source(test_place(args.data_path), split="val").read_as(reading_from(args))
    if (np.asarray(source.labels) < 0).any():
        raise UsageError(f"{source.name}: images without a class; needs one folder per class")
    return source


def head_of(args: argparse.Namespace, network: Network, world: World) -> Prototypes | None:
    """The projection head beside the network; None where there is none and nothing was said."""
    if not args.pretrained_weights:
        if args.assign == "prototypes":
            raise UsageError("--assign prototypes: are a checkpoint's; pass --pretrained_weights")
        return None
    state, info = read_backbone(args.pretrained_weights, args.checkpoint_key)
    try:
        head = Prototypes(state, info)
    except UsageError:
        if args.assign == "prototypes":
            raise
        log.info(f"{info.path}: holds no projection head: k-means of features")
        return None
    width = class_token(network.model, torch.zeros(1, 3, *[crop_and_resize(args, network)[0]] * 2, device=world.device))
    if width.shape[1] != head.in_dim:
        raise UsageError(f"{info.path}: a head on {head.in_dim} numbers, and {network.label} has {width.shape[1]}")
    return head.eval()


def of_prototypes(
    args: argparse.Namespace, world: World, network: Network, source: Source, transform: Callable, head: Prototypes
) -> tuple[torch.Tensor, torch.Tensor]:
    def best(model: torch.nn.Module, images: torch.Tensor) -> torch.Tensor:
        logits = check_finite(network.label, head(class_token(model, images)))
        return logits.argmax(dim=1, keepdim=True)

    rows, kept = rows_of(args, world, network, source, transform, best)
    return rows[:, 0].long(), kept


def of_kmeans(
    args: argparse.Namespace, world: World, network: Network, source: Source, transform: Callable
) -> tuple[torch.Tensor, torch.Tensor, str]:
    (feature,) = chosen_features(network, [args.n_last_blocks], [args.avgpool_patchtokens], [args.class_token])
    clusters = args.clusters or len(source.class_names)
    rows, kept = rows_of(args, world, network, source, transform, feature)
    if clusters > len(rows):
        raise UsageError(f"--clusters {clusters}: {source.name} has {len(rows)} images that can be read")
    rows = F.normalize(check_finite(network.label, rows), dim=1).to(world.device)
    found = kmeans(rows, clusters, args.seed, args.starts, args.iterations) if world.rank == 0 else None
    (assigned, inertia), *_ = all_gather_objects((found.assigned.cpu(), found.inertia) if found else None)
    how = f"k-means, {clusters} centres, the best of {args.starts} starts (inertia {inertia:.5f}), on the {feature}"
    return assigned, kept, how


def rows_of(
    args: argparse.Namespace, world: World, network: Network, source: Source, transform: Callable, feature: Callable
) -> tuple[torch.Tensor, torch.Tensor]:
    """Features of all images that can be read, and which of them these are."""
    options = {"batch_size": args.batch_size_per_gpu, "num_workers": args.num_workers, "device": world.device}
    with evaluating(network.model):
        rows, bad = extract_features(network.model, source, transform, feature=feature, world=world, **options)
    return rows, settled(source, bad, args.skip_unreadable)
