"""Transfer of frozen features as t-ReX (2206.15369) and UNIC (2408.05088) measure it: one classifier per data set.

The training images are divided into those for learning and those for choosing; what was chosen is learnt again from
all of them, and tested once. Results of several data sets are averaged as accuracies and as log-odds.
"""

import math
import random
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from evaluation.linear_heads import Recipe
from evaluation.logistic import ridge_regression
from evaluation.search import Range, best_trial
from evaluation.sgd_regression import initial_layer, orders, predictions, sgd_regression
from utils import UsageError

NORMS = ("none", "l2", "standard")
LEAST_STD = 1e-5
SOLVED = 1e-6  # of a gradient, where only classes are asked for: scikit-learn stops at 1e-4
REFERENCE = "in1k"  # the set that means over data sets leave out


def split_trainval(labels: np.ndarray, val_perc: float, seed: int = 22) -> tuple[np.ndarray, np.ndarray]:
    """Indices for learning and for choosing, class by class: the last ``val_perc`` of a class's shuffled images.

    parity: a class that is too small for one image at this share gives one, and from there on the share is that of
    this class.
    """
    draws, parts = random.Random(seed), ([], [])
    for label in np.unique(labels):
        indices = np.flatnonzero(labels == label)
        if len(indices) < 2:
            raise UsageError(f"class {label} has one training image; two are needed to choose --clf_type's settings")
        draws.shuffle(indices)
        held_out = int(len(indices) * val_perc)
        if held_out == 0:
            held_out, val_perc = 1, 1 / len(indices)
        parts[0].append(indices[:-held_out])
        parts[1].append(indices[-held_out:])
    return np.concatenate(parts[0]), np.concatenate(parts[1])


def normalised(train: torch.Tensor, test: torch.Tensor, norm: str) -> tuple[torch.Tensor, torch.Tensor]:
    """``none``, ``l2`` (every row a unit vector), or ``standard`` (by mean and deviation of the training images)."""
    if norm == "l2":
        return F.normalize(train, dim=1), F.normalize(test, dim=1)
    if norm == "standard":
        mean, std = train.mean(dim=0), train.std(dim=0, correction=0).clamp(min=LEAST_STD)
        return (train - mean) / std, (test - mean) / std
    return train, test


def top1(found: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Percent of the images whose class is found: (..., images) -> (...)."""
    return 100 * (found == labels).double().mean(dim=-1)


def mean_per_class_accuracy(found: torch.Tensor, labels: torch.Tensor) -> float:
    """Percent, the mean over the classes that occur in ``labels`` (images,); what t-ReX's files call m_ap."""
    right = torch.bincount(labels[found == labels], minlength=int(labels.max()) + 1)
    counts = torch.bincount(labels)
    return float(100 * (right / counts)[counts > 0].double().mean())


def log_odds(percent: float) -> float:
    """ln(p / (1 - p)) of an accuracy; infinite at 0 and 100 percent."""
    p = percent / 100
    return math.inf if p >= 1 else -math.inf if p <= 0 else math.log(p / (1 - p))


def over_sets(percent: Mapping[str, float]) -> dict[str, float]:
    """Mean accuracy and mean log-odds over data sets, ImageNet-1k left out."""
    others = [value for name, value in percent.items() if name != REFERENCE]
    if not others:
        return {}
    return {
        "mean_accuracy": math.fsum(others) / len(others),
        "mean_log_odds": math.fsum(map(log_odds, others)) / len(others),
    }


# ---------------------------------------------------------------------------------------------------------------------
# Classifiers: (features, labels, settings of every trial, images to classify) -> classes (trials, images)
# ---------------------------------------------------------------------------------------------------------------------


def lbfgs_classifier(num_classes: int, max_iter: int = 2000) -> Callable:
    """Multinomial regression at scikit-learn's C: C sum of cross-entropies + |W|^2 / 2, with a free intercept."""

    def classify(features, labels, settings: Sequence[dict], images) -> torch.Tensor:
        penalties = [1 / (setting["C"] * len(features)) for setting in settings]
        solution = ridge_regression(features.double(), labels, num_classes, penalties, True, SOLVED, max_iter)
        return solution.predictions(images.double())

    return classify


def sgd_classifier(num_classes: int, epochs: int, batch_size: int, momentum: float, seed: int) -> Callable:
    """SGD at learning rate and weight decay."""

    def classify(features, labels, settings: Sequence[dict], images) -> torch.Tensor:
        heads = sgd_regression(
            features,
            labels,
            [Recipe(setting["lr"], setting["wd"]) for setting in settings],
            initial_layer(num_classes, features.shape[1], seed),
            orders(len(features), epochs, seed),
            epochs=epochs,
            batch_size=batch_size,
            momentum=momentum,
        )
        return predictions(heads, images)

    return classify


class Found(NamedTuple):
    """What the search chose, its accuracy on the images for choosing, all trials, and classes of the test images."""

    setting: dict[str, float]
    val_top1: float
    trials: list[dict[str, float]]
    predictions: torch.Tensor


def searched(
    classify: Callable,
    search,
    trials: int,
    at_once: int,
    trainval: tuple[torch.Tensor, torch.Tensor],
    split: tuple[np.ndarray, np.ndarray],
    test: torch.Tensor,
) -> Found:
    """Settings with the highest accuracy on the images for choosing, learnt again from all training images."""
    features, labels = trainval
    train, val = (torch.from_numpy(part).to(labels.device) for part in split)
    known: list[dict[str, float]] = []
    while len(known) < trials:
        settings = search.ask(min(at_once, trials - len(known)))
        accuracies = top1(classify(features[train], labels[train], settings, features[val]), labels[val]).tolist()
        search.tell(accuracies)
        known += [setting | {"val_top1": found} for setting, found in zip(settings, accuracies, strict=True)]
    best = known[best_trial([trial["val_top1"] for trial in known])]
    setting = {name: value for name, value in best.items() if name != "val_top1"}
    (classes,) = classify(features, labels, [setting], test)
    return Found(setting, best["val_top1"], known, classes)


def ranges(clf_type: str, bounds: Mapping[str, tuple[float, float]]) -> dict[str, Range]:
    """What is searched for: C, or lr and wd."""
    names = {"logreg_sklearn": ("C",), "logreg_torch": ("lr", "wd")}[clf_type]
    return {name: Range(*bounds[name]) for name in names}
