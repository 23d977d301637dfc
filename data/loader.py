"""From a source of images to pieces of batches, the same ones however they are made.

Which images form a batch is a function of (seed, epoch, step), and what is cut from each of them a function of (seed,
epoch, image). So workers hold no state, and their number, the number of processes, and where a run was interrupted
change nothing. One DataLoader serves all epochs: nothing stalls where an epoch ends.

An image that cannot be read is replaced by another one, chosen by (seed, epoch, image, attempt), and reported. The
replacement's crops keep the key of the image it stands for, so they differ from those of its own turn in the epoch.
"""

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import cv2
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from data import waiting
from data.datasets import BadImage, Source
from data.repeated import REPEATS, RepeatedOrder, images_used
from randomness import Permutation, counted_uniforms
from utils import EXIT_REQUEUE, RunStopped, UsageError, World, log, usable_cpus

MAX_ATTEMPTS = 100
_REPLACEMENT = 0x5EED  # keeps these draws apart from those of the crops


class PieceKey(NamedTuple):
    """What a worker needs to know: images ``indices`` of the source, from position ``first_sample`` of the batch on."""

    epoch: int
    first_sample: int
    indices: np.ndarray
    copies: np.ndarray | None = None  # which copy of each image, where an epoch has several


def steps_per_epoch(images: int, global_batch: int) -> int:
    """Whole batches in a data set. Raises UsageError when there is none."""
    if images < global_batch:
        raise UsageError(
            f"--batch_size_per_gpu: a batch of {global_batch} images over all processes is larger than the data set "
            f"of {images}; lower it, or pass more images"
        )
    return images // global_batch


