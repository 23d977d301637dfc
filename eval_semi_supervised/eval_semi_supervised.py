"""Few labels: logistic regression on the frozen features of 1 or 10 % of the training images.

    python eval_semi_supervised/eval_semi_supervised.py --pretrained_weights checkpoint.pth --data_path /imagenet \\
        --target_list_path 1percent.txt
    python eval_semi_supervised/eval_semi_supervised.py --pretrained_weights checkpoint.pth --subset 4  photographs

The regression is solved to its optimum for all penalties at once (evaluation/logistic.py). Published with 1 % of the
labels, ViT-S/16: iBOT 65.9, Mugs 66.9 % top-1. Protocol and more numbers: README.md in this folder.
"""

import argparse
import math

from evaluation.compared import add_compare_argument, check_compare
from evaluation.few_labels import evaluate
from evaluation.network import (
    add_feature_arguments,
    add_head_argument,
    add_network_arguments,
    add_process_arguments,
    of_every_key,
    parse_network_args,
)
from evaluation.sets import add_data_arguments, check_common_arguments
from utils import Parser, UsageError, bool_flag, init_world, keep_large_blocks, run_cli


def get_args_parser() -> Parser:
    parser = Parser(prog="eval_semi_supervised.py", description="Logistic regression with few labels.")
    add_network_arguments(parser.add_argument_group("what is evaluated"))
    group = parser.add_argument_group("feature")
    add_feature_arguments(group, n_last_blocks=1)
    add_head_argument(group)
    data = parser.add_argument_group("data")
    add_data_arguments(data)
    data.add_argument(
        "--target_list_path", default=None, metavar="FILE", help="names of the training images, one a line; out: all"
    )
    add = parser.add_argument_group("regression").add_argument
    add("--lr_lambd", default=[0.01, 0.1, 1.0], nargs="+", type=float, help="ridges; the best one is quoted")
    add(
        "--adjust_lambd",
        default=True,
        type=bool_flag,
        help="divide them by the training images; iBOT's script does not",
    )
    add("--epochs", default=100, type=int, help="accepted and ignored: the optimum is found")
    add("--it0", default=10, type=int, help="accepted and ignored")
    group = parser.add_argument_group("results")
    add_compare_argument(group)
    add = group.add_argument
    add("--feature_cache", default=None, metavar="DIR", help="kept features; left out: features/ in --output_dir")
    add("--output_dir", default=".", help="where eval_semi_supervised.json is written")
    add_process_arguments(parser.add_argument_group("processes"))
    return parser


def check_arguments(args: argparse.Namespace) -> None:
    for value in args.lr_lambd:
        if not 0 < value < math.inf:
            raise UsageError(f"--lr_lambd {value:g}: must be positive")
    if len(set(args.lr_lambd)) < len(args.lr_lambd):
        raise UsageError(f"--lr_lambd {' '.join(map(str, args.lr_lambd))}: pass every value once")
    check_compare(args)
    check_common_arguments(args)


def main() -> None:
    args = parse_network_args(get_args_parser())
    check_arguments(args)
    keep_large_blocks()
    world = init_world(args.device, args.dist_url, args.backend)
    for of_key, append in of_every_key(args):
        evaluate(of_key, world, append)


if __name__ == "__main__":
    run_cli(main)
