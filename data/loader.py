import numpy as np
import torch

from data.preprocess import MEAN, STD
from randomness import Permutation, counted_seed
from utils import UsageError


def steps_per_epoch(n, b):
    if n < b:
        raise UsageError("batch")
    return n // b


class TrainLoader:
    def __init__(
        s, source, views, *, batch_size, pieces=1, world, seed, epochs, num_workers, start_epoch=0, start_step=0
    ):
        s.__dict__.update(locals())
        s.G = batch_size * world.size
        s.niter = len(source) // s.G

    def __iter__(s):
        b = s.batch_size // s.pieces
        for e in range(s.start_epoch, s.epochs):
            perm = Permutation(len(s.source), s.seed, e)
            for st in range(s.start_step if e == s.start_epoch else 0, s.niter):
                for j in range(s.pieces):
                    first = s.world.rank * s.batch_size + j * b
                    idx = perm[st * s.G + first + np.arange(b)]
                    crops = []
                    v = s.views
                    for c in range(2 + v.local_crops_number):
                        size = v.global_crops_size if c < 2 else v.local_crops_size
                        crops.append(
                            torch.stack(
                                [
                                    torch.randint(
                                        0,
                                        256,
                                        (3, size, size),
                                        generator=torch.Generator().manual_seed(counted_seed(s.seed, e, int(i), c)),
                                        dtype=torch.uint8,
                                    )
                                    for i in idx
                                ]
                            )
                        )
                    yield {"crops": crops, "indices": torch.from_numpy(idx), "first_sample": first, "bad": []}


def to_device_ahead(p, device, dtype=torch.float32):
    m, sd = [torch.tensor(x).view(3, 1, 1) for x in (MEAN, STD)]
    for d in p:
        yield {**d, "crops": [((c / 255 - m) / sd).to(dtype) for c in d["crops"]]}
