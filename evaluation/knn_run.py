"""k-NN of a network's features: extracted or read from a folder, classified, shown beside what it has to beat."""

import argparse
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from data.datasets import ALL, Source
from data.decode import reading_from
from data.preprocess import eval_transform
from evaluation.baselines import BINS, RAW_SIDE, colour_histogram, raw_pixels
from evaluation.cache import FeatureCache
from evaluation.features import Feature, extract_features
from evaluation.knn import (
    Accuracies,
    as_numbers,
    bank_rows,
    deviation,
    knn_classify,
    mean_accuracies,
    runs_as_numbers,
    table,
)
from evaluation.network import chosen_features, network_from_options, untrained
from evaluation.results import write_result
from evaluation.sets import Sets, crop_and_resize, open_train_and_test
from models.checkpoints import Network, weights_hash
from utils import UsageError, World, all_reduce_sum, log


@dataclass
class KnnRun:
    """With --subset the bank holds what all --subset_starts need; ``rows``: for every start the rows of its images."""

    args: argparse.Namespace
    world: World
    network: Network
    sets: Sets
    feature: Feature
    rows: dict[int, torch.Tensor | slice]


def build_run(args: argparse.Namespace, world: World) -> KnnRun:
    network = network_from_options(args)
    network.model.to(world.device)
    (feature,) = chosen_features(network, [args.n_last_blocks], [args.avgpool_patchtokens], [args.class_token])
    per_class = None if args.subset == ALL else args.subset
    first, last = min(args.subset_starts), max(args.subset_starts)
    span = per_class and last - first + per_class
    images = open_train_and_test(args.data_path, span, first, args.eval_data_path)
    sets = Sets(images, reading_from(args), crop_and_resize(args, network))
    rows = {
        start: bank_rows(sets.train_labels, per_class, start - first) if per_class else slice(None)
        for start in args.subset_starts
    }
    log.info(f"bank: {sets}")
    return KnnRun(args, world, network, sets, feature, rows)


def evaluate(args: argparse.Namespace, world: World, append: bool) -> None:
    """One network of a checkpoint; ``append``: its result becomes a further line of eval_knn.json."""
    run = build_run(args, world)
    rows = baseline_accuracies(run) if args.baselines else {}
    runs = classify(run, *network_features(run))
    show(runs)
    if args.baselines:
        name = f"{run.network.label}, {args.pretrained_weights or 'random weights'}"
        log.info("k-NN top-1 in percent\n" + table(rows | {name: mean_accuracies(runs)}, args.nb_knn))
    if world.rank == 0:
        numbers = runs_as_numbers(runs)
        numbers |= {"baselines": {name: as_numbers(row) for name, row in rows.items()}} if rows else {}
        write_result(args, "eval_knn", run.network, run.sets, numbers, append)


def show(runs: dict[int, Accuracies]) -> None:
    for start, accuracies in runs.items():
        where = f"from image {start} on: " if len(runs) > 1 else ""
        for k, (top1, top5) in accuracies.items():
            log.info(f"{where}{k}-NN classifier result: Top1: {top1}" + f", Top5: {top5}" * (k > 1))
    if len(runs) > 1:
        for k, (top1, _) in mean_accuracies(runs).items():
            log.info(
                f"{k}-NN, mean of {len(runs)} subsets: Top1: {top1:.4f}, standard deviation {deviation(runs, k):.4f}"
            )


def extract(run: KnnRun, model: torch.nn.Module, source: Source, feature: Callable) -> torch.Tensor:
    args, sets = run.args, run.sets
    features, _ = extract_features(
        model,
        source,
        eval_transform(sets.crop_size, sets.resize_size),
        world=run.world,
        batch_size=args.batch_size_per_gpu,
        num_workers=args.num_workers,
        device=run.world.device,
        feature=feature,
    )
    return features


def network_features(run: KnnRun) -> list[torch.Tensor]:
    """Normalised features of the train and the test images, from a folder where one is given and fits."""
    args, sets, world, network = run.args, run.sets, run.world, run.network
    key = {}
    if args.load_features or args.dump_features:
        key = {
            "weights": weights_hash(network.model),
            "arch": network.label,
            "feature": f"{run.feature}, L2-normalised",
            "preprocessing": f"resize {sets.resize_size} bicubic, centre crop {sets.crop_size}, ImageNet normalisation",
            "train": sets.train.fingerprint,
            "test": sets.test.fingerprint,
        }
        cache = FeatureCache(args.load_features or args.dump_features)
        stored = cache.load(key)
        if args.load_features and stored is None:
            why = cache.difference(key) or "a file is damaged"
            raise UsageError(f"--load_features {args.load_features}: {why}; extract with --dump_features instead")
        hits = all_reduce_sum(torch.tensor([int(stored is not None)], device=world.device))
        if int(hits) == world.size:
            return list(stored[:2])
    features = [
        F.normalize(extract(run, network.model, source, run.feature), dim=1) for source in (sets.train, sets.test)
    ]
    if not all(torch.isfinite(matrix).all() for matrix in features):
        raise UsageError(f"{network.label}: features that are not finite numbers; its weights are damaged or diverged")
    if args.dump_features and world.rank == 0:
        cache.save(key, (*features, sets.train_labels, sets.test_labels))
    return features


def classify(run: KnnRun, bank: torch.Tensor, queries: torch.Tensor) -> dict[int, Accuracies]:
    """For every one of --subset_starts."""
    args, sets = run.args, run.sets
    device = run.world.device if args.use_cuda else torch.device("cpu")
    queries, test_labels = queries.to(device), sets.test_labels.to(device)
    results = {}
    for start, rows in run.rows.items():
        known, labels = bank[rows].to(device), sets.train_labels[rows].to(device)
        options = (args.nb_knn, args.temperature, sets.classes, run.world)
        results[start] = knn_classify(known, labels, queries, test_labels, *options)
    return results


def baseline_accuracies(run: KnnRun) -> dict[str, Accuracies]:
    """Raw pixels, colour histogram and the same architecture untrained (seed 0), on the same images and the same k."""
    network, sets = run.network, run.sets
    model = untrained(network.arch, network.arguments).to(run.world.device)

    def feature(model, images: torch.Tensor) -> torch.Tensor:
        return torch.cat((raw_pixels(images), colour_histogram(images), run.feature(model, images)), dim=1)

    train, test = (extract(run, model, source, feature) for source in (sets.train, sets.test))
    pixels = 3 * min(RAW_SIDE, sets.crop_size) ** 2
    widths = [pixels, BINS**3, train.shape[1] - pixels - BINS**3]
    names = ("raw pixels", "colour histogram", f"untrained {network.label}")
    return {
        name: mean_accuracies(classify(run, bank, queries))
        for name, bank, queries in zip(names, train.split(widths, dim=1), test.split(widths, dim=1), strict=True)
    }
