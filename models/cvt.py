"""Convolutional vision transformer with windows, with the parameter names of EsViT's checkpoints.

EsViT (2106.09785) calls it CvT; of the paper of that name (2103.15808) it has the convolutions: every stage begins with
one that overlaps, and queries, keys and values come from a depthwise one with batch norm. Attention is within windows.
There is no class token: the mean of the normalised tokens of the last stage stands for it.

parity: a window is never larger than the map it finds, unlike Swin's. The map is padded with zeros after the norm,
before the depthwise convolution, which crosses the borders of windows; batch norm sees the padding. Attention is scaled
by the whole width, not by a head's (EsViT models/cvt_v4_transformer.py). Its shift of windows, which never shifts
anything, is left out.
"""

import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from models.batch_norm import recomputing
from models.blocks import QuickGELU, attend
from models.stages import StagedTransformer
from models.stochastic_depth import Kept, add_branch, kept_samples, sample_drop
from models.swin import relative_position_index

NORM_EPS = 1e-5


class Stage(NamedTuple):
    """One stage: its first convolution, and its blocks."""

    kernel: int
    stride: int
    padding: int
    dim: int
    num_heads: int
    depth: int
    window: int = 7
    mlp_ratio: float = 4.0
    qkv_bias: bool = True
    qkv_kernel: int = 3
    qkv_padding: int = 1


def side_after(side: int, stage: Stage) -> int:
    """Tokens along a side of the map that the first convolution of a stage makes of ``side``."""
    return (side + 2 * stage.padding - stage.kernel) // stage.stride + 1


class PointwiseConv(nn.Conv2d):
    """A 1 x 1 convolution on maps whose channels come last: (batch, height, width, dim)."""

    def __init__(self, dim: int, out_dim: int, bias: bool = True):
        super().__init__(dim, out_dim, kernel_size=1, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight.flatten(1), self.bias)


class ConvEmbed(nn.Module):
    """The convolution that begins a stage: (batch, height, width, dim) -> a smaller and wider map, normalised."""

    def __init__(self, in_dim: int, stage: Stage):
        super().__init__()
        self.proj = nn.Conv2d(in_dim, stage.dim, stage.kernel, stage.stride, stage.padding)
        self.norm = nn.LayerNorm(stage.dim, eps=NORM_EPS)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.proj(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))


