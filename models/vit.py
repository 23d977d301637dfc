"""Vision transformers with the parameter names of DINO, so that every checkpoint of that family loads.

An image is worth 16x16 words (2010.11929); DINO (2104.14294) for the names and the resampling of positions; class
tokens beyond the first are UDI's (2407.17671), mask token, LayerScale and mean pooling iBOT's (2111.07832), registers
2309.16588.

Crops of several sizes go through one forward pass, packed as rows of one matrix, and where only class tokens are read
the last block computes only those (models/blocks.py): the numbers are those of the textbook form.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from models.blocks import Block, Reads, group_by_size, pack
from models.layouts.positions import GRID
from models.stochastic_depth import Draws, Groups, kept_samples
from utils import to_device


class PatchEmbed(nn.Module):
    """Non-overlapping patches: (batch, 3, height, width) -> (batch, dim, height // patch, width // patch)."""

    def __init__(self, patch_size: int, in_chans: int, embed_dim: int):
        super().__init__()
        self.proj = nn.Conv2d(in_chans, embed_dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.proj(images)


@dataclass(frozen=True)
class Variant:
    """What few published networks do otherwise, and no option asks for."""

    mlp: str = "gelu"  # a key of MLPS: DINOv2's giant has SwiGLU
    norm_first: bool = False  # a norm of all tokens before the first block: CLIP


class VisionTransformer(nn.Module):
    """See the module docstring. ``embed_dim`` is the width of what ``forward`` returns.

    ``use_mean_pooling``: that is ``fc_norm`` of the mean patch token, and no other token is normalised. Without class
    tokens it is the mean of the normalised patch tokens. ``img_size``: of one side, or (height, width).
    """

    def __init__(
        self,
        patch_size: int = 16,
        embed_dim: int = 384,
        depth: int = 12,
        num_heads: int = 6,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        drop_path_rate: float = 0.0,
        init_values: float = 0.0,
        num_class_tokens: int = 1,
        num_registers: int = 0,
        masked_im_modeling: bool = False,
        use_mean_pooling: bool = False,
        norm_eps: float = 1e-6,
        variant: Variant = Variant(),
    ):
        super().__init__()
        height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
        if height % patch_size or width % patch_size:
            raise ValueError(f"patch_size {patch_size} does not divide the construction size {img_size}")
        self.embed_dim = embed_dim
        self.depth = depth
        self.patch_size = self.mask_unit = patch_size  # a mask hides whole patches
        self.num_class_tokens = num_class_tokens
        self.num_registers = num_registers
        self.grad_checkpointing = False
        self.skip_dropped = True  # False: multiply dropped branches by zero, so that shapes never change
        self._resampling: dict[tuple, torch.Tensor] = {}

        self.cls_token = nn.Parameter(torch.zeros(1, num_class_tokens, embed_dim)) if num_class_tokens else None
        self.grid = height // patch_size, width // patch_size  # of the positions
        if height != width:  # which the number of positions does not show, so a file has to
            self.register_buffer(GRID, torch.tensor(self.grid))
        self.pos_embed = nn.Parameter(torch.zeros(1, num_class_tokens + self.grid[0] * self.grid[1], embed_dim))
        self.register_tokens = nn.Parameter(torch.zeros(1, num_registers, embed_dim)) if num_registers else None
        self.masked_embed = nn.Parameter(torch.zeros(1, embed_dim)) if masked_im_modeling else None
        self.patch_embed = PatchEmbed(patch_size, in_chans, embed_dim)
        self.norm_pre = nn.LayerNorm(embed_dim, eps=norm_eps) if variant.norm_first else None
        rates = torch.linspace(0, drop_path_rate, depth, dtype=torch.float32).tolist()  # parity: float32
        self.blocks = nn.ModuleList(
            Block(embed_dim, num_heads, mlp_ratio, qkv_bias, rate, init_values, norm_eps, variant.mlp) for rate in rates
        )
        self.norm = nn.Identity() if use_mean_pooling else nn.LayerNorm(embed_dim, eps=norm_eps)
        self.fc_norm = nn.LayerNorm(embed_dim, eps=norm_eps) if use_mean_pooling else None
        self._init_weights()

    def _init_weights(self) -> None:
        if self.pos_embed is not None:
            nn.init.trunc_normal_(self.pos_embed, std=0.02)
        if self.cls_token is not None:
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
    def pools_patches(self) -> bool:
        """Whether what ``forward`` returns is made of patch tokens."""
        return self.fc_norm is not None or self.cls_token is None

    @property
    def num_prefix_tokens(self) -> int:
        return self.num_class_tokens + self.num_registers

    # ---- from images to tokens --------------------------------------------------------------------------------------

    def position_embedding(self, height: int, width: int) -> torch.Tensor:
        """Positions for an image of ``height`` x ``width`` pixels: (1, class tokens + patches, dim)."""
        return self.resample_positions(self.pos_embed, height, width, self.grid)

    def resample_positions(
        self, positions: torch.Tensor, height: int, width: int, grid: tuple[int, int] | None = None
    ) -> torch.Tensor:
        """``positions`` (1, class tokens + patches, dim) as this network has them for another image.

        ``grid``: rows and columns of the patches; None: as many of both.

        parity: bicubic by *scale factor* with 0.1 added to the patch counts; an explicit target size samples other
        points and breaks published weights (DINO vision_transformer.py). Networks with registers are DINOv2's, and
        those have an explicit size and antialiasing.
        """
        classes = self.num_class_tokens
        side = round((positions.shape[1] - classes) ** 0.5)
        rows, columns = grid or (side, side)
        size = height // self.patch_size, width // self.patch_size
        if size == (rows, columns) and (height == width or rows != columns):
            return positions
        matrix = self._resampling_matrix((rows, columns), size)
        with torch.autocast(positions.device.type, enabled=False):
            patches = matrix @ positions[0, classes:]
        return torch.cat((positions[:, :classes], patches[None]), dim=1)

    @torch.no_grad()
    def adopt_positions(self, positions: torch.Tensor) -> torch.Tensor:
        """What another network of this kind learnt at its size of image, resampled for the size of this one."""
        height, width = (self.patch_size * count for count in self.grid)
        return self.resample_positions(positions.to(self.pos_embed), height, width)

    def _resampling_matrix(self, grid: tuple[int, int], size: tuple[int, int]) -> torch.Tensor:
        """``resampling_matrix`` on the device, made once for every size."""
        key = (grid, size, self.pos_embed.dtype, self.pos_embed.device)
        if key not in self._resampling:
            matrix = resampling_matrix(grid, size, exact=self.num_registers > 0)
            self._resampling[key] = to_device(matrix, self.pos_embed.device, self.pos_embed.dtype)
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
        prefix = []
        if self.cls_token is not None:
            prefix.append((self.cls_token + positions[:, : self.num_class_tokens]).expand(batch, -1, -1))
        if self.register_tokens is not None:
            prefix.append(self.register_tokens.expand(batch, -1, -1))
        tokens = torch.cat((*prefix, patches + positions[:, self.num_class_tokens :]), dim=1)
        return tokens if self.norm_pre is None else self.norm_pre(tokens)

    # ---- through the blocks -----------------------------------------------------------------------------------------

    def _each_block(self, x, groups, draws=None, reads=None):
        """Packed rows after every block in turn; with ``reads`` the last block returns only those rows."""
        skip = self.skip_dropped and x.device.type == "cpu"  # on a GPU gathering rows costs what it saves
        kept = kept_samples(self.blocks, draws, x.device, skip)
        for index, block in enumerate(self.blocks):
            last = reads if block is self.blocks[-1] else None
            drops = block.drops(kept[index], x, groups, last)
            if self.grad_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, groups, last, *drops, use_reentrant=False)
            else:
                x = block(x, groups, last, *drops)
            yield x

    def _run_blocks(self, x, groups, draws=None, reads=None):
        """What the last of ``_each_block`` returns."""
        (x,) = deque(self._each_block(x, groups, draws, reads), maxlen=1)
        return x

    def forward(self, images: torch.Tensor, draws: np.ndarray | None = None) -> torch.Tensor:
        """(batch, 3, height, width) -> normalised class token (batch, dim); (batch, class tokens, dim) with several."""
        return self.forward_crops([images], draws)

    def forward_crops(self, crops: Sequence[torch.Tensor], draws: np.ndarray | None = None) -> torch.Tensor:
        """Crops of any sizes in one pass -> class tokens in the order of the crops (sum of batches, dim).

        ``draws``: (depth, 2, samples) uniform numbers for stochastic depth (attention and MLP of every block).
        """
        if self.pools_patches:
            return self._pooled_crops(crops, draws)
        x, groups = pack([self.prepare_tokens(group) for group in group_by_size(crops)])
        reads = Reads([self.num_class_tokens] * len(groups))
        x = self.norm(self._run_blocks(x, groups, draws, reads))
        return x if self.num_class_tokens == 1 else x.view(-1, self.num_class_tokens, self.embed_dim)

    def forward_rows(
        self, crops: Sequence[torch.Tensor], draws: np.ndarray | None = None
    ) -> tuple[torch.Tensor, Groups]:
        """All tokens of crops of any sizes as the last block leaves them, without the final norm, in one pass.

        Returns    packed rows (rows, dim), and (samples, tokens) of every size of crops; ``draws`` as ``forward_crops``
        """
        x, groups = pack([self.prepare_tokens(group) for group in group_by_size(crops)])
        return self._run_blocks(x, groups, draws), groups

    def forward_masked(
        self,
        global_crops: Sequence[torch.Tensor],
        local_crops: Sequence[torch.Tensor],
        masks: torch.Tensor | None,
        masked: torch.Tensor,
        draws: np.ndarray | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What masked distillation reads of a student's crops, after the final norm, in one pass.

        Shapes     crops (batch, 3, height, width), the global ones of one size; masks (global crops * batch, rows,
                   columns) bool or None for images as they are; masked (positions,) int64, flat positions in (global
                   crops * batch, patches); draws as ``forward_crops``, global crops first
        Returns    class tokens, of the global crops first (crops * batch, dim); patches (positions, dim) at ``masked``
        """
        tokens = [self.prepare_tokens(torch.cat(tuple(global_crops)), masks)]
        x, groups = pack(tokens + [self.prepare_tokens(group) for group in group_by_size(local_crops)])
        count, prefix = tokens[0].shape[1], self.num_prefix_tokens
        queries = [count] + [1] * (len(groups) - 1)
        images, per_image = groups[0][0], count - prefix
        classes = torch.arange(images, device=x.device) * count
        others = images * count + torch.arange(sum(samples for samples, _ in groups[1:]), device=x.device)
        patches = masked.div(per_image, rounding_mode="floor") * count + prefix + masked % per_image
        x = self.norm(self._run_blocks(x, groups, draws, Reads(queries, torch.cat((classes, others, patches)))))
        return x.split([x.shape[0] - len(masked), len(masked)])

    def forward_with_patches(
        self,
        global_crops: Sequence[torch.Tensor],
        local_crops: Sequence[torch.Tensor] = (),
        draws: np.ndarray | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Class tokens of all crops after the final norm (crops * batch, class tokens, dim), global crops first, and
        patches of the global crops as the last block leaves them (global crops * batch, patches, dim), in one pass.
        """
        tokens = [self.prepare_tokens(torch.cat(tuple(global_crops)))]
        x, groups = pack(tokens + [self.prepare_tokens(group) for group in group_by_size(local_crops)])
        images, count = groups[0]
        queries = [count] + [self.num_class_tokens] * (len(groups) - 1)
        x = self._run_blocks(x, groups, draws, Reads(queries))
        all_tokens = x[: images * count].view(images, count, self.embed_dim)
        classes = all_tokens[:, : self.num_class_tokens].flatten(0, 1)
        classes = self.norm(torch.cat((classes, x[images * count :])))
        return classes.view(-1, self.num_class_tokens, self.embed_dim), all_tokens[:, self.num_prefix_tokens :]

    def forward_regions(
        self, crops: Sequence[torch.Tensor], draws: np.ndarray | None = None
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Class tokens of all crops (sum of batches, dim), and for every size of crops their patches (samples, patches,
        dim), both after the final norm, in one pass. ``draws`` as ``forward_crops``.
        """
        x, groups = pack([self.prepare_tokens(group) for group in group_by_size(crops)])
        rows = self.norm(self._run_blocks(x, groups, draws)).split([samples * tokens for samples, tokens in groups])
        parts = [part.view(*group, self.embed_dim) for part, group in zip(rows, groups, strict=True)]
        return torch.cat([part[:, 0] for part in parts]), [part[:, self.num_prefix_tokens :] for part in parts]

    def forward_blocks(self, images: torch.Tensor, draws: Draws | None = None) -> list[torch.Tensor]:
        """All tokens as every block leaves them, without the final norm: (batch, tokens, dim) for each block.

        ``draws`` as ``forward_crops``, every sample for itself; or ``BatchDraws``, as DINOv2 drops.
        """
        tokens = self.prepare_tokens(images)
        rows = self._each_block(tokens.flatten(0, 1), [tokens.shape[:2]], draws)
        return [x.view_as(tokens) for x in rows]

    def forward_features(
        self, images: torch.Tensor, masks: torch.Tensor | None = None, draws: np.ndarray | None = None
    ) -> torch.Tensor:
        """All tokens after the final norm: (batch, tokens, dim). With mean pooling the first is what is pooled."""
        tokens = self.prepare_tokens(images, masks)
        x = self._run_blocks(tokens.flatten(0, 1), [tokens.shape[:2]], draws)
        x = self.norm(x).view_as(tokens)
        if not self.pools_patches:
            return x
        pooled = x[:, self.num_prefix_tokens :].mean(dim=1, keepdim=True)
        pooled = pooled if self.fc_norm is None else self.fc_norm(pooled)
        return torch.cat((pooled, x[:, min(1, self.num_class_tokens) :]), dim=1)

    def _pooled_crops(self, crops, draws=None):
        """``forward_crops`` of a network that pools its patches: a mean reads all tokens, one size at a time."""
        groups = group_by_size(crops)
        ends = np.cumsum([len(group) for group in groups])
        parts = [None] * len(groups) if draws is None else np.split(draws, ends[:-1], axis=-1)
        pairs = zip(groups, parts, strict=True)
        return torch.cat([self.forward_features(group, draws=part)[:, 0] for group, part in pairs])

    def forward_features_with_attention(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """``forward_features``, and the last block's attention of the first class token (batch, heads, tokens)."""
        tokens = self.prepare_tokens(images)
        groups, x = [tokens.shape[:2]], tokens.flatten(0, 1)
        for block in self.blocks[:-1]:
            x = block(x, groups)
        x, attention = self.blocks[-1].forward_with_attention(x, groups, queries=1)
        return self.norm(x).view_as(tokens), attention[:, :, 0]

    # ---- looking inside ---------------------------------------------------------------------------------------------

    def get_intermediate_layers(self, images: torch.Tensor, n: int = 1, norm: bool = True) -> list[torch.Tensor]:
        """Tokens after each of the last ``n`` blocks, oldest first, each through the final norm or (``norm``) not."""
        tokens = self.prepare_tokens(images)
        outputs = deque(self._each_block(tokens.flatten(0, 1), [tokens.shape[:2]]), maxlen=n)
        return [(self.norm(x) if norm else x).view_as(tokens) for x in outputs]

    def patch_maps(
        self, images: torch.Tensor, blocks: Sequence[int], norm: bool = True, draws: Draws | None = None
    ) -> list[torch.Tensor]:
        """Patches after each of ``blocks`` (from 0 on, ascending) as maps (batch, dim, rows, columns).

        Each through the final norm or (``norm``) not; nothing is computed of later blocks. ``draws`` as
        ``forward_blocks``.
        """
        tokens = self.prepare_tokens(images)
        rows, columns = (side // self.patch_size for side in images.shape[-2:])
        each = self._each_block(tokens.flatten(0, 1), [tokens.shape[:2]], draws)
        outputs = [x for index, x in zip(range(max(blocks) + 1), each, strict=False) if index in set(blocks)]
        maps = [(self.norm(x) if norm else x).view_as(tokens)[:, self.num_prefix_tokens :] for x in outputs]
        return [x.transpose(1, 2).unflatten(2, (rows, columns)) for x in maps]

    def get_last_selfattention(self, images: torch.Tensor, queries: int | None = None) -> torch.Tensor:
        """Attention of the last block: (batch, heads, tokens or ``queries``, tokens)."""
        tokens = self.prepare_tokens(images)
        groups, x = [tokens.shape[:2]], tokens.flatten(0, 1)
        for block in self.blocks[:-1]:
            x = block(x, groups)
        return self.attention_from(x.view_as(tokens), queries)

    def attention_from(self, tokens: torch.Tensor, queries: int | None = None) -> torch.Tensor:
        """Attention of the last block, given what enters it (batch, tokens, dim): as ``get_last_selfattention``."""
        last = self.blocks[-1]
        return last.attn.weights(last.norm1(tokens.flatten(0, 1)), [tokens.shape[:2]], queries)


def resampling_matrix(grid: int | tuple[int, int], size: tuple[int, int], exact: bool) -> torch.Tensor:
    """The bicubic resize of a grid as the linear map it is: (new patches, old patches), float64.

    ``exact``: to this size with antialiasing, else by the factor of ``size`` with 0.1 added. A product has a
    deterministic gradient on every device; the gradient of ``interpolate`` has not.
    """
    grid = (grid, grid) if isinstance(grid, int) else grid
    patches = grid[0] * grid[1]
    units = torch.eye(patches, dtype=torch.float64).view(1, patches, *grid)
    if exact:
        resized = F.interpolate(units, size=size, mode="bicubic", antialias=True)
    else:
        factor = tuple((count + 0.1) / old for count, old in zip(size, grid, strict=True))
        resized = F.interpolate(units, scale_factor=factor, mode="bicubic", recompute_scale_factor=False)
    if resized.shape[-2:] != size:
        raise ValueError(f"positions for {size} patches became {tuple(resized.shape[-2:])}")
    return resized.flatten(2)[0].t().contiguous()


SIZES = ("micro", "tiny", "small", "base", "large", "huge", "giant2")


def vit_micro(network: type = VisionTransformer, **kwargs) -> VisionTransformer:
    """Small enough to learn something on a laptop's processor; nobody published it."""
    return network(**{"embed_dim": 128, "depth": 4, "num_heads": 4} | kwargs)


def vit_tiny(network: type = VisionTransformer, **kwargs) -> VisionTransformer:
    return network(**{"embed_dim": 192, "depth": 12, "num_heads": 3} | kwargs)


def vit_small(network: type = VisionTransformer, **kwargs) -> VisionTransformer:
    return network(**{"embed_dim": 384, "depth": 12, "num_heads": 6} | kwargs)


def vit_base(network: type = VisionTransformer, **kwargs) -> VisionTransformer:
    return network(**{"embed_dim": 768, "depth": 12, "num_heads": 12} | kwargs)


def vit_large(network: type = VisionTransformer, **kwargs) -> VisionTransformer:
    return network(**{"embed_dim": 1024, "depth": 24, "num_heads": 16} | kwargs)


def vit_huge(network: type = VisionTransformer, **kwargs) -> VisionTransformer:
    """MAE's and CLIP's."""
    return network(**{"embed_dim": 1280, "depth": 32, "num_heads": 16} | kwargs)


def vit_giant2(network: type = VisionTransformer, **kwargs) -> VisionTransformer:
    """DINOv2's, the only one with SwiGLU."""
    return network(**{"embed_dim": 1536, "depth": 40, "num_heads": 24, "variant": Variant(mlp="swiglu")} | kwargs)
