"""What is done to images to see how much a classifier can bear, and what is made of its answers: pure functions.

Images are (batch, channels, height, width), normalised unless something else is said.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F

BLACK = (-2.1179, -2.0357, -1.8044)  # of normalised pixels, rounded as AttMask rounds it
OFFSET = 8  # pixels that a drop is shifted by, where it is
CALIBRATION_BIN = 100  # images

# ---------------------------------------------------------------------------------------------------------------------
# Images
# ---------------------------------------------------------------------------------------------------------------------


def most_attended(attention: torch.Tensor, ratio: float) -> torch.Tensor:
    """The ``ratio`` of an image's patches that hold most attention, rounded down: bool (batch, rows, columns)."""
    count = int(attention[0].numel() * ratio)
    mask = torch.zeros_like(attention, dtype=torch.bool).flatten(1)
    mask.scatter_(1, attention.flatten(1).topk(count, dim=1).indices, True)
    return mask.view_as(attention)


def enlarged(mask: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    """A mask of patches (batch, rows, columns) as one of pixels (batch, 1, height, width)."""
    return F.interpolate(mask[:, None].float(), tuple(size), mode="nearest") > 0


def painted(images: torch.Tensor, mask: torch.Tensor, colour: Sequence[float] = BLACK) -> torch.Tensor:
    """``images`` with the patches of ``mask`` (batch, rows, columns) in one colour."""
    colour = torch.tensor(colour, dtype=images.dtype, device=images.device).view(-1, 1, 1)
    return torch.where(enlarged(mask, images.shape[-2:]), colour, images)


def shuffled(images: torch.Tensor, grid: tuple[int, int], order: torch.Tensor) -> torch.Tensor:
    """Block j (row by row of ``grid``: rows, columns) shows what block ``order[..., j]`` showed.

    ``order``: (blocks,) or (batch, blocks). Height and width must be whole numbers of blocks.
    """
    rows, columns = grid
    batch, channels, height, width = images.shape
    size = height // rows, width // columns
    blocks = images.view(batch, channels, rows, size[0], columns, size[1]).permute(0, 2, 4, 1, 3, 5).flatten(1, 2)
    index = order.expand(batch, -1)[..., None, None, None].expand_as(blocks)
    blocks = blocks.gather(1, index).unflatten(1, grid)
    return blocks.permute(0, 3, 1, 4, 2, 5).reshape(images.shape)


def dropped(images: torch.Tensor, grid: tuple[int, int], blocks: torch.Tensor, offset: int = 0) -> torch.Tensor:
    """``images`` with 0, the mean colour, in ``blocks`` (dropped,) or (batch, dropped), as ``shuffled`` counts them.

    ``offset``: pixels that the dropped squares are moved down and to the right; what comes in is not dropped.
    """
    rows, columns = grid
    height, width = images.shape[-2:]
    kept = torch.ones(len(images), rows * columns, dtype=torch.bool, device=images.device)
    kept.scatter_(1, blocks.expand(len(images), -1), False)
    kept = kept.view(-1, rows, columns)
    kept = kept.repeat_interleave(height // rows, dim=1).repeat_interleave(width // columns, dim=2)
    if offset:
        moved = torch.ones_like(kept)
        moved[:, offset:, offset:] = kept[:, :-offset, :-offset]
        kept = moved
    return images * kept[:, None]


def visible(attention: torch.Tensor, share: float, foreground: bool) -> torch.Tensor:
    """Patches that stay when the ``share`` of attention that is strongest is removed: bool, as ``attention``.

    Otherwise, without ``foreground``, just this share stays. Attention (batch, patches).
    """
    values, order = attention.sort(dim=-1)
    mass = (values / values.sum(dim=-1, keepdim=True)).cumsum(dim=-1)
    kept = mass <= 1 - share if foreground else mass > 1 - share
    return torch.empty_like(kept).scatter_(-1, order, kept)


def composed(foreground: torch.Tensor, mask: torch.Tensor, backgrounds: torch.Tensor) -> torch.Tensor:
    """One foreground (channels, height, width) where its ``mask`` (height, width) is, on all ``backgrounds``."""
    return torch.where(mask, foreground, backgrounds)


# ---------------------------------------------------------------------------------------------------------------------
# Answers
# ---------------------------------------------------------------------------------------------------------------------


def outcomes(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """(batch, 3): cross-entropy, and whether the class comes first, and among the first five."""
    ranked = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
    losses = F.cross_entropy(logits, labels, reduction="none")
    return torch.stack((losses, ranked[:, 0].to(losses), ranked.any(dim=1).to(losses)), dim=1)


def hits(predictions: torch.Tensor, labels: torch.Tensor, mapped: torch.Tensor | None = None) -> torch.Tensor:
    """Whether predicted classes, or what they are ``mapped`` to, are the true ones; -1 is none. Bool."""
    return (predictions if mapped is None else mapped[predictions]) == labels


def calibration_error(
    confidence: np.ndarray, correct: np.ndarray, power: int = 2, size: int = CALIBRATION_BIN
) -> float:
    """How far confidence is from accuracy in bins of ``size`` images of like confidence; root mean square by default.

    parity: the last bin, which takes the rest too, is left out, though its images count (Hendrycks et al.,
    calibration_tools.py); so there is no such error of less than two bins.
    """
    order = np.argsort(confidence, kind="stable")
    bins = max(len(order) // size - 1, 0)
    if not bins:
        return float("nan")
    sorted_ = [np.asarray(values, dtype=np.float64)[order[: bins * size]] for values in (confidence, correct)]
    confidence, correct = (values.reshape(bins, size).mean(axis=1) for values in sorted_)
    return float((size / len(order) * np.abs(confidence - correct) ** power).sum() ** (1 / power))


def response_rate_accuracy(confidence: np.ndarray, correct: np.ndarray) -> float:
    """AURRA: the accuracy of the most confident images, averaged over how many of them are answered."""
    order = np.argsort(confidence, kind="stable")[::-1]
    return float((np.cumsum(np.asarray(correct, dtype=np.float64)[order]) / np.arange(1, len(order) + 1)).mean())
