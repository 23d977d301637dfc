"""Robustness: what is left of a linear classifier's accuracy on images that are masked, mixed, shuffled or corrupted.

    python eval_robustness/eval_robustness.py masked --pretrained_weights checkpoint.pth --load_from linear.pth \\
        --data_path /imagenet --masking_ratio 0.1 0.3 0.5 0.7 --attention_weights dino_vitbase16.pth
    python eval_robustness/eval_robustness.py combine --checkpoint_backbone checkpoint.pth \\
        --checkpoint_linear linear.pth --output_file combined.pth
    python eval_robustness/eval_robustness.py backgrounds --pretrained_weights combined.pth --data_path /bg_challenge

What there is: masked, combine, backgrounds, challenge, occlusion, salience, shuffle, imagenet_a, imagenet_c. Protocols
and published numbers: README.md in this folder.
"""

import argparse
import sys
from collections.abc import Callable, Sequence

from evaluation.classifier import add_head_arguments, write_combined
from evaluation.images import add_loading_arguments, check_loading_arguments
from evaluation.network import add_network_arguments, add_process_arguments
from evaluation.robust_run import TENTHS, masked, occlusion, salience, shuffle
from evaluation.robust_sets import backgrounds, challenge, imagenet_a, imagenet_c
from evaluation.sets import SKIP_HELP
from models.esvit_configs import words_of
from utils import Parser, UsageError, bool_flag, init_world, keep_large_blocks, run_cli