class TrainLoader:
    """Iterates over the pieces of all steps of all epochs, from (start_epoch, start_step) on.

    ``batch_size``: images per process and step, divided into ``pieces`` equal parts (gradient accumulation). Yields
    dicts: what ``views`` return, stacked over the piece; "indices" (piece,) int64, the images used; "first_sample", the
    position of the piece's first image in the batch of all processes; "bad", a list of (name, reason) of unreadable
    images; "replaced", how many of its own they are, which counts every image once in an epoch. The last len(source) %
    (batch_size * processes) images of an epoch's order are left out; with ``drop_last`` False they are a smaller batch,
    of which the first processes take as many as ever, the last perhaps none ("indices" is empty, and nothing of
    ``views`` is there).

    ``repeated``: an epoch's order is that of data/repeated.py, and the copies of an image are cut differently.

    Raises UsageError when the data set is smaller than a batch, and from the iteration when no image can be read or a
    worker dies; RunStopped when ``stop_requested`` says so and workers hang, so that no step will come to an end.
    """

    def __init__(
        self,
        source: Source,
        views: Callable,
        *,
        batch_size: int,
        pieces: int = 1,
        world: World,
        seed: int,
        epochs: int,
        num_workers: int,
        start_epoch: int = 0,
        start_step: int = 0,
        drop_last: bool = True,
        stop_requested: Callable[[], bool] = lambda: False,
        repeated: bool = False,
    ):
        if min(batch_size, pieces) < 1 or num_workers < 0:
            raise UsageError(
                f"--batch_size_per_gpu {batch_size}, {pieces} pieces, --num_workers {num_workers}: the first two have "
                "to be at least 1, the last at least 0"
            )
        self.batch_size, self.pieces, self.world = batch_size, pieces, world
        self.seed, self.epochs, self.start_epoch, self.start_step = seed, epochs, start_epoch, start_step
        self.global_batch = batch_size * world.size
        self.repeated = repeated
        self.images = images_used(len(source)) if repeated else len(source)
        if drop_last:
            self.niter = steps_per_epoch(self.images, self.global_batch)
        else:
            self.niter = -(-self.images // self.global_batch)
        if batch_size % pieces:
            raise UsageError(f"a batch of {batch_size} images cannot be divided into {pieces} equal pieces")
        self.dataset = _Pieces(source, views, seed)
        self.stop_requested = stop_requested
        self.num_workers = min(num_workers, usable_cpus())
        if self.num_workers < num_workers:
            log.info("%d data workers instead of %d: as many as there are processors", self.num_workers, num_workers)

    def __len__(self) -> int:
        """Pieces from the start to the end of the last epoch."""
        return max(0, (self.epochs - self.start_epoch) * self.niter - self.start_step) * self.pieces

    def __iter__(self) -> Iterator[dict]:
        loader = DataLoader(
            self.dataset,
            batch_size=None,  # a worker makes a whole piece
            sampler=_PieceSampler(self),
            num_workers=self.num_workers,
            collate_fn=_as_it_is,
            timeout=waiting.POLL if self.num_workers else 0,
            pin_memory=self.world.device.type == "cuda",
            worker_init_fn=_init_worker,
            generator=torch.Generator(),  # leaves the global generator alone
        )
        before = multiprocessing.active_children()
        pieces = iter(loader)
        workers = [process for process in multiprocessing.active_children() if process not in before]
        if threading.current_thread() is threading.main_thread():
            # torch would raise wherever the main process happens to be when a worker dies, in the middle of a step;
            # the loader notices it as well, when it waits for the next piece
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        died = ""
        watched = self.dataset.reading, "the loading of images", self.stop_requested
        end = None if self.num_workers else waiting.watch(*watched)
        try:
            while (piece := self._next(pieces)) is not None:
                yield _checked(piece)
        except RuntimeError as error:
            if not str(error).startswith("DataLoader worker (pid"):
                raise
            died = ", ".join(_ending(worker.exitcode) for worker in workers if worker.exitcode) or "without a signal"
        finally:
            if end is not None:
                end()
        if died:
            del pieces  # ends the remaining workers, which the error's traceback would keep
            raise UsageError(
                f"a data worker died ({died}); when memory ran out, lower --num_workers {self.num_workers} or the "
                "batch; after SIGBUS enlarge /dev/shm (docker --shm-size)"
            )

    def _next(self, pieces: Iterator[dict]) -> dict | None:
        """The next piece, None after the last. Raises RunStopped where a stop is asked for and none arrives."""
        asked = None
        while True:
            try:
                return next(pieces, None)
            except RuntimeError as error:
                if not str(error).startswith("DataLoader timed out"):
                    raise
            asked = None if not self.stop_requested() else asked or time.monotonic()
            if asked and time.monotonic() - asked >= waiting.GRACE:
                raise RunStopped(waiting.STOPPED, exit_code=EXIT_REQUEUE)

    def piece(self, epoch: int, step: int, piece: int = 0) -> dict:
        """Any piece by itself, made in this process: for a first look at the data, and to replay a step."""
        return _checked(self.dataset[self.key(self.order(epoch), epoch, step, piece)])

    def order(self, epoch: int) -> Permutation | RepeatedOrder:
        """Positions of an epoch -> images."""
        if self.repeated:
            return RepeatedOrder(len(self.dataset), epoch)
        return Permutation(self.images, self.seed, epoch)

    def key(self, order: Permutation | RepeatedOrder, epoch: int, step: int, piece: int) -> PieceKey:
        size = self.batch_size // self.pieces
        first_sample = self.world.rank * self.batch_size + piece * size
        positions = step * self.global_batch + first_sample + np.arange(size)
        positions = positions[positions < self.images]
        return PieceKey(epoch, first_sample, order[positions], positions % REPEATS if self.repeated else None)


class _PieceSampler(Sampler):
    """The keys of all pieces, in order."""

    def __init__(self, loader: TrainLoader):
        self.loader = loader

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[PieceKey]:
        loader, start_step = self.loader, self.loader.start_step
        for epoch in range(loader.start_epoch, loader.epochs):
            order = loader.order(epoch)
            for step in range(start_step, loader.niter):
                for piece in range(loader.pieces):
                    yield loader.key(order, epoch, step, piece)
            start_step = max(0, start_step - loader.niter)


class _Pieces(Dataset):
    """PieceKey -> piece. Runs in the workers."""

    def __init__(self, source: Source, views: Callable, seed: int):
        self.source, self.views, self.seed = source, views, seed
        self.reading = waiting.Reading(source.image_name)
        self.read = source.pil if views.augment == "pil" else source.array

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: PieceKey) -> dict:
        with _one_thread():
            return self._make(key)

    def _make(self, key: PieceKey) -> dict:
        samples, used, bad, replaced = [], [], [], 0
        copies = [()] * len(key.indices) if key.copies is None else key.copies[:, None].tolist()
        for index, copy in zip(key.indices.tolist(), copies, strict=True):
            image, index_used = self._readable_image(key.epoch, index, bad)
            if image is None:
                name, reason = bad[-1]
                return {"error": f"none of {MAX_ATTEMPTS} images could be read; the last one was {name}: {reason}"}
            samples.append(self.views(image, (self.seed, key.epoch, index, *copy)))
            used.append(index_used)
            replaced += index_used != index
        collate = getattr(self.views, "collate", stack)
        views = collate(samples) if samples else {}
        told = {"bad": bad, "replaced": replaced}
        return {**views, "indices": torch.tensor(used).long(), "first_sample": key.first_sample, **told}

    def _readable_image(self, epoch: int, index: int, bad: list) -> tuple:
        """The image and its index, or those of the first replacement that can be read; what cannot goes to ``bad``."""
        candidate = index
        for attempt in range(MAX_ATTEMPTS):
            try:
                with self.reading.of(candidate):
                    return self.read(candidate), candidate
            except BadImage as error:
                bad.append((error.name, error.reason))
            draw = counted_uniforms(self.seed, epoch, index, attempt, _REPLACEMENT)
            candidate = int(draw * len(self.source))
        return None, index


@contextmanager
def _one_thread() -> Iterator[None]:
    """Without workers the pieces are made beside the training, where sharing out small crops costs four times more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def stack(samples: list) -> torch.Tensor | list | dict:
    """Tensors, numbers, and lists, tuples and dicts of them, one per sample -> the same with a batch dimension."""
    first = samples[0]
    if isinstance(first, torch.Tensor):
        return torch.stack(samples)
    if isinstance(first, dict):
        return {name: stack([sample[name] for sample in samples]) for name in first}
    if isinstance(first, (list, tuple)):
        return [stack(list(column)) for column in zip(*samples, strict=True)]
    return torch.tensor(samples)


def _ending(code: int) -> str:
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"


def _as_it_is(piece: dict) -> dict:
    return piece


def _checked(piece: dict) -> dict:
    if "error" in piece:  # raised here, since an exception from a worker arrives as a page of traceback
        raise UsageError(piece["error"])
    piece["bad"] = [tuple(entry) for entry in piece["bad"]]  # pinning makes lists of tuples
    return piece


def _init_worker(worker: int) -> None:
    """One thread per worker; signals meant for the run (save and stop) are the main process's business."""
    cv2.setNumThreads(0)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_when_the_parent_says_so, args=(os.getppid(),), daemon=True).start()
    waiting.watch_worker(worker)  # a thread of it must not hear SIGTERM either


def _end_when_the_parent_says_so(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)
