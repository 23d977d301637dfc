"""k-means of features, in pieces that fit anywhere: k-means++ starts, Lloyd's steps, the best of several."""

from typing import NamedTuple

import torch

from randomness import counted_seed

PIECE = 2**24  # distances that exist at once


class Clusters(NamedTuple):
    assigned: torch.Tensor  # (rows,)
    centres: torch.Tensor  # (clusters, dim)
    inertia: float  # mean squared distance to the own centre


def kmeans(features: torch.Tensor, clusters: int, seed: int = 0, starts: int = 5, iterations: int = 100) -> Clusters:
    """Features (rows, dim), at least as many rows as ``clusters``; the same seed gives the same clusters."""
    if not 1 <= clusters <= len(features):
        raise ValueError(f"{clusters} clusters of {len(features)} rows")
    runs = (_one_run(features, clusters, counted_seed(seed, start), iterations) for start in range(starts))
    return min(runs, key=lambda run: run.inertia)


def _one_run(features: torch.Tensor, clusters: int, seed: int, iterations: int) -> Clusters:
    centres = _spread(features, clusters, torch.Generator().manual_seed(seed))
    before = None
    for _ in range(iterations):
        assigned, distances = nearest(features, centres)
        if before is not None and torch.equal(assigned, before):
            break
        before = assigned
        counts = torch.bincount(assigned, minlength=clusters)
        sums = torch.zeros_like(centres).index_add_(0, assigned, features)
        centres = sums / counts.clamp(min=1)[:, None]
        empty = (counts == 0).nonzero().flatten()
        if len(empty):  # they begin anew at what lies farthest off
            centres[empty] = features[distances.topk(len(empty)).indices]
    assigned, distances = nearest(features, centres)
    return Clusters(assigned, centres, float(distances.double().mean()))


def _spread(features: torch.Tensor, clusters: int, generator: torch.Generator) -> torch.Tensor:
    """Starts that are drawn one after the other, by squared distance to the nearest one there is (k-means++)."""
    first = int(torch.randint(len(features), (1,), generator=generator))
    centres = features.new_empty(clusters, features.shape[1])
    centres[0] = features[first]
    distances = (features - centres[0]).square().sum(dim=1)
    for number in range(1, clusters):
        mass = distances.double().cumsum(dim=0).cpu()
        draw = torch.rand(1, generator=generator, dtype=torch.float64) * mass[-1]
        place = min(int(torch.searchsorted(mass, draw)), len(features) - 1)
        centres[number] = features[place]
        distances = torch.minimum(distances, (features - centres[number]).square().sum(dim=1))
    return centres


def nearest(features: torch.Tensor, centres: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of every row the nearest centre, and its squared distance."""
    squares = centres.square().sum(dim=1)
    parts = [
        torch.addmm(squares, rows, centres.T, alpha=-2).min(dim=1)
        for rows in features.split(max(1, PIECE // len(centres)))
    ]
    assigned = torch.cat([part.indices for part in parts])
    distances = torch.cat([part.values for part in parts]) + features.square().sum(dim=1)
    return assigned, distances.clamp(min=0)
