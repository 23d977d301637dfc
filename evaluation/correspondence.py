"""Correspondence of images, or of two views of one, by the tokens of a frozen network: measured and drawn.

iBOT's (``sample_pairs``) and EsViT's three analyses (``draw_pair``, ``measure``, ``draw_attention``), for every
backbone that has tokens of places.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision import transforms
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as tv

from data.pictures import save_picture
from data.preprocess import MEAN, STD, to_pixels
from data.source import Source
from data.views import seeded_generators
from evaluation.attention import (
    attention_entropy,
    attention_maps,
    blended,
    bright_colour,
    enlarge,
    heat,
    keep_mass,
    overlaid,
    stretched,
)
from evaluation.correspondence_pictures import beside, dotted, grid_of, joined, marked, shorter_side
from evaluation.matching import (
    Grid,
    best_matches,
    matched_within,
    mirror_matches,
    overlapping,
    patch_centres,
    true_matches,
)
from models.checkpoints import Network
from models.swin import SwinTransformer
from randomness import counted_seed
from utils import UsageError, log, make_folder, save_atomically

PAIRS = 10  # that EsViT looks at
normalised = transforms.Compose([transforms.ToTensor(), transforms.Normalize(MEAN, STD)])
_GRAY = transforms.Grayscale(3)


class View(NamedTuple):
    """What was cut from an image, (3, size, size) normalised, and where: top, left, bottom, right in [0, 1]."""

    pixels: torch.Tensor
    corner: torch.Tensor  # of a mirrored view left is larger than right


def place_tokens(network: Network, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, Grid]:
    """Tokens of places (batch, rows * columns, dim) of the last block, what stands for the image, and their grid.

    Raises UsageError for a network without such tokens. Images are square.
    """
    model = network.model
    if hasattr(model, "get_intermediate_layers"):
        tokens = model.get_intermediate_layers(images, 1)[-1]
        pooled, places = tokens[:, 0], tokens[:, model.num_prefix_tokens :]
    elif hasattr(model, "forward_regions"):
        pooled, (places,) = model.forward_regions([images])
    else:
        raise UsageError(f"{network.label}: has no tokens of places; use one of our backbones")
    side = round(places.shape[1] ** 0.5)
    return places, pooled, (side, side)


def middle_of(place: int, grid: Grid, size: int) -> tuple[int, int]:
    """x and y in pixels of a place's middle."""
    rows, columns = grid
    return round((place % columns + 0.5) * size / columns), round((place // columns + 0.5) * size / rows)


# ---------------------------------------------------------------------------------------------------------------------
# Views
# ---------------------------------------------------------------------------------------------------------------------


def random_view(image: Image.Image, size: int, scale: tuple[float, float], seed: int, colours: bool = True) -> View:
    """A crop of a share of the area in ``scale``, perhaps mirrored, in other colours, or grey; the seed decides."""
    with seeded_generators(seed):
        top, left, height, width = transforms.RandomResizedCrop.get_params(image, list(scale), [3 / 4, 4 / 3])
        view = tv.resized_crop(image, top, left, height, width, [size, size], InterpolationMode.BICUBIC)
        corner = [top / image.height, left / image.width, (top + height) / image.height, (left + width) / image.width]
        flip, jitter, gray = torch.rand(3).tolist()
        if flip < 0.5 and colours:
            view, corner = tv.hflip(view), [corner[0], corner[3], corner[2], corner[1]]
        if jitter < 0.8 and colours:
            view = transforms.ColorJitter(0.4, 0.4, 0.2, 0.1)(view)
        if gray < 0.2 and colours:
            view = _GRAY(view)
    return View(normalised(view), torch.tensor(corner, dtype=torch.float64))


def whole_view(image: Image.Image, size: int) -> View:
    """Shorter side to size * 256 / 224, and the middle; where that is in the image is not told."""
    view = tv.center_crop(tv.resize(image, [round(size * 256 / 224)], InterpolationMode.BICUBIC), [size, size])
    return View(normalised(view), torch.tensor([0.0, 0.0, 1.0, 1.0], dtype=torch.float64))


# ---------------------------------------------------------------------------------------------------------------------
# iBOT: two images of a class, or two views of an image
# ---------------------------------------------------------------------------------------------------------------------


class Sampled(NamedTuple):
    pairs: int
    accuracy: float | None  # over all overlapping patches of a pair, mean over pairs, in percent; of two views


@torch.no_grad()
def sample_pairs(
    network: Network, source: Source, folder: Path, *, kind: str, size: int, topk: int, radius: int, seed: int,
    most: int, draw: bool, with_attention: bool, looking: torch.nn.Module | None, device: torch.device,
) -> Sampled:  # fmt: skip
    """``kind`` "class": an image and the next of its class; "instance": two views of an image.

    Lines start at the ``topk`` patches that ``looking`` attends to most (None: whose matches are most similar), of two
    views only where they overlap. parity: tokens are compared as they are, not as unit vectors.
    """
    accuracies = []
    for number, (first, second) in enumerate(chosen_pairs(source, kind, most)):
        images = source.pil(first), source.pil(second)
        if kind == "instance":
            seeds = [counted_seed(seed, first, view) for view in (0, 1)]
            views = [random_view(image, size, (0.4, 1.0), s) for image, s in zip(images, seeds, strict=True)]
        else:
            views = [whole_view(image, size) for image in images]
        pixels = torch.stack([view.pixels for view in views]).to(device)
        tokens, _, grid = place_tokens(network, pixels)
        found = best_matches(tokens[:1], tokens[1:])[0].cpu()
        candidates, right = torch.ones(len(found), dtype=torch.bool), None
        if kind == "instance":
            centres = [patch_centres(view.corner[None], grid) for view in views]
            candidates = overlapping(*centres, 0.5 / grid[0])[0]
            right = matched_within(found, true_matches(*centres)[0], grid[1], radius)
            if candidates.any():
                accuracies.append(100 * float(right[candidates].double().mean()))
        if draw:
            rank = strength_of(looking, pixels[:1], tokens, grid)
            starts = rank.masked_fill(~candidates, -torch.inf).argsort(descending=True)[
                : min(topk, int(candidates.sum()))
            ]
            pictures = tuple(to_pixels(pixels))
            lines = [(middle_of(int(s), grid, size), middle_of(int(found[s]), grid, size)) for s in starts]
            picture = joined(pictures, lines, None if right is None else right[starts].tolist())
            if with_attention and looking is not None:
                maps = attention_maps(looking, pixels).mean(dim=1).cpu().numpy()
                lit = beside(*(overlaid(p, m) for p, m in zip(pictures, maps, strict=True)))
                picture = np.concatenate((picture, lit))
            heads = getattr(getattr(getattr(network.model, "blocks", [None])[-1], "attn", None), "num_heads", 0)
            label = int(source.labels[first])
            save_picture(picture, folder / f"{kind}_corresp{number}_cls{label}_nh{heads}.png")
    accuracy = float(np.mean(accuracies)) if accuracies else None
    return Sampled(number + 1, accuracy)


def chosen_pairs(source: Source, kind: str, most: int) -> list[tuple[int, int]]:
    """Indices; of two images of a class every image is followed by the next of its class, the last by the first."""
    if kind == "instance":
        return [(index, index) for index in range(min(most, len(source)))]
    if not source.class_names:
        raise UsageError(f"{source.name}: images without classes; pass --sample_type instance for two views of each")
    labels, pairs = np.asarray(source.labels), []
    for index in range(len(source)):
        same = np.flatnonzero(labels == labels[index])
        if len(same) > 1:
            pairs.append((index, int(same[(np.searchsorted(same, index) + 1) % len(same)])))
        if len(pairs) == most:
            break
    if not pairs:
        raise UsageError(f"{source.name}: no class has two images; pass --sample_type instance")
    return pairs


def strength_of(
    looking: torch.nn.Module | None, images: torch.Tensor, tokens: torch.Tensor, grid: Grid
) -> torch.Tensor:
    """By what places of the first image are ranked: (places,)."""
    if looking is None:
        similarity = F.normalize(tokens[0], dim=-1) @ F.normalize(tokens[1], dim=-1).T
        return similarity.max(dim=1).values.cpu()
    maps = attention_maps(looking, images).mean(dim=1, keepdim=True)
    return F.interpolate(maps, grid, mode="bilinear", align_corners=False)[0, 0].flatten().cpu()


# ---------------------------------------------------------------------------------------------------------------------
# EsViT: a pair, a measure over mirrored images, one query's attention
# ---------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def draw_pair(network: Network, views: tuple[torch.Tensor, torch.Tensor], folder: Path, seed: int) -> list[dict]:
    """The ten most similar pairs of places, drawn and returned.

    Blue circles: the place of a view that is most like this view as a whole; red triangles: most like the other one.
    """
    images = torch.stack(views)
    tokens, pooled, grid = place_tokens(network, images)
    size = images.shape[-1]
    unit, whole = F.normalize(tokens, dim=-1), F.normalize(pooled, dim=-1)
    similarity, match = (unit[0] @ unit[1].T).max(dim=1)
    order = similarity.argsort(descending=True)[:PAIRS]
    pairs = [
        {"first": int(i), "second": int(match[i]), "similarity": round(float(similarity[i]), 4)} for i in order.tolist()
    ]
    lines = [(middle_of(pair["first"], grid, size), middle_of(pair["second"], grid, size)) for pair in pairs]
    likeness = (
        torch.einsum("vpd,wd->vwp", unit, whole).argmax(dim=-1).tolist() if unit.shape[-1] == whole.shape[-1] else []
    )
    pictures = []
    for view, picture in enumerate(to_pixels(images)):
        own = [middle_of(likeness[view][view], grid, size)] if likeness else []
        other = [middle_of(likeness[view][1 - view], grid, size)] if likeness else []
        pictures.append(marked(picture.copy(), own, other))
    save_picture(joined(tuple(pictures), lines, numbered=True), folder / f"correspondence{seed}.png")
    return pairs


@torch.no_grad()
def measure(network: Network, source: Source, size: int, seed: int, device: torch.device) -> dict:
    """How well places of an image are found again in its mirror image in other colours and grey; means over images."""
    totals, count = np.zeros(3), 0
    for index in range(len(source)):
        view = whole_view(source.pil(index), size).pixels
        with seeded_generators(counted_seed(seed, index)):
            mirrored = tv.hflip(Image.fromarray(to_pixels(view)))
            if torch.rand(1) < 0.8:
                mirrored = transforms.ColorJitter(0.4, 0.4, 0.2, 0.1)(mirrored)
        images = torch.stack((view, normalised(_GRAY(mirrored)))).to(device)
        tokens, _, grid = place_tokens(network, images)
        found = mirror_matches(tokens[0], tokens[1], grid, size // grid[1], PAIRS)
        totals += [found.similarity, found.accuracy, found.distance]
        count += 1
    names = ("sim_value_avg", "accuracy_avg", "distance_error_avg")
    return {"count": count} | dict(zip(names, (totals / count).tolist(), strict=True))


@torch.no_grad()
def query_attention(network: Network, images: torch.Tensor, query: int) -> tuple[torch.Tensor, Grid]:
    """Where the token at place ``query`` looks in the last block: (heads, places), and their grid; for one image.

    Of a vision transformer every patch, of a Swin the window, which has to be the whole map. Raises UsageError.
    """
    model = network.model
    if isinstance(model, SwinTransformer):
        side = round(place_tokens(network, images)[0].shape[1] ** 0.5)
        attention = model.window_attention(images)
        window = round(attention.shape[-1] ** 0.5)
        if len(attention) > 1:
            raise UsageError(
                f"--image_size {images.shape[-1]}: the last map of {network.label} is {side} x {side}, in several "
                f"windows of {window} x {window}; take a smaller size, so that it is one"
            )
        real = torch.arange(window**2).view(window, window)[:side, :side].flatten().to(attention.device)
        attention = attention[0][:, real][:, :, real]
    elif hasattr(model, "get_last_selfattention"):
        prefix = model.num_prefix_tokens
        attention = model.get_last_selfattention(images)[0, :, prefix:, prefix:]
        side = round(attention.shape[-1] ** 0.5)
    else:
        raise UsageError(f"{network.label}: no attention between places to show; use a vit_* or a swin_*")
    if not 0 <= query < attention.shape[-1]:
        raise UsageError(f"--query {query}: places are counted from 0 to {attention.shape[-1] - 1}, row by row")
    attention = attention[:, query]
    return attention / attention.sum(dim=-1, keepdim=True), (side, side)


def draw_attention(network: Network, image: torch.Tensor, folder: Path, query: int, threshold: float) -> list[float]:
    """Maps and masks of every head, those that look widest first; the heads' entropies in bits, in this order."""
    attention, grid = query_attention(network, image[None], query)
    entropy = attention_entropy(attention)
    order = entropy.argsort(descending=True)
    size = image.shape[-1]
    cell = size // grid[0]
    maps = attention[order].unflatten(-1, grid).float().cpu()
    layer = len(network.model.blocks) - 1
    photograph, dot = to_pixels(image), middle_of(query, grid, size)
    masks = enlarge(keep_mass(maps, threshold), cell).numpy()
    photograph = photograph[: masks.shape[1], : masks.shape[2]]
    pictures = [heat(values) for values in enlarge(maps, cell)]
    masked = [dotted(blended(photograph, mask, bright_colour(head)), dot) for head, mask in enumerate(masks)]
    below = folder / f"layer{layer}_query{query}"
    make_folder(below / "attn")
    make_folder(below / f"mask_th{threshold}")
    save_picture(stretched(image.cpu()), folder / "img.png")
    for head, (picture, mask) in enumerate(zip(pictures, masked, strict=True)):
        save_picture(picture, below / "attn" / f"attn-head_{head:02}.png")
        save_picture(mask, below / f"mask_th{threshold}" / f"mask_th{threshold}_head_{head:02}.png")
    save_picture(grid_of(pictures), folder / f"attn_all_{layer}_query{query}.png")
    whole = grid_of(masked)
    save_picture(whole, folder / f"attn_masked_all_{layer}_query{query}.png")
    save_picture(shorter_side(whole, 400), folder / f"attn_masked_all_{layer}_query{query}_compressed.png")
    return entropy[order].tolist()


def write_measure(found: dict, folder: Path) -> None:
    make_folder(folder)
    path = folder / "measure_correspondence.json"
    try:
        save_atomically(path, lambda temporary: temporary.write_text(json.dumps(found) + "\n"))
    except OSError as error:
        raise UsageError(f"{path}: cannot be written: {error}") from error
    log.info(f"written to {path}")


def in_one_folder(views: Sequence[torch.Tensor], folder: Path) -> None:
    """The views of ``draw_pair`` beside its picture, to be used again."""
    for number, view in enumerate(views, start=1):
        save_picture(to_pixels(view), folder / f"img{number}.png")
