"""Networks that are fine-tuned with labels: a backbone of ours, what BEiT's recipe adds to it, and a linear classifier.

BEiT (2106.08254) for the recipe, iBOT (modeling_finetune.py) and UDI for the forms that are used here. Parameters keep
their names: ``head.*`` beside those of the backbone, ``fc_norm.*`` instead of ``norm.*`` where patches are pooled, and
``blocks.<i>.attn.relative_position_bias_table`` where positions are relative. A network takes images of one size only.
"""

import itertools
import math

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from models import ALIASES, SWIN, VIT, family_of
from models.blocks import Attention, attention_weights
from models.swin import SwinTransformer, relative_position_index
from models.vit import VisionTransformer
from models.weight_norm import WeightNormLinear, unit_vectors
from utils import UsageError


def bias_index(side: int) -> torch.Tensor:
    """Row of a bias table for every (query, key) of [class token | patches]: (1 + side^2, 1 + side^2) int64.

    The table has (2 side - 1)^2 rows for pairs of patches, then class to patch, patch to class, class to class.
    """
    rows = (2 * side - 1) ** 2
    index = torch.empty(1 + side**2, 1 + side**2, dtype=torch.long)
    index[1:, 1:] = relative_position_index(side)
    index[0, :], index[:, 0], index[0, 0] = rows, rows + 1, rows + 2
    return index


class FinetunedAttention(Attention):
    """Attention with a bias by relative position (``side`` patches a side; None: none) and dropout of its weights."""

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool, side: int | None, drop: float):
        super().__init__(dim, num_heads, qkv_bias)
        self.drop, self.relative = drop, side is not None
        if self.relative:
            self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * side - 1) ** 2 + 3, num_heads))
            self.register_buffer("relative_position_index", bias_index(side))

    def bias(self, q: torch.Tensor) -> torch.Tensor | None:
        if not self.relative:
            return None
        index = self.relative_position_index[: q.shape[2]]
        rows = self.relative_position_bias_table[index.flatten()].view(*index.shape, self.num_heads)
        return rows.permute(2, 0, 1)[None].to(q.dtype)

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        if not (self.drop and self.training):
            return super().attend(q, k, v)
        return F.dropout(attention_weights(q, k, self.bias(q)), self.drop) @ v


class DroppedLinear(nn.Linear):
    """A linear layer followed by dropout, under the names of a linear layer."""

    def __init__(self, layer: nn.Linear, drop: float):
        super().__init__(layer.in_features, layer.out_features)
        self.drop = drop

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.dropout(super().forward(x), self.drop, self.training)


class FinetunedTransformer(VisionTransformer):
    """A vision transformer with ``head``: images (batch, 3, img_size, img_size) -> logits (batch, classes).

    ``use_mean_pooling``: the head reads ``fc_norm`` of the mean patch, else the normalised class token. ``drop``: of
    tokens with their positions, and of what either branch of a block adds.
    """

    def __init__(
        self,
        num_classes: int,
        abs_pos_emb: bool = True,
        rel_pos_bias: bool = False,
        init_scale: float = 0.001,
        drop: float = 0.0,
        attn_drop: float = 0.0,
        **arguments,
    ):
        super().__init__(**arguments)
        self.img_size, self.drop, self.side = arguments["img_size"], drop, arguments["img_size"] // self.patch_size
        if rel_pos_bias and self.num_prefix_tokens != 1:
            raise UsageError("--rel_pos_bias: made for one class token and no registers; pass --disable_rel_pos_bias")
        if not abs_pos_emb:
            self.pos_embed = None
        for block in self.blocks:
            old = block.attn
            if rel_pos_bias or attn_drop:
                side = self.side if rel_pos_bias else None
                bias = old.qkv.bias is not None
                block.attn = FinetunedAttention(self.embed_dim, old.num_heads, bias, side, attn_drop)
            if drop:
                block.attn.proj = DroppedLinear(block.attn.proj, drop)
                setattr(block.mlp, block.mlp.last, DroppedLinear(getattr(block.mlp, block.mlp.last), drop))
        self.head = nn.Linear(self.embed_dim, num_classes)
        self._init_weights()
        scale_initial_weights(self, init_scale)

    def position_embedding(self, height: int, width: int) -> torch.Tensor:
        if (height, width) != (self.img_size, self.img_size):
            raise ValueError(f"images of {height} x {width} pixels: this network was built for {self.img_size}")
        if self.pos_embed is not None:
            return self.pos_embed
        return self.cls_token.new_zeros(1, self.num_class_tokens + self.side**2, self.embed_dim)

    def prepare_tokens(self, images: torch.Tensor, masks: torch.Tensor | None = None) -> torch.Tensor:
        return F.dropout(super().prepare_tokens(images, masks), self.drop, self.training)

    def pooled(self, images: torch.Tensor, draws: np.ndarray | None = None) -> torch.Tensor:
        """What the head reads: (batch, dim)."""
        return super().forward(images, draws)

    def forward(self, images: torch.Tensor, draws: np.ndarray | None = None) -> torch.Tensor:
        return self.head(self.pooled(images, draws))


class FinetunedSwin(SwinTransformer):
    """A Swin with ``head`` on the mean of its tokens. Its window is fixed, so any square images will do."""

    def __init__(self, num_classes: int, init_scale: float = 0.001, **arguments):
        super().__init__(**arguments)
        self.head = nn.Linear(self.embed_dim, num_classes)
        nn.init.trunc_normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)
        scale_head(self.head, init_scale)

    def no_weight_decay(self) -> set[str]:
        return set()

    def pooled(self, images: torch.Tensor, draws: np.ndarray | None = None) -> torch.Tensor:
        return super().forward(images, draws)

    def forward(self, images: torch.Tensor, draws: np.ndarray | None = None) -> torch.Tensor:
        return self.head(self.pooled(images, draws))


