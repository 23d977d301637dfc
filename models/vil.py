"""Vision Longformer with the parameter names of EsViT's checkpoints.

Multi-scale vision longformer (2103.15358) for the networks, EsViT (2106.09785) for what is trained of them: relative
biases, one set of projections for local and global tokens. A stage is an attention over all its tokens, or a sparse
one: its map is cut into square chunks, and a token attends to the global tokens of its stage and to its chunk and the
eight around it. Which stages there are says a string, one field a letter: ``l1,h3,d96,n2,s1,g1,p4,f7,a0_l2,...``
"""

import functools
import math
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
from torch.utils.checkpoint import checkpoint

from models.blocks import Mlp
from models.sparse_attention import Attention, FullAttention, SparseAttention
from models.stages import StagedTransformer
from models.stochastic_depth import Kept, add_branch, kept_samples, sample_drop
from utils import UsageError

NORM_EPS = 1e-6
FIELDS = {"l": 1, "h": 3, "d": 192, "n": 1, "s": 1, "g": 1, "p": 2, "f": 7, "a": 1, "r": 0}  # left out in a string


class Stage(NamedTuple):
    """One group of the architecture's string."""

    num_heads: int
    dim: int
    depth: int
    sparse: bool
    global_tokens: int
    patch: int
    window: int

    def __str__(self) -> str:
        heads, dim, depth, sparse, global_tokens, patch, window = (int(value) for value in self)
        return f"h{heads},d{dim},n{depth},s{sparse},g{global_tokens},p{patch},f{window},a0"


def parse_architecture(text: str) -> tuple[Stage, ...]:
    """The stages of an architecture's string. Raises UsageError for what is none, or is not built here."""

    def refuse(reason: str) -> UsageError:
        return UsageError(f"--vil_arch {text}: {reason}")

    stages: list[Stage] = []
    for number, group in enumerate(text.split("_"), start=1):
        field = dict(FIELDS)
        for part in group.split(","):
            match = re.fullmatch(r"([a-z])(\d+)", part)
            if match is None or match[1] not in FIELDS:
                raise refuse(f"{part!r} is no field of a stage, such as d96; there are {', '.join(FIELDS)}")
            field[match[1]] = int(match[2])
        if field["l"] != number:
            raise refuse(f"stage {number} is called l{field['l']}; stages are counted from l1")
        if field["a"] or field["r"]:
            what = "absolute positions (a1, which is also what a string without a means)" if field["a"] else "r1"
            raise refuse(f"stage {number} has {what}, which no trained network has; pass a0 and r0")
        if not all(field[letter] for letter in "hdnpf"):
            raise refuse(f"stage {number} has none of what h, d, n, p and f count")
        if field["d"] % field["h"]:
            raise refuse(f"stage {number}: {field['h']} heads do not divide a width of {field['d']}")
        sparse = bool(field["s"]) and all(stage.sparse for stage in stages)  # parity: after a full stage all are full
        letters = (field[letter] for letter in "hdn")
        stages.append(Stage(*letters, sparse, *(field[letter] for letter in "gpf")))
    return tuple(stages)


def architecture_string(stages: Sequence[Stage]) -> str:
    """What ``parse_architecture`` makes these ``stages`` of."""
    return "_".join(f"l{number},{stage}" for number, stage in enumerate(stages, start=1))


class PatchEmbed(nn.Module):
    """Normalised patches of a map behind a stage's global tokens: (batch, dim, height, width) -> tokens, map's size."""

    def __init__(self, in_dim: int, stage: Stage):
        super().__init__()
        tokens = stage.global_tokens
        self.cls_token = nn.Parameter(torch.zeros(1, tokens, stage.dim)) if tokens else None
        self.proj = nn.Conv2d(in_dim, stage.dim, stage.patch, stage.patch)
        self.norm_embed = nn.LayerNorm(stage.dim, eps=NORM_EPS)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, tuple[int, int]]:
        x = self.proj(x)
        tokens = self.norm_embed(x.flatten(2).transpose(1, 2))
        if self.cls_token is not None:
            tokens = torch.cat((self.cls_token.expand(x.shape[0], -1, -1).to(tokens.dtype), tokens), dim=1)
        return tokens, tuple(x.shape[2:])


