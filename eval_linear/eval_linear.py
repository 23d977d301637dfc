"""Linear classifiers on a frozen network: many learning rates, numbers of blocks and poolings in one run.

    torchrun --nproc_per_node=8 eval_linear/eval_linear.py --pretrained_weights checkpoint.pth --data_path /imagenet
    python eval_linear/eval_linear.py --pretrained_weights checkpoint.pth --sweep_lr_only      on bundled photographs

Every image goes through the network once a step, whatever the number of heads (evaluation/linear_heads.py). DINO's
protocol (2104.14294), iBOT's sweep (2111.07832); published: DINO ViT-S/16 77.0, ViT-B/16 78.2 % top-1. More: README.md
here.
"""

import argparse
import math

from evaluation.compared import add_compare_argument, check_compare
from evaluation.linear import build_run, evaluate, train
from evaluation.linear_run import SWEEPS, report
from evaluation.network import (
    add_feature_arguments,
    add_head_argument,
    add_network_arguments,
    add_process_arguments,
    parse_network_args,
)
from evaluation.run import conduct
from evaluation.sets import add_data_arguments, check_common_arguments
from utils import Parser, UsageError, bool_flag, init_world, keep_large_blocks, run_cli


def get_args_parser() -> Parser:
    parser = Parser(prog="eval_linear.py", description="Linear classifiers on frozen features.")
    add_network_arguments(parser.add_argument_group("what is evaluated"))
    group = parser.add_argument_group("heads: one for every combination of what follows")
    add_feature_arguments(group, n_last_blocks=4, several=True)
    add_head_argument(group)
    add = group.add_argument
    add("--topk", default=None, nargs="+", type=int, help="instead: mean of so many patches that draw most attention")
    add("--reverse_top", default=False, type=bool_flag, help="of those that draw least")
    add("--lr", default=None, nargs="+", type=float, help="at 256 images per step, scaled linearly; left out: 0.001")
    add(
        "--sweep_lr_only",
        default=None,
        nargs="?",
        const=True,
        type=bool_flag,
        help="instead of --lr, those of --sweep; false: each also with its weight decays and SGD and LARS",
    )
    add("--sweep", default="ibot", choices=tuple(SWEEPS), help="45 rates from 0.0001 to 9, Mugs: 36 to 0.9 (180, 360)")
    add_data_arguments(parser.add_argument_group("data"))
    add = parser.add_argument_group("training").add_argument
    add("--epochs", default=100, type=int, help="of training; the rate falls to 0 along half a cosine")
    add("--lr_min", default=0.0, type=float, help="where the rate falls to instead; NOT scaled with the batch")
    add("--val_freq", default=1, type=int, help="epochs between tests")
    add("--num_labels", default=None, type=int, help="classes of a head; left out: those of the training images")
    add(
        "--augment",
        default="fast",
        choices=["fast", "pil", "strong"],
        help="pil: the original's pixels, bit for bit; slower; strong: Mugs's chain, RandAugment and erasing",
    )
    add(
        "--color_aug",
        default=None,
        type=bool_flag,
        help="accepted and ignored: Mugs's preset passes it, nothing reads it",
    )
    add("--seed", default=0, type=int, help="of weights, order of the images and crops")
    add("--load_from", default=None, metavar="FILE", help="continue from this file of --output_dir (or a whole path)")
    add = parser.add_argument_group("testing only").add_argument
    add("--evaluate", action="store_true", help="train nothing, test a head that is there")
    add(
        "--pretrained_linear", default=None, metavar="FILE", help="the head; left out: --pretrained_weights', the run's"
    )
    group = parser.add_argument_group("results")
    add_compare_argument(group)
    add = group.add_argument
    add("--output_dir", default=".", help="for log.txt, checkpoints and eval_linear.json; a run there is continued")
    add_process_arguments(parser.add_argument_group("processes"))
    return parser


def check_arguments(args: argparse.Namespace) -> None:
    if args.lr is not None and args.sweep_lr_only is not None:
        raise UsageError("--sweep_lr_only brings its own learning rates: leave out --lr")
    if args.reverse_top and not args.topk:
        raise UsageError("--reverse_top: turns --topk round; pass that as well")
    for lr in args.lr or ():
        if not 0 < lr < math.inf:
            raise UsageError(f"--lr {lr:g}: must be positive")
    if not 0 <= args.lr_min < math.inf:
        raise UsageError(f"--lr_min {args.lr_min:g}: must not be negative")
    for name in ("epochs", "val_freq", "num_labels"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UsageError(f"--{name} {value}: must be at least 1")
    if args.pretrained_linear and not args.evaluate:
        raise UsageError("--pretrained_linear is a head to be tested: add --evaluate")
    check_compare(args)
    check_common_arguments(args)


def main() -> None:
    args = parse_network_args(get_args_parser())
    check_arguments(args)
    keep_large_blocks()
    world = init_world(args.device, args.dist_url, args.backend)
    run = build_run(args, world)
    conduct(run, evaluate if args.evaluate else train, report, trains=not args.evaluate)


if __name__ == "__main__":
    run_cli(main)
