"""Everything but training: what would be built, and what it would see; what it needs is in planner.py."""

from collections import Counter
from pathlib import Path

import numpy as np

from data.datasets import BadImage
from data.pictures import save_picture
from randomness import Permutation
from utils import autocast, log, make_folder

SCANNED = 64


def dry_run(run, pieces) -> None:
    """Print parameter counts and a scan of the data; draw what the method shows of a batch."""
    piece = next(pieces)
    for name, reason in piece["bad"]:
        log.error("unreadable image, replaced by another: %s (%s)", name, reason)
    describe_parameters(run)
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