GRIDS = ((2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (14, 14), (16, 16))
IMAGENET_HELP = "folder, list (.txt), zip or tar archives of the test images, or with val/ or test/ below"


def add_common(parser: argparse.ArgumentParser, data_help: str, batch_size: int = 128) -> Callable:
    """What every test of a classifier is told; the rest is added with what is returned."""
    add_network_arguments(parser.add_argument_group("what is evaluated"))
    add_head_arguments(parser.add_argument_group("its linear head"))
    data = parser.add_argument_group("data")
    data.add_argument("--data_path", "--data-path", required=True, help=data_help)
    data.add_argument("--crop_size", default=224, type=int, help="pixels that the network sees")
    add_loading_arguments(data, batch_size)
    data.add_argument("--skip_unreadable", action="store_true", help=SKIP_HELP)
    parser.add_argument("--output_dir", default=".", help="where eval_<name>.json is written")
    add_process_arguments(parser.add_argument_group("processes"))
    return data.add_argument


def add_resize(add: Callable) -> None:
    add("--resize_size", default=None, type=int, help="shorter side before the crop; left out: crop * 256 / 224")


def add_attention(parser: argparse.ArgumentParser, arch: str) -> None:
    add = parser.add_argument_group("where to look").add_argument
    add("--attention_weights", default=None, metavar="FILE", help="network that says it; left out: the evaluated one")
    add("--attention_arch", default=None, help=f"of a file that does not tell; published with {arch}")
    add("--attention_patch_size", default=None, type=int, help="likewise")
    add("--attention_key", default="teacher", help="as --checkpoint_key")


def add_blocks(add: Callable) -> None:
    add("--exp_count", default=1, type=int, help="how often everything is drawn anew")
    add("--seed", default=1, type=int, help="of what is drawn")
    add("--bicubic_resize", action="store_true", help="resize bicubically; left out: bilinearly")
    add("--test_image", action="store_true", help="draw what the first images became")


def get_args_parser() -> Parser:
    parser = Parser(prog="eval_robustness.py", description="Robustness of a linear classifier on a frozen network.")
    chosen = parser.add_subparsers(dest="what", required=True, metavar="WHAT")

    def command(name: str, run: Callable, text: str) -> Parser:
        sub = chosen.add_parser(name, help=text, description=text)
        sub.set_defaults(run=run)
        return sub

    sub = command("masked", masked, "what draws most attention is painted over")
    add = add_common(sub, IMAGENET_HELP)
    add_resize(add)
    add("--masking_ratio", default=[0.3], nargs="+", type=float, help="shares of the patches; attention is shared")
    add("--test_image", action="store_true", help="draw what the first images became")
    for name, kind in (("lr", float), ("epochs", int), ("val_freq", int), ("subset", int), ("num_labels", int)):
        add(f"--{name}", default=None, type=kind, help="accepted and ignored: nothing is trained")
    add_attention(sub, "DINO's ViT-B/16")

    sub = command("combine", None, "a backbone and its linear head in one file")
    add = sub.add_argument
    add("--checkpoint_backbone", "--checkpoint_pretraining", required=True, metavar="FILE", help="of pretraining")
    add("--checkpoint_linear", required=True, metavar="FILE", help="of eval_linear.py; of several heads the best")
    add("--output_file", required=True, metavar="FILE", help="what is written")
    add("--checkpoint_key", default="teacher", help="which network of the first file")

    for name, run, text in (
        ("backgrounds", backgrounds, "ImageNet-9: other backgrounds, or none"),
        ("challenge", challenge, "ImageNet-9: every foreground on every background"),
    ):
        sub = command(name, run, text)
        add = add_common(sub, "folder bg_challenge: <variant>/val/<nine classes>/", batch_size=64)
        add("--in9", action="store_true", help="the head has nine classes, not ImageNet's")

    sub = command("occlusion", occlusion, "random blocks are dropped, a tenth after the other")
    add = add_common(sub, IMAGENET_HELP)
    add_resize(add)
    add_blocks(add)
    add("--shuffle_size", default=None, type=int, help="blocks a side; left out: 14")
    add("--random_offset_drop", action="store_true", help="blocks do not lie on the grid, but 8 pixels beside it")

    sub = command("salience", salience, "what one head attends to is removed, or all but it")
    add = add_common(sub, IMAGENET_HELP)
    add_resize(add)
    add_blocks(add)
    add("--drop_lambda", default=list(TENTHS), nargs="+", type=float, help="shares of the attention")
    add("--drop_best", default=None, type=bool_flag, help="true: only remove the foreground; false: the background")
    add("--attention_head", default=1, type=int, help="counted from 0")
    add_attention(sub, "DINO's ViT-S/16")

    sub = command("shuffle", shuffle, "blocks of an image change places")
    add = add_common(sub, IMAGENET_HELP)
    add_resize(add)
    add_blocks(add)
    for number, letter in enumerate("hw"):
        add(
            f"--shuffle_{letter}",
            default=[grid[number] for grid in GRIDS],
            nargs="+",
            type=int,
            help="blocks of a grid",
        )

    sub = command("imagenet_a", imagenet_a, "ImageNet-A: natural adversarial examples, and calibration")
    add_resize(add_common(sub, "folder of 200 classes"))
    sub = command("imagenet_c", imagenet_c, "ImageNet-C: 19 corruptions in 5 severities")
    add_common(sub, "folder <corruption>/<severity>/<class>/")
    return parser


def check_arguments(args: argparse.Namespace) -> None:
    check_loading_arguments(args)
    for name in ("masking_ratio", "drop_lambda"):
        for value in getattr(args, name, ()):
            if not 0 < value <= 1 or (name == "masking_ratio" and value == 1):
                raise UsageError(f"--{name} {value}: a share, above 0 and at most 1")
    if getattr(args, "exp_count", 1) < 1:
        raise UsageError(f"--exp_count {args.exp_count}: must be at least 1")
    if getattr(args, "attention_head", 0) < 0:
        raise UsageError(f"--attention_head {args.attention_head}: heads are counted from 0")


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The options of a command line, with what --cfg says of the network among them."""
    parser, argv = get_args_parser(), list(sys.argv[1:] if argv is None else argv)
    (commands,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    if argv and argv[0] in commands.choices:
        of_file, rest, arch = words_of(argv[1:], commands.choices[argv[0]]._option_string_actions)
        argv = [argv[0], *of_file, *rest, *arch]
    return parser.parse_args(argv)


def main() -> None:
    args = parse_arguments()
    if args.what == "combine":
        init_world("cpu")
        write_combined(args.checkpoint_backbone, args.checkpoint_linear, args.output_file, args.checkpoint_key)
        return
    check_arguments(args)
    keep_large_blocks()
    args.run(args, init_world(args.device, args.dist_url, args.backend))


if __name__ == "__main__":
    run_cli(main)
