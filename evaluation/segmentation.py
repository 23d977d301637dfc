"""Semantic segmentation with maps of a network: heads, loss, learning rate, windows over an image, and mean IoU.

Linear segmentation as DINOv2 (2304.07193) and UNIC (2408.05088) measure it, and iBOT's variant (2111.07832), in the
numbers of mmsegmentation 0.30, without it. Logits are (batch, classes, rows, columns) of a map; labels (batch, height,
width) with IGNORED where there is none.
"""

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from data.segmentation import IGNORED
from models.vit import VisionTransformer


class LinearHead(nn.Module):
    """Maps of one size (batch, dim, rows, columns), one or several -> logits, by one linear layer for every token.

    Several are joined along their channels. ``norm``: batch norm before it (DINOv2, UNIC), or none (iBOT).
    """

    def __init__(self, dim: int, classes: int, norm: bool = True):
        super().__init__()
        self.bn = nn.BatchNorm2d(dim) if norm else nn.Identity()
        self.conv_seg = nn.Conv2d(dim, classes, kernel_size=1)
        nn.init.normal_(self.conv_seg.weight, std=0.01)
        nn.init.zeros_(self.conv_seg.bias)

    def forward(self, maps: Sequence[torch.Tensor]) -> torch.Tensor:
        return self.conv_seg(self.bn(torch.cat(tuple(maps), dim=1)))


class Segmenter(nn.Module):
    """Images of any size -> logits of the maps of ``blocks``. A ``frozen`` network stays in evaluation mode.

    parity: an image is padded with zeros on all sides to whole patches, and what is found is stretched over the image
    without them (37 x 37 patches of 14 pixels over 512 x 512): a slight shift, the same in training and testing.
    """

    def __init__(
        self, network: VisionTransformer, blocks: Sequence[int], norm: bool, head: nn.Module, frozen: bool = True
    ):
        super().__init__()
        self.network, self.decode_head = network, head
        self.blocks, self.norm, self.frozen = tuple(blocks), norm, frozen
        if frozen:
            network.requires_grad_(False)

    def train(self, mode: bool = True) -> "Segmenter":
        super().train(mode)
        if self.frozen:
            self.network.eval()
        return self

    def maps(self, images: torch.Tensor, draws: object = None) -> list[torch.Tensor]:
        padding = centre_padding(*images.shape[-2:], self.network.patch_size)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            return self.network.patch_maps(F.pad(images, padding), self.blocks, self.norm, draws)

    def forward(self, images: torch.Tensor, draws: object = None) -> torch.Tensor:
        return self.decode_head(self.maps(images, draws))


