"""Transfer, data set by data set: features kept or given, a classifier per seed, means over seeds and sets."""

import argparse
import hashlib
import json
import statistics
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from data.datasets import Source
from data.decode import reading_from
from data.labelled import open_labelled
from evaluation.cache import FeatureStore, Preparation
from evaluation.compared import compared
from evaluation.confidence import interval_of
from evaluation.features import Feature
from evaluation.knn import accuracies_of, knn_right
from evaluation.network import chosen_features, network_from_options
from evaluation.results import write_result
from evaluation.search import SEARCHES
from evaluation.sets import common_labels, open_train_and_test
from evaluation.transfer import (
    lbfgs_classifier,
    log_odds,
    mean_per_class_accuracy,
    normalised,
    over_sets,
    ranges,
    searched,
    sgd_classifier,
    split_trainval,
    top1,
)
from evaluation.transfer_options import bounds
from evaluation.unreadable import leave_out, readable, refuse
from lock import hold
from models.checkpoints import Network, weights_hash
from models.safe_load import load_file
from utils import UsageError, World, barrier, log, make_folder, save_atomically, save_torch

PARTS = ("trainval", "test")
POOLS = {"cls": "0", "patch": "mean"}  # --token_type -> evaluation/features.py
FINISHED = "finished.json"
OWN = "own"  # the name of what no --dataset names


class Data(NamedTuple):
    """Features (images, dim) and labels (images,) of both parts; ``told``: which images; ``of``: their identity;
    ``tested``: which the test images are, whatever network made the features.
    """

    trainval: tuple[torch.Tensor, torch.Tensor]
    test: tuple[torch.Tensor, torch.Tensor]
    told: str
    of: str
    tested: str
    unreadable: dict[str, int]


def evaluate(args: argparse.Namespace, world: World) -> None:
    network, feature = None, None
    if args.features_dir is None:
        network = network_from_options(args)
        network.model.to(world.device)
        (feature,) = chosen_features(network, [1], [POOLS[args.token_type]])
        log.info(f"feature: {feature}, {Preparation(args.image_size, args.image_size)}")
    folder = Path(args.output_dir)
    make_folder(folder)
    with hold(folder, world):
        if args.purge_output_dir and world.rank == 0:
            (folder / FINISHED).unlink(missing_ok=True)
        barrier()
        results, told, unreadable = {}, [], {"train": 0, "test": 0}
        right, tested = {}, []
        for name, given in sets_of(args).items():
            data = given_data(given) if given else extracted_data(args, world, network, feature, name)
            told.append(data.told)
            unreadable = {part: unreadable[part] + data.unreadable[part] for part in unreadable}
            results[name], hits = of_set(args, world, name, data)
            right |= hits
            tested += [data.tested] * len(hits)
        extra = compared(args, "eval_transfer", tested, right) if world.rank == 0 else {}
        report(args, world, network, results, "; ".join(told), unreadable, extra)


def sets_of(args: argparse.Namespace) -> dict[str, str | None]:
    """Name of every data set, and the folder where its features are, if they are given."""
    if args.features_dir is None:
        return dict.fromkeys(args.dataset or [OWN])
    names = args.dataset or [Path(folder).name for folder in args.features_dir]
    if not args.dataset and len(names) == 1:
        names = [OWN]
    return dict(zip(names, args.features_dir, strict=True))


# ---------------------------------------------------------------------------------------------------------------------
# Features
# ---------------------------------------------------------------------------------------------------------------------


def open_part(args: argparse.Namespace, name: str, part: str) -> Source:
    """Images of a set: in --data_path itself, or in the folder of its name there."""
    root = Path(args.data_path)
    if (root / name).is_dir():
        root = root / name
    elif len(args.dataset) > 1:
        raise UsageError(f"--data_path {root}: has no folder {name}, which is one of several --dataset")
    return open_labelled(name, root, part, official=not args.any_counts)


def extracted_data(args: argparse.Namespace, world: World, network: Network, feature: Feature, name: str) -> Data:
    reading = reading_from(args)
    if name == OWN:
        sources = open_train_and_test(args.data_path, None)
        labels = common_labels(*sources)
    else:
        sources = tuple(open_part(args, name, part) for part in PARTS)
        labels = tuple(torch.tensor(source.labels) for source in sources)
    store = FeatureStore(args.feature_cache or Path(args.output_dir) / "features")
    preparation = Preparation(args.image_size, args.image_size)
    options = {"world": world, "batch_size": args.batch_size_per_gpu, "num_workers": args.num_workers}
    parts, counts = {}, {}
    for part, source, classes in reversed(list(zip(PARTS, sources, labels, strict=True))):
        source = source.read_as(reading)
        (rows,), unreadable = store.features(network, source, preparation, [feature], **options)
        if part == "test" and not args.skip_unreadable:
            refuse(source, unreadable)
        leave_out(source, unreadable)
        parts[part] = rows, classes[readable(len(source), unreadable)]
        counts["train" if part == "trainval" else part] = len(unreadable)
    if args.dump_features and world.rank == 0:
        dump(Path(args.dump_features) / name, parts)
    of = json.dumps([weights_hash(network.model), str(feature), str(preparation), *(s.fingerprint for s in sources)])
    told = "; ".join(source.name for source in sources)
    return Data(parts["trainval"], parts["test"], told, of, sources[1].fingerprint, counts)


