"""Frozen features: of which network, which part of its output, of which images; extracted once for every evaluation.

Row i of a feature matrix belongs to the i-th readable image of its source, whatever the number of processes: each takes
every world-th image, rows are placed by index, and a missing or doubled row is an error. Images that cannot be read
have no row, and are told beside the features. No metric in here.
"""

import contextlib
import re
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
from torch.utils.data import DataLoader, Dataset

from data import waiting
from data.datasets import BadImage, Source
from evaluation.unreadable import Unreadable
from models.vit import VisionTransformer
from utils import World, all_gather_objects, all_gather_rows, log, usable_cpus

# ---------------------------------------------------------------------------------------------------------------------
# Which feature: pure functions (network, images (batch, 3, height, width)) -> (batch, width of the feature)
# ---------------------------------------------------------------------------------------------------------------------


def class_token(model: Callable, images: torch.Tensor) -> torch.Tensor:
    """What ``model`` returns, the first of several class tokens: k-NN and retrieval. (batch, dim)."""
    output = model(images)
    output = output[0] if isinstance(output, tuple) else output
    return output[:, 0] if output.ndim == 3 else output


# iBOT's numbers, DINO's "true", and what Mugs and UNIC take for patches
CLASS, MEAN, BOTH, INTERLEAVED, NORMALISED_MEAN = POOLINGS = ("0", "1", "2", "interleaved", "mean")
CLASS_TOKENS = {"cls": (0,), "cls+": (1,), "both": (0, 1)}  # which of a network's class tokens
CLS = "cls"


class Feature(NamedTuple):
    """Which tokens of a network make a feature, as the originals' options of the same names say it.

    | avgpool     | feature                                                                             | width       |
    |-------------|-------------------------------------------------------------------------------------|-------------|
    | 0           | class tokens of the last n blocks, oldest first                                     | n * dim     |
    | 1           | mean patch token of the last block before the final norm                            | dim         |
    | 2           | class tokens of the last n blocks, then the mean patch token of the last            | (n+1) * dim |
    | interleaved | class_0, mean_0, class_1, mean_1, ... of the last block: what DINO's heads expect   | 2 * dim     |
    | mean        | mean patch token of the last block after the final norm: Mugs's avgpool 1           | dim         |
    | top<k>      | as 1, of the k patches that the class token attends to most (``part``): iBOT's parts | dim        |
    | least<k>    | likewise, of those that it attends to least                                         | dim         |

    ``token``: which class token, of those that have two (UDI); "both" are one after the other, block by block.
    All but avgpool 1 after the final norm. A Swin's class token is the mean of its tokens, and ``dim`` differs between
    its stages. parity: iBOT builds plain transformers without final norm for avgpool 1, but Swin with it.
    """

    n_last_blocks: int = 1
    avgpool: str = CLASS
    token: str = CLS

    def __str__(self) -> str:
        token = {"cls": "class token", "cls+": "second class token (cls+)", "both": "both class tokens"}[self.token]
        blocks = "the last block" if self.n_last_blocks == 1 else f"the last {self.n_last_blocks} blocks"
        if self.part:
            count, least = self.part
            return f"mean of the {count} {'least' if least else 'most'} attended patch tokens of the last block"
        return {
            CLASS: f"{token} of {blocks}",
            MEAN: "mean patch token of the last block before the norm",
            BOTH: f"{token} of {blocks} and mean patch token of the last",
            NORMALISED_MEAN: "mean patch token of the last block",
            INTERLEAVED: f"{token} and mean patch token of {blocks}, interleaved",
        }[self.avgpool]

    @property
    def part(self) -> tuple[int, bool] | None:
        """Of how many patches, and whether these are the least attended ones; None where a feature is of all."""
        match = re.fullmatch(r"(top|least)(\d+)", self.avgpool)
        return match and (int(match[2]), match[1] == "least")

    def __call__(self, model: nn.Module, images: torch.Tensor) -> torch.Tensor:
        return token_features(model, images, [self])[0]