def centre_padding(height: int, width: int, multiple: int) -> tuple[int, int, int, int]:
    """Pixels to the left, right, top and bottom up to a multiple; the smaller half comes first."""
    missing = [-side % multiple for side in (width, height)]
    left, top = (count // 2 for count in missing)
    return left, missing[0] - left, top, missing[1] - top


def resized(logits: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    return F.interpolate(logits, size=tuple(size), mode="bilinear", align_corners=False)


# ---------------------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------------------


def pixel_loss(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean cross-entropy of logits stretched over the labels, and the share of right pixels in percent.

    parity: the mean is over all pixels, those without a label being 0; the share is of those with one (mmsegmentation).
    """
    logits, labels = resized(logits, labels.shape[-2:]), labels.long()
    loss = F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum") / labels.numel()
    right = (logits.detach().argmax(dim=1) == labels).sum()
    return loss, 100 * right / (labels != IGNORED).sum().clamp(min=1)


def learning_rate(
    iteration: int,
    base: float,
    iterations: int,
    warmup: int = 1500,
    start: float = 1e-6,
    power: float = 1.0,
    lowest: float = 0.0,
) -> float:
    """Falls to ``lowest`` at ``iterations`` as a power of what is left; during the first ``warmup`` iterations also
    times a line from ``start`` to 1.
    """
    rate = (base - lowest) * (1 - iteration / iterations) ** power + lowest
    return rate * (1 - (1 - iteration / warmup) * (1 - start)) if iteration < warmup else rate


def build_optimizer(
    parameters: list, lr: float, weight_decay: float, betas: tuple[float, float] = (0.9, 0.999)
) -> torch.optim.AdamW:
    """All parameters of a head decay, vectors and norms too (DINOv2, UNIC); groups may say otherwise."""
    return torch.optim.AdamW(parameters, lr=lr, betas=betas, weight_decay=weight_decay)


def train_step(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """A step with gradients that are there; every group has ``lr`` times its own ``lr_scale``."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


# ---------------------------------------------------------------------------------------------------------------------
# Testing
# ---------------------------------------------------------------------------------------------------------------------


class Window(NamedTuple):
    """Height and width of the windows over an image, and how far they are from each other."""

    size: tuple[int, int]
    stride: tuple[int, int]


def windows(image: tuple[int, int], window: Window) -> list[tuple[slice, slice]]:
    """Rows and columns of windows that cover an image (height, width); the last ones end with it, and where it is
    smaller than a window so are they.
    """
    sides = []
    for whole, size, stride in zip(image, *window, strict=True):
        count = max(whole - size + stride - 1, 0) // stride + 1
        starts = [max(min(i * stride + size, whole) - size, 0) for i in range(count)]
        sides.append([slice(start, min(start + size, whole)) for start in starts])
    return list(itertools.product(*sides))


@torch.no_grad()
def image_logits(segmenter: nn.Module, image: torch.Tensor, window: Window | None, batch_size: int = 8) -> torch.Tensor:
    """Logits of an image (1, 3, height, width) at its own size: (1, classes, height, width).

    ``window``: the mean of all windows over a pixel; None: of the whole image at once.
    """
    height, width = image.shape[-2:]
    if window is None:
        return resized(segmenter(image), (height, width))
    places = windows((height, width), window)
    crops = torch.cat([image[..., rows, columns] for rows, columns in places])
    total, cover = None, image.new_zeros(height, width)
    for start in range(0, len(places), batch_size):
        part = resized(segmenter(crops[start : start + batch_size]), crops.shape[-2:])
        for logits, (rows, columns) in zip(part, places[start : start + batch_size], strict=True):
            total = logits.new_zeros(len(logits), height, width) if total is None else total
            total[:, rows, columns] += logits
            cover[rows, columns] += 1
    return (total / cover)[None]


def resized_classes(logits: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    """The class of every pixel of logits (classes, rows, columns) stretched over ``size``: int64.

    A pixel between four places is a mean of theirs, with weights that sum to 1. So where all four have the same class,
    that is its class, and only the pixels along borders are computed: the same as ``resized`` and argmax, but for
    classes that are equal up to rounding.
    """
    rows, columns = logits.shape[1:]
    found = logits.max(dim=0).indices  # argmax of several lines at once takes twice as long
    if tuple(size) == (rows, columns):
        return found
    tops, downs = _neighbours(size[0], rows, logits)
    lefts, rights = _neighbours(size[1], columns, logits)
    upper, lower = found[tops], found[(tops + 1).clamp(max=rows - 1)]
    others = (lefts + 1).clamp(max=columns - 1)
    classes = upper[:, lefts]
    mixed = (upper[:, others] != classes) | (lower[:, lefts] != classes) | (lower[:, others] != classes)
    y, x = mixed.nonzero(as_tuple=True)
    top, left, down, right = tops[y], lefts[x], downs[y], rights[x]
    bottom, other, flat = (top + 1).clamp(max=rows - 1), (left + 1).clamp(max=columns - 1), logits.flatten(1)
    lines = []
    for row in (top, bottom):
        first, second = (flat.index_select(1, row * columns + column) for column in (left, other))
        lines.append(first.mul_(1 - right).addcmul_(second, right))
    value = lines[0].mul_(1 - down).addcmul_(lines[1], down)
    classes[y, x] = value.max(dim=0).indices
    return classes


def _neighbours(length: int, old: int, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """For every place of a side stretched to ``length``: the place before it in ``old``, and how far beyond it is."""
    places = torch.arange(length, device=like.device, dtype=like.dtype)
    places = ((places + 0.5) * (old / length) - 0.5).clamp(min=0)
    before = places.floor().long().clamp(max=old - 1)
    return before, places - before


# ---------------------------------------------------------------------------------------------------------------------
# Mean IoU
# ---------------------------------------------------------------------------------------------------------------------


def count_pixels(predicted: torch.Tensor, labels: torch.Tensor, classes: int) -> torch.Tensor:
    """Pixels of every class that are right, predicted, and labelled: (3, classes) int64, of those with a label."""
    there = labels != IGNORED
    predicted, labels = predicted[there].long(), labels[there].long()
    parts = (predicted[predicted == labels], predicted, labels)
    return torch.stack([torch.bincount(part, minlength=classes) for part in parts])


def scores(counts: torch.Tensor) -> dict[str, torch.Tensor]:
    """From ``count_pixels`` summed over images: IoU and accuracy (classes,), NaN where a class is nowhere; means.

    mIoU and mAcc leave out such classes; aAcc is the share of all pixels that are right.
    """
    right, predicted, labelled = counts.double()
    iou, accuracy = right / (predicted + labelled - right), right / labelled
    means = {"mIoU": iou.nanmean(), "mAcc": accuracy.nanmean(), "aAcc": right.sum() / labelled.sum()}
    return {"IoU": iou, "Acc": accuracy, **means}


def published(share: torch.Tensor | float) -> float:
    """parity: a share as mmsegmentation reports it, percent with two decimals, again as a share."""
    value = float(share)
    return value if math.isnan(value) else round(100 * value, 2) / 100