class AttentionBranch(nn.Module):
    """x += drop_path(attn(norm(x)))."""

    def __init__(self, dim: int, attn: Attention, drop_path: float):
        super().__init__()
        self.drop_path = drop_path
        self.norm = nn.LayerNorm(dim, eps=NORM_EPS)
        self.attn = attn

    def forward(self, x: torch.Tensor, size: tuple[int, int], neighbour: int | None, drop=None) -> torch.Tensor:
        return add_branch(x, drop, lambda rows: self.attn(self.norm(rows), size, neighbour))


class MlpBranch(nn.Module):
    """x += drop_path(mlp(norm(x)))."""

    def __init__(self, dim: int, drop_path: float):
        super().__init__()
        self.drop_path = drop_path
        self.norm = nn.LayerNorm(dim, eps=NORM_EPS)
        self.mlp = Mlp(dim, 4 * dim)

    def forward(self, x: torch.Tensor, drop=None) -> torch.Tensor:
        return add_branch(x, drop, lambda rows: self.mlp(self.norm(rows)))


class Block(NamedTuple):
    """An attention and an MLP, which files count one by one."""

    attention: AttentionBranch
    mlp: MlpBranch

    @property
    def drop_path(self) -> float:
        return self.attention.drop_path

    @property
    def draws_neighbour(self) -> bool:
        return isinstance(self.attention.attn, SparseAttention) and self.attention.attn.mode > 0

    def __call__(self, x, size, neighbour, attn_drop=None, mlp_drop=None):
        return self.mlp(self.attention(x, size, neighbour, attn_drop), mlp_drop)

    def drops(self, kept: Kept | None, x: torch.Tensor) -> tuple:
        """Of ``kept_samples`` what this block keeps, for its two branches."""
        if kept is None:
            return None, None
        return tuple(sample_drop(part, kept.scale, x) for part in kept.samples)


