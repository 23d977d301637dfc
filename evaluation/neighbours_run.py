"""From a Mugs run's checkpoint and some images to the contact sheet of their neighbours."""

import argparse
from pathlib import Path

import torch
from PIL import Image

from data.datasets import open_training
from data.decode import MAX_IMAGE_PIXELS, BadImage, Reading, reading_from
from data.pictures import save_picture
from data.preprocess import eval_transform
from data.published import place_from
from data.source import Source
from evaluation.features import evaluating
from evaluation.image_files import image_files, read_pil, refuse_unreadable
from evaluation.neighbours import Found, Rows, contact_sheet, mean_tokens, nearest_rows, stored_rows
from evaluation.network import network_from_options
from evaluation.sets import crop_and_resize
from models.checkpoints import Network
from models.vit import VisionTransformer
from utils import UsageError, World, check_writable, escape, log, make_folder

MOST = 40  # rows of a sheet
BATCH = 32
UNREADABLE = (225, 225, 225)  # instead of a stored image that is gone


def check_options(args: argparse.Namespace) -> None:
    """Raise UsageError for values that cannot work, before anything is read."""
    for name in ("topk", "crop_size", "resize_size", "patch_size"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UsageError(f"--{name} {value}: must be at least 1")
    if not args.pretrained_weights:
        raise UsageError("--pretrained_weights: pass a checkpoint of main_pretrain.py --method mugs")
    check_writable(Path(args.output_dir))


def draw_neighbours(args: argparse.Namespace, world: World) -> None:
    """Write neighbours.png to --output_dir."""
    rows = stored_rows(args.pretrained_weights, args.checkpoint_key)
    network = network_from_options(args)
    check_fits(network, rows)
    source = run_images(rows, args.data_path)
    files = image_files(args.image_path)
    if len(files) > MOST:
        log.info(f"the first {MOST} of {len(files)} images are shown")
    images, names, unreadable = read_images(files[:MOST], reading_from(args))
    if images:
        cosines, found = nearest_rows(rows, queries_of(network, images, args, world), args.topk)
        sheet = [
            (Found(image, [name]), [stored(source, *pair) for pair in zip(*columns, strict=True)])
            for image, name, *columns in zip(images, names, found.tolist(), cosines.tolist(), strict=True)
        ]
        written = (
            f"{len(rows.keys)} of {rows.size} rows are written" if len(rows.keys) < rows.size else f"{rows.size} rows"
        )
        title = f"{network.label}: nearest rows of the {args.checkpoint_key}'s memory ({written})"
        make_folder(Path(args.output_dir))
        save_picture(contact_sheet(title, sheet), Path(args.output_dir) / "neighbours.png")
        log.info(f"{title} -> {escape(Path(args.output_dir) / 'neighbours.png')}")
    refuse_unreadable(unreadable, args.image_path, len(files))


def check_fits(network: Network, rows: Rows) -> None:
    if not isinstance(network.model, VisionTransformer) or network.model.embed_dim != rows.keys.shape[1]:
        raise UsageError(f"{network.label}: rows of the memory have {rows.keys.shape[1]} numbers, its tokens do not")


def run_images(rows: Rows, data_path: str | None) -> Source:
    """The images of the run. Raises UsageError when they are others."""
    plain = {"dataset": "", "zip_mode": False, "tsv_mode": False, "split": "train", "subset": None, "data_path": None}
    plain |= {"exif": False, "max_image_pixels": MAX_IMAGE_PIXELS}
    options = argparse.Namespace(**plain | rows.arguments)
    options.data_path = path = data_path or options.data_path
    source = open_training(place_from(options), options.subset, options.split).read_as(reading_from(options))
    if source.fingerprint != rows.data:
        given = f"--data_path {escape(path)}" if path else "--data_path left out"
        raise UsageError(f"{given}: {source.name} is not what the run was trained on; pass its own --data_path")
    return source


def read_images(files: list[Path], reading: Reading) -> tuple[list[Image.Image], list[str], list[BadImage]]:
    images, names, unreadable = [], [], []
    for file in files:
        try:
            images.append(read_pil(file, reading))
            names.append(file.name)
        except BadImage as error:
            unreadable.append(error)
    return images, names, unreadable


def queries_of(network: Network, images: list[Image.Image], args: argparse.Namespace, world: World) -> torch.Tensor:
    transform, model = eval_transform(*crop_and_resize(args, network)), network.model.to(world.device)
    batch = torch.stack([transform(image) for image in images])
    with evaluating(model):
        return torch.cat([mean_tokens(model, part.to(world.device)).cpu() for part in batch.split(BATCH)])


def stored(source: Source, index: int, cosine: float) -> Found:
    """A stored image with its cosine and its name; grey where it can no longer be read."""
    try:
        image = source.pil(index)
    except BadImage:
        image = Image.new("RGB", (1, 1), UNREADABLE)
    name = source.image_name(index)
    lines = [f"{cosine:.3f}", *name.rsplit("/", 2)[-2:]] if "/" in name else [f"{cosine:.3f}", name]
    return Found(image, lines)
