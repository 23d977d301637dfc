"""k-NN of a network's features: extracted or read from a folder, classified, shown beside what it has to beat."""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F

from data.datasets import ALL, Source
from data.decode import reading_from
from data.index import refresh_indices
from data.preprocess import eval_transform
from data.published import place_from
from evaluation.baselines import BINS, RAW_SIDE, colour_histogram, raw_pixels
from evaluation.cache import FeatureCache, FeatureStore, Preparation, still_unreadable
from evaluation.compared import compared
from evaluation.confidence import interval_of
from evaluation.features import Feature, extract_features
from evaluation.knn import (
    Accuracies,
    Bank,
    accuracies_of,
    as_numbers,
    bank_rows,
    deviation,
    doubts,
    knn_right,
    mean_accuracies,
    remark_on_k,
    runs_as_numbers,
    table,
)
from evaluation.network import chosen_features, network_from_options, untrained
from evaluation.results import write_result
from evaluation.sets import Sets, crop_and_resize, open_train_and_test
from evaluation.unreadable import Unreadable, leave_out, readable, refuse, remark
from models.checkpoints import Network, weights_hash
from utils import UsageError, World, all_reduce_sum, log


@dataclass
class KnnRun:
    """With --subset the bank holds what all --subset_starts need; ``rows``: for every start the rows of its images.

    ``unreadable``: the images of "train" and of "test" that were left out, so that features have no row for them.
    """

    args: argparse.Namespace
    world: World
    network: Network
    sets: Sets
    feature: Feature
    rows: dict[int, torch.Tensor | slice]
    unreadable: dict[str, Sequence[Unreadable]] = field(default_factory=lambda: {"train": (), "test": ()})

    def source(self, part: str) -> Source:
        return {"train": self.sets.train, "test": self.sets.test}[part]

    def labels(self, part: str) -> torch.Tensor:
        """Of the images that have a row."""
        labels = {"train": self.sets.train_labels, "test": self.sets.test_labels}[part]
        return labels[readable(len(labels), self.unreadable[part])]

    def bank(self, start: int) -> torch.Tensor | slice:
        """The rows of the images of ``start``, among those that have one. Raises UsageError when none has."""
        if isinstance(self.rows[start], slice):
            return self.rows[start]
        row_of = torch.full((len(self.sets.train),), -1)
        known = readable(len(row_of), self.unreadable["train"])
        row_of[known] = torch.arange(len(known))
        rows = row_of[self.rows[start]]
        if (rows < 0).all():
            raise UsageError(f"{self.sets.train.name}: none of the images from {start} on can be read")
        return rows[rows >= 0]

    @property
    def counts(self) -> dict[str, int]:
        return {part: len(images) for part, images in self.unreadable.items()}


def build_run(args: argparse.Namespace, world: World) -> KnnRun:
    network = network_from_options(args)
    network.model.to(world.device)
    (feature,) = chosen_features(network, [args.n_last_blocks], [args.avgpool_patchtokens], [args.class_token])
    per_class = None if args.subset == ALL else args.subset
    first, last = min(args.subset_starts), max(args.subset_starts)
    span = per_class and last - first + per_class
    refresh_indices(args.refresh_index)
    images = open_train_and_test(place_from(args), span, first, args.eval_data_path)
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
    right: dict[str, np.ndarray] = {}
    runs = classify(run, *network_features(run), right)
    banks = {start: Bank.of(run.labels("train")[run.bank(start)]) for start in runs}
    show(run, runs, banks)
    if args.baselines:
        name = f"{run.network.label}, {args.pretrained_weights or 'random weights'}"
        log.info("k-NN top-1 in percent\n" + table(rows | {name: mean_accuracies(runs)}, args.nb_knn))
    if world.rank == 0:
        numbers = runs_as_numbers(runs, banks, len(run.labels("test")))
        smallest = min(banks.values())
        numbers |= {"baselines": {name: as_numbers(row, smallest) for name, row in rows.items()}} if rows else {}
        numbers |= compared(args, "eval_knn", run.sets.test.fingerprint, right)
        write_result(args, "eval_knn", run.network, run.sets, run.counts, numbers, append)


