"""Pre-norm transformer blocks on packed tokens: the rows of crops of several sizes in one matrix.

Norms and linear layers run once on all rows; only attention looks at one size at a time (``Groups`` says which rows
belong together). Where only some tokens are read (``Reads``), queries and MLP are computed for those rows alone.
Stochastic depth (models/stochastic_depth.py) takes its draws as an argument and does not compute what it drops.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from models.stochastic_depth import Groups, Kept, Selection, scale_samples, select_samples


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bias: torch.Tensor | None = None,
    scale: float | None = None,
) -> torch.Tensor:
    """softmax(scale q k^T + bias) v for (batch, heads, tokens, d) tensors; ``scale``: left out, 1 / sqrt(d).

    Half precision on a CPU uses the explicit product: the backward of the fused kernel is 2-6x slower there.
    """
    if q.device.type == "cpu" and q.dtype in (torch.bfloat16, torch.float16):
        return attention_weights(q, k, bias, scale) @ v
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)


def attention_weights(
    q: torch.Tensor, k: torch.Tensor, bias: torch.Tensor | None = None, scale: float | None = None
) -> torch.Tensor:
    """softmax(scale q k^T + bias) -> (batch, heads, queries, tokens)."""
    logits = (q * (q.shape[-1] ** -0.5 if scale is None else scale)) @ k.transpose(-2, -1)
    return (logits if bias is None else logits + bias).softmax(dim=-1)


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


def pack(tokens: Sequence[torch.Tensor]) -> tuple[torch.Tensor, Groups]:
    """(samples, tokens, dim) tensors -> the rows of all of them in one matrix, and how these belong together."""
    groups = [(t.shape[0], t.shape[1]) for t in tokens]
    rows = [t.flatten(0, 1) for t in tokens]
    return torch.cat(rows) if len(rows) > 1 else rows[0], groups


def group_by_size(crops: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Consecutive crops of one size, concatenated along the batch."""
    groups: list[list[torch.Tensor]] = []
    for crop in crops:
        if groups and groups[-1][0].shape[-2:] == crop.shape[-2:]:
            groups[-1].append(crop)
        else:
            groups.append([crop])
    return [torch.cat(group) if len(group) > 1 else group[0] for group in groups]


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

    last = "fc2"  # the layer whose output is that of all

    def __init__(self, dim: int, hidden_dim: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.act(self.fc1(x)))


class QuickGELU(nn.Module):
    """x sigmoid(1.702 x), what CLIP was trained with in place of GELU."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.sigmoid(1.702 * x)


class QuickGELUMlp(Mlp):
    """Linear, QuickGELU, Linear."""

    def __init__(self, dim: int, hidden_dim: int):
        super().__init__(dim, hidden_dim)
        self.act = QuickGELU()


class SwiGLU(nn.Module):
    """w3(silu(x1) * x2) of the halves of w12(x): GLU variants improve transformer (2002.05202), as DINOv2 has it.

    parity: two thirds of the width asked for, as the gate is a third matrix, in multiples of 8.
    """

    last = "w3"

    def __init__(self, dim: int, hidden_dim: int):
        super().__init__()
        width = (int(hidden_dim * 2 / 3) + 7) // 8 * 8
        self.w12 = nn.Linear(dim, 2 * width)
        self.w3 = nn.Linear(width, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, value = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(gate) * value)


ACTIVATIONS = ("gelu", "quick_gelu")  # of MLPs without a gate
MLPS = {"gelu": Mlp, "quick_gelu": QuickGELUMlp, "swiglu": SwiGLU}


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
        mlp: str = "gelu",
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
        self.mlp = MLPS[mlp](dim, int(dim * mlp_ratio))

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
