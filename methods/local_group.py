"""Local groups (Mugs 2203.14415, section 3.2): an image as seen among its nearest in a memory of earlier ones."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn

from methods.memory import Memory
from models.blocks import Block, Reads
from models.stochastic_depth import Groups
from models.vit import VisionTransformer


class Views(NamedTuple):
    """What is read of all crops of a batch.

    Shapes     classes (crops * batch, dim), class tokens after the final norm; relations (crops * batch, dim), the mean
               token of every crop after it attended to its neighbours, through the same norm; patches (batch, dim), the
               mean patch of the first crop after the norm, no gradient; index (crops * batch, k) of the neighbours
    """

    classes: torch.Tensor
    relations: torch.Tensor
    patches: torch.Tensor
    index: torch.Tensor


class LocalGroupTransformer(VisionTransformer):
    """A vision transformer with ``relation_blocks`` behind it, through which a mean token meets rows of a memory.

    parity: the query is the mean of all tokens, the class token included, before the final norm, while the memory
    holds means of patches after it; the relation block sees both side by side. One final norm serves all. Relation
    blocks have the rates of stochastic depth of the first blocks: with one there is none.
    """

    def __init__(self, *args, num_relation_blocks: int = 1, **kwargs):
        super().__init__(*args, **kwargs)
        heads, mlp_ratio = self.blocks[0].attn.num_heads, kwargs.get("mlp_ratio", 4.0)
        qkv_bias, eps = kwargs.get("qkv_bias", True), kwargs.get("norm_eps", 1e-6)
        self.relation_blocks = nn.ModuleList(
            Block(self.embed_dim, heads, mlp_ratio, qkv_bias, norm_eps=eps) for _ in range(num_relation_blocks)
        )
        self._init_weights()

    def forward_views(
        self, crops: Sequence[torch.Tensor], memory: Memory, k: int, draws: np.ndarray | None = None
    ) -> Views:
        """Crops (batch, 3, height, width) of any sizes in one pass; ``draws`` as ``forward_crops``."""
        return self.views_of(*self.forward_rows(crops, draws), len(crops[0]), memory, k)

    def views_of(self, x: torch.Tensor, groups: Groups, batch: int, memory: Memory, k: int) -> Views:
        """The same from packed rows as the last block leaves them, the first ``batch`` samples being the first crop."""
        tokens, queries = unpacked(x, groups), mean_tokens(x, groups)
        neighbours = memory.nearest(queries.detach(), k)
        relations = self.relate(queries, neighbours.rows.to(queries.dtype))
        normed = self.norm(torch.cat((*(part[:, 0] for part in tokens), relations)))
        with torch.no_grad():
            first = tokens[0][:batch, self.num_prefix_tokens :]
            patches = self.norm(first).mean(dim=1)
        return Views(*normed.chunk(2), patches, neighbours.index)

    def relate(self, queries: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Queries (samples, dim) after they attended to their rows (samples, k, dim), before the final norm.

        There are no positions among the rows, so their order means nothing.
        """
        return self.first_related(torch.cat((queries[:, None], rows), dim=1))

    def first_related(self, tokens: torch.Tensor) -> torch.Tensor:
        """The first of (samples, tokens, dim) as the relation blocks leave it: (samples, dim)."""
        x, groups = tokens.flatten(0, 1), [tokens.shape[:2]]
        for block in self.relation_blocks:
            x = block(x, groups, Reads([1]) if block is self.relation_blocks[-1] else None)
        return x


def unpacked(rows: torch.Tensor, groups: Groups) -> list[torch.Tensor]:
    """Packed rows (rows, dim) -> (samples, tokens, dim) of every group."""
    parts = rows.split([samples * tokens for samples, tokens in groups])
    return [part.view(*group, -1) for part, group in zip(parts, groups, strict=True)]


def mean_tokens(rows: torch.Tensor, groups: Groups) -> torch.Tensor:
    """The mean of all tokens of every sample, the class token included: (samples of all groups, dim)."""
    return torch.cat([tokens.mean(dim=1) for tokens in unpacked(rows, groups)])
