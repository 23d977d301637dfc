"""Pre-norm transformer blocks on packed tokens: the rows of crops of several sizes in one matrix.

Norms and linear layers run once on all rows; only attention looks at one size at a time (``Groups`` says which rows
belong together). Where only the first tokens are read, queries and MLP are computed for those rows alone. Stochastic
depth takes its draws as an argument and does not compute what it drops.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

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


class Selection(NamedTuple):
    """The samples of a packed matrix that a residual branch computes, the others being dropped."""

    rows: torch.Tensor  # (kept rows,) of the branch's input
    groups: Groups  # how those rows are grouped
    out_rows: torch.Tensor  # (kept output rows,) in the residual stream
    scale: float  # 1 / keep probability


def select_samples(kept: np.ndarray, groups: Groups, out_groups: Groups, rate: float, device) -> Selection:
    """``kept`` (samples,) bool over all groups -> the rows of those samples on both sides of a branch."""
    per_group = np.split(kept, np.cumsum([samples for samples, _ in groups])[:-1])

    def rows_of(layout: Groups) -> torch.Tensor:
        parts, first_row = [], 0
        for group_kept, (samples, tokens) in zip(per_group, layout, strict=True):
            parts.append((first_row + np.flatnonzero(group_kept)[:, None] * tokens + np.arange(tokens)).ravel())
            first_row += samples * tokens
        return torch.from_numpy(np.concatenate(parts)).to(device, non_blocking=True)

    counts = [(int(group_kept.sum()), tokens) for group_kept, (_, tokens) in zip(per_group, groups, strict=True)]
    rows = rows_of(groups)
    return Selection(rows, counts, rows if out_groups == groups else rows_of(out_groups), 1 / (1 - rate))


def scale_samples(kept: np.ndarray, out_groups: Groups, rate: float, like: torch.Tensor) -> torch.Tensor:
    """``kept`` (samples,) bool -> (output rows, 1): 0 for rows of dropped samples, else 1 / keep probability."""
    tokens = np.concatenate([np.full(samples, count) for samples, count in out_groups])
    scale = np.repeat(kept / (1 - rate), tokens)[:, None]
    return torch.from_numpy(scale).to(like.device, like.dtype, non_blocking=True)


def first_tokens(x: torch.Tensor, groups: Groups, count: int) -> torch.Tensor:
    """The first ``count`` tokens of every sample: packed (rows, dim) -> packed (samples * count, dim)."""
    parts = [
        part.view(samples, tokens, x.shape[-1])[:, :count].flatten(0, 1)
        for part, (samples, tokens) in zip(x.split([b * t for b, t in groups]), groups, strict=True)
    ]
    return torch.cat(parts) if len(parts) > 1 else parts[0]


class Attention(nn.Module):
    """Multi-head self-attention within every sample of a packed (rows, dim) matrix."""

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool = True):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: torch.Tensor, groups: Groups, queries: int | None = None) -> torch.Tensor:
        """All rows out, or with ``queries`` only those of the first ``queries`` tokens of every sample."""
        if queries is None:
            parts = [
                attend(*self._heads(part, samples, tokens, 3))
                for part, (samples, tokens) in zip(self._split(self.qkv(x), groups), groups, strict=True)
            ]
        else:
            parts = [attend(*qkv) for qkv in self._query_heads(x, groups, queries)]
        rows = [out.transpose(1, 2).flatten(2).flatten(0, 1) for out in parts]
        return self.proj(torch.cat(rows) if len(rows) > 1 else rows[0])

    def weights(self, x: torch.Tensor, groups: Groups, queries: int | None = None) -> torch.Tensor:
        """Attention of one group (samples, tokens): (samples, heads, queries or tokens, tokens)."""
        ((samples, tokens),) = groups
        if queries is None:
            q, k, _ = self._heads(self.qkv(x), samples, tokens, 3)
        else:
            ((q, k, _),) = self._query_heads(x, groups, queries)
        return attention_weights(q, k)

    def _query_heads(self, x, groups, queries):
        """q of the first ``queries`` tokens, k and v of all tokens, for every group."""
        dim = x.shape[-1]
        bias = self.qkv.bias
        q_rows = F.linear(first_tokens(x, groups, queries), self.qkv.weight[:dim], None if bias is None else bias[:dim])
        kv_rows = F.linear(x, self.qkv.weight[dim:], None if bias is None else bias[dim:])
        query_groups = [(samples, queries) for samples, _ in groups]
        parts = zip(groups, self._split(q_rows, query_groups), self._split(kv_rows, groups), strict=True)
        return [
            (*self._heads(q, samples, queries, 1), *self._heads(kv, samples, tokens, 2))
            for (samples, tokens), q, kv in parts
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
    ):
        super().__init__()
        self.drop_path = drop_path
        if init_values > 0:
            self.gamma_1 = nn.Parameter(init_values * torch.ones(dim))
            self.gamma_2 = nn.Parameter(init_values * torch.ones(dim))
        else:
            self.gamma_1 = self.gamma_2 = None
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, num_heads, qkv_bias)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))

    def forward(
        self,
        x: torch.Tensor,
        groups: Groups,
        queries: int | None = None,
        attn_drop: Selection | torch.Tensor | None = None,
        mlp_drop: Selection | torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Packed (rows, dim) -> the same rows, or only those of the first ``queries`` tokens of every sample.

        ``attn_drop``, ``mlp_drop``: stochastic depth of the two branches, made by ``drops``; None drops nothing.
        """
        out = x if queries is None else first_tokens(x, groups, queries)
        out = self._add(out, x, groups, attn_drop, lambda rows, layout: self._attn_branch(rows, layout, queries))
        return self._add(out, out, None, mlp_drop, lambda rows, _: self._mlp_branch(rows))

    def drops(self, draws: np.ndarray, x: torch.Tensor, groups: Groups, queries: int | None, skip: bool) -> tuple:
        """``draws`` (2, samples) uniform numbers -> what ``forward`` takes for its two branches."""
        out_groups = groups if queries is None else [(samples, queries) for samples, _ in groups]
        attn_kept, mlp_kept = draws >= self.drop_path
        if skip:
            return (
                select_samples(attn_kept, groups, out_groups, self.drop_path, x.device),
                select_samples(mlp_kept, out_groups, out_groups, self.drop_path, x.device),
            )
        return tuple(scale_samples(kept, out_groups, self.drop_path, x) for kept in (attn_kept, mlp_kept))

    def _attn_branch(self, rows, groups, queries):
        y = self.attn(self.norm1(rows), groups, queries)
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