def dump(folder: Path, parts: dict) -> None:
    """UNIC's files: X (images, dim) float32 and Y (images,) int64."""
    make_folder(folder)
    for part, (rows, labels) in parts.items():
        try:
            save_torch({"X": rows.clone(), "Y": labels}, folder / f"features_{part}.pth")
        except OSError as error:
            raise UsageError(f"--dump_features {folder}: cannot be written: {error}") from error
    log.info(f"features written to {folder}")


def given_data(given: str) -> Data:
    """From a folder of --features_dir. All that is known of its test images is their classes, in order."""
    parts, folder, digest = {}, Path(given), hashlib.blake2b(digest_size=12)
    for part in PARTS:
        path = folder / f"features_{part}.pth"
        file = load_file(path)
        if not isinstance(file, dict) or not all(isinstance(file.get(key), torch.Tensor) for key in "XY"):
            raise UsageError(
                f"{path}: holds no tensors X and Y; features of UNIC's or of our --dump_features are needed"
            )
        rows, labels = file["X"].float(), file["Y"].long()
        if rows.ndim != 2 or labels.shape != rows.shape[:1] or not len(rows) or int(labels.min()) < 0:
            shapes = f"X {tuple(rows.shape)}, Y {tuple(labels.shape)}"
            raise UsageError(f"{path}: {shapes}: a row and a class from 0 for every image are needed")
        if not torch.isfinite(rows).all():
            raise UsageError(f"{path}: features that are not finite numbers")
        parts[part] = rows, labels
        digest.update(rows.numpy().tobytes() + labels.numpy().tobytes())
    if parts["trainval"][0].shape[1] != parts["test"][0].shape[1]:
        raise UsageError(
            f"{folder}: features of {parts['trainval'][0].shape[1]} and {parts['test'][0].shape[1]} numbers"
        )
    tested = hashlib.blake2b(parts["test"][1].numpy().tobytes(), digest_size=12).hexdigest()
    none = {"train": 0, "test": 0}
    return Data(*(parts[part] for part in PARTS), str(folder), digest.hexdigest(), f"classes {tested}", none)


# ---------------------------------------------------------------------------------------------------------------------
# Classification
# ---------------------------------------------------------------------------------------------------------------------


def as_published(name: str) -> tuple[str, str]:
    """UNIC's classifier and normalisation for a set: large ones by SGD on unit vectors."""
    large = name == "in1k" or name.startswith(("cog_", "inat"))
    return ("logreg_torch", "l2") if large else ("logreg_sklearn", "none")


def of_set(args: argparse.Namespace, world: World, name: str, data: Data) -> tuple[dict, dict[str, np.ndarray]]:
    """Results of every seed, and their means; what was finished before is taken from the folder. And for every seed,
    or k, which test images are right.
    """
    clf_type = args.clf_type or as_published(name)[0]
    norm = args.features_norm or ("l2" if clf_type == "knn_torch" else as_published(name)[1])
    (train, labels), (test, test_labels) = data.trainval, data.test
    classes = 1 + int(max(labels.max(), test_labels.max()))
    unseen = set(test_labels.tolist()) - set(labels.tolist())
    if unseen:
        raise UsageError(
            f"{name}: {len(unseen)} classes of the test images have no training images, such as {min(unseen)}"
        )
    device = world.device
    train, test = normalised(train.to(device), test.to(device), norm)
    labels, test_labels = labels.to(device), test_labels.to(device)
    log.info(
        f"{name}: {len(train)} images to learn from, {len(test)} to test on, {classes} classes; {clf_type} on {norm}"
    )
    if clf_type == "knn_torch":
        return neighbours(args, world, name, (train, labels), (test, test_labels), classes, cosine=norm == "l2")
    runs = {}
    for seed in args.seed:
        path = Path(args.output_dir) / FINISHED
        key = key_of(args, name, clf_type, norm, data.of, seed)
        finished = read_finished(path)
        if "right" not in finished.get(key, {}):
            finished[key] = one_seed(args, clf_type, classes, seed, (train, labels), (test, test_labels))
            if world.rank == 0:
                write_finished(path, finished)
        runs[seed] = finished[key]
        setting = ", ".join(f"{n} {value:.4g}" for n, value in runs[seed]["setting"].items())
        log.info(
            f"{name}, seed {seed}: {setting}; validation {runs[seed]['val_top1']:.2f}, test {runs[seed]['top1']:.2f}"
        )
    means = {kind: statistics.fmean(run[kind] for run in runs.values()) for kind in ("top1", "mean_per_class_acc")}
    low, high = interval_of(means["top1"], len(test))
    right = {f"{name}, seed {seed}": unpacked(run["right"], len(test)) for seed, run in runs.items()}
    runs = {str(seed): {n: value for n, value in run.items() if n != "right"} for seed, run in runs.items()}
    found = means | {"interval": [low, high], "log_odds": finite(log_odds(means["top1"])), "clf_type": clf_type}
    per_class = f"per class {means['mean_per_class_acc']:.2f}"
    log.info(f"{name}: top-1 {means['top1']:.2f} (95 %: {low:.2f} to {high:.2f}), {per_class}")
    return found | {"features_norm": norm, "seeds": runs}, right


