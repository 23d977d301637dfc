"""Pictures of where a vision transformer looks: the class token's attention to every patch in the last block.

    python visualize_attention.py --pretrained_weights checkpoint.pth --image_path photo.jpg --threshold 0.6
    python visualize_attention.py --pretrained_weights checkpoint.pth            on the bundled photographs
    python visualize_attention.py --pretrained_weights checkpoint.pth --color_heads --image_size 960 960

For every image: ``img.png`` (what the network saw), ``attn-head<j>.png`` for each head, with ``--threshold`` also
``mask_th<threshold>_head<j>.png`` (the patches that hold this share of the head's attention), and ``sheet.png``, a
contact sheet of them. With ``--color_heads`` also ``heads.png``, every patch in the colour of the head that looks at
it most (Mugs, 2203.14415), which wants 50 patches a side or more. Of two class tokens (UDI) the second has files of its
own, ``attn-cls+-head<j>.png``, ``mask-cls+_th<threshold>_head<j>.png`` and ``heads-cls+.png``, and its own rows below.
Several images get a folder each; of those in a folder an unreadable one is left out, and the script ends with exit code
1 and its name. What this script wrote is marked as such inside the file, so that a folder of images may hold
--output_dir. DINO (2104.14294), figures 1 and 3; its script of this name.
"""

import argparse
from pathlib import Path

import numpy as np
import torch

from data.decode import BadImage, reading_from
from data.pictures import save_picture
from data.preprocess import to_pixels
from evaluation.attention import (
    attention_maps,
    attention_sheet,
    blended,
    bright_colour,
    check_has_attention,
    class_token_names,
    coloured_heads,
    enlarge,
    heat,
    keep_mass,
    stretched,
)
from evaluation.features import evaluating
from evaluation.image_files import add_file_arguments, image_files, read_image, refuse_unreadable, result_folders
from evaluation.network import add_network_arguments, network_from_options, parse_network_args
from utils import Parser, UsageError, check_writable, escape, init_world, log, make_folder, run_cli

HEADS_THRESHOLD = 0.6  # share of a head's attention that is painted in its colour


def visualise(
    model: torch.nn.Module, image: torch.Tensor, folder: Path, threshold: float | None, color_heads: bool = False
) -> None:
    """All pictures of one normalised image (3, height, width), written to ``folder``."""
    patch, sheets = model.patch_size, []
    height, width = (size - size % patch for size in image.shape[-2:])
    seen = image[:, :height, :width].cpu()
    photograph = to_pixels(seen)
    save_picture(stretched(seen), folder / "img.png")
    for token, name in enumerate(class_token_names(model)):
        maps, mark = attention_maps(model, image[None], token)[0].float().cpu(), f"-{name}" if token else ""
        for head, values in enumerate(enlarge(maps, patch)):
            save_picture(heat(values), folder / f"attn{mark}-head{head}.png")
        masks = () if threshold is None else enlarge(keep_mass(maps, threshold), patch).numpy()
        masked = [blended(photograph, mask, bright_colour(head)) for head, mask in enumerate(masks)]
        for head, picture in enumerate(masked):
            save_picture(picture, folder / f"mask{mark}_th{threshold}_head{head}.png")
        if color_heads:
            picture = coloured_heads(photograph, maps, HEADS_THRESHOLD if threshold is None else threshold)
            save_picture(picture, folder / f"heads{mark}.png")
        sheets.append(attention_sheet(photograph, maps, masked, name))
    save_picture(np.concatenate(sheets), folder / "sheet.png")


def refuse_to_overwrite(files: list[Path], folders: list[Path]) -> None:
    """Raise UsageError for an image that has the place and the name of a picture that will be written."""
    places = {folder.resolve() for folder in folders}
    for file in files:
        ours = file.name in ("img.png", "sheet.png", "heads.png")
        ours = ours or file.name.startswith(("attn-", "mask-", "mask_", "heads-"))
        if ours and file.parent.resolve() in places:
            raise UsageError(
                f"--output_dir {escape(file.parent)}: {escape(file.name)} is an image to look at; choose another folder"
            )


def get_args_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="visualize_attention.py", description="Pictures of a vision transformer's attention.")
    add_network_arguments(parser.add_argument_group("which network"))
    group = parser.add_argument_group("which images")
    add_file_arguments(group, "--data_path")
    add = group.add_argument
    add("--image_size", default=[480, 480], nargs="+", type=int, help="height and width, or one number: shorter side")
    add = parser.add_argument_group("pictures").add_argument
    add("--threshold", default=None, type=float, help="also show the patches that hold this share of the attention")
    heads = f"also one picture of all heads, each in a colour, of --threshold (left out: {HEADS_THRESHOLD})"
    add("--color_heads", action="store_true", help=heads)
    add("--output_dir", default=".", help="where pictures are written")
    add("--device", default="auto", choices=("auto", "cpu", "cuda"), help="auto: the GPU if there is one")
    return parser


def main() -> None:
    args = parse_network_args(get_args_parser())
    if len(args.image_size) > 2 or min(args.image_size) < 1:
        raise UsageError(f"--image_size {' '.join(map(str, args.image_size))}: one or two positive numbers of pixels")
    if args.threshold is not None and not 0 < args.threshold <= 1:
        raise UsageError(f"--threshold {args.threshold}: a share of the attention, above 0 and at most 1")
    check_writable(Path(args.output_dir))
    world = init_world(args.device)
    files = image_files(args.image_path)
    model = network_from_options(args).model.to(world.device)
    check_has_attention(model)
    if min(args.image_size) < model.patch_size:
        raise UsageError(f"--image_size {min(args.image_size)}: smaller than a patch ({model.patch_size} pixels)")
    unreadable, folders = [], result_folders(files, args.output_dir)
    refuse_to_overwrite(files, folders)
    with evaluating(model):
        for file, folder in zip(files, folders, strict=True):
            try:
                image = read_image(file, args.image_size, reading_from(args))
            except BadImage as error:
                unreadable.append(error)
                continue
            make_folder(folder)
            visualise(model, image.to(world.device), folder, args.threshold, args.color_heads)
            log.info(f"{escape(file)} -> {escape(folder)}/")
    refuse_unreadable(unreadable, args.image_path, len(files))


if __name__ == "__main__":
    run_cli(main)
