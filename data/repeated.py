"""Repeated augmentation: every image three times in a row in an epoch's order (1901.09335; DeiT 2012.12877)."""

import numpy as np
import torch

REPEATS, ROUNDED_TO = 3, 256


def repeated_order(images: int, epoch: int, world: int = 1, repeats: int = REPEATS) -> np.ndarray:
    """A permutation of the images with each of them ``repeats`` times, filled from its beginning to a multiple of
    ``world``: (padded,).

    parity: the permutation is torch's, from a generator whose seed is the epoch, whatever the run's own.
    """
    order = torch.randperm(images, generator=torch.Generator().manual_seed(epoch)).repeat_interleave(repeats).numpy()
    return np.concatenate((order, order[: -len(order) % world]))


def images_used(images: int) -> int:
    """Of an epoch's order, over all processes.

    parity: as many as there are images, in multiples of 256, so that an epoch sees a third of them. Of fewer than 256,
    where the original would see none, all.
    """
    return images // ROUNDED_TO * ROUNDED_TO or images


def repeated_indices(images: int, epoch: int, world: int, rank: int, repeats: int = REPEATS) -> np.ndarray:
    """What process ``rank`` of ``world`` sees in an epoch: the copies of an image go to different processes."""
    return repeated_order(images, epoch, world, repeats)[rank::world][: images_used(images) // world]


class RepeatedOrder:
    """An epoch's order for data/loader.py: position -> image, the same for any number of processes.

    Position ``i`` of the batch of all processes is what the original's process ``i % world`` has at ``i // world``.
    """

    def __init__(self, images: int, epoch: int):
        self._order = repeated_order(images, epoch)

    def __getitem__(self, positions: np.ndarray) -> np.ndarray:
        return self._order[positions]
