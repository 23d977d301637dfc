"""Centring: the running mean of the teacher's logits, subtracted so that no prototype wins everywhere."""

import math

import torch
import torch.nn as nn

from utils import all_reduce_sum


class Centres(nn.Module):
    """c <- momentum * c + (1 - momentum) * mean over all processes and rows of the teacher's logits.

    One centre for every keyword: the name of its buffer, as in the original's checkpoints, and its shape. Rows are
    collected while a step's pieces are computed and enter the centre only when the step is taken: every piece of an
    accumulated batch sees the old centre, and a skipped step leaves it as it was. DINO (2104.14294), eq. 4.
    """

    def __init__(self, momentum: float = 0.9, **shapes: tuple[int, ...]):
        super().__init__()
        self.momentum = momentum
        self.shapes = shapes
        sizes = [math.prod(shape) for shape in shapes.values()]
        for name, shape in shapes.items():
            self.register_buffer(name, torch.zeros(shape))
        # the sums of the rows, one centre after the other, then the numbers of rows: one exchange for all of them
        self.register_buffer("pending", torch.zeros(sum(sizes) + len(sizes)), persistent=False)
        self._parts = [*sizes, len(sizes)]

    @torch.no_grad()
    def collect(self, **logits: torch.Tensor) -> None:
        """Remember raw teacher logits (rows, prototypes) of this step, for every centre."""
        *sums, counts = self.pending.split(self._parts)
        for index, (name, total) in enumerate(zip(self.shapes, sums, strict=True)):
            total += logits[name].sum(dim=0, dtype=total.dtype)
            counts[index] += logits[name].shape[0]

    @torch.no_grad()
    def commit(self, gate: torch.Tensor | None) -> None:
        """Move the centres to what was collected; a ``gate`` of 0 (a tensor on the device) discards it instead."""
        all_reduce_sum(self.pending)
        *sums, counts = self.pending.split(self._parts)
        for name, total, count in zip(self.shapes, sums, counts, strict=True):
            centre = getattr(self, name)
            moved = centre * self.momentum + (total / count).view_as(centre) * (1 - self.momentum)
            centre.copy_(moved if gate is None else torch.where(gate > 0, moved, centre))
        self.pending.zero_()


class LevelCentre(nn.Module):
    """A row of the centre for every level of UDI (2407.17671): c <- momentum * c + (1 - momentum) * mean of means.

    parity: a process counts the same however many rows its mean is over; so does a piece of an accumulated batch, which
    makes pieces and processes alike. A level without rows anywhere stays. ``count`` stands in the original's
    checkpoints and is always zero.
    """

    def __init__(self, levels: int, dim: int, momentum: float = 0.9):
        super().__init__()
        self.momentum = momentum
        self.register_buffer("center", torch.zeros(levels, dim))
        self.register_buffer("count", torch.zeros(levels, 1))
        self.register_buffer("pending", torch.zeros(levels, dim + 1), persistent=False)  # sum of means; their number

    @torch.no_grad()
    def collect(self, sums: torch.Tensor, weights: torch.Tensor) -> None:
        """Remember weighted sums of raw teacher logits (levels, dim) of a piece, and the weights (levels,)."""
        there = weights[:, None] > 0
        self.pending[:, :-1] += torch.where(there, sums / weights[:, None], 0.0)
        self.pending[:, -1:] += there

    @torch.no_grad()
    def commit(self, gate: torch.Tensor | None) -> None:
        """Move the centre to what was collected; a ``gate`` of 0 (a tensor on the device) discards it instead."""
        all_reduce_sum(self.pending)
        number = self.pending[:, -1:]
        moved = self.center * self.momentum + self.pending[:, :-1] / number * (1 - self.momentum)
        moves = number > 0 if gate is None else (number > 0) & (gate > 0)
        self.center.copy_(torch.where(moves, moved, self.center))
        self.pending.zero_()
