"""A classifier on images that something was done to: opened, looked at once, and what came out of it."""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torchvision import transforms

from data.datasets import open_source
from data.decode import BadImage, reading_from
from data.pictures import save_picture, sheet
from data.preprocess import eval_transform, to_pixels
from data.source import Source
from evaluation.attention import attention_maps
from evaluation.classifier import classifier_from_options
from evaluation.confidence import interval_of
from evaluation.features import evaluating, labels_of, rows_of_images
from evaluation.images import settled, test_place
from evaluation.network import second_network
from evaluation.results import write_result
from evaluation.robustness import (
    OFFSET,
    dropped,
    enlarged,
    hits,
    most_attended,
    outcomes,
    painted,
    shuffled,
    visible,
)
from models.checkpoints import Network
from randomness import counted_uniforms
from utils import UsageError, World, escape, log, make_folder

TENTHS = tuple(round(0.1 * step, 1) for step in range(1, 11))
BLOCKS = 14  # a side, of what is dropped
SHOWN = 4  # images of a picture


class Trial:
    """What exists once: a classifier, options, and of every set what could not be read."""

    def __init__(self, args: argparse.Namespace, world: World, name: str):
        self.args, self.world, self.name = args, world, name
        self.classifier = classifier_from_options(args, world)
        self.network: Network = self.classifier.network
        self.unreadable = 0
        self.shown: list[list[np.ndarray]] = []

    def rows(
        self,
        source: Source,
        transform: Callable,
        row: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """``row(indices, images, labels)`` of all images that can be read, float64, and which of them these are."""
        labels, args, device = labels_of(source), self.args, self.world.device

        def of_batch(indices: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
            return row(indices, images, labels[indices].to(device))

        options = {"batch_size": args.batch_size_per_gpu, "num_workers": args.num_workers, "device": device}
        found, unreadable = rows_of_images(of_batch, source, transform, world=self.world, **options)
        kept = settled(source, unreadable, args.skip_unreadable)
        self.unreadable += len(unreadable)
        if not torch.isfinite(found).all():
            raise UsageError(f"{self.network.label}: answers that are not finite numbers; its weights are damaged")
        return found.double(), kept

    def show(self, *images: torch.Tensor) -> None:
        """Keep the first images of a batch, normalised, a column for every tensor, for ``--test_image``."""
        if getattr(self.args, "test_image", False) and not self.shown and self.world.rank == 0:
            columns = [to_pixels(batch[:SHOWN].float()) for batch in images]
            self.shown = [list(row) for row in zip(*columns, strict=True)]

    def write(self, data: str, numbers: dict) -> None:
        if self.world.rank:
            return
        args = self.args
        if self.shown:
            make_folder(Path(args.output_dir))
            save_picture(sheet(self.shown, 4), Path(args.output_dir) / f"{self.name}.png")
        numbers = {"feature": str(self.classifier.feature)} | numbers
        write_result(args, self.name, self.network, data, {"train": 0, "test": self.unreadable}, numbers)


def open_test_images(args: argparse.Namespace, classes: int) -> Source:
    """The test images of --data_path, which have as many classes as the head. Raises UsageError."""
    source = open_source(test_place(args.data_path), split="val").read_as(reading_from(args))
    check_classes(source, classes)
    return source


def check_classes(source: Source, classes: int, where: str = "the linear head") -> None:
    if not source.class_names or len(source) == 0:
        raise UsageError(f"{source.name}: images without classes; needs a folder per class")
    if len(source.class_names) != classes:
        raise UsageError(f"{source.name}: has {len(source.class_names)} classes, and {where} {classes}")
    empty = np.flatnonzero(np.bincount(source.labels, minlength=classes) == 0)
    if len(empty):
        raise UsageError(f"{source.name}: no image of class {escape(source.class_names[empty[0]])}")


def crop_of(args: argparse.Namespace, network: Network) -> tuple[int, int]:
    """Crop and shorter side in pixels."""
    crop = args.crop_size
    resize = args.resize_size or round(crop * 256 / 224)
    patch = network.arguments.get("patch_size", 1)
    if not patch <= crop <= resize:
        raise UsageError(f"--crop_size {crop} --resize_size {resize}: need patch size ({patch}) <= crop <= resize")
    return crop, resize


def attentive_network(args: argparse.Namespace, trial: Trial, published: str) -> torch.nn.Module:
    """What says where to look: --attention_weights, or the evaluated network itself."""
    if not args.attention_weights:
        log.warning(f"warning: no --attention_weights: the network's own attention is taken; published is {published}")
        return trial.network.model
    asked = {"arch": args.attention_arch, "patch_size": args.attention_patch_size}
    network = second_network(args.attention_weights, args.attention_key, **asked)
    return network.model.to(trial.world.device).eval().requires_grad_(False)


def attention_of(model: torch.nn.Module, images: torch.Tensor) -> torch.Tensor:
    """(batch, heads, rows, columns); the images have to be whole numbers of patches."""
    if any(side % getattr(model, "patch_size", 1) for side in images.shape[-2:]):
        raise UsageError(f"--crop_size {images.shape[-1]}: not a whole number of patches of {model.patch_size} pixels")
    with evaluating(model):
        return attention_maps(model, images)


def percent(values: torch.Tensor) -> list[float]:
    return (100 * values).tolist()


# ---------------------------------------------------------------------------------------------------------------------
# What draws most attention, painted over
# ---------------------------------------------------------------------------------------------------------------------


def masked(args: argparse.Namespace, world: World) -> None:
    """AttMask's drop of accuracy; the attention of an image is computed once for all ratios."""
    trial = Trial(args, world, "eval_masked")
    source = open_test_images(args, trial.classifier.classes)
    looking = attentive_network(args, trial, "DINO's ViT-B/16")
    ratios = [0.0, *args.masking_ratio]

    def row(_, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        attention = attention_of(looking, images).mean(dim=1)
        seen = [images, *(painted(images, most_attended(attention, ratio)) for ratio in args.masking_ratio)]
        trial.show(*seen)
        return torch.cat([outcomes(trial.classifier(image), labels) for image in seen], dim=1)

    found, kept = trial.rows(source, eval_transform(*crop_of(args, trial.network)), row)
    table = found.mean(dim=0).view(-1, 3)
    results = {}
    for ratio, (loss, acc1, acc5) in zip(ratios, table.tolist(), strict=True):
        interval = interval_of(100 * acc1, len(kept))
        five = {"acc5": 100 * acc5} if trial.classifier.classes >= 5 else {}
        results[str(ratio)] = {"acc1": 100 * acc1, **five, "loss": loss, "interval": list(interval)}
        shown = f" Acc@5 {100 * acc5:.3f}" if five else ""
        drop = f", {100 * (table[0, 1].item() - acc1):.2f} less than of whole images" if ratio else ", whole images"
        log.info(f"masking ratio {ratio}: * Acc@1 {100 * acc1:.3f}{shown} loss {loss:.3f} ({interval}){drop}")
    if trial.classifier.accuracy is not None:
        log.info(f"the head's file says {trial.classifier.accuracy:.2f} of whole images")
    trial.write(source.name, {"masking_ratio": results})


# ---------------------------------------------------------------------------------------------------------------------
# Blocks dropped or shuffled, what is salient removed
# ---------------------------------------------------------------------------------------------------------------------


def draws(seed: int, run: int, indices: torch.Tensor, blocks: int) -> torch.Tensor:
    """A random order of ``blocks`` for every image: a function of (seed, run, image); (batch, blocks)."""
    uniforms = counted_uniforms(seed, run, indices.numpy()[:, None], np.arange(blocks))
    return torch.from_numpy(np.argsort(uniforms, axis=1))


def occlusion(args: argparse.Namespace, world: World) -> None:
    """A tenth after the other of 14 x 14 blocks is dropped; those of a tenth are among those of the next."""
    trial = Trial(args, world, "eval_occlusion")
    source = open_test_images(args, trial.classifier.classes)
    side = args.shuffle_size or BLOCKS
    whole_blocks(args.crop_size, (side, side), "--shuffle_size")
    counts = [tenth * side * side // 10 for tenth in range(10)]
    offset = OFFSET if args.random_offset_drop else 0

    def row(indices: torch.Tensor, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        found = []
        for run in range(args.exp_count):
            order = draws(args.seed, run, indices, side * side).to(images.device)
            seen = [dropped(images, (side, side), order[:, :count], offset) for count in counts]
            trial.show(*seen)
            found += [hits(trial.classifier(image).argmax(dim=1), labels) for image in seen]
        return torch.stack(found, dim=1)

    found, kept = trial.rows(source, occlusion_transform(args, trial.network), row)
    shares = found.mean(dim=0).view(args.exp_count, -1).tolist()
    results = {run: dict(enumerate(part)) for run, part in enumerate(shares)}
    for run, part in results.items():
        log.info(f"run {run}: top-1 with tenths dropped { ({i: round(share, 4) for i, share in part.items()}) }")
    trial.write(source.name, {"dropped_tenths": results, "images": len(kept)})


def shuffle(args: argparse.Namespace, world: World) -> None:
    trial = Trial(args, world, "eval_shuffle")
    source = open_test_images(args, trial.classifier.classes)
    if len(args.shuffle_h) != len(args.shuffle_w):
        raise UsageError(f"--shuffle_h, --shuffle_w: {len(args.shuffle_h)} and {len(args.shuffle_w)} values; as many")
    grids = list(zip(args.shuffle_h, args.shuffle_w, strict=True))
    for grid in grids:
        whole_blocks(args.crop_size, grid, "--shuffle_h --shuffle_w")

    def row(indices: torch.Tensor, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        found = []
        for run in range(args.exp_count):
            orders = [draws(args.seed, run, indices, h * w).to(images.device) for h, w in grids]
            seen = [shuffled(images, grid, order) for grid, order in zip(grids, orders, strict=True)]
            trial.show(images, *seen)
            found += [hits(trial.classifier(image).argmax(dim=1), labels) for image in seen]
        return torch.stack(found, dim=1)

    found, kept = trial.rows(source, occlusion_transform(args, trial.network), row)
    shares = found.mean(dim=0).view(args.exp_count, -1).tolist()
    names = [f"{h}x{w}" for h, w in grids]
    results = {run: dict(zip(names, part, strict=True)) for run, part in enumerate(shares)}
    for run, part in results.items():
        log.info(f"run {run}: top-1 of shuffled blocks { ({name: round(share, 4) for name, share in part.items()}) }")
    trial.write(source.name, {"shuffled": results, "images": len(kept)})


def salience(args: argparse.Namespace, world: World) -> None:
    """The strongest share of one head's attention is removed (foreground), or all but it."""
    trial = Trial(args, world, "eval_salience")
    source = open_test_images(args, trial.classifier.classes)
    looking = attentive_network(args, trial, "DINO's ViT-S/16, head 1")
    modes = {"foreground": True, "background": False}
    if args.drop_best is not None:
        modes = {name: best for name, best in modes.items() if best == args.drop_best}

    def row(_, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        maps = attention_of(looking, images)
        if args.attention_head >= maps.shape[1]:
            raise UsageError(f"--attention_head {args.attention_head}: there are {maps.shape[1]}, counted from 0")
        flat = maps[:, args.attention_head].flatten(1)
        masks = [
            visible(flat, share, best).view_as(maps[:, 0]) for best in modes.values() for share in args.drop_lambda
        ]
        seen = [images * enlarged(mask, images.shape[-2:]) for mask in masks]
        trial.show(*seen)
        right = [hits(trial.classifier(image).argmax(dim=1), labels) for image in seen]
        removed = [1 - mask.float().mean(dim=(1, 2)) for mask in masks]
        return torch.stack([column.float() for pair in zip(right, removed, strict=True) for column in pair], dim=1)

    found, kept = trial.rows(source, occlusion_transform(args, trial.network), row)
    pairs = found.mean(dim=0).view(len(modes), len(args.drop_lambda), 2).tolist()
    results = {}
    for mode, part in zip(modes, pairs, strict=True):
        results[mode] = {
            str(share): {"accuracy": a, "removed": r} for share, (a, r) in zip(args.drop_lambda, part, strict=True)
        }
        said = ", ".join(f"{share}: ({a:.4f}, {r:.4f})" for share, (a, r) in zip(args.drop_lambda, part, strict=True))
        log.info(f"{mode} removed, share of attention: (top-1, share of patches) {said}")
    trial.write(source.name, {"salience": results, "images": len(kept)})


def whole_blocks(crop: int, grid: Sequence[int], option: str) -> None:
    if min(grid) < 1 or any(crop % blocks for blocks in grid):
        raise UsageError(f"{option} {' '.join(map(str, grid))}: --crop_size {crop} is not so many whole blocks")


def occlusion_transform(args: argparse.Namespace, network: Network) -> Callable:
    return eval_transform(*crop_of(args, network), "bicubic" if args.bicubic_resize else "bilinear")


class Exactly:
    """PIL RGB -> (3, size, size) in [0, 1]; an image of another size is none of these."""

    def __init__(self, size: int):
        self.size = size

    def __call__(self, image) -> torch.Tensor:
        if image.size != (self.size, self.size):
            raise BadImage("image", f"{image.size[0]} x {image.size[1]} pixels instead of {self.size} x {self.size}")
        return transforms.functional.to_tensor(image)