class VisionLongformer(StagedTransformer):
    """See the module docstring. ``mode``: of its sparse attentions.

    ``attention_calls``: those that attend to one neighbour in mode 1, which is drawn for every call in training, and
    shared by all images; evaluated, mode 1 is mode 0.
    """

    def __init__(self, stages: Sequence[Stage], img_size: int = 224, mode: int = 0, drop_path_rate: float = 0.0):
        super().__init__()
        self.embed_dim, self.depth = stages[-1].dim, sum(stage.depth for stage in stages)
        self.last_depth, self.architecture, self.mode = stages[-1].depth, tuple(stages), mode
        rates = iter(torch.linspace(0, drop_path_rate, self.depth, dtype=torch.float32).tolist())  # parity: float32
        in_dim, side = 3, img_size
        for number, stage in enumerate(stages, start=1):
            side //= stage.patch
            if not side:
                raise ValueError(f"img_size {img_size}: no token is left in stage {number}")
            layer: list[nn.Module] = [PatchEmbed(in_dim, stage)]
            for _ in range(stage.depth):
                rate = next(rates)
                sizes = stage.dim, stage.num_heads, stage.global_tokens
                attention = SparseAttention(*sizes, stage.window, mode) if stage.sparse else FullAttention(*sizes, side)
                layer += [AttentionBranch(stage.dim, attention, rate), MlpBranch(stage.dim, rate)]
            self.add_module(f"layer{number}", nn.ModuleList(layer))
            in_dim = stage.dim
        self.norm = nn.LayerNorm(self.embed_dim, eps=NORM_EPS)
        self._init_weights()

    def _init_weights(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
            if isinstance(module, Attention):
                module.init_tables()
            if isinstance(module, PatchEmbed) and module.cls_token is not None:
                nn.init.trunc_normal_(module.cls_token, std=0.02)

    @property
    def layers(self) -> list[nn.ModuleList]:
        """[patch embedding, attention, MLP, attention, ...] of every stage."""
        return [self.get_submodule(f"layer{number}") for number in range(1, 1 + len(self.architecture))]

    @property
    def blocks(self) -> list[Block]:
        """All blocks, first to last."""
        return [Block(*pair) for layer in self.layers for pair in zip(layer[1::2], layer[2::2], strict=True)]

    @property
    def attention_calls(self) -> int:
        return sum(block.draws_neighbour for block in self.blocks)

    def each_block(self, images, draws=None, neighbours=None) -> Iterator[tuple[torch.Tensor, int]]:
        blocks, drawn = self.blocks, iter(self._drawn(neighbours))
        skip = self.skip_dropped and images.device.type == "cpu"  # on a GPU gathering samples costs what it saves
        kept = iter(kept_samples(blocks, draws, images.device, skip))
        x, blocks = images, iter(blocks)
        for stage, layer in zip(self.architecture, self.layers, strict=True):
            x, size = layer[0](x)
            for _ in range(stage.depth):
                block = next(blocks)
                neighbour = next(drawn) if block.draws_neighbour else None
                drops = block.drops(next(kept), x)
                if self.grad_checkpointing and torch.is_grad_enabled():
                    x = checkpoint(block, x, size, neighbour, *drops, use_reentrant=False)
                else:
                    x = block(x, size, neighbour, *drops)
                yield x, stage.global_tokens
            x = x[:, stage.global_tokens :].transpose(1, 2).unflatten(2, size)

    def _drawn(self, neighbours):
        """One for every call that draws one: what was drawn in training, None in evaluation."""
        calls = self.attention_calls
        if not self.training:
            return [None] * calls
        drawn = [] if neighbours is None else np.asarray(neighbours).tolist()
        if len(drawn) != calls or not all(neighbour in range(1, 9) for neighbour in drawn):
            raise ValueError(f"neighbours {drawn}: mode {self.mode} wants {calls} of every size, from 1 to 8")
        return drawn

    def forward_regions(
        self,
        crops: Sequence[torch.Tensor],
        draws: np.ndarray | None = None,
        neighbours: np.ndarray | None = None,
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """What stands for each of all crops (crops * batch, dim), and the normalised tokens of every size of crops,
        each (crops of that size * batch, tokens, dim). ``neighbours``: (sizes, attention_calls) int of 1 to 8.
        """
        return self._regions(crops, draws, neighbours)


def token_pixels(stages: Sequence[Stage]) -> int:
    """Pixels along a side of a token of the last stage."""
    return math.prod(stage.patch for stage in stages)


DIMS, PATCHES = (96, 192, 384, 768), (4, 2, 2, 2)
DEPTHS = {"vil_1281": (1, 2, 8, 1), "vil_2262": (2, 2, 6, 2), "vil_14121": (1, 4, 12, 1)}
DEFAULT = "vil_2262"  # all have its patches


def stages_of(name: str, vil_arch: str | None = None) -> tuple[Stage, ...]:
    """The stages of ``name``, or those that a string says.

    vil_2262 is that of EsViT's results; of the others only the depths were published, and they have the heads of the
    original's file, whose absolute positions are left out.
    """
    if vil_arch is not None:
        return parse_architecture(vil_arch)
    heads = (3, 6, 12, 24) if name == DEFAULT else (3, 3, 6, 12)
    sizes = zip(heads, DIMS, DEPTHS[name], PATCHES, strict=True)
    return tuple(
        Stage(*three, sparse=number < 2, global_tokens=int(number < 3), patch=patch, window=7)
        for number, (*three, patch) in enumerate(sizes)
    )


def vil(name: str, vil_arch: str | None = None, vil_mode: int = 0, **kwargs) -> VisionLongformer:
    """``name``, or with a string the network that it says."""
    return VisionLongformer(stages_of(name, vil_arch), mode=vil_mode, **kwargs)


NETWORKS = {name: functools.partial(vil, name) for name in DEPTHS}
