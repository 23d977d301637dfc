"""What detectors and segmenters see of a vision transformer: maps of four of its blocks, and the pyramid made of them.

One adapter serves iBOT (2111.07832), Mugs (2203.14415) and UDI (2407.17671); the settings of their published runs:

| | blocks (from 0) | final norm | class tokens | drop path | optimiser |
|---|---|---|---|---|---|
| COCO, iBOT ViT-S / ViT-B | 3 5 7 11 | no | kept | 0.1 / 0.2 | AdamW 1e-4, decay 0.05, layer decay 0.8 / 0.75 |
| COCO, Mugs ViT-S | 3 5 7 11 | no | kept | 0.1 | AdamW 2e-4, decay 0.05, layer decay 0.8 |
| COCO, UDI ViT-S | 3 5 7 11 | no | none | 0.05 | AdamW 5e-5, decay 0.05 |
| UPerNet on ADE20K, iBOT ViT-S / ViT-B | 3 5 7 11 | yes | kept | - | AdamW 3e-5 / 8e-5, 0.05, layer decay 0.9 / 0.65 |
| UPerNet on ADE20K, Mugs ViT-S | 3 5 7 11 | yes | kept | 0.1 | AdamW 3e-5, decay 0.05, layer decay 0.9 |
| Semantic FPN on ADE20K, UDI ViT-S | 2 5 8 11, straight into the FPN | no | none | 0.1 | AdamW 6e-5, decay 0.01 |

COCO networks learn positions for images of 800 x 1008 pixels (``lay_out(network, 50, 63)``); batch norm is over all
processes. Where the decoder is another library's, ``DenseBackbone`` is what it takes as its backbone.
"""

import copy
from collections.abc import Sequence

import torch
import torch.nn as nn
import torch.nn.functional as F

from models.finetuned import layer_of
from models.stochastic_depth import Draws
from models.vit import VisionTransformer

BLOCKS = (3, 5, 7, 11)  # of twelve


def pyramid(dim: int, patch_size: int) -> list[nn.Module]:
    """Four layers from one map each to strides of 4, 8, 16 and 32 pixels. Raises ValueError for other patches."""
    if patch_size == 16:
        up = [nn.ConvTranspose2d(dim, dim, kernel_size=2, stride=2) for _ in range(3)]
        first = nn.Sequential(up[0], nn.BatchNorm2d(dim), nn.GELU(), up[1])
        return [first, nn.Sequential(up[2]), nn.Identity(), nn.MaxPool2d(kernel_size=2, stride=2)]
    if patch_size == 8:
        up = nn.Sequential(nn.ConvTranspose2d(dim, dim, kernel_size=2, stride=2))
        return [up, nn.Identity(), *(nn.MaxPool2d(kernel_size=k, stride=k) for k in (2, 4))]
    raise ValueError(f"patches of {patch_size} pixels: the pyramid is made for 8 and 16")


class DenseBackbone(nn.Module):
    """Images (batch, 3, height, width) -> four maps (batch, dim, height / s, width / s), s = 4, 8, 16, 32.

    ``out_indices``: the blocks, from 0 on; ``out_with_norm``: their tokens pass the final norm. Beside the network
    stand ``fpn1`` to ``fpn4``; ``synchronise_batch_norm`` (models/batch_norm.py) makes the one norm there see all
    processes, as in the originals.
    """

    def __init__(self, network: VisionTransformer, out_indices: Sequence[int] = BLOCKS, out_with_norm: bool = False):
        super().__init__()
        if len(out_indices) != 4 or sorted(set(out_indices)) != list(out_indices):
            raise ValueError(f"out_indices {list(out_indices)}: four different blocks in ascending order")
        if not 0 <= out_indices[0] <= out_indices[-1] < network.depth:
            raise ValueError(f"out_indices {list(out_indices)}: the network has blocks 0 to {network.depth - 1}")
        self.network = network
        self.out_indices, self.out_with_norm = tuple(out_indices), out_with_norm
        self.fpn1, self.fpn2, self.fpn3, self.fpn4 = pyramid(network.embed_dim, network.patch_size)

    def forward(self, images: torch.Tensor, draws: Draws | None = None) -> list[torch.Tensor]:
        maps = self.network.patch_maps(images, self.out_indices, self.out_with_norm, draws)
        levels = (self.fpn1, self.fpn2, self.fpn3, self.fpn4)
        return [level(x) for level, x in zip(levels, maps, strict=True)]


def lay_out(network: VisionTransformer, rows: int, columns: int) -> None:
    """Give ``network`` positions for a grid of this size, from which those of every image are made.

    Bicubic to this very size, as the originals load a checkpoint for detection (50 x 63 patches, images of 800 x
    1008); what an image's own size asks for then follows DINO's rule.
    """
    classes, positions = network.num_class_tokens, network.pos_embed.detach()
    grid = network.grid
    if grid != (rows, columns):
        patches = positions[:, classes:].transpose(1, 2).unflatten(2, grid)
        patches = F.interpolate(patches, size=(rows, columns), mode="bicubic", align_corners=False)
        positions = torch.cat((positions[:, :classes], patches.flatten(2).transpose(1, 2)), dim=1)
    network.pos_embed = nn.Parameter(positions.clone())
    network.grid = (rows, columns)


def without_class_tokens(network: VisionTransformer) -> VisionTransformer:
    """The same network of patches alone, as UDI's detectors have it; its class tokens' positions go with them."""
    bare = copy.deepcopy(network)
    bare.pos_embed = nn.Parameter(bare.pos_embed.detach()[:, bare.num_class_tokens :].clone())
    bare.cls_token = None
    bare.num_class_tokens = 0
    return bare


def decayed_group(
    name: str, vector: bool, depth: int, rate: float, prefix: str = "backbone."
) -> tuple[int, float, bool]:
    """Of a parameter of a detector or segmenter: its layer, the factor of its learning rate, whether it decays.

    Layer 0 is embeddings, ``depth`` + 1 the final norm, the pyramid and every decoder; the factor is ``rate`` to the
    power of the distance from there. ``vector``: one-dimensional, or a bias.

    parity: the originals exempt ``pos_embed`` and ``cls_token`` by names without the prefix that stands before them,
    so both decay (iBOT, Mugs).
    """
    inner = name.removeprefix(prefix)
    layer = layer_of(inner, [depth]) if name.startswith(prefix) else depth + 1
    return layer, rate ** (depth + 1 - layer), not (vector or name.endswith(".bias"))
