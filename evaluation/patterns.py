"""What prototypes stand for: the patches, or images, that each is surest of (iBOT 2111.07832, section 4.3)."""

import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import torch

from data.decode import BadImage
from data.pictures import save_picture, sheet
from data.preprocess import eval_transform, to_pixels
from data.source import Source
from evaluation.features import evaluating, rows_of_images
from evaluation.images import check_finite, settled
from evaluation.prototypes import Prototypes
from models.checkpoints import Network
from utils import UsageError, World, save_torch

DARK = 40  # of 255; what is darker on average shows nothing
TINT = np.array([255, 60, 60], np.float32)  # over the patch in the middle


class Bank(NamedTuple):
    """Of every image and place: the prototype with the highest logit, and this logit, (images, places)."""

    prototypes: torch.Tensor
    logits: torch.Tensor
    images: torch.Tensor  # (images,): which of the source's, for some cannot be read
    per_cluster: torch.Tensor  # (prototypes,): places that are its

    def save(self, path: Path) -> None:
        bank = torch.stack((self.prototypes.float(), self.logits), dim=-1)
        try:
            save_torch({"memory_bank": bank, "num_per_cluster": self.per_cluster, "images": self.images}, path)
        except OSError as error:
            raise UsageError(f"{path}: cannot be written: {error}") from error


def fill_bank(
    network: Network, head: Prototypes, source: Source, *, patches: bool, size: int, world: World, batch_size: int,
    num_workers: int, skip_unreadable: bool,
) -> Bank:  # fmt: skip
    """One pass over all images; ``patches``: of every patch token, else of the class token."""
    model = network.model

    def row(_, images: torch.Tensor) -> torch.Tensor:
        tokens = model.get_intermediate_layers(images, 1)[-1]
        tokens = tokens[:, model.num_prefix_tokens :] if patches else tokens[:, :1]
        best = check_finite(network.label, head(tokens)).max(dim=-1)
        return torch.cat((best.indices.float(), best.values), dim=1)

    options = {"world": world, "batch_size": batch_size, "num_workers": num_workers, "device": world.device}
    with evaluating(model):
        rows, unreadable = rows_of_images(row, source, preparation(size), **options)
    images = settled(source, unreadable, skip_unreadable)
    found, logits = rows.chunk(2, dim=1)
    found = found.long()
    return Bank(found, logits, images, torch.bincount(found.flatten(), minlength=head.prototypes))


def preparation(size: int) -> Callable:
    return eval_transform(size, round(size * 256 / 224))


def members(bank: Bank, cluster: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of the bank that have a place in ``cluster``, the surest first, and the surest place of each."""
    logits = bank.logits.masked_fill(bank.prototypes != cluster, -torch.inf)
    best, places = logits.max(dim=1)
    order = best.argsort(descending=True, stable=True)
    order = order[best[order] > -torch.inf]
    return order, places[order]


def draw_clusters(
    bank: Bank, source: Source, folder: Path, *, patches: bool, size: int, patch_window: int, topk: int, most: int
) -> list[tuple[int, int]]:
    """A picture for each of the ``most`` fullest clusters; (cluster, pictures in it) in this order."""
    transform, kind = preparation(size), "patch" if patches else "cls"
    side = round(bank.prototypes.shape[1] ** 0.5)

    @functools.lru_cache(maxsize=256)
    def pixels(row: int) -> np.ndarray | None:
        try:
            return to_pixels(transform(source.pil(int(bank.images[row]))))
        except BadImage:  # since it was looked at
            return None

    drawn = []
    fullest = bank.per_cluster.argsort(descending=True, stable=True)[:most]
    for rank, cluster in enumerate(fullest[bank.per_cluster[fullest] > 0].tolist()):
        shown = []
        for row, place in zip(*(part.tolist() for part in members(bank, cluster)), strict=True):
            image = pixels(row)
            if image is None:
                continue
            seen = surroundings(image, place, side, patch_window) if patches else image
            if seen.max(axis=2).mean() > DARK:
                shown.append(tinted(seen, patch_window) if patches else cv2.resize(image, (96, 96)))
            if len(shown) == topk:
                break
        if shown:
            columns = math.ceil(math.sqrt(len(shown)))
            rows = [shown[start : start + columns] for start in range(0, len(shown), columns)]
            save_picture(sheet(rows, 2), folder / f"c{kind}_crank{rank}_cid{cluster}_top{topk}.png")
            drawn.append((cluster, len(shown)))
    return drawn


def surroundings(image: np.ndarray, place: int, side: int, window: int) -> np.ndarray:
    """``window`` x ``window`` patches around a place of the ``side`` x ``side`` grid, black beyond the border."""
    patch = image.shape[0] // side
    border = window // 2 * patch
    padded = np.pad(image, ((border, border), (border, border), (0, 0)))
    top, left = place // side * patch, place % side * patch
    return padded[top : top + window * patch, left : left + window * patch]


def tinted(picture: np.ndarray, window: int) -> np.ndarray:
    """With the patch in the middle coloured."""
    patch = picture.shape[0] // window
    picture, first = picture.copy(), window // 2 * patch
    middle = picture[first : first + patch, first : first + patch]
    middle[:] = (0.7 * middle + 0.3 * TINT).astype(np.uint8)
    return picture
