"""Weighted k-NN: the classifier, and its accuracies over banks and numbers of neighbours.

Features are L2-normalised; the k training images most similar to a test image vote for their classes with weight
exp(similarity / temperature) (Wu et al., 1805.01978).
"""

import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F

from data.datasets import images_per_class
from evaluation.confidence import interval_of
from utils import World, all_reduce_sum

Accuracies = dict[int, tuple[float, float]]  # k -> (top-1, top-5) in percent

WORKING_BYTES = 128 * 2**20  # beyond the features themselves, whatever the number of images
QUERIES = 512  # test images compared at once


def nearest_neighbours(
    bank: torch.Tensor, queries: torch.Tensor, k: int, working_bytes: int = WORKING_BYTES, cosine: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """The ``k`` rows of ``bank`` (images, dim) with the largest cosine similarity to every row of ``queries``.

    Without ``cosine`` the similarity is the dot product of the features as they are (UNIC's features_norm none).

    Returns similarities and row numbers, both (queries, k), most similar first. The bank is read in pieces that take
    no more than ``working_bytes``, normalised and compared, and the best of all pieces so far are kept.
    """
    normalise = (lambda rows: F.normalize(rows, dim=1)) if cosine else (lambda rows: rows)
    k, queries = min(k, len(bank)), normalise(queries)
    rows = max(1, working_bytes // (sum(queries.shape) * bank.element_size()))
    best = queries.new_empty(len(queries), 0)
    indices = best.long()
    for start in range(0, len(bank), rows):
        piece = queries @ normalise(bank[start : start + rows]).T
        similarities, found = piece.topk(min(k, piece.shape[1]))
        del piece  # before the next one is made
        best, indices = torch.cat((best, similarities), dim=1), torch.cat((indices, found + start), dim=1)
        best, order = best.topk(min(k, best.shape[1]))
        indices = indices.gather(1, order)
    return best, indices


def class_votes(similarities: torch.Tensor, labels: torch.Tensor, temperature: float, num_classes: int) -> torch.Tensor:
    """Neighbours' similarities and labels, both (queries, k) -> total vote of every class (queries, num_classes)."""
    votes = torch.zeros(len(labels), num_classes, dtype=similarities.dtype, device=similarities.device)
    return votes.scatter_add_(1, labels, (similarities / temperature).exp())


def neighbours_in_chunks(
    train_features: torch.Tensor,
    train_labels: torch.Tensor,
    test_features: torch.Tensor,
    k: int,
    num_classes: int,
    working_bytes: int = WORKING_BYTES,
    cosine: bool = True,
) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
    """For a slice of test images at a time: their neighbours' similarities and labels, both (images, k)."""
    step = max(1, min(QUERIES, working_bytes // (num_classes * train_features.element_size())))
    for start in range(0, len(test_features), step):
        part = slice(start, min(start + step, len(test_features)))
        similarities, indices = nearest_neighbours(train_features, test_features[part], k, working_bytes, cosine)
        yield part, similarities, train_labels[indices]


def rank_of_class(votes: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """How many classes come before the true one: (queries,), 0 is first. Of equal votes the lower class comes first.

    parity: among classes without votes too, which the original's sort leaves in the order of their numbers.
    """
    true = votes.gather(1, labels[:, None])
    before = torch.arange(votes.shape[1], device=votes.device) < labels[:, None]
    return ((votes > true) | ((votes == true) & before)).sum(dim=1)


def knn_right(
    train_features: torch.Tensor,
    train_labels: torch.Tensor,
    test_features: torch.Tensor,
    test_labels: torch.Tensor,
    ks: Sequence[int],
    temperature: float = 0.07,
    num_classes: int | None = None,
    world: World | None = None,
    working_bytes: int = WORKING_BYTES,
    cosine: bool = True,
) -> torch.Tensor:
    """For every k in ``ks`` and every test image whether its class is first, and among the first min(5, k).

    (ks, test images, 2) of 0 and 1, on every process. Features (images, dim) of any norm, labels (images,). Float64
    features are compared in float64. Neighbours are searched once, for the largest k; a k beyond the bank takes all of
    it. With ``world`` every process must call this with the same arguments, and does its share of the queries.
    """
    if not len(train_features) or not len(test_features):
        raise ValueError(f"k-NN of {len(test_features)} test images in a bank of {len(train_features)}")
    num_classes = num_classes or 1 + max(int(train_labels.max()), int(test_labels.max()))
    right = torch.zeros(len(ks), len(test_features), 2, dtype=torch.long, device=test_features.device)
    mine = right
    if world is not None:
        test_features, test_labels = test_features[world.rank :: world.size], test_labels[world.rank :: world.size]
        mine = right[:, world.rank :: world.size]
    options = (max(ks), num_classes, working_bytes, cosine)
    chunks = neighbours_in_chunks(train_features, train_labels, test_features, *options)
    for part, similarities, labels in chunks:
        # relative to the best one: the same ranking, and no overflow at low temperatures
        relative = similarities - similarities[:, :1]
        for row, k in enumerate(ks):
            rank = rank_of_class(
                class_votes(relative[:, :k], labels[:, :k], temperature, num_classes), test_labels[part]
            )
            mine[row, part] = torch.stack((rank < 1, rank < min(5, k)), dim=1).long()
    return right if world is None else all_reduce_sum(right.to(world.device)).to(right.device)


def knn_classify(
    train_features: torch.Tensor,
    train_labels: torch.Tensor,
    test_features: torch.Tensor,
    test_labels: torch.Tensor,
    ks: Sequence[int],
    *options,
    **named,
) -> Accuracies:
    """Top-1 and top-5 accuracy in percent for every k in ``ks``; what follows are the options of ``knn_right``."""
    features_and_labels = (train_features, train_labels, test_features, test_labels)
    return accuracies_of(knn_right(*features_and_labels, ks, *options, **named), ks)


def accuracies_of(right: torch.Tensor, ks: Sequence[int]) -> Accuracies:
    """In percent, of what ``knn_right`` returns."""
    total = right.shape[1]
    sums = right.sum(dim=1).tolist()
    return {k: (100 * first / total, 100 * five / total) for k, (first, five) in zip(ks, sums, strict=True)}


def bank_rows(labels: torch.Tensor, per_class: int, start: int) -> torch.Tensor:
    """Rows of the images [start, start + per_class) of every class."""
    return torch.from_numpy(images_per_class(labels.numpy(), per_class, start))


# ---------------------------------------------------------------------------------------------------------------------
# What there is to vote
# ---------------------------------------------------------------------------------------------------------------------


class Bank(NamedTuple):
    """Numbers of images, of classes that have any, and of images of the largest class."""

    images: int
    classes: int
    largest_class: int

    @classmethod
    def of(cls, labels: torch.Tensor) -> "Bank":
        counts = labels.bincount()
        return cls(len(labels), int((counts > 0).sum()), int(counts.max()))

    def __str__(self) -> str:
        return f"{self.images} images, {self.classes} classes, the largest of {self.largest_class} images"


def doubts(ks: Iterable[int], bank: Bank) -> list[str]:
    """Why accuracies of ``bank`` say less than they seem to, a sentence each."""
    if bank.classes == 1:
        return ["the bank has one class, which wins every vote whatever the features are"]
    whole = [k for k in ks if k >= bank.images]
    many = [k for k in ks if bank.largest_class <= k < bank.images]
    sentences = []
    if many:
        sentences.append(
            f"k = {_listed(many)}: no class of the bank has more than {bank.largest_class} images, so at best as many "
            "neighbours are of the right class; lower --nb_knn"
        )
    if whole:
        sentences.append(
            f"k = {_listed(whole)}: all {bank.images} images of the bank vote for every test image; lower --nb_knn"
        )
    return sentences


def remark_on_k(k: int, bank: Bank) -> str:
    """For a line with the result of ``k`` neighbours: how many there were, where these are fewer."""
    return f" ({bank.images} neighbours: all there are)" * (k > bank.images)


def _listed(numbers: Iterable[int]) -> str:
    return ", ".join(map(str, numbers))


# ---------------------------------------------------------------------------------------------------------------------
# Accuracies
# ---------------------------------------------------------------------------------------------------------------------


def mean_accuracies(runs: dict[int, Accuracies]) -> Accuracies:
    """Over the starts."""
    first, *_ = runs.values()
    return {k: tuple(statistics.fmean(run[k][part] for run in runs.values()) for part in (0, 1)) for k in first}


def deviation(runs: dict[int, Accuracies], k: int) -> float:
    """Standard deviation of top-1 over the starts (of a sample, n - 1)."""
    return statistics.stdev(run[k][0] for run in runs.values())


def as_numbers(accuracies: Accuracies, bank: Bank) -> dict[str, dict[str, float]]:
    """For logs and results, ``neighbours`` where ``bank`` has fewer than k; the first five of one neighbour are no more
    than the first.
    """
    return {
        str(k): {"top1": top1}
        | ({"top5": top5} if k > 1 else {})
        | ({"neighbours": bank.images} if k > bank.images else {})
        for k, (top1, top5) in accuracies.items()
    }


def runs_as_numbers(runs: dict[int, Accuracies], banks: Mapping[int, Bank], tested: int = 0) -> dict:
    """Accuracies and bank of a start; of several the means, the deviation of top-1, and every start's own.

    ``tested``: so many test images, for the 95 % intervals of top-1 by k.
    """
    own = {start: as_numbers(run, banks[start]) | {"bank": banks[start]._asdict()} for start, run in runs.items()}
    for start, run in runs.items() if tested else ():
        own[start]["intervals"] = {str(k): list(interval_of(top1, tested)) for k, (top1, _) in run.items()}
    if len(own) == 1:
        return next(iter(own.values()))
    numbers = as_numbers(mean_accuracies(runs), min(banks.values()))
    for k in mean_accuracies(runs):
        numbers[str(k)]["top1_std"] = deviation(runs, k)
    return numbers | {"starts": {str(start): numbers for start, numbers in own.items()}}


def table(rows: dict[str, Accuracies], ks: Iterable[int]) -> str:
    """Aligned top-1 accuracies: a line per row, a column per k."""
    width = max(map(len, rows))
    lines = [" " * width + "".join(f"{f'k={k}':>9}" for k in ks)]
    lines += [f"{name:<{width}}" + "".join(f"{accuracies[k][0]:9.2f}" for k in ks) for name, accuracies in rows.items()]
    return "\n".join(lines)
