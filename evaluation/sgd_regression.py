"""Logistic regression by SGD on features that are kept: many trials as one layer, every one as if it were alone.

t-ReX (2206.15369) and UNIC (2408.05088). Trials differ in learning rate and weight decay, and share features, order of
the images and the start; so a step of all of them is one product (evaluation/linear_heads.py), and none depends on
which others there are.
"""

import math
from collections.abc import Iterable, Sequence

import torch

from evaluation.linear_heads import LinearHeads, Recipe, cosine_factor
from randomness import counted_seed

MOMENTUM = 0.9
_START, _ORDER = 0x57A, 0x0DE  # keep these draws apart


def lagged_factor(epoch: int, epochs: int) -> float:
    """What learning rates are multiplied by in an epoch.

    parity: the cosine is moved on after an epoch with that epoch's number, so the first two have the whole rate, and
    none the last value.
    """
    return cosine_factor(max(0, epoch - 1), epochs)


def initial_layer(num_classes: int, dim: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight (classes, dim) and bias (classes,) as torch's Linear begins: uniform within 1 / sqrt(dim)."""
    generator = torch.Generator().manual_seed(counted_seed(seed, num_classes, dim, _START))
    bound = 1 / math.sqrt(dim)
    return tuple(
        torch.rand(*shape, generator=generator) * 2 * bound - bound for shape in ((num_classes, dim), (num_classes,))
    )


def orders(images: int, epochs: int, seed: int) -> Iterable[torch.Tensor]:
    """Of every epoch the images in a random order."""
    for epoch in range(epochs):
        yield torch.randperm(images, generator=torch.Generator().manual_seed(counted_seed(seed, epoch, _ORDER)))


def sgd_regression(
    features: torch.Tensor,
    labels: torch.Tensor,
    trials: Sequence[Recipe],
    start: tuple[torch.Tensor, torch.Tensor],
    order: Iterable[torch.Tensor],
    *,
    epochs: int = 100,
    batch_size: int = 1024,
    momentum: float = MOMENTUM,
) -> LinearHeads:
    """A head for every one of ``trials``, trained on features (images, dim) and labels (images,).

    ``start``: weight and bias of all of them; ``order``: the images of every epoch. The last batch of an epoch is what
    is left. A trial that diverges has no finite weights, and changes no other.
    """
    weight, bias = (part.to(features)[None].repeat(len(trials), *[1] * part.ndim) for part in start)
    heads = LinearHeads(weight, bias, trials, momentum=momentum)
    gradients = [torch.empty_like(parameter) for parameter in heads.parameters]
    for epoch, indices in enumerate(order):
        factor = lagged_factor(epoch, epochs)
        shuffled, targets = features[indices.to(features.device)], labels[indices.to(labels.device)]
        for first in range(0, len(features), batch_size):
            part = slice(first, first + batch_size)
            heads.loss_and_gradients(shuffled[part], targets[part], len(targets[part]), gradients)
            heads.step(gradients, factor)
    return heads


def predictions(heads: LinearHeads, features: torch.Tensor, images: int = 1024) -> torch.Tensor:
    """Class of every image by every head: (heads, images)."""
    parts = [heads.logits(features[i : i + images]).argmax(dim=2) for i in range(0, len(features), images)]
    return torch.cat(parts).T
