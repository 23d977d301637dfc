"""Semantic FPN (1901.02446) on four maps of a vision transformer, as UDI (2407.17671) measures segmentation."""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from randomness import counted_uniforms
from utils import to_device

_DROPOUT = 0xF9D0


class SemanticFPN(nn.Module):
    """Four maps (batch, dim, rows, columns), coarsest last -> logits at the size of the first.

    Lateral layers of ``width`` channels are summed from the last map on; each then passes as many convolutions, each
    followed by a doubling, as its level of a pyramid of strides 4 to 32 asks for, and all are summed at the first's
    size. parity: UDI's maps all have one size, and its levels pass these doublings nevertheless. ``dropout``: of
    channels.
    """

    def __init__(self, dim: int, classes: int, width: int = 256, channels: int = 128, dropout: float = 0.1):
        super().__init__()
        self.lateral_convs = nn.ModuleList(nn.Conv2d(dim, width, 1) for _ in range(4))
        self.fpn_convs = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(4))
        self.scale_heads = nn.ModuleList()
        for level in range(4):
            steps: list[nn.Module] = []
            for step in range(max(1, level)):
                steps += [_convolution(channels if step else width, channels)]
                steps += [nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False)] * (level > 0)
            self.scale_heads.append(nn.Sequential(*steps))
        self.conv_seg = nn.Conv2d(channels, classes, 1)
        self.dropout = dropout
        for convolution in (*self.lateral_convs, *self.fpn_convs):
            nn.init.xavier_uniform_(convolution.weight)
            nn.init.zeros_(convolution.bias)
        nn.init.normal_(self.conv_seg.weight, std=0.01)
        nn.init.zeros_(self.conv_seg.bias)

    def forward(self, maps: Sequence[torch.Tensor], kept: torch.Tensor | None = None) -> torch.Tensor:
        """``kept``: (batch, channels) bool, which channels are not dropped; None: all."""
        laterals = [layer(x) for layer, x in zip(self.lateral_convs, maps, strict=True)]
        for level in (3, 2, 1):
            above = F.interpolate(laterals[level], size=laterals[level - 1].shape[-2:], mode="nearest")
            laterals[level - 1] = laterals[level - 1] + above
        levels = [layer(x) for layer, x in zip(self.fpn_convs, laterals, strict=True)]
        levels = [head(x) for head, x in zip(self.scale_heads, levels, strict=True)]
        size = levels[0].shape[-2:]
        total = sum(F.interpolate(x, size=size, mode="bilinear", align_corners=False) for x in levels)
        if kept is not None:
            total = total * kept[..., None, None] / (1 - self.dropout)
        return self.conv_seg(total)

    def drawn(self, seed: int, iteration: int, first_sample: int, batch: int) -> torch.Tensor:
        """``kept`` for samples of a batch, whatever processes it is divided among."""
        samples, channels = np.arange(batch)[:, None] + first_sample, np.arange(self.conv_seg.in_channels)
        uniforms = counted_uniforms(seed, iteration, samples, channels, _DROPOUT)
        return to_device(torch.from_numpy(uniforms >= self.dropout), self.conv_seg.weight.device)


def _convolution(old: int, new: int) -> nn.Sequential:
    layer = nn.Conv2d(old, new, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
    return nn.Sequential(layer, nn.BatchNorm2d(new), nn.ReLU())
