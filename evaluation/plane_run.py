"""t-SNE of a network's features: from options and images to a picture and the coordinates behind it."""

import argparse
from pathlib import Path

import numpy as np

from data.pictures import save_picture
from data.preprocess import eval_transform
from data.source import Source
from evaluation.features import extract_features, labels_of
from evaluation.plane import Layout, check_plane, embed, plane_picture, purity
from evaluation.unreadable import leave_out, readable
from models.checkpoints import Network
from utils import UsageError, World, check_writable, escape, log, make_folder, save_atomically


def check_options(args: argparse.Namespace) -> None:
    """Raise UsageError for values that cannot work, before anything is read."""
    for name in ("num_per_class", "batch_size_per_gpu", "crop_size", "resize_size", "patch_size", "window_size"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UsageError(f"--{name} {value}: must be at least 1")
    if args.num_workers < 0 or min(args.seed) < 0:
        raise UsageError(f"--num_workers {args.num_workers} --seed {min(args.seed)}: must be 0 or more")
    if len(args.seed) > 1 and args.init == "pca":
        raise UsageError("--seed: several differ only with --init random; principal components begin alike")
    check_plane(np.iinfo(int).max, args.perplexity, args.iters)
    check_writable(Path(args.output_dir))


def lay_out(
    args: argparse.Namespace, world: World, network: Network, images: Source, sides: tuple[int, int], folder: Path
) -> None:
    """Write tsne.png and tsne.npz to ``folder``. ``sides``: crop, and shorter side before it, in pixels."""
    check_plane(len(images), args.perplexity, args.iters)
    network.model.to(world.device)
    features, unreadable = extract_features(
        network.model,
        images,
        eval_transform(*sides),
        world=world,
        batch_size=args.batch_size_per_gpu,
        num_workers=args.num_workers,
        device=world.device,
    )
    leave_out(images, unreadable)
    kept = readable(len(images), unreadable)
    check_plane(len(kept), args.perplexity, args.iters)
    labels = labels_of(images)[kept].numpy()
    layouts = []
    for seed in args.seed:
        layout = embed(features, args.perplexity, args.iters, seed, args.init)
        log.info(f"seed {seed}: {summary(layout, labels)}")
        layouts.append(layout)
    panels = [
        (caption(args, seed, layout, labels), layout.points) for seed, layout in zip(args.seed, layouts, strict=True)
    ]
    make_folder(folder)
    title = f"{network.label}: {len(kept)} images of {len(images.class_names)} classes"
    save_picture(plane_picture(panels, labels, images.class_names, title), folder / "tsne.png")
    save_layouts(folder / "tsne.npz", args.seed, layouts, labels, images, kept.tolist())
    log.info(f"{escape(images.name)} -> {escape(folder / 'tsne.png')}, tsne.npz")


def summary(layout: Layout, labels: np.ndarray) -> str:
    share = 100 * purity(layout.points, labels)
    return f"{share:.1f} % of the 5 nearest points are of the same class; divergence {layout.divergence:.3f}"


def caption(args: argparse.Namespace, seed: int, layout: Layout, labels: np.ndarray) -> str:
    start = f"seed {seed}, " if args.init == "random" else ""
    return f"{start}perplexity {args.perplexity:g}; {summary(layout, labels)}"


def save_layouts(
    path: Path, seeds: list[int], layouts: list[Layout], labels: np.ndarray, images: Source, kept: list[int]
) -> None:
    """An archive that NumPy opens without pickle."""
    arrays = {
        "coordinates": np.stack([layout.points for layout in layouts]),
        "divergences": np.array([layout.divergence for layout in layouts]),
        "seeds": np.array(seeds),
        "labels": labels,
        "classes": np.array([escape(name) for name in images.class_names]),
        "images": np.array([images.image_name(index) for index in kept]),
    }

    def write(temporary: Path) -> None:
        with open(temporary, "wb") as file:
            np.savez_compressed(file, **arrays)

    try:
        save_atomically(path, write)
    except OSError as error:
        raise UsageError(f"--output_dir {path.parent}: {path.name} cannot be written: {error}") from error
