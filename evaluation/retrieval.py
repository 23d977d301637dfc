"""Scores of retrieval, and descriptors of images and copies: pure functions.

Revisited Oxford and Paris (Radenović et al., 1803.11285) as DINO scores them, and Copydays (Douze et al. 2009).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from evaluation.features import class_token

KS = (1, 5, 10)  # precisions are quoted at
GEM_POWER, GEM_EPS = 4, 1e-6
WHITENING_POWER, SMALLEST = 0.5, 1e-5  # eigenvalues are at least this share of the largest one


class Protocol(NamedTuple):
    """Which lists of a query are relevant, and which are taken out of the ranking."""

    relevant: tuple[str, ...]
    ignored: tuple[str, ...]


PROTOCOLS = {
    "E": Protocol(("easy",), ("junk", "hard")),
    "M": Protocol(("easy", "hard"), ("junk",)),
    "H": Protocol(("hard",), ("junk", "easy")),
}


class Scores(NamedTuple):
    """Shares, not percent. Of a query without anything relevant the average precision is NaN, and it does not count."""

    mean_ap: float
    aps: list[float]
    precisions: list[float]  # at every k, mean over the queries


def rank(queries: torch.Tensor, database: torch.Tensor) -> torch.Tensor:
    """Database images by falling cosine similarity, (images, queries): a column for every query.

    Queries (queries, dim), database (images, dim).
    """
    similarity = F.normalize(database, dim=1) @ F.normalize(queries, dim=1).T
    return similarity.argsort(dim=0, descending=True)


def average_precision(ranks: Sequence[int], relevant: int) -> float:
    """Area below precision over recall by trapezoids, from the ranks (from 0, rising) at which relevant ones stand.

    ``relevant``: how many there are; what has no rank was not found.
    """
    ranks = np.asarray(ranks, dtype=np.float64)
    found = np.arange(len(ranks))
    before = np.divide(found, ranks, out=np.ones(len(ranks)), where=ranks > 0)
    return float((before + (found + 1) / (ranks + 1)).sum() / (2 * relevant)) if len(ranks) else 0.0


def score(
    ranks: np.ndarray, lists: Sequence[Mapping[str, Sequence[int]]], protocol: Protocol, ks: Sequence[int] = KS
) -> Scores:
    """``ranks`` (images, queries) as ``rank`` gives them; of every query its ``lists`` easy, hard and junk.

    Precision at k looks at no more images than the last relevant one needs.
    """
    aps, precisions = [], []
    for column, query in zip(np.asarray(ranks).T, lists, strict=True):
        relevant = _joined(query, protocol.relevant)
        if not len(relevant):
            aps.append(float("nan"))
            continue
        kept = column[~np.isin(column, _joined(query, protocol.ignored))]
        places = np.flatnonzero(np.isin(kept, relevant))
        aps.append(average_precision(places, len(relevant)))
        last = places.max() + 1 if len(places) else len(kept)
        precisions.append([(places < min(k, last)).sum() / min(k, last) for k in ks])
    means = np.mean(precisions, axis=0).tolist() if precisions else [float("nan")] * len(ks)
    return Scores(float(np.nanmean(aps)) if precisions else float("nan"), aps, means)


def _joined(query: Mapping[str, Sequence[int]], names: Sequence[str]) -> np.ndarray:
    return np.concatenate([np.asarray(query[name], dtype=np.int64).ravel() for name in names])


def multiscale(
    model: nn.Module, images: torch.Tensor, feature: Callable[[Callable, torch.Tensor], torch.Tensor] = class_token
) -> torch.Tensor:
    """Mean ``feature`` over the scales 1, 1/sqrt(2) and 1/2, for retrieval: (batch, dim).

    parity: divided by the norm of the whole batch, which is a unit vector for one image at a time (DINO utils.py).
    """
    total = feature(model, images)
    for scale in (2**-0.5, 0.5):
        total = total + feature(model, F.interpolate(images, scale_factor=scale, mode="bilinear"))
    return total / 3 / (total / 3).norm()


# ---------------------------------------------------------------------------------------------------------------------
# Copies
# ---------------------------------------------------------------------------------------------------------------------


def copy_descriptor(
    tokens: torch.Tensor, num_prefix_tokens: int = 1, power: float = GEM_POWER, eps: float = GEM_EPS
) -> torch.Tensor:
    """Class token and generalised mean of the patch tokens: (batch, tokens, dim) -> (batch, 2 * dim)."""
    patches = tokens[:, num_prefix_tokens:].clamp(min=eps)
    return torch.cat((tokens[:, 0], patches.pow(power).mean(dim=1).pow(1 / power)), dim=1)


class Whitening:
    """Directions of equal variance, learnt from the features (images, dim) of other images.

    parity: their mean is taken off what is whitened, but not off themselves (DINO eval_copy_detection.py).
    """

    def __init__(self, features: torch.Tensor, power: float = WHITENING_POWER):
        features = features.double()
        self.mean = features.mean(dim=0)
        values, vectors = torch.linalg.eigh(features.T @ features / len(features))
        self.matrix = vectors * values.clamp(min=SMALLEST * float(values.max())) ** -power

    def __call__(self, features: torch.Tensor) -> torch.Tensor:
        """(images, dim), unit vectors in double precision."""
        return F.normalize((features.double() - self.mean) @ self.matrix, dim=1)


def similarities(queries: torch.Tensor, database: torch.Tensor, whitening: Whitening | None = None) -> torch.Tensor:
    """Cosines (queries, images), of whitened features where ``whitening`` is given."""
    prepare = whitening or (lambda features: F.normalize(features, dim=1))
    return prepare(queries) @ prepare(database).T


def copies_mean_ap(similarity: torch.Tensor, positives: Sequence[Sequence[int]], neighbours: int = 20) -> float:
    """Mean average precision over queries, of whose ranking only so many ``neighbours`` are looked at."""
    nearest = similarity.topk(min(neighbours, similarity.shape[1]), dim=1).indices.cpu().numpy()
    aps = [
        average_precision(np.flatnonzero(np.isin(row, wanted)), len(wanted))
        for row, wanted in zip(nearest, positives, strict=True)
    ]
    return float(np.mean(aps))
