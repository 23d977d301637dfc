"""What the prototypes of a checkpoint stand for: for each the patches, or images, that it is surest of.

    python visualize_patterns.py --pretrained_weights checkpoint.pth                       on the bundled photographs
    python visualize_patterns.py --pretrained_weights checkpoint.pth --data_path /imagenet/val --type cls --show_pics 20

For the fullest clusters a picture ``c<type>_crank<rank>_cid<prototype>_top<topk>.png``: of every image the surest
patch, tinted, in its surroundings, the surest image first; what is nearly black is left out. ``memory_<type>.pth``
holds the prototype and the logit of every place. iBOT (2111.07832, section 4.3); its extract_topk_cluster.py.
"""

import argparse
from pathlib import Path

import torch

from data.bundled import photograph_paths
from data.datasets import open_source
from data.decode import reading_from
from data.named import NamedFiles
from data.source import Source
from evaluation.features import class_token, evaluating
from evaluation.images import add_loading_arguments, check_loading_arguments, test_place
from evaluation.network import add_network_arguments, add_process_arguments, network_from_options, parse_network_args
from evaluation.patterns import draw_clusters, fill_bank
from evaluation.prototypes import Prototypes
from evaluation.sets import SKIP_HELP
from models.reading import read_backbone
from utils import Parser, UsageError, escape, init_world, log, make_folder, run_cli


def get_args_parser() -> Parser:
    parser = Parser(prog="visualize_patterns.py", description="Pictures of what prototypes stand for.")
    add_network_arguments(parser.add_argument_group("which network"))
    group = parser.add_argument_group("which images")
    add = group.add_argument
    add("--data_path", default=None, help="folder, list or archive of images; left out: the bundled photographs")
    add("--img_size", default=224, type=int, help="pixels, cut from a shorter side of 256 / 224 of it")
    add_loading_arguments(group)
    add("--skip_unreadable", action="store_true", help=SKIP_HELP)
    add = parser.add_argument_group("pictures").add_argument
    add("--type", default="patch", choices=("patch", "cls"), help="prototypes of patches, or of whole images")
    add("--topk", default=196, type=int, help="patches or images of a picture")
    add("--show_pics", default=100, type=int, help="clusters that are drawn, the fullest first")
    add("--patch_window", default=5, type=int, help="patches a side that are shown around one; odd")
    add("--out_dim", "--chunks", default=None, type=int, help="accepted and ignored: the head tells")
    add("--output_dir", "--save_path", default="patterns", help="where pictures and memory_<type>.pth are written")
    add_process_arguments(parser.add_argument_group("processes"))
    return parser


def check_arguments(args: argparse.Namespace) -> None:
    check_loading_arguments(args)
    for name in ("topk", "show_pics", "img_size"):
        if getattr(args, name) < 1:
            raise UsageError(f"--{name} {getattr(args, name)}: must be at least 1")
    if args.patch_window < 1 or args.patch_window % 2 == 0:
        raise UsageError(f"--patch_window {args.patch_window}: an odd number of patches, so that one is in the middle")
    if not args.pretrained_weights:
        raise UsageError("--pretrained_weights: prototypes are a checkpoint's; name one")


def images_of(args: argparse.Namespace) -> Source:
    if args.data_path is not None:
        return open_source(test_place(args.data_path), split="val").read_as(reading_from(args))
    paths = photograph_paths()
    return NamedFiles(paths[0].parent, [path.name for path in paths], "photographs", reading_from(args))


def main() -> None:
    args = parse_network_args(get_args_parser())
    check_arguments(args)
    world = init_world(args.device, args.dist_url, args.backend)
    network = network_from_options(args)
    network.model.to(world.device).requires_grad_(False)
    if not hasattr(network.model, "get_intermediate_layers"):
        raise UsageError(f"{network.label}: has no tokens of places; use one of our transformers")
    head = Prototypes(*read_backbone(args.pretrained_weights, args.checkpoint_key), patches=args.type == "patch").eval()
    with evaluating(network.model), torch.no_grad():
        width = class_token(network.model, torch.zeros(1, 3, args.img_size, args.img_size, device=world.device)).shape[
            1
        ]
    if width != head.in_dim:
        raise UsageError(f"{args.pretrained_weights}: a head on {head.in_dim} numbers, {network.label} has {width}")
    source, patches = images_of(args), args.type == "patch"
    options = {"batch_size": args.batch_size_per_gpu, "num_workers": args.num_workers, "world": world}
    options |= {"skip_unreadable": args.skip_unreadable, "patches": patches, "size": args.img_size}
    bank = fill_bank(network, head, source, **options)
    if world.rank:
        return
    folder = Path(args.output_dir)
    make_folder(folder)
    bank.save(folder / f"memory_{args.type}.pth")
    shown = {"patches": patches, "size": args.img_size, "patch_window": args.patch_window}
    drawn = draw_clusters(bank, source, folder, **shown, topk=args.topk, most=args.show_pics)
    used = int((bank.per_cluster > 0).sum())
    log.info(f"{used} of {head.prototypes} prototypes are used; {len(drawn)} are drawn -> {escape(folder)}/")


if __name__ == "__main__":
    run_cli(main)