# AttMask's rows (2203.12719): images per class -> neighbours, and the first image of each of five banks
LOW_SHOT = {1: (1, range(0, 25, 5)), 5: (20, range(0, 25, 5)), 10: (20, range(0, 50, 10)), 20: (20, range(0, 100, 20))}


def evaluate_low_shot(args: argparse.Namespace, world: World, append: bool) -> None:
    """All rows of LOW_SHOT on features that are extracted once; the file has a table for each."""
    span = max(max(starts) + images for images, (_, starts) in LOW_SHOT.items())
    run = build_run(argparse.Namespace(**{**vars(args), "subset": span, "subset_starts": [0]}), world)
    features, tested, numbers = network_features(run), len(run.labels("test")), {}
    for images, (k, starts) in LOW_SHOT.items():
        log.info(f"{images} image{'s' * (images > 1)} per class")
        run.args = argparse.Namespace(**{**vars(args), "nb_knn": [k]})
        run.rows = {start: bank_rows(run.sets.train_labels, images, start) for start in starts}
        runs = classify(run, *features)
        banks = {start: Bank.of(run.labels("train")[run.bank(start)]) for start in runs}
        show(run, runs, banks)
        numbers[str(images)] = runs_as_numbers(runs, banks, tested)
    if world.rank == 0:
        write_result(args, "eval_knn", run.network, run.sets, run.counts, {"low_shot": numbers}, append)


def show(run: KnnRun, runs: dict[int, Accuracies], banks: dict[int, Bank]) -> None:
    """The originals' lines; behind them what is not as it was asked for."""
    for sentence in dict.fromkeys(sentence for bank in banks.values() for sentence in doubts(run.args.nb_knn, bank)):
        log.warning(f"warning: {sentence}")
    for start, accuracies in runs.items():
        where, bank = f"from image {start} on: " if len(runs) > 1 else "", banks[start]
        log.info(f"{where}{', '.join(map(str, accuracies))} neighbours in a bank of {bank}")
        for k, (top1, top5) in accuracies.items():
            result = f"{where}{k}-NN classifier result: Top1: {top1}" + f", Top5: {top5}" * (k > 1)
            interval = f" ({interval_of(top1, len(run.labels('test')))})"
            log.info(result + interval + remark_on_k(k, bank) + remark(run.counts))
    if len(runs) > 1:
        for k, (top1, _) in mean_accuracies(runs).items():
            log.info(
                f"{k}-NN, mean of {len(runs)} subsets: Top1: {top1:.4f}, standard deviation {deviation(runs, k):.4f}"
            )


def extract(run: KnnRun, model: torch.nn.Module, feature: Callable) -> dict[str, torch.Tensor]:
    """Features of the "train" and "test" images that can be read: the latter first, since they may be refused."""
    return {part: extract_part(run, model, part, feature) for part in ("test", "train")}


def extract_part(run: KnnRun, model: torch.nn.Module, part: str, feature: Callable) -> torch.Tensor:
    args, sets = run.args, run.sets
    features, unreadable = extract_features(
        model,
        run.source(part),
        eval_transform(sets.crop_size, sets.resize_size),
        world=run.world,
        batch_size=args.batch_size_per_gpu,
        num_workers=args.num_workers,
        device=run.world.device,
        feature=feature,
    )
    without(run, part, unreadable)
    return features


def without(run: KnnRun, part: str, unreadable: Sequence[Unreadable]) -> None:
    """From here on the run does without these images. Raises UsageError when it must not."""
    if part == "test" and not run.args.skip_unreadable:
        refuse(run.sets.test, unreadable)
    leave_out(run.source(part), unreadable, told=run.unreadable[part])
    run.unreadable[part] = unreadable


