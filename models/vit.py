"""Vision transformers with the parameter names of DINO, so that every checkpoint of that family loads.

An image is worth 16x16 words (2010.11929); DINO (2104.14294) for the names and the resampling of positions; class
tokens beyond the first are UDI's (2407.17671), mask token and LayerScale iBOT's (2111.07832), registers 2309.16588.

What is unusual here:
- crops of several sizes go through a block together: tokens are packed as rows of one (rows, dim) matrix, so norms and
  linear layers run once; only attention looks at one size at a time (``groups`` says which rows belong together);
- where only class tokens are read, the last block computes queries and the MLP for those rows alone;
- stochastic depth takes its draws as an argument and does not compute what it drops.
All three give the numbers of the textbook form.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

Groups = Sequence[tuple[int, int]]  # one (samples, tokens per sample) for every image size, in packing order


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """softmax(q k^T / sqrt(d)) v for (batch, heads, tokens, d) tensors.

    Half precision on a CPU uses the explicit product: the backward of the fused kernel is 2-6x slower there.
    """
    if q.device.type == "cpu" and q.dtype in (torch.bfloat16, torch.float16):
        return attention_weights(q, k) @ v
    return F.scaled_dot_product_attention(q, k, v)


def attention_weights(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """softmax(q k^T / sqrt(d)) -> (batch, heads, queries, tokens)."""
    return ((q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)).softmax(dim=-1)


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


class PatchEmbed(nn.Module):
    """Non-overlapping patches: (batch, 3, height, width) -> (batch, dim, height // patch, width // patch)."""

    def __init__(self, patch_size: int, in_chans: int, embed_dim: int):
        super().__init__()
        self.proj = nn.Conv2d(in_chans, embed_dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.proj(images)


class VisionTransformer(nn.Module):
    """See the module docstring. ``embed_dim`` is the width of what ``forward`` returns."""

    def __init__(
        self,
        patch_size: int = 16,
        embed_dim: int = 384,
        depth: int = 12,
        num_heads: int = 6,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        img_size: int = 224,
        in_chans: int = 3,
        drop_path_rate: float = 0.0,
        init_values: float = 0.0,
        num_class_tokens: int = 1,
        num_registers: int = 0,
        masked_im_modeling: bool = False,
    ):
        super().__init__()
        if img_size % patch_size:
            raise ValueError(f"patch_size {patch_size} does not divide the construction size {img_size}")
        self.embed_dim = embed_dim
        self.patch_size = patch_size
        self.num_class_tokens = num_class_tokens
        self.num_registers = num_registers
        self.grad_checkpointing = False
        self.skip_dropped = True  # False: multiply dropped branches by zero, so that shapes never change
        self._resampling: dict[tuple, torch.Tensor] = {}

        self.cls_token = nn.Parameter(torch.zeros(1, num_class_tokens, embed_dim))
        num_patches = (img_size // patch_size) ** 2
        self.pos_embed = nn.Parameter(torch.zeros(1, num_class_tokens + num_patches, embed_dim))
        self.register_tokens = nn.Parameter(torch.zeros(1, num_registers, embed_dim)) if num_registers else None
        self.masked_embed = nn.Parameter(torch.zeros(1, embed_dim)) if masked_im_modeling else None
        self.patch_embed = PatchEmbed(patch_size, in_chans, embed_dim)
        rates = torch.linspace(0, drop_path_rate, depth, dtype=torch.float32).tolist()  # parity: float32
        self.blocks = nn.ModuleList(
            Block(embed_dim, num_heads, mlp_ratio, qkv_bias, rate, init_values) for rate in rates
        )
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        self._init_weights()

    def _init_weights(self) -> None:
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        if self.register_tokens is not None:
            nn.init.normal_(self.register_tokens, std=1e-6)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def no_weight_decay(self) -> set[str]:
        """Names that recipes with layer-wise decay exempt (DINO itself decays them)."""
        return {"pos_embed", "cls_token"}

    @property
    def num_prefix_tokens(self) -> int:
        return self.num_class_tokens + self.num_registers

    # ---- from images to tokens --------------------------------------------------------------------------------------

    def position_embedding(self, height: int, width: int) -> torch.Tensor:
        """Positions for an image of ``height`` x ``width`` pixels: (1, class tokens + patches, dim).

        parity: bicubic by *scale factor* with 0.1 added to the patch counts; an explicit target size samples other
        points and breaks published weights (DINO vision_transformer.py).
        """
        classes = self.num_class_tokens
        num_patches = self.pos_embed.shape[1] - classes
        rows, columns = height // self.patch_size, width // self.patch_size
        if rows * columns == num_patches and height == width:
            return self.pos_embed
        factor = ((rows + 0.1) / num_patches**0.5, (columns + 0.1) / num_patches**0.5)
        matrix = self._resampling_matrix(int(num_patches**0.5), (rows, columns), factor)
        with torch.autocast(self.pos_embed.device.type, enabled=False):
            patches = matrix @ self.pos_embed[0, classes:]
        return torch.cat((self.pos_embed[:, :classes], patches[None]), dim=1)

    def _resampling_matrix(self, side: int, size: tuple[int, int], factor: tuple[float, float]) -> torch.Tensor:
        """The bicubic resize as the linear map it is, (new patches, old patches), made once for every size.

        A product has a deterministic gradient on every device; the gradient of ``interpolate`` has not.
        """
        key = (size, self.pos_embed.dtype, self.pos_embed.device)
        if key not in self._resampling:
            units = torch.eye(side * side, dtype=torch.float64).view(1, side * side, side, side)
            resized = F.interpolate(units, scale_factor=factor, mode="bicubic", recompute_scale_factor=False)
            if resized.shape[-2:] != size:
                raise ValueError(f"positions for {size} patches became {tuple(resized.shape[-2:])}")
            self._resampling[key] = resized.flatten(2)[0].t().contiguous().to(self.pos_embed)
        return self._resampling[key]

    def prepare_tokens(self, images: torch.Tensor, masks: torch.Tensor | None = None) -> torch.Tensor:
        """(batch, 3, height, width), masks (batch, rows, columns) bool -> (batch, tokens, dim).

        Tokens are [class tokens | registers | patches row by row]; masked patches are replaced by ``masked_embed``
        before positions are added.
        """
        batch, _, height, width = images.shape
        patches = self.patch_embed(images).flatten(2).transpose(1, 2)
        if masks is not None:
            if self.masked_embed is None:
                raise ValueError("masks were given to a network built without masked_im_modeling")
            patches = torch.where(masks.flatten(1)[..., None], self.masked_embed.to(patches.dtype), patches)
        positions = self.position_embedding(height, width)
        prefix = [(self.cls_token + positions[:, : self.num_class_tokens]).expand(batch, -1, -1)]
        if self.register_tokens is not None:
            prefix.append(self.register_tokens.expand(batch, -1, -1))
        return torch.cat((*prefix, patches + positions[:, self.num_class_tokens :]), dim=1)

    # ---- through the blocks -----------------------------------------------------------------------------------------

    def _run_blocks(self, x, groups, draws=None, queries=None):
        """Packed rows through every block; with ``queries`` the last block returns only those tokens."""
        skip = self.skip_dropped and x.device.type == "cpu"  # on a GPU gathering rows costs what it saves
        for index, block in enumerate(self.blocks):
            last = queries if block is self.blocks[-1] else None
            drops = (None, None)
            if draws is not None and block.drop_path > 0:
                drops = block.drops(draws[index], x, groups, last, skip)
            if self.grad_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, groups, last, *drops, use_reentrant=False)
            else:
                x = block(x, groups, last, *drops)
        return x

    def forward(self, images: torch.Tensor, draws: np.ndarray | None = None) -> torch.Tensor:
        """(batch, 3, height, width) -> normalised class token (batch, dim); (batch, class tokens, dim) with several."""
        return self.forward_crops([images], draws)

    def forward_crops(self, crops: Sequence[torch.Tensor], draws: np.ndarray | None = None) -> torch.Tensor:
        """Crops of any sizes in one pass -> class tokens in the order of the crops (sum of batches, dim).

        ``draws``: (depth, 2, samples) uniform numbers for stochastic depth (attention and MLP of every block).
        """
        tokens = [self.prepare_tokens(group) for group in group_by_size(crops)]
        groups = [(t.shape[0], t.shape[1]) for t in tokens]
        packed = [t.flatten(0, 1) for t in tokens]
        x = self._run_blocks(
            torch.cat(packed) if len(packed) > 1 else packed[0], groups, draws, queries=self.num_class_tokens
        )
        x = self.norm(x)
        return x if self.num_class_tokens == 1 else x.view(-1, self.num_class_tokens, self.embed_dim)

    def forward_features(
        self, images: torch.Tensor, masks: torch.Tensor | None = None, draws: np.ndarray | None = None
    ) -> torch.Tensor:
        """All tokens after the final norm: (batch, tokens, dim)."""
        tokens = self.prepare_tokens(images, masks)
        x = self._run_blocks(tokens.flatten(0, 1), [tokens.shape[:2]], draws)
        return self.norm(x).view_as(tokens)

    # ---- looking inside ---------------------------------------------------------------------------------------------

    def get_intermediate_layers(self, images: torch.Tensor, n: int = 1) -> list[torch.Tensor]:
        """Tokens after each of the last ``n`` blocks, oldest first, each through the final norm."""
        tokens = self.prepare_tokens(images)
        groups, x, outputs = [tokens.shape[:2]], tokens.flatten(0, 1), []
        for index, block in enumerate(self.blocks):
            x = block(x, groups)
            if index >= len(self.blocks) - n:
                outputs.append(self.norm(x).view_as(tokens))
        return outputs

    def get_last_selfattention(self, images: torch.Tensor, queries: int | None = None) -> torch.Tensor:
        """Attention of the last block: (batch, heads, tokens or ``queries``, tokens)."""
        tokens = self.prepare_tokens(images)
        groups, x = [tokens.shape[:2]], tokens.flatten(0, 1)
        for block in self.blocks[:-1]:
            x = block(x, groups)
        return self.blocks[-1].attn.weights(self.blocks[-1].norm1(x), groups, queries)


def group_by_size(crops: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Consecutive crops of one size, concatenated along the batch."""
    groups: list[list[torch.Tensor]] = []
    for crop in crops:
        if groups and groups[-1][0].shape[-2:] == crop.shape[-2:]:
            groups[-1].append(crop)
        else:
            groups.append([crop])
    return [torch.cat(group) if len(group) > 1 else group[0] for group in groups]


def vit_micro(**kwargs) -> VisionTransformer:
    """Small enough to learn something on a laptop's processor; nobody published it."""
    return VisionTransformer(embed_dim=128, depth=4, num_heads=4, **kwargs)


def vit_tiny(**kwargs) -> VisionTransformer:
    return VisionTransformer(embed_dim=192, depth=12, num_heads=3, **kwargs)


def vit_small(**kwargs) -> VisionTransformer:
    return VisionTransformer(embed_dim=384, depth=12, num_heads=6, **kwargs)


def vit_base(**kwargs) -> VisionTransformer:
    return VisionTransformer(embed_dim=768, depth=12, num_heads=12, **kwargs)


def vit_large(**kwargs) -> VisionTransformer:
    return VisionTransformer(embed_dim=1024, depth=24, num_heads=16, **kwargs)
