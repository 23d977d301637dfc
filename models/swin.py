"""Swin transformers with the parameter names of the published checkpoints: Microsoft's, iBOT's, EsViT's.

Shifted windows (2103.14030); iBOT (2111.07832) for the mask token, EsViT (2106.09785) for windows of 14. There is no
class token: the mean of the normalised tokens of the last stage stands for it, and is token 0 wherever tokens are
returned.

parity: window and shift are fixed when the network is built, for ``img_size``, and stay what they are for every other
crop. A map that the windows do not cover is padded with zeros after norm1 and before it is shifted; padded positions
take part in attention. Other libraries shift first, pad later or drop the shift, and differ on every small crop
(EsViT models/swin_transformer.py).
"""

from collections import deque
from collections.abc import Iterator, Sequence

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from models.blocks import Mlp, attend, attention_weights
from models.stochastic_depth import Kept, Selection, kept_samples, scale_samples, select_samples
from models.vit import group_by_size
from utils import to_device

PATCH_SIZE = 4  # of every published Swin
MASK_UNIT = 32  # pixels of a token of its fourth stage

# The rates they were published with. iBOT's students take them whatever --drop_path says.
DEFAULT_DROP_PATH = {"swin_micro": 0.1, "swin_tiny": 0.1, "swin_small": 0.2, "swin_base": 0.2, "swin_large": 0.2}


def relative_position_index(window: int) -> torch.Tensor:
    """Row of the bias table for every (query, key) of a window: (window^2, window^2) int64."""
    row, column = torch.arange(window**2) // window, torch.arange(window**2) % window
    rows, columns = (x[:, None] - x[None] + window - 1 for x in (row, column))
    return rows * (2 * window - 1) + columns


def shift_mask(side: int, window: int, shift: int) -> torch.Tensor:
    """-100 where query and key come from different ends of a shifted map: (windows, window^2, window^2).

    ``side`` is that of the padded map. parity: padding is not told apart from the image, and -100 is not infinity.
    """
    part = torch.bucketize(torch.arange(side), torch.tensor([side - window, side - shift]), right=True)
    region = 3 * part[:, None] + part[None]
    region = region.unfold(0, window, window).unfold(1, window, window).flatten(2).flatten(0, 1)
    return -100.0 * (region[:, :, None] != region[:, None, :])


class PatchEmbed(nn.Module):
    """Normalised patches: (batch, 3, side, side) -> (batch, side // patch, side // patch, dim)."""

    def __init__(self, patch_size: int, embed_dim: int):
        super().__init__()
        self.proj = nn.Conv2d(3, embed_dim, kernel_size=patch_size, stride=patch_size)
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.norm(self.proj(images).permute(0, 2, 3, 1))


