"""Few labels: the training images that a list names, and logistic regression on their frozen features.

SimCLR v2 (2006.10029) published lists of 1 and 10 % of ImageNet's training images; they are the user's, not ours.
"""

import argparse
import hashlib
import os
from collections import Counter
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from data.datasets import Source
from data.decode import Reading, reading_from
from data.index import refresh_indices
from data.published import place_from
from data.source import PartOfSource
from evaluation.cache import FeatureStore, Preparation
from evaluation.compared import compared
from evaluation.confidence import interval_of
from evaluation.logistic import ridge_regression
from evaluation.network import chosen_features, network_from_options
from evaluation.results import write_result
from evaluation.sets import Sets, crop_and_resize, open_train_and_test
from evaluation.unreadable import leave_out, readable, refuse, remark
from utils import UsageError, World, escape, log


class ListedSource(PartOfSource):
    """Those images of a source whose file names a list has, in the order of the source; all of its classes stay."""

    def __init__(self, source: Source, names: frozenset[str], path: str):
        self.source, self.names, self.path = source, names, path
        files = [os.path.basename(source.image_name(i)) for i in range(len(source))]
        counts = Counter(name for name in files if name in names)
        missing = sorted(names - counts.keys())
        if missing:
            raise UsageError(
                f"--target_list_path {escape(path)}: {len(missing)} of its {len(names)} names are not in "
                f"{source.name}, such as {escape(missing[0])}"
            )
        twice = next((name for name, count in counts.items() if count > 1), None)
        if twice is not None:
            raise UsageError(f"--target_list_path {escape(path)}: {escape(twice)} is the name of several images")
        self.positions = np.array([i for i, name in enumerate(files) if name in names], np.int64)
        self.labels, self.class_names = np.asarray(source.labels)[self.positions], source.class_names
        self.name = f"{source.name}, of which {len(self)} are listed in {escape(path)}"

    @property
    def fingerprint(self) -> str:
        digest = hashlib.blake2b("\n".join(sorted(self.names)).encode(errors="surrogateescape"), digest_size=12)
        return f"{self.source.fingerprint}-{digest.hexdigest()}"

    def read_as(self, reading: Reading) -> "ListedSource":
        return ListedSource(self.source.read_as(reading), self.names, self.path)


def listed(source: Source, path: str) -> Source:
    """The images whose names stand in the lines of ``path``.

    The last line counts, with or without an end: the original cuts a character off every line, and loses it.
    """
    try:
        lines = Path(path).read_text().split("\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not a text file"
        raise UsageError(f"--target_list_path {escape(path)}: {reason}; a file name per line is needed") from error
    names = frozenset(os.path.basename(line.strip()) for line in lines if line.strip())
    if not names:
        raise UsageError(f"--target_list_path {escape(path)}: this list is empty")
    return ListedSource(source, names, path)


def evaluate(args: argparse.Namespace, world: World, append: bool) -> None:
    """Logistic regression with one network of a checkpoint; ``append``: its result is a further line of the JSON."""
    network = network_from_options(args)
    network.model.to(world.device)
    (feature,) = chosen_features(network, [args.n_last_blocks], [args.avgpool_patchtokens], [args.class_token])
    refresh_indices(args.refresh_index)
    train, test = open_train_and_test(place_from(args), args.subset, eval_data_path=args.eval_data_path)
    if args.target_list_path:
        train = listed(train, args.target_list_path)
    sets = Sets((train, test), reading_from(args), crop_and_resize(args, network))
    log.info(str(sets))
    counts = np.bincount(sets.train_labels.numpy(), minlength=sets.classes)
    if not counts.all():
        empty = escape(sets.train.class_names[int(counts.argmin())])
        raise UsageError(f"{sets.train.name}: class {empty} has no training image")
    store = FeatureStore(args.feature_cache or Path(args.output_dir) / "features")
    options = {"world": world, "batch_size": args.batch_size_per_gpu, "num_workers": args.num_workers}
    parts, unreadable = {}, {}
    for part, source, labels in (("test", sets.test, sets.test_labels), ("train", sets.train, sets.train_labels)):
        preparation = Preparation(sets.crop_size, sets.resize_size)
        (rows,), bad = store.features(network, source, preparation, [feature], **options)
        if part == "test" and not args.skip_unreadable:
            refuse(source, bad)
        leave_out(source, bad)
        unit = F.normalize(rows.to(world.device).double(), dim=1)
        parts[part], unreadable[part] = (unit, labels[readable(len(source), bad)].to(world.device)), len(bad)
    runs, right = regress(*parts["train"], *parts["test"], sets.classes, args.lr_lambd, args.adjust_lambd)
    for value, run in runs.items():
        low, high = run["interval"]
        log.info(
            f"lambda {value}: Top1: {run['top1']:.2f} (95 %: {low:.2f} to {high:.2f}), objective {run['objective']:.6f}"
        )
    best = max(runs, key=lambda value: runs[value]["top1"])
    log.info(f"best lambda {best}: Top1: {runs[best]['top1']:.2f}{remark(unreadable)}")
    if world.rank == 0:
        numbers = compared(args, "eval_semi_supervised", sets.test.fingerprint, right)
        numbers |= {"top1": runs[best]["top1"], "interval": runs[best]["interval"], "lambda": float(best), "runs": runs}
        write_result(args, "eval_semi_supervised", network, sets, unreadable, numbers, append)


def regress(
    features: torch.Tensor,
    labels: torch.Tensor,
    test_features: torch.Tensor,
    test_labels: torch.Tensor,
    classes: int,
    penalties: list[float],
    adjust: bool,
) -> tuple[dict[str, dict], dict[str, np.ndarray]]:
    """Of every penalty accuracy in percent, its interval, and the objective; and which test images are right.

    ``adjust`` divides the penalties by the number of images.
    """
    scale = len(features) if adjust else 1
    solution = ridge_regression(features, labels, classes, [value / scale for value in penalties])
    names = [f"{value:g}" for value in penalties]
    right = solution.predictions(test_features) == test_labels
    runs = {}
    for name, hits, objective in zip(names, right, solution.objective.tolist(), strict=True):
        top1 = 100 * float(hits.double().mean())
        runs[name] = {"top1": top1, "interval": list(interval_of(top1, len(hits))), "objective": objective}
    return runs, dict(zip(names, right.cpu().numpy(), strict=True))
