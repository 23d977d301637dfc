"""Centring: the running mean of the teacher's logits, subtracted so that no prototype wins everywhere."""

import torch
import torch.nn as nn

from utils import all_reduce_sum


class Centre(nn.Module):
    """c <- momentum * c + (1 - momentum) * mean over all processes and rows of the teacher's logits.

    Rows are collected while a step's pieces are computed and enter the centre only when the step is taken: every piece
    of an accumulated batch sees the old centre, and a skipped step leaves it as it was. DINO (2104.14294), eq. 4.
    """

    def __init__(self, dim: int, momentum: float = 0.9):
        super().__init__()
        self.momentum = momentum
        self.register_buffer("center", torch.zeros(1, dim))
        self.register_buffer("pending", torch.zeros(dim + 1), persistent=False)  # sum of rows, and their number last

    @torch.no_grad()
    def collect(self, logits: torch.Tensor) -> None:
        """Remember raw teacher logits (rows, dim) of this step."""
        self.pending[:-1] += logits.sum(dim=0).to(self.pending.dtype)
        self.pending[-1] += logits.shape[0]

    @torch.no_grad()
    def commit(self, gate: torch.Tensor | None) -> None:
        """Move the centre to what was collected; a ``gate`` of 0 (a tensor on the device) discards it instead."""
        all_reduce_sum(self.pending)
        mean = self.pending[:-1] / self.pending[-1]
        moved = self.center * self.momentum + mean * (1 - self.momentum)
        self.center.copy_(moved if gate is None else torch.where(gate > 0, moved, self.center))
        self.pending.zero_()
