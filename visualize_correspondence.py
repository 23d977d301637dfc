"""Which place of an image does a network find again in another image, or in another view of the same?

    python visualize_correspondence.py --pretrained_weights checkpoint.pth --sample_type instance     photographs
    python visualize_correspondence.py --pretrained_weights checkpoint.pth --data_path /imagenet/val --show_pics 20
    python visualize_correspondence.py --pretrained_weights swin.pth --measure_correspondence --data_path /imagenet/val
    python visualize_correspondence.py --pretrained_weights swin.pth --vis_correspondence --vis_attention \\
        --image_path photo.jpg

Without a switch as in iBOT (2111.07832, section 4.3): two images of a class, or two views of each image with the share
of patches that are found where they are. With a switch as in EsViT (2106.09785, section 4.2), for every backbone here:
a pair of views with the ten most similar places, the accuracy over mirrored images, or where one place looks. Pictures
go to --output_dir, EsViT's into a folder for every image.
"""

import argparse
from pathlib import Path

import torch
from PIL import Image

from data.bundled import photograph_paths
from data.datasets import open_source
from data.decode import BadImage, add_reading_arguments, reading_from
from data.named import NamedFiles
from data.source import Source
from evaluation.correspondence import (
    PAIRS,
    draw_attention,
    draw_pair,
    in_one_folder,
    measure,
    normalised,
    random_view,
    sample_pairs,
    write_measure,
)
from evaluation.features import evaluating
from evaluation.images import test_place
from evaluation.network import add_network_arguments, network_from_options, parse_network_args, second_network
from models.checkpoints import Network
from randomness import counted_seed
from utils import Parser, UsageError, World, bool_flag, check_writable, escape, init_world, log, make_folder, run_cli

SWITCHES = ("vis_attention", "vis_correspondence", "measure_correspondence")


def get_args_parser() -> Parser:
    parser = Parser(prog="visualize_correspondence.py", description="Places of images that a network takes for one.")
    add_network_arguments(parser.add_argument_group("which network"))
    parser.add_argument("--learning", default="ssl", help="EsViT's: anything but ssl reads the weights under `model`")
    group = parser.add_argument_group("which images")
    add = group.add_argument
    add("--data_path", default=None, help="images in class folders, or below val/; left out: bundled photographs")
    add("--image_path", default=None, help="image of --vis_correspondence, --vis_attention; left out: a photograph")
    add("--image_path2", default=None, help="a second image; left out: another view of the first")
    add("--img_size", "--image_size", default=224, type=int, help="pixels of both sides")
    add_reading_arguments(group)
    add = parser.add_argument_group("iBOT's pairs").add_argument
    add("--sample_type", default="class", choices=("class", "instance"), help="two images of a class, or two views")
    add("--topk", default=12, type=int, help="lines that are drawn")
    add("--show_pics", "--show_nums", default=100, type=int, help="pairs, at most")
    add("--show_with_attn", default=False, type=bool_flag, nargs="?", const=True, help="attention below the images")
    add("--eval_radius", default=0, type=int, help="rows and columns that a match may be off")
    add("--attention_weights", default=None, metavar="FILE", help="what ranks patches; left out: the network itself")
    add("--batch_size", default=2, type=int, help="accepted and ignored: a pair at a time")
    add = parser.add_argument_group("EsViT's analyses").add_argument
    for switch in SWITCHES:
        add(f"--{switch}", action="store_true")
    add("--query", default=9, type=int, help="place whose attention is shown, counted row by row")
    add("--threshold", default=0.6, type=float, help="share of the attention that a mask holds")
    add("--use_saved_aug", action="store_true", help="take the views that an earlier run has written")
    add("--num_workers", default=10, type=int, help="accepted and ignored")
    parser.add_argument("--seed", default=8, type=int, help="of the views")
    parser.add_argument("--output_dir", "--output_path", default="pics", help="where pictures are written")
    parser.add_argument(
        "--device", default="auto", choices=("auto", "cpu", "cuda"), help="auto: the GPU if there is one"
    )
    return parser


def check_arguments(args: argparse.Namespace) -> None:
    for name in ("img_size", "topk", "show_pics"):
        if getattr(args, name) < 1:
            raise UsageError(f"--{name} {getattr(args, name)}: must be at least 1")
    for name in ("eval_radius", "query"):
        if getattr(args, name) < 0:
            raise UsageError(f"--{name} {getattr(args, name)}: must not be negative")
    if not 0 < args.threshold <= 1:
        raise UsageError(f"--threshold {args.threshold}: a share of the attention, above 0 and at most 1")
    check_writable(Path(args.output_dir))


