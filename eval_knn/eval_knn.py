"""Weighted k-NN: how well do a frozen network's features separate classes it was never told about?

    python eval_knn/eval_knn.py --pretrained_weights checkpoint.pth --data_path /imagenet
    torchrun --nproc_per_node=8 eval_knn/eval_knn.py --pretrained_weights checkpoint.pth --data_path /imagenet
    python eval_knn/eval_knn.py --pretrained_weights checkpoint.pth --baselines        on the bundled photographs

Features are L2-normalised; the k training images most similar to a test image vote for their classes with weight
exp(similarity / temperature) (Wu et al., 1805.01978). Published with DINO: ViT-S/16 74.5, ViT-S/8 78.3 % top-1 at
k = 20. Protocol and more numbers: README.md in this folder.
"""

import argparse

from data.datasets import ALL
from evaluation.compared import add_compare_argument, check_compare
from evaluation.knn_run import evaluate, evaluate_low_shot
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
    parser = Parser(prog="eval_knn.py", description="Weighted k-NN on frozen features.")
    add_network_arguments(parser.add_argument_group("what is evaluated"))
    group = parser.add_argument_group("feature")
    add_feature_arguments(group, n_last_blocks=1)
    add_head_argument(group)
    add_data_arguments(parser.add_argument_group("data"))
    add = parser.add_argument_group("k-NN").add_argument
    add(
        "--nb_knn",
        "--knn_k",
        default=[10, 20, 100, 200],
        nargs="+",
        type=int,
        help="numbers of neighbours; 20 is usually best",
    )
    add("--temperature", "--knn_temp", default=0.07, type=float, help="of the votes exp(similarity / temperature)")
    add(
        "--subset_starts",
        default=[0],
        nargs="+",
        type=int,
        help="first image of every class in the subset; for several, mean and standard deviation are given too",
    )
    add("--low_shot", action="store_true", help="1, 5, 10 and 20 images per class, five banks of each (AttMask)")
    add("--use_cuda", default=True, type=bool_flag, help="compare features on the GPU, if there is one")
    add("--baselines", action="store_true", help="also test raw pixels, a colour histogram and the untrained network")
    group = parser.add_argument_group("results")
    add = group.add_argument
    add("--dump_features", default=None, metavar="DIR", help="keep the features here, and use them if they are there")
    add("--load_features", default=None, metavar="DIR", help="use the features kept here, or stop if they are others")
    add("--feature_cache", default=None, metavar="DIR", help="features of all evaluations, each extracted once")
    add_compare_argument(group)
    add("--output_dir", default=".", help="where eval_knn.json is written")
    add_process_arguments(parser.add_argument_group("processes"))
    return parser


def check_arguments(args: argparse.Namespace) -> None:
    if min(args.nb_knn) < 1:
        raise UsageError(f"--nb_knn {min(args.nb_knn)}: a vote needs at least one neighbour")
    if not args.temperature > 0:
        raise UsageError(f"--temperature {args.temperature}: must be positive (the default is 0.07)")
    if min(args.subset_starts) < 0:
        raise UsageError(f"--subset_starts {min(args.subset_starts)}: the first image of a class is 0")
    if args.subset_starts != [0] and args.subset in (None, ALL):
        raise UsageError("--subset_starts chooses the first image of a --subset, and there is none; pass --subset too")
    if args.feature_cache and (args.dump_features or args.load_features):
        raise UsageError("--feature_cache keeps the features itself; leave out --dump_features and --load_features")
    if args.low_shot and (args.subset not in (None, ALL) or args.baselines or args.compare):
        raise UsageError("--low_shot brings its own subsets: leave out --subset, --baselines and --compare")
    check_compare(args)
    if "," in args.checkpoint_key and (args.dump_features or args.load_features):
        raise UsageError(f"--checkpoint_key {args.checkpoint_key}: features are kept of one network; pass one key")
    check_common_arguments(args)


def main() -> None:
    args = parse_network_args(get_args_parser())
    check_arguments(args)
    keep_large_blocks()
    world = init_world(args.device, args.dist_url, args.backend)
    for of_key, append in of_every_key(args):
        (evaluate_low_shot if args.low_shot else evaluate)(of_key, world, append)


if __name__ == "__main__":
    run_cli(main)
