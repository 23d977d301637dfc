"""Stratified random sampling: patch tokens become a few vectors at sampled places (UDI, 2407.17671, section 3.2).

A place is a token of the same view, or a mixture of up to four tokens of another view where the same point of the image
lies. Its query attends to all patches of the view; what comes out is added to the place's own token, and normalised.

Exact, and less than the textbook form: places are gathered before queries are projected, and what leaves the attention
is projected for valid places alone.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F

from models.blocks import attend
from models.vit import VisionTransformer


class SampledAttention(nn.Module):
    """Attention of sampled places over all patches of their view, with the names of the original."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        for layer in (self.qkv, self.proj):
            nn.init.trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)

    def forward(
        self, tokens: torch.Tensor, index: torch.Tensor, weight: torch.Tensor, points: torch.Tensor
    ) -> torch.Tensor:
        """
        Shapes     tokens (rows, patches, dim), normalised; index (rows, places, k) int64 and weight of the same shape,
                   the patches that a place mixes; points (valid,) int64, flat positions in (rows, places)
        Returns    (valid, dim)
        """
        rows, places, _ = index.shape
        dim, heads = tokens.shape[-1], self.num_heads
        weight = weight.to(tokens.dtype)
        at = (index + torch.arange(rows, device=index.device)[:, None, None] * tokens.shape[1]).flatten()
        mixed = (tokens.flatten(0, 1).index_select(0, at).view(*index.shape, dim) * weight[..., None]).sum(dim=2)
        # parity: the map is applied to projected queries, biases included
        q = F.linear(mixed, self.qkv.weight[:dim]) + self.qkv.bias[:dim] * weight.sum(dim=2, keepdim=True)
        k, v = F.linear(tokens, self.qkv.weight[dim:], self.qkv.bias[dim:]).chunk(2, dim=-1)
        q, k, v = (x.unflatten(-1, (heads, dim // heads)).transpose(1, 2) for x in (q.to(k.dtype), k, v))
        out = attend(q, k, v).transpose(1, 2).reshape(rows * places, dim).index_select(0, points)
        return self.norm(self.proj(out) + mixed.view(-1, dim).index_select(0, points))


class SampledBackbone(nn.Module):
    """A vision transformer and what samples its last block: ``backbone``, ``attn``, ``norm1`` as in the original."""

    def __init__(self, backbone: VisionTransformer, sampling: bool = True, num_heads: int | None = None):
        """``num_heads`` of the sampling; left out: those of the backbone (the original has 6, whatever the width)."""
        super().__init__()
        self.backbone = backbone
        self.attn = self.norm1 = None
        if sampling:
            self.attn = SampledAttention(backbone.embed_dim, num_heads or backbone.blocks[0].attn.num_heads)
            self.norm1 = nn.LayerNorm(backbone.embed_dim, eps=1e-6)

    def sample(
        self, patches: torch.Tensor, index: torch.Tensor, weight: torch.Tensor, points: torch.Tensor
    ) -> torch.Tensor:
        """``SampledAttention.forward`` of patches (rows, patches, dim) as the last block leaves them."""
        return self.attn(self.norm1(patches), index, weight, points)
