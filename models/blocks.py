"""Pre-norm transformer blocks on packed tokens: the rows of crops of several sizes in one matrix.

Norms and linear layers run once on all rows; only attention looks at one size at a time (``Groups`` says which rows
belong together). Where only some tokens are read (``Reads``), queries and MLP are computed for those rows alone.
Stochastic depth takes its draws as an argument and does not compute what it drops.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from utils import to_device

Groups = Sequence[tuple[int, int]]  # one (samples, tokens per sample) for every image size, in packing order


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """softmax(q k^T / sqrt(d) + bias) v for (batch, heads, tokens, d) tensors.

    Half precision on a CPU uses the explicit product: the backward of the fused kernel is 2-6x slower there.
    """
    if q.device.type == "cpu" and q.dtype in (torch.bfloat16, torch.float16):
        return attention_weights(q, k, bias) @ v
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)


def attention_weights(q: torch.Tensor, k: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """softmax(q k^T / sqrt(d) + bias) -> (batch, heads, queries, tokens)."""
    logits = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    return (logits if bias is None else logits + bias).softmax(dim=-1)


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


class Reads(NamedTuple):
    """What is read of a block's output, so that the last block computes nothing else.

    ``queries``: for every group of sizes, how many tokens of a sample are read, from the first on. ``rows``: of these
    (packed), the rows that are read; None means all.
    """

    queries: Sequence[int]
    rows: torch.Tensor | None = None

    def groups(self, groups: Groups) -> Groups:
        return [(samples, count) for (samples, _), count in zip(groups, self.queries, strict=True)]

    def pick(self, x: torch.Tensor, groups: Groups) -> torch.Tensor:
        """Packed rows of whole samples -> the packed rows that are read."""
        queries = first_tokens(x, groups, self.queries)
        return queries if self.rows is None else queries.index_select(0, self.rows)


def first_tokens(x: torch.Tensor, groups: Groups, counts: Sequence[int]) -> torch.Tensor:
    """The first ``counts[g]`` tokens of every sample of group g: packed (rows, dim) -> packed (fewer rows, dim)."""
    parts = [
        part if count == tokens else part.view(samples, tokens, x.shape[-1])[:, :count].flatten(0, 1)
        for part, (samples, tokens), count in zip(x.split([b * t for b, t in groups]), groups, counts, strict=True)
    ]
    return torch.cat(parts) if len(parts) > 1 else parts[0]


class Attention(nn.Module):
    """Multi-head self-attention within every sample of a packed (rows, dim) matrix."""

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool = True):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: torch.Tensor, groups: Groups, reads: Reads | None = None) -> torch.Tensor:
        """All rows out, or only those that are read."""
        parts = [self.attend(*qkv) for qkv in self._group_heads(x, groups, reads)]
        rows = [out.transpose(1, 2).flatten(2).flatten(0, 1) for out in parts]
        rows = torch.cat(rows) if len(rows) > 1 else rows[0]
        return self.proj(rows if reads is None or reads.rows is None else rows.index_select(0, reads.rows))

    def weights(self, x: torch.Tensor, groups: Groups, queries: int | None = None) -> torch.Tensor:
        """Attention of one group (samples, tokens): (samples, heads, queries or tokens, tokens)."""
        ((q, k, _),) = self._group_heads(x, groups, None if queries is None else Reads([queries]))
        return attention_weights(q, k, self.bias(q))

    def forward_with_weights(self, x: torch.Tensor, groups: Groups, queries: int) -> tuple[torch.Tensor, torch.Tensor]:
        """All rows of a group, and the attention (samples, heads, queries, tokens) of its first ``queries`` tokens."""
        ((q, k, v),) = self._group_heads(x, groups, None)
        rows = self.attend(q, k, v).transpose(1, 2).flatten(2).flatten(0, 1)
        read = q[:, :, :queries]
        return self.proj(rows), attention_weights(read, k, self.bias(read))

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return attend(q, k, v, self.bias(q))

    def bias(self, q: torch.Tensor) -> torch.Tensor | None:
        """What is added to the logits of ``q``, the first tokens of their samples; models/finetuned.py has some."""
        return None

    def _group_heads(self, x, groups, reads):
        """q, k, v (samples, heads, tokens, head dim) of every group; with ``reads`` q of the tokens that are read."""
        if reads is None:
            parts = zip(self._split(self.qkv(x), groups), groups, strict=True)
            return [self._heads(part, samples, tokens, 3) for part, (samples, tokens) in parts]
        dim, bias = x.shape[-1], self.qkv.bias
        queries = first_tokens(x, groups, reads.queries)
        q_rows = F.linear(queries, self.qkv.weight[:dim], None if bias is None else bias[:dim])
        kv_rows = F.linear(x, self.qkv.weight[dim:], None if bias is None else bias[dim:])
        q_groups = reads.groups(groups)
        parts = zip(q_groups, groups, self._split(q_rows, q_groups), self._split(kv_rows, groups), strict=True)
        return [
            (*self._heads(q, samples, count, 1), *self._heads(kv, samples, tokens, 2))
            for (samples, count), (_, tokens), q, kv in parts
        ]

    @staticmethod
    def _split(rows: torch.Tensor, groups: Groups) -> tuple[torch.Tensor, ...]:
        return rows.split([samples * tokens for samples, tokens in groups])

    def _heads(self, rows: torch.Tensor, samples: int, tokens: int, parts: int) -> tuple[torch.Tensor, ...]:
        head_dim = rows.shape[-1] // (parts * self.num_heads)
        return rows.view(samples, tokens, parts, self.num_heads, head_dim).permute(2, 0, 3, 1, 4).unbind(0)


class Mlp(nn.Module):
    """Linear, GELU (exact), Linear."""

    def __init__(self, dim: int, hidden_dim: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.act(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm residual block: x += drop_path(attn(norm1(x))); x += drop_path(mlp(norm2(x)))."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        drop_path: float = 0.0,
        init_values: float = 0.0,
        norm_eps: float = 1e-6,
    ):
        super().__init__()
        self.drop_path = drop_path
        if init_values > 0:
            self.gamma_1 = nn.Parameter(init_values * torch.ones(dim))
            self.gamma_2 = nn.Parameter(init_values * torch.ones(dim))
        else:
            self.gamma_1 = self.gamma_2 = None
        self.norm1 = nn.LayerNorm(dim, eps=norm_eps)
        self.attn = Attention(dim, num_heads, qkv_bias)
        self.norm2 = nn.LayerNorm(dim, eps=norm_eps)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))

    def forward(
        self,
        x: torch.Tensor,
        groups: Groups,
        reads: Reads | None = None,
        attn_drop: Selection | torch.Tensor | None = None,
        mlp_drop: Selection | torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Packed (rows, dim) -> the same rows, or only those that are read.

        ``attn_drop``, ``mlp_drop``: stochastic depth of the two branches, made by ``drops``; None drops nothing.
        """
        out = x if reads is None else reads.pick(x, groups)
        out = self._add(out, x, groups, attn_drop, lambda rows, layout: self._attn_branch(rows, layout, reads))
        return self._add(out, out, None, mlp_drop, lambda rows, _: self._mlp_branch(rows))

    def forward_with_attention(
        self, x: torch.Tensor, groups: Groups, queries: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """All rows of one group, nothing dropped, and the attention of the first ``queries`` tokens."""
        y, weights = self.attn.forward_with_weights(self.norm1(x), groups, queries)
        x = x + (y if self.gamma_1 is None else self.gamma_1 * y)
        return x + self._mlp_branch(x), weights

    def drops(
        self, kept: Kept | None, x: torch.Tensor, groups: Groups, reads: Reads | None
    ) -> tuple[Selection | torch.Tensor | None, Selection | torch.Tensor | None]:
        """Of ``kept_samples`` what this block keeps -> what ``forward`` takes for its two branches."""
        if kept is None:
            return None, None
        out_groups = groups if reads is None else reads.groups(groups)
        samples, scale = kept
        if isinstance(samples, np.ndarray) and (reads is None or reads.rows is None):
            return (
                select_samples(samples[0], groups, out_groups, scale, x.device),
                select_samples(samples[1], out_groups, out_groups, scale, x.device),
            )
        scales = [scale_samples(part, out_groups, scale, x.dtype) for part in torch.as_tensor(samples)]
        return tuple(scales if reads is None or reads.rows is None else (scale[reads.rows] for scale in scales))

    def _attn_branch(self, rows, groups, reads):
        y = self.attn(self.norm1(rows), groups, reads)
        return y if self.gamma_1 is None else self.gamma_1 * y

    def _mlp_branch(self, rows):
        y = self.mlp(self.norm2(rows))
        return y if self.gamma_2 is None else self.gamma_2 * y

    @staticmethod
    def _add(out, x, groups, drop, branch):
        if drop is None:
            return out + branch(x, groups)
        if isinstance(drop, torch.Tensor):
            return out + drop * branch(x, groups)
        # with every sample dropped the branch still runs, on no rows: its weights must get a gradient of zero, not none
        y = branch(x.index_select(0, drop.rows), drop.groups)
        return out.index_add(0, drop.out_rows, y.to(out.dtype), alpha=drop.scale)