def packed(right: torch.Tensor) -> str:
    """Which test images are right, a bit for each, as JSON takes it."""
    return np.packbits(right.cpu().numpy()).tobytes().hex()


def unpacked(text: str, images: int) -> np.ndarray:
    return np.unpackbits(np.frombuffer(bytes.fromhex(text), np.uint8), count=images).astype(bool)


def one_seed(args: argparse.Namespace, clf_type: str, classes: int, seed: int, trainval: tuple, test: tuple) -> dict:
    if clf_type == "logreg_sklearn":
        classify = lbfgs_classifier(classes, args.clf_max_iter)
    else:
        classify = sgd_classifier(classes, args.clf_epochs, args.clf_batch_size, args.clf_mom, seed)
    search = SEARCHES[args.search](ranges(clf_type, bounds(args)), seed)
    at_once = args.trials_at_once or (1 if args.search == "tpe" else args.n_optuna_trials)
    split = split_trainval(trainval[1].cpu().numpy(), args.val_perc, seed)
    found = searched(classify, search, args.n_optuna_trials, at_once, trainval, split, test[0])
    return {
        "top1": float(top1(found.predictions, test[1])),
        "mean_per_class_acc": mean_per_class_accuracy(found.predictions, test[1]),
        "val_top1": found.val_top1,
        "setting": found.setting,
        "trials": found.trials,
        "right": packed(found.predictions == test[1]),
    }


def neighbours(
    args, world: World, name: str, trainval: tuple, test: tuple, classes: int, cosine: bool
) -> tuple[dict, dict[str, np.ndarray]]:
    hits = knn_right(*trainval, *test, args.knn_k, args.knn_temp, classes, world, cosine=cosine)
    results, rows = accuracies_of(hits, args.knn_k), {}
    for k, (one, five) in results.items():
        interval = interval_of(one, len(test[0]))
        log.info(f"{name}: {k}-NN classifier result: Top1: {one}, Top5: {five} ({interval})")
        rows[str(k)] = {"top1": one, "top5": five, "interval": list(interval)}
    quoted = str(20 if 20 in results else args.knn_k[0])
    first = hits[..., 0].bool().cpu().numpy()
    right = {f"{name}, {k}-NN": row for k, row in zip(args.knn_k, first, strict=True)}
    found = {"top1": rows[quoted]["top1"], "interval": rows[quoted]["interval"], "clf_type": "knn_torch", "k": rows}
    return found, right


def finite(value: float) -> float | None:
    return value if abs(value) < float("inf") else None


def key_of(args: argparse.Namespace, *parts: object) -> str:
    """What decides a result."""
    names = (
        "val_perc",
        "n_optuna_trials",
        "search",
        "trials_at_once",
        "clf_mom",
        "clf_epochs",
        "clf_batch_size",
        "clf_max_iter",
    )
    options = {name: getattr(args, name) for name in names} | bounds(args)
    return hashlib.blake2b(json.dumps([*parts, options]).encode(), digest_size=12).hexdigest()


def read_finished(path: Path) -> dict:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        log.warning(f"warning: {path} cannot be read, and everything is done again ({error})")
        return {}


def write_finished(path: Path, finished: dict) -> None:
    try:
        save_atomically(path, lambda temporary: temporary.write_text(json.dumps(finished)))
    except OSError as error:
        raise UsageError(f"--output_dir {path.parent}: cannot save ({error.strerror or error})") from error


def report(
    args, world: World, network: Network | None, results: dict, told: str, unreadable: dict, extra: dict
) -> None:
    """A line per set, the means without ImageNet-1k, and the JSON."""
    means = over_sets({name: found["top1"] for name, found in results.items()})
    if len(results) > 1:
        width = max(map(len, results))
        lines = [
            f"{name:<{width}}{found['top1']:9.2f} (95 %: {found['interval'][0]:.2f} to {found['interval'][1]:.2f})"
            for name, found in results.items()
        ]
        log.info("top-1 in percent\n" + "\n".join(lines))
        if means:
            log.info(f"mean without in1k: {means['mean_accuracy']:.2f}, log-odds {means['mean_log_odds']:.4f}")
    if world.rank == 0:
        means = {name: finite(value) for name, value in means.items()}
        write_result(args, "eval_transfer", network, told, unreadable, {"sets": results, **means, **extra})