OUTPUT = Feature()  # what a network returns: the one feature that those without blocks have


def token_features(model: nn.Module, images: torch.Tensor, features: Sequence[Feature]) -> list[torch.Tensor]:
    """All ``features`` from one pass through a transformer of ours, each (batch, its width).

    Of other networks only OUTPUT exists (``evaluation.network.chosen_features`` sees to that).
    """
    if set(features) == {OUTPUT}:
        return [class_token(model, images)] * len(features)
    blocks = max(feature.n_last_blocks for feature in features)
    parts = any(feature.part for feature in features)
    if parts:
        blocks = max(blocks, 2)  # their attention is made from what the last block is given
    if isinstance(model, VisionTransformer):
        unnormalised = model.get_intermediate_layers(images, blocks, norm=False)
        layers, last = [model.norm(tokens) for tokens in unnormalised], unnormalised[-1]
    else:
        layers = model.get_intermediate_layers(images, blocks)
        last = layers[-1]
    prefix = model.num_prefix_tokens
    if parts:
        attention = model.attention_from(unnormalised[-2])[:, :, 0, prefix:]
    return [
        most_attended_mean(last[:, prefix:], attention, *feature.part)
        if feature.part
        else pool_tokens(layers, last, feature, prefix)
        for feature in features
    ]


def pool_tokens(
    layers: Sequence[torch.Tensor], unnormalised: torch.Tensor, feature: Feature, num_prefix_tokens: int
) -> torch.Tensor:
    """``feature`` from the tokens of the last blocks, oldest first, each (batch, tokens, its dim).

    ``unnormalised``: those of the last block as avgpool 1 takes them. Of fewer blocks than the feature asks for all are
    taken, as the originals do.
    """
    last = layers[-feature.n_last_blocks :]
    classes = [tokens[:, token] for tokens in last for token in CLASS_TOKENS[feature.token]]
    patches = unnormalised if feature.avgpool == MEAN else layers[-1]
    mean = patches[:, num_prefix_tokens:].mean(dim=1)
    if feature.avgpool == INTERLEAVED:
        return torch.stack((classes[-1], mean), dim=2).flatten(1)
    parts = {CLASS: classes, MEAN: [mean], NORMALISED_MEAN: [mean], BOTH: [*classes, mean]}
    return torch.cat(parts[feature.avgpool], dim=1)


@torch.no_grad()
def feature_widths(model: nn.Module, features: Sequence[Feature], crop_size: int, device: torch.device) -> list[int]:
    image = torch.zeros(1, 3, crop_size, crop_size, device=device)
    with evaluating(model):
        return [feature.shape[1] for feature in token_features(model, image, features)]


def most_attended_mean(patches: torch.Tensor, attention: torch.Tensor, topk: int, least: bool = False) -> torch.Tensor:
    """Mean of the ``topk`` patches with most attention, mean over heads, or with the ``least``: iBOT's parts.

    Patch tokens (batch, patches, dim), a class token's attention to them (batch, heads, patches) -> (batch, dim).
    """
    chosen = attention.mean(dim=1).topk(min(topk, patches.shape[1]), dim=1, largest=not least).indices
    return patches.gather(1, chosen[..., None].expand(-1, -1, patches.shape[2])).mean(dim=1)


# ---------------------------------------------------------------------------------------------------------------------
# Extraction
# ---------------------------------------------------------------------------------------------------------------------

LINES_EVERY = 10.0  # seconds between progress lines
GATHER_ROWS = 8192  # rows of every process that travel together