class ConvProjection(nn.Module):
    """Queries, keys and values: depthwise convolution, batch norm, pointwise convolution."""

    def __init__(self, stage: Stage):
        super().__init__()
        dim, kernel, padding = stage.dim, stage.qkv_kernel, stage.qkv_padding
        self.dw = nn.Conv2d(dim, dim, kernel, padding=padding, groups=dim, bias=False)
        self.bn = nn.BatchNorm2d(dim)
        self.pw = PointwiseConv(dim, 3 * dim, stage.qkv_bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, height, width, dim) -> (batch, height, width, 3 * dim)."""
        return self.pw(self.bn(self.dw(x.permute(0, 3, 1, 2))).permute(0, 2, 3, 1))


class WindowAttention(nn.Module):
    """Multi-head self-attention within windows: (batch, height, width, dim) -> the same shape."""

    def __init__(self, stage: Stage, rel_pos_embed: bool):
        super().__init__()
        self.num_heads, self.window = stage.num_heads, stage.window
        self.rel_pos_bias_table = None
        if rel_pos_embed:
            self.rel_pos_bias_table = nn.Parameter(torch.zeros((2 * stage.window - 1) ** 2, stage.num_heads))
            self.register_buffer("rel_pos_idx", relative_position_index(stage.window))
        self.qkv = ConvProjection(stage)
        self.proj_out = PointwiseConv(stage.dim, stage.dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, height, width, dim = x.shape
        heads, window = self.num_heads, min(self.window, height, width)
        bottom, right = -height % window, -width % window
        qkv = self.qkv(F.pad(x, (0, 0, 0, right, 0, bottom)) if bottom or right else x)
        rows, columns = (height + bottom) // window, (width + right) // window
        # windows stand beside heads: the batch shares one bias, which fused kernels then never copy for every image
        qkv = qkv.view(batch, rows, window, columns, window, 3, heads, dim // heads).permute(5, 0, 1, 3, 6, 2, 4, 7)
        q, k, v = qkv.reshape(3, batch, rows * columns * heads, window**2, dim // heads)
        out = attend(q, k, v, self._bias(window, rows * columns, q.dtype), scale=dim**-0.5)
        out = out.view(batch, rows, columns, heads, window, window, dim // heads).permute(0, 1, 4, 2, 5, 3, 6)
        out = out.reshape(batch, rows * window, columns * window, dim)
        return self.proj_out(out[:, :height, :width])

    def _bias(self, window, windows, dtype):
        """What is added to the logits: (1, windows * heads, window^2, window^2), or None."""
        if self.rel_pos_bias_table is None:
            return None
        if window != self.window:
            raise ValueError(f"a map of {window} tokens: the relative bias is that of windows of {self.window}")
        bias = self.rel_pos_bias_table[self.rel_pos_idx.flatten()].view(window**2, window**2, -1).permute(2, 0, 1)
        return bias.expand(windows, -1, -1, -1).flatten(0, 1)[None].to(dtype)


class ConvMlp(nn.Module):
    """Pointwise convolution, QuickGELU, pointwise convolution."""

    def __init__(self, dim: int, hidden_dim: int):
        super().__init__()
        self.net = nn.Sequential(PointwiseConv(dim, hidden_dim), QuickGELU(), PointwiseConv(hidden_dim, dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)


class Branch(nn.Module):
    """fn(norm(x))."""

    def __init__(self, dim: int, fn: nn.Module):
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=NORM_EPS)
        self.fn = fn

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fn(self.norm(x))


class CvTBlock(nn.ModuleList):
    """Pre-norm residual block on a map: x += drop_path(attention(x)); x += drop_path(mlp(x))."""

    def __init__(self, stage: Stage, rel_pos_embed: bool, drop_path: float):
        mlp = ConvMlp(stage.dim, int(stage.dim * stage.mlp_ratio))
        super().__init__([Branch(stage.dim, WindowAttention(stage, rel_pos_embed)), Branch(stage.dim, mlp)])
        self.drop_path = drop_path

    def forward(self, x: torch.Tensor, attn_drop=None, mlp_drop=None) -> torch.Tensor:
        """(batch, height, width, dim) -> the same shape; the last two arguments are made by ``drops``."""
        attention, mlp = self
        return add_branch(add_branch(x, attn_drop, attention), mlp_drop, mlp)

    def drops(self, kept: Kept | None, x: torch.Tensor) -> tuple:
        """Of ``kept_samples`` what this block keeps -> what ``forward`` takes for its two branches."""
        if kept is None:
            return None, None
        attention, mlp = kept.samples
        return sample_drop(attention, kept.scale, x, skip=False), sample_drop(mlp, kept.scale, x)


class Layers(nn.Module):
    """The blocks of a stage."""

    def __init__(self, blocks: Sequence[CvTBlock]):
        super().__init__()
        self.layers = nn.ModuleList(blocks)


class CvT(StagedTransformer):
    """See the module docstring. ``rel_pos_embed``: a learnt bias for every pair of places in a window.

    Windows of that bias fit no map that is smaller, so crops of 96 pixels can have none.
    """

    def __init__(self, stages: Sequence[Stage], rel_pos_embed: bool = False, drop_path_rate: float = 0.0):
        super().__init__()
        self.embed_dim, self.depth = stages[-1].dim, sum(stage.depth for stage in stages)
        self.last_depth, self.num_stages = stages[-1].depth, len(stages)
        rates = iter(torch.linspace(0, drop_path_rate, self.depth, dtype=torch.float32).tolist())  # parity: float32
        dims = [3, *(stage.dim for stage in stages)]
        for index, stage in enumerate(stages):
            blocks = [CvTBlock(stage, rel_pos_embed, next(rates)) for _ in range(stage.depth)]
            self.add_module(f"stage{index}", nn.ModuleList([ConvEmbed(dims[index], stage), Layers(blocks)]))
        self.norm = nn.LayerNorm(self.embed_dim, eps=NORM_EPS)
        self._init_weights()

    def _init_weights(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            if isinstance(module, WindowAttention) and module.rel_pos_bias_table is not None:
                nn.init.trunc_normal_(module.rel_pos_bias_table, std=0.02)

    @property
    def stages(self) -> list[nn.ModuleList]:
        """(first convolution, blocks) of every stage."""
        return [self.get_submodule(f"stage{index}") for index in range(self.num_stages)]

    @property
    def blocks(self) -> list[CvTBlock]:
        """All blocks, first to last."""
        return [block for _, body in self.stages for block in body.layers]

    def each_block(self, images, draws=None, neighbours=None) -> Iterator[tuple[torch.Tensor, int]]:
        skip = self.skip_dropped and images.device.type == "cpu"  # on a GPU gathering samples costs what it saves
        kept = iter(kept_samples(self.blocks, draws, images.device, skip))
        x = images.permute(0, 2, 3, 1)
        for embed, body in self.stages:
            x = embed(x)
            for block in body.layers:
                drops = block.drops(next(kept), x)
                if self.grad_checkpointing and torch.is_grad_enabled():
                    again = functools.partial(recomputing, block)
                    x = checkpoint(block, x, *drops, use_reentrant=False, context_fn=again)
                else:
                    x = block(x, *drops)
                yield x.flatten(1, 2), 0

    def forward_regions(
        self, crops: Sequence[torch.Tensor], draws: np.ndarray | None = None
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Means of all crops (crops * batch, dim), and the normalised tokens of every size of crops, each (crops of
        that size * batch, tokens, dim).
        """
        return self._regions(crops, draws)


TINY = (
    Stage(kernel=7, stride=4, padding=2, dim=64, num_heads=1, depth=2),
    Stage(kernel=3, stride=2, padding=1, dim=192, num_heads=3, depth=2),
    Stage(kernel=3, stride=2, padding=1, dim=384, num_heads=6, depth=6),
    Stage(kernel=3, stride=2, padding=1, dim=768, num_heads=12, depth=2),
)
SMALL = tuple(
    stage._replace(dim=dim, num_heads=heads, depth=depth)
    for stage, dim, heads, depth in zip(TINY, (64, 128, 256, 512), (2, 4, 8, 16), (2, 2, 10, 4), strict=True)
)


def cvt_tiny(**kwargs) -> CvT:
    """EsViT's s1, and with ``rel_pos_embed`` s1_rpe."""
    return CvT(TINY, **kwargs)


def cvt_small(**kwargs) -> CvT:
    """EsViT's s3, of which no result was published."""
    return CvT(SMALL, **kwargs)


TOKEN_PIXELS = 32  # along a side of a token of the last stage


def smallest_side(windows: bool = False) -> int:
    """Pixels along a side from which on every stage has a map; with ``windows`` one that whole windows fit."""
    return next(side for side in itertools.count(1) if all(tokens >= wanted for tokens, wanted in _maps(side, windows)))


def _maps(side: int, windows: bool) -> Iterator[tuple[int, int]]:
    """Tokens along a side of every stage's map, and how many there must be."""
    for stage in TINY:  # SMALL has the same
        side = side_after(side, stage)
        yield side, stage.window if windows else 1
