"""torchvision's ResNets, whose last map is at hand as tokens: EsViT's (2106.09785) networks to compare with.

Names, weights and what ``forward`` returns are torchvision's. There is no norm behind the last block.
"""

import functools
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn as nn
import torchvision
from torch.utils.checkpoint import checkpoint

from models.batch_norm import recomputing
from models.blocks import group_by_size


class ResNet(torchvision.models.ResNet):
    """A ResNet without classifier: images (batch, 3, height, width) -> mean of its last map (batch, ``embed_dim``)."""

    grad_checkpointing = False

    def _map(self, images):
        """What the last block returns: (batch, dim, rows, columns)."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(images))))
        for layer in (self.layer1, self.layer2, self.layer3, self.layer4):
            if self.grad_checkpointing and torch.is_grad_enabled():
                x = checkpoint(layer, x, use_reentrant=False, context_fn=functools.partial(recomputing, layer))
            else:
                x = layer(x)
        return x

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.avgpool(self._map(images)).flatten(1)

    def forward_regions(
        self, crops: Sequence[torch.Tensor], draws: np.ndarray | None = None
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """``forward`` of all crops (crops * batch, dim), and the last map of every size of crops, each (crops of that
        size * batch, tokens, dim), row by row. ``draws``: there is nothing to draw.
        """
        maps = [self._map(group) for group in group_by_size(crops)]
        return torch.cat([self.avgpool(x).flatten(1) for x in maps]), [x.flatten(2).transpose(1, 2) for x in maps]


def build(arch: str, drop_path_rate: float = 0.0) -> ResNet:
    """torchvision's ``arch``, with random weights; its classifier becomes the identity, as DINO has it.

    There is no stochastic depth in it, whatever its rate.
    """
    model = torchvision.models.get_model(arch, weights=None)
    model.__class__ = ResNet  # the same modules under the same names: only what runs them differs
    model.embed_dim = model.fc.in_features
    model.fc = nn.Identity()
    return model