def extract_features(
    model_fn: Callable[[torch.Tensor], torch.Tensor],
    source: Source,
    transform: Callable,
    *,
    world: World,
    batch_size: int = 128,
    num_workers: int = 10,
    device: torch.device,
    feature: Callable[[Callable, torch.Tensor], torch.Tensor] = class_token,
) -> tuple[torch.Tensor, list[Unreadable]]:
    """``feature(model_fn, images)`` of every image that can be read, and the images that cannot, both in order.

    Features (images, dim) float32, on the CPU; ``readable`` of evaluation/unreadable.py tells which images they are
    of. ``transform``: PIL RGB -> (3, height, width). A network runs in evaluation mode without gradients and is left in
    the mode it was in. Every process returns everything.
    """
    options = {"world": world, "batch_size": batch_size, "num_workers": num_workers, "device": device}
    with evaluating(model_fn):
        return rows_of_images(lambda _, images: feature(model_fn, images), source, transform, **options)


@torch.no_grad()
def rows_of_images(
    row: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    source: Source,
    transform: Callable,
    *,
    world: World,
    batch_size: int = 128,
    num_workers: int = 10,
    device: torch.device,
) -> tuple[torch.Tensor, list[Unreadable]]:
    """``extract_features`` of whatever ``row(indices, images)`` says of a batch: (batch, numbers)."""
    local, found, done = torch.empty(0, 0), [torch.empty(0, dtype=torch.long)], 0
    unreadable: list[Unreadable] = []
    progress = _Progress(source, world)
    options = {"world": world, "batch_size": batch_size, "num_workers": num_workers, "device": device}
    for indices, images in batches(source, transform, **options, unreadable=unreadable):
        rows = row(indices, images)
        if not done:
            local = torch.empty(len(range(world.rank, len(source), world.size)), rows.shape[1])
        local[done : done + len(rows)] = rows.float()
        done += len(rows)
        found.append(indices)
        progress.report(done + len(unreadable))
    absent = [image.index for image in unreadable]
    return gather_rows(local[:done], torch.cat(found), len(source), world, absent), unreadable


