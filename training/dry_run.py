"""Everything but training: what would be built, what it would need, what it would see."""

from collections import Counter
from pathlib import Path

import numpy as np
import torch

from data.datasets import BadImage
from data.loader import TrainLoader, to_device_ahead
from randomness import Permutation
from utils import World, autocast, batch_dtype, log, make_folder
from visualize_attention import save_picture

SCANNED = 64


def dry_run(run, pieces) -> None:
    """Print parameter counts, predicted memory and a scan of the data; draw what the method shows of a batch."""
    piece = next(pieces)
    for name, reason in piece["bad"]:
        log.error("unreadable image, replaced by another: %s (%s)", name, reason)
    describe_parameters(run)
    describe_memory(run)
    scan_images(run.source)
    sizes = Counter(crop.shape[-1] for crop in piece["crops"])
    crops = " + ".join(f"{count} x {size}" for size, count in sizes.items())
    log.info("first batch: %d images, crops of %s pixels", len(piece["crops"][0]), crops)
    if run.world.rank == 0:
        folder = Path(run.args.output_dir)
        make_folder(folder)
        with autocast(run.args.precision, run.world.device):
            for name, picture in run.method.pictures(piece, run.clock(0, 0, piece["first_sample"])):
                save_picture(picture, folder / f"{name}.png")
                log.info("picture: %s", folder / f"{name}.png")


def describe_parameters(run) -> None:
    for key, part in run.method.checkpoint_parts().items():
        parameters = list(part.parameters()) if hasattr(part, "parameters") else []
        total = sum(p.numel() for p in parameters)
        trained = sum(p.numel() for p in parameters if p.requires_grad)
        if total:
            log.info("parameters of the %s: %.2f M, %.2f M trained", key, total / 1e6, trained / 1e6)


def describe_memory(run) -> None:
    """Weights, gradients and moments are counted; activations are measured on two images and scaled."""
    weights = sum(t.numel() * t.element_size() for t in (*run.method.parameters(), *run.method.buffers()))
    trained = sum(p.numel() * p.element_size() for p in run.method.parameters() if p.requires_grad)
    moments = {"adamw": 2}.get(run.args.optimizer, 1) * trained
    images = run.args.batch_size_per_gpu // run.args.accum_iter
    measured = min(2, images)
    per_image = saved_bytes(run, measured) / measured
    parts = {"weights": weights, "gradients": trained, "optimiser": moments, "activations": per_image * images}
    shown = ", ".join(f"{name} {value / 2**20:.0f}" for name, value in parts.items())
    log.info("predicted memory per process: about %.0f MB (%s)", sum(parts.values()) / 2**20, shown)
    log.info("activations: %.1f MB per image, %d images at a time", per_image / 2**20, images)


def saved_bytes(run, images: int) -> int:
    """Bytes that the backward pass of ``images`` images keeps alive, parameters not counted."""
    args, alone = run.args, World(0, 1, 0, run.world.device)
    loader = TrainLoader(
        run.source,
        type(run.method).views(args),
        batch_size=images,
        world=alone,
        seed=args.seed,
        epochs=1,
        num_workers=0,
    )
    (small,) = to_device_ahead([loader.piece(0, 0)], alone.device, batch_dtype(args.precision))
    parameters = {p.untyped_storage().data_ptr() for p in run.method.parameters()}
    seen: dict[int, int] = {}

    def count(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    keep = torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor)
    with keep, autocast(run.args.precision, run.world.device):
        run.method(small, run.clock(0, 0))
    return sum(seen.values())


def scan_images(source) -> None:
    """Open some images of every part of the data."""
    count = min(SCANNED, len(source))
    sizes, bad = [], []
    for index in Permutation(len(source), 0)[np.arange(count)].tolist():
        try:
            sizes.append(source.array(index).shape[:2])
        except BadImage as error:
            bad.append(f"{error.name} ({error.reason})")
    log.info("data: %s; opened %d of %d, %d unreadable", source.name, count, len(source), len(bad))
    for line in bad[:5]:
        log.info("  unreadable: %s", line)
    if sizes:
        heights, widths = np.array(sizes).T
        log.info("  median size %d x %d pixels, smallest side %d", *np.median(sizes, axis=0), min(*heights, *widths))
