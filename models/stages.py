"""What networks of several stages have in common that keep a map of tokens: CvT and Vision Longformer.

Between stages the map becomes smaller and the tokens wider. A stage may have global tokens in front of those of its
map; they end with it. What stands for an image is the first global token of the last stage, or the mean of its tokens.
"""

from collections import deque
from collections.abc import Iterator, Sequence

import numpy as np
import torch
import torch.nn as nn

from models.blocks import group_by_size
from models.swin import split_draws, with_mean


def summarised(tokens: torch.Tensor, global_tokens: int) -> torch.Tensor:
    """(batch, global tokens + tokens, dim) -> [first global token, else mean | tokens]."""
    if not global_tokens:
        return with_mean(tokens)
    return tokens if global_tokens == 1 else torch.cat((tokens[:, :1], tokens[:, global_tokens:]), dim=1)


class StagedTransformer(nn.Module):
    """A subclass has ``norm``, ``depth``, ``last_depth`` (blocks of the last stage), and ``each_block``.

    ``embed_dim`` is the width of what ``forward`` returns. ``draws``: (depth, 2, samples) uniform numbers for
    stochastic depth, samples in the order of the crops. ``neighbours``: what Vision Longformer draws besides, one row
    for every size of crops; None for others.
    """

    num_prefix_tokens = 1  # what stands for the image

    def __init__(self):
        super().__init__()
        self.grad_checkpointing = False
        self.skip_dropped = True  # False: multiply dropped branches by zero, so that shapes never change

    def each_block(
        self, images: torch.Tensor, draws: np.ndarray | None = None, neighbours: np.ndarray | None = None
    ) -> Iterator[tuple[torch.Tensor, int]]:
        """(batch, [global tokens | tokens], dim) after every block in turn, and how many global tokens there are."""
        raise NotImplementedError

    def _tokens(self, images, draws=None, neighbours=None):
        """What the last block returns, normalised, and how many global tokens there are."""
        ((x, global_tokens),) = deque(self.each_block(images, draws, neighbours), maxlen=1)
        return self.norm(x), global_tokens

    def forward(
        self, images: torch.Tensor, draws: np.ndarray | None = None, neighbours: np.ndarray | None = None
    ) -> torch.Tensor:
        """(batch, 3, height, width) -> first global token, else mean of the normalised tokens (batch, dim)."""
        x, global_tokens = self._tokens(images, draws, neighbours)
        return x[:, 0] if global_tokens else x.mean(dim=1)

    def forward_crops(
        self, crops: Sequence[torch.Tensor], draws: np.ndarray | None = None, neighbours: np.ndarray | None = None
    ) -> torch.Tensor:
        """Crops of any sizes, size by size -> ``forward`` of all in the order of the crops (sum of batches, dim)."""
        return torch.cat([self(*group) for group in self._groups(crops, draws, neighbours)])

    def _regions(self, crops, draws, neighbours=None):
        """``forward_crops``, and the normalised tokens of every size (crops of it * batch, tokens, dim)."""
        groups = [self._tokens(*group) for group in self._groups(crops, draws, neighbours)]
        pooled = [x[:, 0] if global_tokens else x.mean(dim=1) for x, global_tokens in groups]
        return torch.cat(pooled), [x[:, global_tokens:] for x, global_tokens in groups]

    @staticmethod
    def _groups(crops, draws, neighbours):
        groups = group_by_size(crops)
        rows = [None] * len(groups) if neighbours is None else neighbours
        return zip(groups, split_draws(draws, groups), rows, strict=True)

    def forward_features(self, images: torch.Tensor, draws: np.ndarray | None = None) -> torch.Tensor:
        """[what stands for the image | tokens] after the final norm: (batch, 1 + tokens, dim)."""
        return summarised(*self._tokens(images, draws))

    def get_intermediate_layers(self, images: torch.Tensor, n: int = 1) -> list[torch.Tensor]:
        """[what stands for the image | tokens] after each of the last ``n`` blocks, oldest first.

        parity: only blocks of the last stage go through the final norm (EsViT models/vision_longformer.py).
        """
        first_normed, layers = self.depth - self.last_depth, []
        for index, (x, global_tokens) in enumerate(self.each_block(images)):
            if index >= self.depth - n:
                layers.append(summarised(self.norm(x) if index >= first_normed else x, global_tokens))
        return layers