class PatchMerging(nn.Module):
    """Four neighbours become one token of twice the width: (batch, side, side, dim) -> half the side, rounded up."""

    def __init__(self, dim: int):
        super().__init__()
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)
        self.norm = nn.LayerNorm(4 * dim, eps=1e-6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        odd = x.shape[1] % 2
        x = F.pad(x, (0, 0, 0, odd, 0, odd)) if odd else x
        batch, side, _, dim = x.shape
        # neighbours in the order (row, column) = (0, 0), (1, 0), (0, 1), (1, 1)
        x = x.view(batch, side // 2, 2, side // 2, 2, dim).permute(0, 1, 3, 4, 2, 5)
        return self.reduction(self.norm(x.reshape(batch, side // 2, side // 2, 4 * dim)))


class WindowAttention(nn.Module):
    """Multi-head self-attention within windows of a map that is shifted by ``shift`` up and left."""

    def __init__(self, dim: int, num_heads: int, window: int, shift: int):
        super().__init__()
        self.num_heads, self.window, self.shift = num_heads, window, shift
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * window - 1) ** 2, num_heads))
        self.register_buffer("relative_position_index", relative_position_index(window))
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """(batch, side, side, dim), ``mask`` of ``shift_mask`` -> the same shape."""
        batch, side, _, dim = x.shape
        window, count = self.window, -(-side // self.window)
        out = attend(*self._windows(x, mask))
        out = out.view(batch, count, count, self.num_heads, window, window, dim // self.num_heads)
        out = out.permute(0, 1, 4, 2, 5, 3, 6).reshape(batch, count * window, count * window, dim)
        if self.shift:
            out = out.roll((self.shift, self.shift), (1, 2))
        return self.proj(out[:, :side, :side])

    def weights(self, x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """Attention: (batch * windows, heads, window^2, window^2)."""
        q, k, _, bias = self._windows(x, mask)
        return attention_weights(q, k, bias).unflatten(1, (-1, self.num_heads)).flatten(0, 1)

    def _windows(self, x, mask):
        """q, k, v (batch, windows * heads, window^2, dim / heads) and what is added to the logits (1, ...)."""
        batch, side, _, dim = x.shape
        window, heads = self.window, self.num_heads
        if padding := -side % window:
            # zeros after the norm: there q, k and v are the bias, and need no product
            qkv = F.pad(F.linear(x, self.qkv.weight), (0, 0, 0, padding, 0, padding))
            qkv = qkv + self.qkv.bias.to(qkv.dtype)
        else:
            qkv = self.qkv(x)
        if self.shift:
            qkv = qkv.roll((-self.shift, -self.shift), (1, 2))
        count = (side + padding) // window
        qkv = qkv.view(batch, count, window, count, window, 3, heads, dim // heads).permute(5, 0, 1, 3, 6, 2, 4, 7)
        # windows stand beside heads: the batch shares one bias, which fused kernels then never copy for every image
        q, k, v = qkv.reshape(3, batch, count**2 * heads, window**2, dim // heads)
        bias = self.relative_position_bias_table[self.relative_position_index.flatten()]
        bias = bias.view(window**2, window**2, heads).permute(2, 0, 1)[None]
        bias = bias if mask is None else bias + mask[:, None]
        return q, k, v, bias.expand(count**2, -1, -1, -1).flatten(0, 1)[None].to(q.dtype)


class SwinBlock(nn.Module):
    """Pre-norm residual block: x += drop_path(attn(norm1(x))); x += drop_path(mlp(norm2(x)))."""

    def __init__(self, dim: int, num_heads: int, window: int, shift: int, mlp_ratio: float, drop_path: float):
        super().__init__()
        self.drop_path = drop_path
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = WindowAttention(dim, num_heads, window, shift)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None, attn_drop=None, mlp_drop=None) -> torch.Tensor:
        """(batch, side, side, dim) -> the same shape; the last two arguments are made by ``drops``."""
        x = self._add(x, attn_drop, lambda rows: self.attn(self.norm1(rows), mask))
        return self._add(x, mlp_drop, lambda rows: self.mlp(self.norm2(rows)))

    def drops(self, kept: Kept | None, x: torch.Tensor) -> tuple:
        """Of ``kept_samples`` what this block keeps -> what ``forward`` takes for its two branches."""
        if kept is None:
            return None, None
        samples = [(x.shape[0], 1)]

        def drop(part: np.ndarray | torch.Tensor) -> Selection | torch.Tensor:
            # attention on no samples at all would leave its bias without a gradient
            if isinstance(part, np.ndarray) and part.any():
                return select_samples(part, samples, samples, kept.scale, x.device)
            return scale_samples(torch.as_tensor(part), samples, kept.scale, x.dtype)[..., None, None]

        return tuple(map(drop, kept.samples))

    @staticmethod
    def _add(x, drop, branch):
        if drop is None:
            return x + branch(x)
        if isinstance(drop, torch.Tensor):
            return x + drop * branch(x)
        y = branch(x.index_select(0, drop.rows))
        return x.index_add(0, drop.out_rows, y.to(x.dtype), alpha=drop.scale)


class SwinStage(nn.Module):
    """Blocks of one resolution, then the merging that leads to the next; the last stage has none."""

    def __init__(self, blocks: list[SwinBlock], downsample: PatchMerging | None):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.downsample = downsample


class SwinTransformer(nn.Module):
    """See the module docstring. ``embed_dim`` is the width of what ``forward`` returns, not that of the first stage.

    ``mask_unit``: pixels per cell of a mask, the size of a token of the last stage.
    """

    num_prefix_tokens = 1  # the mean

    def __init__(
        self,
        img_size: int = 224,
        patch_size: int = PATCH_SIZE,
        embed_dim: int = 96,
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        window_size: int = 7,
        mlp_ratio: float = 4.0,
        drop_path_rate: float = 0.0,
        masked_im_modeling: bool = False,
    ):
        super().__init__()
        last = len(depths) - 1
        if window_size < 1 or img_size // patch_size < 2**last:
            raise ValueError(f"window_size {window_size}, img_size {img_size}: no window is left in the last stage")
        self.embed_dim = embed_dim * 2**last
        self.depth = sum(depths)
        self.patch_size = patch_size
        self.mask_unit = patch_size * 2**last
        self.grad_checkpointing = False
        self.skip_dropped = True  # False: multiply dropped branches by zero, so that shapes never change
        self._shift_masks: dict[tuple, torch.Tensor] = {}

        self.masked_embed = nn.Parameter(torch.zeros(1, embed_dim)) if masked_im_modeling else None
        self.patch_embed = PatchEmbed(patch_size, embed_dim)
        rates = iter(torch.linspace(0, drop_path_rate, self.depth, dtype=torch.float32).tolist())  # parity: float32
        self.layers = nn.ModuleList()
        for stage, (depth, heads) in enumerate(zip(depths, num_heads, strict=True)):
            dim, side = embed_dim * 2**stage, img_size // patch_size // 2**stage
            window, shift = (side, 0) if side <= window_size else (window_size, window_size // 2)
            blocks = [SwinBlock(dim, heads, window, shift * (i % 2), mlp_ratio, next(rates)) for i in range(depth)]
            self.layers.append(SwinStage(blocks, PatchMerging(dim) if stage < last else None))
        self.norm = nn.LayerNorm(self.embed_dim, eps=1e-6)
        self._init_weights()

    def _init_weights(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            if isinstance(module, WindowAttention):
                nn.init.trunc_normal_(module.relative_position_bias_table, std=0.02)

    @property
    def blocks(self) -> list[SwinBlock]:
        """All blocks, first to last."""
        return [block for layer in self.layers for block in layer.blocks]

    # ---- from images to tokens --------------------------------------------------------------------------------------

    def prepare_tokens(self, images: torch.Tensor, masks: torch.Tensor | None = None) -> torch.Tensor:
        """(batch, 3, side, side), masks (batch, rows, columns) bool -> (batch, side // patch, side // patch, dim).

        A cell of a mask covers ``mask_unit`` pixels; ``masked_embed`` replaces the patches in it after their norm.
        """
        height, width = images.shape[-2:]
        if height != width:
            raise ValueError(f"images of {height} x {width} pixels: a Swin transformer takes square ones only")
        if height < self.patch_size:
            raise ValueError(f"images of {height} pixels are smaller than one patch of {self.patch_size}")
        x = self.patch_embed(images)
        if masks is None:
            return x
        if self.masked_embed is None:
            raise ValueError("masks were given to a network built without masked_im_modeling")
        side, repeats = x.shape[1], self.mask_unit // self.patch_size
        cells = -(-side // repeats)
        if masks.shape != (x.shape[0], cells, cells):
            raise ValueError(f"masks of shape {tuple(masks.shape)}, expected {(x.shape[0], cells, cells)}")
        masks = masks.repeat_interleave(repeats, 1).repeat_interleave(repeats, 2)[:, :side, :side]
        return torch.where(masks[..., None], self.masked_embed.to(x.dtype), x)

    # ---- through the blocks -----------------------------------------------------------------------------------------

    def _shift_mask(self, block: SwinBlock, side: int) -> torch.Tensor | None:
        """``shift_mask`` for a map of ``side`` x ``side`` tokens, made once for every size; None without shift."""
        attn, like = block.attn, block.attn.relative_position_bias_table
        if not attn.shift:
            return None
        key = (side + -side % attn.window, attn.window, attn.shift, like.device, like.dtype)
        if key not in self._shift_masks:
            self._shift_masks[key] = to_device(shift_mask(*key[:3]), like.device, like.dtype)
        return self._shift_masks[key]

    def _run_blocks(self, x: torch.Tensor, draws: np.ndarray | None = None) -> Iterator[tuple[torch.Tensor, ...]]:
        """Input, shift mask and output of every block in turn, the maps (batch, side, side, dim)."""
        skip = self.skip_dropped and x.device.type == "cpu"  # on a GPU gathering samples costs what it saves
        kept = kept_samples(self.blocks, draws, x.device, skip)
        index = 0
        for layer in self.layers:
            for block in layer.blocks:
                shown, mask, drops = x, self._shift_mask(block, x.shape[1]), block.drops(kept[index], x)
                if self.grad_checkpointing and torch.is_grad_enabled():
                    x = checkpoint(block, x, mask, *drops, use_reentrant=False)
                else:
                    x = block(x, mask, *drops)
                yield shown, mask, x
                index += 1
            if layer.downsample is not None:
                x = layer.downsample(x)

    def _tokens(self, images, masks=None, draws=None):
        """Normalised tokens of the last stage: (batch, tokens, dim)."""
        ((_, _, x),) = deque(self._run_blocks(self.prepare_tokens(images, masks), draws), maxlen=1)
        return self.norm(x.flatten(1, 2))

    def forward(self, images: torch.Tensor, draws: np.ndarray | None = None) -> torch.Tensor:
        """(batch, 3, side, side) -> mean of the normalised tokens (batch, dim).

        ``draws``, here and below: (depth, 2, samples) uniform numbers for stochastic depth, samples in the order of the
        crops.
        """
        return self._tokens(images, draws=draws).mean(dim=1)

    def forward_crops(self, crops: Sequence[torch.Tensor], draws: np.ndarray | None = None) -> torch.Tensor:
        """Crops of any square sizes, size by size -> means in the order of the crops (sum of batches, dim)."""
        groups = group_by_size(crops)
        return torch.cat([self(group, part) for group, part in zip(groups, split_draws(draws, groups), strict=True)])

    def forward_regions(
        self, crops: Sequence[torch.Tensor], draws: np.ndarray | None = None
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """``forward_crops``, and for every size of crops their normalised tokens (samples, tokens, dim)."""
        groups = group_by_size(crops)
        pairs = zip(groups, split_draws(draws, groups), strict=True)
        tokens = [self._tokens(group, draws=part) for group, part in pairs]
        return torch.cat([part.mean(dim=1) for part in tokens]), tokens

    def forward_features(
        self, images: torch.Tensor, masks: torch.Tensor | None = None, draws: np.ndarray | None = None
    ) -> torch.Tensor:
        """[mean | tokens] after the final norm: (batch, 1 + tokens, dim)."""
        return with_mean(self._tokens(images, masks, draws))

    def forward_masked(
        self,
        global_crops: Sequence[torch.Tensor],
        local_crops: Sequence[torch.Tensor],
        masks: torch.Tensor | None,
        masked: torch.Tensor,
        draws: np.ndarray | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Means of all crops (crops * batch, dim), and the global crops' tokens at ``masked`` (len(masked), dim).

        ``masks``: (globals * batch, rows, columns) bool or None. ``masked``: positions in the flattened tokens of the
        global crops (globals * batch * tokens). Local crops are never masked, and run apart even at the same size.
        """
        groups = [torch.cat(tuple(global_crops)), *group_by_size(local_crops)]
        parts = split_draws(draws, groups)
        tokens = self._tokens(groups[0], masks, parts[0])
        means = [tokens.mean(dim=1), *(self(group, part) for group, part in zip(groups[1:], parts[1:], strict=True))]
        return torch.cat(means), tokens.flatten(0, 1).index_select(0, masked)

    # ---- looking inside ---------------------------------------------------------------------------------------------

    def get_intermediate_layers(self, images: torch.Tensor, n: int = 1) -> list[torch.Tensor]:
        """[mean | tokens] after each of the last ``n`` blocks, oldest first; widths grow from stage to stage.

        parity: only blocks of the last stage go through the final norm (iBOT models/swin_transformer.py).
        """
        outputs = [x.flatten(1, 2) for _, _, x in self._run_blocks(self.prepare_tokens(images))]
        normed = self.depth - len(self.layers[-1].blocks)
        return [with_mean(self.norm(x) if i >= normed else x) for i, x in enumerate(outputs) if i >= self.depth - n]

    def window_attention(self, images: torch.Tensor) -> torch.Tensor:
        """Attention of the last block, padded positions included: (batch * windows, heads, window^2, window^2)."""
        ((shown, mask, _),) = deque(self._run_blocks(self.prepare_tokens(images)), maxlen=1)
        block = self.blocks[-1]
        return block.attn.weights(block.norm1(shown), mask)


def with_mean(tokens: torch.Tensor) -> torch.Tensor:
    """(batch, tokens, dim) -> [mean | tokens] (batch, 1 + tokens, dim)."""
    return torch.cat((tokens.mean(dim=1, keepdim=True), tokens), dim=1)


def split_draws(draws: np.ndarray | None, groups: Sequence[torch.Tensor]) -> list[np.ndarray | None]:
    """The draws of every group of samples, (depth, 2, samples) cut along its last axis."""
    if draws is None:
        return [None] * len(groups)
    return np.split(draws, np.cumsum([len(group) for group in groups])[:-1], axis=-1)


def swin_micro(network: type = SwinTransformer, **kwargs) -> SwinTransformer:
    """Small enough to learn something on a laptop's processor; nobody published it."""
    return network(embed_dim=32, depths=(1, 1, 2, 1), num_heads=(1, 2, 4, 8), **kwargs)


def swin_tiny(network: type = SwinTransformer, **kwargs) -> SwinTransformer:
    return network(embed_dim=96, depths=(2, 2, 6, 2), num_heads=(3, 6, 12, 24), **kwargs)


def swin_small(network: type = SwinTransformer, **kwargs) -> SwinTransformer:
    return network(embed_dim=96, depths=(2, 2, 18, 2), num_heads=(3, 6, 12, 24), **kwargs)


def swin_base(network: type = SwinTransformer, **kwargs) -> SwinTransformer:
    return network(embed_dim=128, depths=(2, 2, 18, 2), num_heads=(4, 8, 16, 32), **kwargs)


def swin_large(network: type = SwinTransformer, **kwargs) -> SwinTransformer:
    return network(embed_dim=192, depths=(2, 2, 18, 2), num_heads=(6, 12, 24, 48), **kwargs)