class CutHead(nn.Module):
    """A classifier inside a pretrained projection head: its first ``kept`` linear layers, then a new one.

    Images' features (batch, in_dim) -> logits (batch, classes). Of three kept layers the bottleneck is normalised and
    compared with the prototypes, whose similarities the new layer reads (iBOT 2111.07832, SimCLR v2 2006.10029).
    Parameters have the names of the projection head (methods/heads.py), the new layer is ``cls_head``.
    """

    def __init__(
        self,
        in_dim: int,
        num_classes: int,
        kept: int,
        hidden_dim: int = 2048,
        bottleneck_dim: int = 256,
        out_dim: int = 8192,
    ):
        super().__init__()
        widths = [in_dim, hidden_dim, hidden_dim, bottleneck_dim][: kept + 1]
        layers: list[nn.Module] = []
        for width_in, width_out in itertools.pairwise(widths):
            layers += [nn.Linear(width_in, width_out), nn.GELU()]
        whole = kept == 3
        self.mlp = nn.Sequential(*layers[: -1 if whole else None])
        self.last_layer = WeightNormLinear(bottleneck_dim, out_dim, train_norm=True) if whole else None
        self.cls_head = nn.Linear(out_dim if whole else widths[-1], num_classes)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        x = self.mlp(features)
        return self.cls_head(x if self.last_layer is None else self.last_layer(unit_vectors(x)))


def scale_head(head: nn.Linear, init_scale: float) -> None:
    with torch.no_grad():
        head.weight.mul_(init_scale)
        head.bias.mul_(init_scale)


@torch.no_grad()
def scale_initial_weights(model: FinetunedTransformer, init_scale: float) -> None:
    """The head times ``init_scale``, and what block i = 1, 2, ... adds divided by sqrt(2 i): BEiT's start."""
    scale_head(model.head, init_scale)
    for number, block in enumerate(model.blocks, start=1):
        for layer in (block.attn.proj, getattr(block.mlp, block.mlp.last)):
            layer.weight.div_(math.sqrt(2 * number))


# ---------------------------------------------------------------------------------------------------------------------
# Layers, of which every one has its own learning rate
# ---------------------------------------------------------------------------------------------------------------------


def depths_of(model: nn.Module) -> list[int]:
    """Blocks of every stage; a vision transformer is one stage."""
    return [len(stage.blocks) for stage in model.layers] if hasattr(model, "layers") else [len(model.blocks)]


def layer_of(name: str, depths: list[int]) -> int:
    """The layer a parameter belongs to: 0 embeddings, 1, 2, ... blocks, then norm and head.

    A Swin's blocks are counted through its stages, and what merges patches belongs to the block before it.
    """
    parts = name.split(".")
    if parts[0] in ("cls_token", "register_tokens", "masked_embed", "pos_embed", "patch_embed"):
        return 0
    if parts[0] == "blocks":
        return int(parts[1]) + 1
    if parts[0] == "layers":
        stage = int(parts[1])
        return sum(depths[:stage]) + (int(parts[3]) + 1 if parts[2] == "blocks" else depths[stage])
    return sum(depths) + 1


def layer_decay_groups(
    model: nn.Module, layer_decay: float, weight_decay: float, decay_bias_tables: bool = True
) -> list[dict]:
    """Groups for an optimiser, one for every layer with and without weight decay, in order of first appearance.

    ``lr_scale`` is layer_decay ** (distance from the head). Not decayed: vectors, biases, what the network names, and
    bias tables if so wished.
    """
    depths, spared = depths_of(model), model.no_weight_decay()
    groups: dict[tuple, dict] = {}
    for name, parameter in model.named_parameters():
        layer = layer_of(name, depths)
        free = parameter.ndim == 1 or name.endswith(".bias") or name in spared
        free |= not decay_bias_tables and name.endswith("relative_position_bias_table")
        scale = layer_decay ** (sum(depths) + 1 - layer)
        start = {"lr_scale": scale, "weight_decay": 0.0 if free else weight_decay, "decays": not free}
        group = groups.setdefault((layer, free), start | {"params": [], "names": []})
        group["params"].append(parameter)
        group["names"].append(name)
    return list(groups.values())


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """What is not decayed, vectors and biases, and everything else; one rate for all of them (DeiT 2012.12877).

    parity: class token and positions are decayed here.
    """
    groups = [
        {"lr_scale": 1.0, "weight_decay": d, "decays": d > 0, "params": [], "names": []} for d in (0.0, weight_decay)
    ]
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            group = groups[parameter.ndim > 1 and not name.endswith(".bias")]
            group["params"].append(parameter)
            group["names"].append(name)
    return [group for group in groups if group["params"]]


# ---------------------------------------------------------------------------------------------------------------------
# By name
# ---------------------------------------------------------------------------------------------------------------------

FORMS = {VIT: FinetunedTransformer, SWIN: FinetunedSwin}


def build_finetuned(arch: str, num_classes: int, init_scale: float, backbone: dict, transformer: dict) -> nn.Module:
    """``arch`` with a head. ``backbone``: arguments of the architecture; ``transformer``: further ones of a plain one.

    Raises UsageError for what has no form that is fine-tuned here.
    """
    family = family_of(arch)
    if family not in FORMS:
        known = ", ".join(name for form in FORMS for name in form.networks)
        raise UsageError(f"--model {arch}: fine-tuned are {known}")
    family.check_patch(arguments := backbone | (transformer if family is VIT else {}))
    constructor = family.networks[ALIASES.get(arch, arch)]
    return constructor(FORMS[family], num_classes=num_classes, init_scale=init_scale, **arguments)