def images_of(args: argparse.Namespace) -> Source:
    if args.data_path is not None:
        return open_source(test_place(args.data_path), split="val").read_as(reading_from(args))
    if args.sample_type == "class" and not args.measure_correspondence:
        raise UsageError("--sample_type class: needs classes; pass --data_path, or --sample_type instance")
    paths = photograph_paths()
    return NamedFiles(paths[0].parent, [path.name for path in paths], "photographs", reading_from(args))


def one_image(path: str | None, args: argparse.Namespace) -> tuple[str, Image.Image]:
    """Its name without the suffix, and the image."""
    file = photograph_paths()[0] if path is None else Path(path)
    try:
        return file.stem, NamedFiles(file.parent, [file.name], "images", reading_from(args)).pil(0)
    except BadImage as error:
        raise UsageError(f"{error.name}: cannot be read as an image ({error.reason}); mend or remove it") from error


def draw_correspondence(args: argparse.Namespace, network: Network, world: World) -> None:
    name, image = one_image(args.image_path, args)
    other = one_image(args.image_path2, args)[1] if args.image_path2 else image
    folder = Path(args.output_dir) / name / f"seed{args.seed}"
    make_folder(folder)
    if args.use_saved_aug:
        saved = [str(folder / f"img{number}.png") for number in (1, 2)]
        views = [saved_view(one_image(path, args)[1], args.img_size) for path in saved]
    else:
        scales = ((1.0, 1.0), (0.4, 0.6))
        views = [
            random_view(picture, args.img_size, scale, counted_seed(args.seed, number), colours=number > 0).pixels
            for number, (picture, scale) in enumerate(zip((image, other), scales, strict=True))
        ]
        in_one_folder(views, folder)
    pairs = draw_pair(network, tuple(view.to(world.device) for view in views), folder, args.seed)
    for number, pair in enumerate(pairs):
        log.info(f"pair {number}: place {pair['first']} -> {pair['second']}, similarity {pair['similarity']:.4f}")
    log.info(f"{escape(name)} -> {escape(folder)}/")


def saved_view(image: Image.Image, size: int) -> torch.Tensor:
    if image.size != (size, size):
        raise UsageError(f"--use_saved_aug: views of {image.size[0]} x {image.size[1]} pixels, --img_size is {size}")
    return normalised(image)


def main() -> None:
    args = parse_network_args(get_args_parser())
    check_arguments(args)
    world = init_world(args.device)
    if args.learning != "ssl":
        args.checkpoint_key = "model"
    network = network_from_options(args)
    model = network.model.to(world.device).requires_grad_(False)
    if args.img_size < network.arguments.get("patch_size", 1):
        raise UsageError(f"--img_size {args.img_size}: smaller than a patch ({network.arguments['patch_size']} pixels)")
    with evaluating(model):
        if args.vis_correspondence:
            draw_correspondence(args, network, world)
        if args.vis_attention:
            name, image = one_image(args.image_path, args)
            folder = Path(args.output_dir) / name
            view = normalised(image.resize((args.img_size,) * 2, Image.Resampling.BICUBIC)).to(world.device)
            bits = draw_attention(network, view, folder, args.query, args.threshold)
            log.info(f"heads by entropy in bits: {', '.join(f'{value:.2f}' for value in bits)} -> {escape(folder)}/")
        if args.measure_correspondence:
            source = images_of(args)
            found = measure(network, source, args.img_size, args.seed, world.device)
            log.info(", ".join(f"{key} {value:.4g}" for key, value in found.items()) + f" (best {PAIRS} pairs)")
            write_measure(
                found, Path(args.output_dir) / (Path(args.data_path).name if args.data_path else "photographs")
            )
        if not any(getattr(args, switch) for switch in SWITCHES):
            sample(args, network, world)


def sample(args: argparse.Namespace, network: Network, world: World) -> None:
    source = images_of(args)
    looking = network.model if hasattr(network.model, "get_last_selfattention") else None
    if args.attention_weights:
        looking = second_network(args.attention_weights).model.to(world.device).eval()
    make_folder(Path(args.output_dir))
    options = {"kind": args.sample_type, "size": args.img_size, "topk": args.topk, "radius": args.eval_radius}
    options |= {"seed": args.seed, "most": args.show_pics, "draw": True, "with_attention": args.show_with_attn}
    found = sample_pairs(network, source, Path(args.output_dir), **options, looking=looking, device=world.device)
    accuracy = (
        "" if found.accuracy is None else f", {found.accuracy:.2f} % of patches are found within {args.eval_radius}"
    )
    log.info(f"{found.pairs} pairs -> {escape(args.output_dir)}/{accuracy}")


if __name__ == "__main__":
    run_cli(main)
