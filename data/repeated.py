"""Repeated augmentation: every image three times in a row in an epoch's order (1901.09335; DeiT 2012.12877)."""

import numpy as np
import torch

REPEATS, ROUNDED_TO = 3, 256


def images_used(images: int) -> int:
    """Of an epoch's order, over all processes.

    parity: as many as there are images, in multiples of 256, so that an epoch sees a third of them. Of fewer than 256,
    where the original would see none, all.
    """
    return images // ROUNDED_TO * ROUNDED_TO or images


class RepeatedOrder:
    """An epoch's order for data/loader.py: position -> image, the same for any number of processes.

    Position ``i`` of the batch of all processes is what the original's process ``i % world`` has at ``i // world``: the
    copies of an image go to different processes.

    parity: the permutation is torch's, from a generator whose seed is the epoch, whatever the run's own.
    """

    def __init__(self, images: int, epoch: int):
        order = torch.randperm(images, generator=torch.Generator().manual_seed(epoch))
        self._order = order.repeat_interleave(REPEATS).numpy()

    def __getitem__(self, positions: np.ndarray) -> np.ndarray:
        return self._order[positions]