def batches(
    source: Source,
    transform: Callable,
    *,
    world: World,
    batch_size: int,
    num_workers: int,
    device: torch.device,
    unreadable: list[Unreadable],
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """This process's share of the images, in order: indices (batch,) on the CPU, transformed images on ``device``.

    Images that cannot be read are put into ``unreadable`` instead; at the end it holds those of all processes.
    """
    indices = range(world.rank, len(source), world.size)
    dataset = _Images(source, transform, indices)
    loader = DataLoader(
        dataset,
        batch_size=batch_size,
        num_workers=min(num_workers, usable_cpus(), -(-len(indices) // batch_size)),
        collate_fn=_collate,
        pin_memory=device.type == "cuda",
        worker_init_fn=waiting.watch_worker,
    )
    end = None if loader.num_workers else waiting.watch(dataset.reading, "the loading of images")
    try:
        for batch_indices, images, bad in loader:
            unreadable += [Unreadable(*image) for image in bad]
            if images is not None:
                yield batch_indices, images.to(device, non_blocking=True)
    finally:
        if end is not None:
            end()
    unreadable[:] = sorted(image for part in all_gather_objects(unreadable) for image in part)


def labels_of(source: Source) -> torch.Tensor:
    """(images,) int64, copied: a source may hand out a read-only map of its index."""
    return torch.from_numpy(np.array(source.labels, dtype=np.int64))


class _Images(Dataset):
    """The images ``indices`` of a source, transformed; an unreadable one is returned as an Unreadable."""

    def __init__(self, source: Source, transform: Callable, indices: range):
        self.source, self.transform, self.indices = source, transform, indices
        self.reading = waiting.Reading(source.image_name)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int) -> tuple[int, torch.Tensor] | Unreadable:
        index = self.indices[position]
        try:
            with self.reading.of(index):
                return index, self.transform(self.source.pil(index))
        except BadImage as error:
            return Unreadable(index, error.name or self.source.image_name(index), error.reason)
        except MemoryError:
            return Unreadable(index, self.source.image_name(index), "it does not fit into memory")


def _collate(
    items: list[tuple[int, torch.Tensor] | Unreadable],
) -> tuple[torch.Tensor, torch.Tensor | None, list[Unreadable]]:
    """Indices and images of those that could be read (None when none could), and the others."""
    bad = [item for item in items if isinstance(item, Unreadable)]
    good = [item for item in items if not isinstance(item, Unreadable)]
    images = torch.stack([image for _, image in good]) if good else None
    return torch.tensor([index for index, _ in good], dtype=torch.long), images, bad


class _Progress:
    """A line in the log every few seconds, and one at the end: images done by all processes, images per second."""

    def __init__(self, source: Source, world: World):
        self.source, self.world = source, world
        self.done, self.start, self.last = 0, time.monotonic(), time.monotonic()

    def report(self, images: int) -> None:
        """``images``: seen by this process so far."""
        self.done = min(images * self.world.size, len(self.source))
        now = time.monotonic()
        if now - self.last >= LINES_EVERY or self.done == len(self.source):
            rate = self.done / max(now - self.start, 1e-9)
            log.info(f"features of {self.source.name}: {self.done} of {len(self.source)} images, {rate:.0f} images/s")
            self.last = now


@contextlib.contextmanager
def evaluating(model: Callable) -> Iterator[None]:
    """``model`` in evaluation mode and as it was written; afterwards every part of it is again in the mode it was in.

    A network that is compiled for training would be compiled anew for the batches and modes of an evaluation.
    """
    modes = {module: module.training for module in model.modules()} if isinstance(model, nn.Module) else {}
    compiled = any(getattr(module, "_compiled_call_impl", None) is not None for module in modes)
    for module in modes:
        module.training = False
    try:
        with torch.compiler.set_stance("force_eager") if compiled else contextlib.nullcontext():
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def gather_rows(
    local: torch.Tensor, indices: torch.Tensor, total: int, world: World, absent: Sequence[int] = ()
) -> torch.Tensor:
    """Rows (rows, dim) of every process, with the indices they belong to, as one matrix on each; in pieces.

    The matrix has a row for every index in [0, total) but those that are ``absent``, in order. Raises RuntimeError when
    an index has no row, or more than one, or one although it is absent.
    """
    dim = torch.tensor([local.shape[1], local.shape[0]], device=world.device)
    if world.size > 1:
        dist.all_reduce(dim, op=dist.ReduceOp.MAX)
    dim, longest = dim.tolist()
    wanted = torch.ones(total, dtype=torch.long)
    wanted[list(absent)] = 0
    row_of = wanted.cumsum(0).sub_(1).clamp_(min=0)
    features, counts = torch.zeros(int(wanted.sum()), dim), torch.zeros(total, dtype=torch.long)
    for start in range(0, longest, GATHER_ROWS):
        part, where = local[start : start + GATHER_ROWS], indices[start : start + GATHER_ROWS]
        if world.size > 1:
            part, where = _all_gather(part, where, min(GATHER_ROWS, longest - start), dim, world)
        counts += torch.bincount(where, minlength=total)
        features[row_of[where]] = part
    if (counts != wanted).any():
        kinds = {"missing": counts < wanted, "doubled": counts > wanted}
        parts = [
            f"{kind} {_shortened(rows.nonzero().flatten().tolist())}" for kind, rows in kinds.items() if rows.any()
        ]
        raise RuntimeError(f"extracted {int((counts > 0).sum())} of {int(wanted.sum())} images; " + "; ".join(parts))
    return features


def _all_gather(part, where, rows, dim, world):
    """Up to ``rows`` rows from every process; shorter contributions are padded, and the padding dropped again."""
    padded = torch.zeros(rows, dim, device=world.device)
    index = torch.full((rows,), -1, dtype=torch.long, device=world.device)
    if len(part):  # a process without images does not know the width of a row
        padded[: len(part)], index[: len(where)] = part, where
    all_rows, all_indices = all_gather_rows(padded).cpu(), all_gather_rows(index).cpu()
    return all_rows[all_indices >= 0], all_indices[all_indices >= 0]


def _shortened(rows: list[int], show: int = 8) -> str:
    return ", ".join(map(str, rows[:show])) + (f" and {len(rows) - show} more" if len(rows) > show else "")