def network_features(run: KnnRun) -> list[torch.Tensor]:
    """Normalised features of the train and the test images, from a folder where one is given and fits."""
    args, sets, world, network = run.args, run.sets, run.world, run.network
    if args.feature_cache:
        return stored_features(run)
    key = {}
    if args.load_features or args.dump_features:
        cache = FeatureCache(args.load_features or args.dump_features)
        still = {part: still_unreadable(run.source(part), indices) for part, indices in cache.unreadable().items()}
        key = {
            "weights": weights_hash(network.model),
            "arch": network.label,
            "feature": f"{run.feature}, L2-normalised",
            "preprocessing": str(Preparation(sets.crop_size, sets.resize_size)),
            "train": sets.train.fingerprint,
            "test": sets.test.fingerprint,
        }
        stored = cache.load(key | noted(still))
        hits = all_reduce_sum(torch.tensor([int(stored is not None)], device=world.device))
        if int(hits) == world.size:
            for part, unreadable in still.items():
                without(run, part, unreadable)
            return list(stored[:2])
        if args.load_features:
            why = cache.difference(key | noted(still)) or "a file is damaged"
            raise UsageError(f"--load_features {args.load_features}: {why}; extract with --dump_features instead")
    features = {part: F.normalize(rows, dim=1) for part, rows in extract(run, network.model, run.feature).items()}
    if not all(torch.isfinite(matrix).all() for matrix in features.values()):
        raise UsageError(f"{network.label}: features that are not finite numbers; its weights are damaged or diverged")
    both = [features["train"], features["test"]]
    if args.dump_features and world.rank == 0:
        cache.save(key | noted(run.unreadable), (*both, run.labels("train"), run.labels("test")))
    return both


def stored_features(run: KnnRun) -> list[torch.Tensor]:
    """The same, from --feature_cache."""
    store, found = FeatureStore(run.args.feature_cache), {}
    options = {"batch_size": run.args.batch_size_per_gpu, "num_workers": run.args.num_workers}
    preparation = Preparation(run.sets.crop_size, run.sets.resize_size)
    for part in ("test", "train"):
        wanted = (run.network, run.source(part), preparation, [run.feature])
        (rows,), unreadable = store.features(*wanted, world=run.world, **options)
        without(run, part, unreadable)
        found[part] = F.normalize(rows, dim=1)
    return [found["train"], found["test"]]


def noted(unreadable: dict[str, Sequence[Unreadable]]) -> dict:
    """What the key of kept features says of images without a row; nothing where there are none."""
    indices = {part: [image.index for image in images] for part, images in unreadable.items()}
    return {"unreadable": indices} if any(indices.values()) else {}


def classify(
    run: KnnRun, bank: torch.Tensor, queries: torch.Tensor, right: dict[str, np.ndarray] | None = None
) -> dict[int, Accuracies]:
    """For every one of --subset_starts. ``right`` takes which test images are, for every start and k."""
    args = run.args
    device = run.world.device if args.use_cuda else torch.device("cpu")
    queries, test_labels = queries.to(device), run.labels("test").to(device)
    results = {}
    for start in run.rows:
        rows = run.bank(start)
        known, labels = bank[rows].to(device), run.labels("train")[rows].to(device)
        options = (args.nb_knn, args.temperature, run.sets.classes, run.world)
        found = knn_right(known, labels, queries, test_labels, *options)
        results[start] = accuracies_of(found, args.nb_knn)
        if right is not None:
            rows = found[..., 0].bool().cpu().numpy()
            where = f", from image {start} on" * (len(run.rows) > 1)
            right |= {f"{k}-NN{where}": row for k, row in zip(args.nb_knn, rows, strict=True)}
    return results


def baseline_accuracies(run: KnnRun) -> dict[str, Accuracies]:
    """Raw pixels, colour histogram and the same architecture untrained (seed 0), on the same images and the same k."""
    network, sets = run.network, run.sets
    model = untrained(network.arch, network.arguments).to(run.world.device)

    def feature(model, images: torch.Tensor) -> torch.Tensor:
        return torch.cat((raw_pixels(images), colour_histogram(images), run.feature(model, images)), dim=1)

    features = extract(run, model, feature)
    pixels = 3 * min(RAW_SIDE, sets.crop_size) ** 2
    widths = [pixels, BINS**3, features["train"].shape[1] - pixels - BINS**3]
    names = ("raw pixels", "colour histogram", f"untrained {network.label}")
    banks, queries = (features[part].split(widths, dim=1) for part in ("train", "test"))
    triples = zip(names, banks, queries, strict=True)
    return {name: mean_accuracies(classify(run, bank, tests)) for name, bank, tests in triples}
