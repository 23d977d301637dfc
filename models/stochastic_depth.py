"""Stochastic depth on packed tokens: which samples a block's branches compute, from uniform numbers, in two forms.

Deep networks with stochastic depth (1603.09382) drops every sample by itself; DINOv2 (2304.07193) an exact number of
a batch. What is decided on the host goes to a device in one copy for all blocks, and no device is waited for.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn

from utils import to_device

Groups = Sequence[tuple[int, int]]  # one (samples, tokens per sample) for every image size, in packing order
SUBSET_ABOVE = 0.1  # DINOv2's rate from which on it drops an exact number of samples


class BatchDraws(NamedTuple):
    """Draws for stochastic depth as DINOv2 has it, of a batch of which a network may see a part.

    A rate above SUBSET_ABOVE keeps exactly max(int(batch * (1 - rate)), 1) samples of the batch, those with the
    largest draws; others drop every sample by itself. parity: the original permutes the batch of every process, here
    it is that of all, so that numbers do not depend on how it is divided (DINOv2 layers/block.py).
    """

    uniforms: np.ndarray  # (depth, 2, samples of the batch)
    first: int  # position in it of the first sample that the network sees
    count: int  # how many it sees

    def kept(self, rates: np.ndarray) -> tuple[np.ndarray, list[float]]:
        """(depth, 2, count) bool, and what every block multiplies its branches by."""
        seen = slice(self.first, self.first + self.count)
        batch = self.uniforms.shape[-1]
        numbers = np.maximum((batch * (1 - rates)).astype(np.int64), 1)
        kept = self.uniforms[..., seen] >= rates[:, None, None]
        scales = 1 / (1 - rates)
        subset = rates > SUBSET_ABOVE
        ranks = self.uniforms[subset].argsort(axis=-1, kind="stable").argsort(axis=-1)[..., seen]
        kept[subset] = ranks >= batch - numbers[subset, None, None]
        scales[subset] = batch / numbers[subset]
        return kept, scales.tolist()


Draws = np.ndarray | BatchDraws  # uniform numbers (depth, 2, samples), attention and MLP of every block


class Selection(NamedTuple):
    """The samples of a packed matrix that a residual branch computes, the others being dropped."""

    rows: torch.Tensor  # (kept rows,) of the branch's input
    groups: Groups  # how those rows are grouped
    out_rows: torch.Tensor  # (kept output rows,) in the residual stream
    scale: float  # of what the branch adds to them


class Kept(NamedTuple):
    """Which samples the two branches of a block keep, the others being dropped."""

    samples: np.ndarray | torch.Tensor  # (2, samples) bool
    scale: float  # of what is added to them, so that its mean is that of nothing dropped


def kept_samples(
    blocks: Sequence[nn.Module], draws: Draws | None, device: torch.device, skip: bool
) -> list[Kept | None]:
    """What every block keeps; None for those that drop nothing.

    With ``skip`` the answer stays on the host, where rows are chosen by it; else it goes to the device, that of all
    blocks in one copy.
    """
    rates = np.array([block.drop_path for block in blocks])
    if draws is None or not rates.any():
        return [None] * len(blocks)
    if isinstance(draws, BatchDraws):
        kept, scales = draws.kept(rates)
    else:
        kept, scales = draws >= rates[:, None, None], (1 / (1 - rates)).tolist()
    kept = kept if skip else to_device(torch.from_numpy(kept), device)
    return [Kept(*pair) if rate > 0 else None for rate, *pair in zip(rates, kept, scales, strict=True)]


def select_samples(kept: np.ndarray, groups: Groups, out_groups: Groups, scale: float, device) -> Selection:
    """``kept`` (samples,) bool over all groups -> the rows of those samples on both sides of a branch."""
    per_group = np.split(kept, np.cumsum([samples for samples, _ in groups])[:-1])

    def rows_of(layout: Groups) -> torch.Tensor:
        parts, first_row = [], 0
        for group_kept, (samples, tokens) in zip(per_group, layout, strict=True):
            parts.append((first_row + np.flatnonzero(group_kept)[:, None] * tokens + np.arange(tokens)).ravel())
            first_row += samples * tokens
        return to_device(torch.from_numpy(np.concatenate(parts)), device)

    counts = [(int(group_kept.sum()), tokens) for group_kept, (_, tokens) in zip(per_group, groups, strict=True)]
    rows = rows_of(groups)
    return Selection(rows, counts, rows if out_groups == groups else rows_of(out_groups), scale)


def scale_samples(kept: torch.Tensor, out_groups: Groups, scale: float, dtype: torch.dtype) -> torch.Tensor:
    """``kept`` (samples,) bool -> (output rows, 1): 0 for rows of dropped samples, else ``scale``."""
    scales = (kept.to(dtype) * scale).split([samples for samples, _ in out_groups])
    rows = [scale[:, None].expand(-1, tokens).flatten() for scale, (_, tokens) in zip(scales, out_groups, strict=True)]
    return torch.cat(rows)[:, None]


# ---- of tensors (samples, ...), one image size at a time -------------------------------------------------------------


def sample_drop(
    kept: np.ndarray | torch.Tensor, scale: float, x: torch.Tensor, skip: bool = True
) -> Selection | torch.Tensor:
    """``kept`` (samples,) bool -> what ``add_branch`` takes for ``x`` (samples, ...).

    ``skip``: whether a branch may be computed for the kept samples alone, where ``kept`` is on the host. A branch with
    batch norm may not: its statistics are those of all samples.
    """
    samples = [(x.shape[0], 1)]
    # a branch on no samples at all would leave tables that the batch shares without a gradient
    if skip and isinstance(kept, np.ndarray) and kept.any():
        return select_samples(kept, samples, samples, scale, x.device)
    scales = scale_samples(torch.as_tensor(kept), samples, scale, x.dtype)
    return scales.view(-1, *[1] * (x.ndim - 1))


def add_branch(
    x: torch.Tensor, drop: Selection | torch.Tensor | None, branch: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """x + branch(x), of which ``drop`` drops samples."""
    if drop is None:
        return x + branch(x)
    if isinstance(drop, torch.Tensor):
        return x + drop * branch(x)
    y = branch(x.index_select(0, drop.rows))
    return x.index_add(0, drop.out_rows, y.to(x.dtype), alpha=drop.scale)
