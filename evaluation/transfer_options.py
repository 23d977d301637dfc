"""The options of transfer, with the names and defaults of UNIC's and t-ReX's scripts, and what cannot work."""

import argparse
import math
from pathlib import Path

from data.decode import add_reading_arguments
from data.labelled import SETS
from evaluation.compared import add_compare_argument, check_compare
from evaluation.network import add_head_argument, add_network_arguments, add_process_arguments
from evaluation.search import SEARCHES
from evaluation.sets import SKIP_HELP
from evaluation.transfer import NORMS
from utils import Parser, UsageError, check_writable

CLASSIFIERS = ("logreg_sklearn", "logreg_torch", "knn_torch")
TOKENS = ("cls", "patch")


def get_args_parser() -> Parser:
    parser = Parser(prog="eval_transfer.py", description="Transfer of frozen features to other data sets.")
    network = parser.add_argument_group("what is evaluated")
    add_network_arguments(network)
    network.add_argument("--token_type", default="cls", choices=TOKENS, help="class token, or mean of all patches")
    add_head_argument(network)
    _add_data(parser.add_argument_group("data"))
    _add_classifier(parser.add_argument_group("classifier").add_argument)
    group = parser.add_argument_group("results")
    add_compare_argument(group)
    add = group.add_argument
    add("--feature_cache", default=None, metavar="DIR", help="kept features; left out: features/ in --output_dir")
    add("--dump_features", default=None, metavar="DIR", help="also write UNIC's files there, a folder per data set")
    add("--output_dir", default=".", help="for eval_transfer.json; what is finished there is not done again")
    add("--purge_output_dir", action="store_true", help="do it again")
    add_process_arguments(parser.add_argument_group("processes"))
    return parser


def _add_data(group: argparse._ActionsContainer) -> None:
    add = group.add_argument
    names = ", ".join(SETS)
    add("--dataset", default=[], nargs="+", choices=tuple(SETS), metavar="NAME", help=f"of {names}; left out: folders")
    what = "the set's folder, or one that holds a folder named as every set; without --dataset one with train/ and val/"
    add("--data_path", default=None, help=f"{what}; left out: tiles of the bundled photographs")
    add(
        "--features_dir",
        "--features_dirs",
        default=None,
        nargs="+",
        metavar="DIR",
        help="features_trainval.pth and features_test.pth instead of images; of several sets a folder each, called as "
        "the sets, or as --dataset says in this order",
    )
    add("--any_counts", action="store_true", help="accept other numbers of images and classes than the published ones")
    add("--image_size", default=224, type=int, help="pixels of the shorter side and of the centre crop")
    add(
        "--batch_size", "--batch_size_per_gpu", dest="batch_size_per_gpu", default=128, type=int, help="images per pass"
    )
    add("--num_workers", default=8, type=int, help="processes that decode images, per process")
    add_reading_arguments(group)
    add("--skip_unreadable", action="store_true", help=SKIP_HELP)


def _add_classifier(add) -> None:
    large = "in1k, cog_*, inat*: l2 and logreg_torch; others: none and logreg_sklearn"
    add("--clf_type", default=None, choices=CLASSIFIERS, help=f"left out: as published ({large})")
    add("--features_norm", default=None, choices=NORMS, help="left out: as published; knn_torch: l2")
    add("--val_perc", "--dataset_per_val", default=0.2, type=float, help="of every class, to choose settings by")
    add("--n_optuna_trials", default=40, type=int, help="settings that are tried")
    add("--search", default="tpe", choices=tuple(SEARCHES), help="optuna's TPE, or settings drawn at random")
    add("--trials_at_once", default=None, type=int, help="asked for together; left out: 1 of tpe, all of random")
    add("--clf_C_min", default=1e-5, type=float, help="scikit-learn's C")
    add("--clf_C_max", default=1e6, type=float, help="largest C")
    add("--clf_max_iter", default=2000, type=int, help="steps to the optimum at most, as of L-BFGS there")
    add("--clf_lr_min", default=0.1, type=float, help="of SGD")
    add("--clf_lr_max", default=100.0, type=float, help="largest learning rate")
    add("--clf_wd_min", default=1e-12, type=float, help="weight decay of SGD")
    add("--clf_wd_max", default=1e-4, type=float, help="largest weight decay")
    add("--clf_mom", default=0.9, type=float, help="momentum of SGD")
    add("--clf_epochs", default=100, type=int, help="of SGD")
    add("--clf_batch_size", default=1024, type=int, help="of SGD")
    add("--knn_k", default=[10, 20, 100, 200], nargs="+", type=int, help="numbers of neighbours; 20 is quoted")
    add("--knn_temp", default=0.07, type=float, help="of the votes exp(similarity / temperature)")
    add("--n_sklearn_workers", default=-1, type=int, help="accepted and ignored")
    add("--n_optuna_workers", default=1, type=int, help="accepted and ignored: see --trials_at_once")
    add("--seed", default=[22], nargs="+", type=int, help="of split, search and SGD; results of several are averaged")


def check_arguments(args: argparse.Namespace) -> None:
    """Raise UsageError for values that cannot work, before anything is read."""
    counts = (
        "image_size",
        "batch_size_per_gpu",
        "n_optuna_trials",
        "clf_epochs",
        "clf_batch_size",
        "clf_max_iter",
        "patch_size",
    )
    for name in (*counts, "trials_at_once", "window_size"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UsageError(f"--{name} {value}: must be at least 1")
    if args.num_workers < 0:
        raise UsageError(f"--num_workers {args.num_workers}: must be 0 (decode in this process) or more")
    if not 0 < args.val_perc < 1:
        raise UsageError(f"--val_perc {args.val_perc:g}: must be between 0 and 1")
    for name in ("C", "lr", "wd"):
        low, high = bounds(args)[name]
        if not 0 < low <= high < math.inf:
            raise UsageError(f"--clf_{name}_min {low:g} --clf_{name}_max {high:g}: must be positive and in this order")
    if not 0 <= args.clf_mom < 1:
        raise UsageError(f"--clf_mom {args.clf_mom:g}: must be at least 0 and below 1")
    if min(args.knn_k) < 1 or not args.knn_temp > 0:
        raise UsageError(f"--knn_k {min(args.knn_k)} --knn_temp {args.knn_temp:g}: at least 1, and positive")
    if args.apply_head and args.token_type != TOKENS[0]:
        raise UsageError(
            f"--apply_head {args.apply_head} --token_type {args.token_type}: is of the class token; pass cls"
        )
    if args.dataset and args.data_path is None and args.features_dir is None:
        raise UsageError(f"--dataset {' '.join(args.dataset)}: where are its files? pass --data_path")
    if args.features_dir and (args.data_path or args.pretrained_weights or args.apply_head):
        raise UsageError("--features_dir holds features: leave out --data_path, --pretrained_weights and --apply_head")
    names = args.dataset or [Path(folder).name for folder in args.features_dir or ()]
    if args.features_dir and args.dataset and len(args.dataset) != len(args.features_dir):
        raise UsageError(
            f"--features_dir {' '.join(args.features_dir)}: a folder for every --dataset is needed, in the same order"
        )
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UsageError(f"{twice}: is the name of two data sets; pass every one once, or their names with --dataset")
    check_compare(args)
    if min(args.seed) < 0 or max(args.seed) >= 2**32:
        raise UsageError(f"--seed {' '.join(map(str, args.seed))}: must be between 0 and 2^32 - 1")
    check_writable(Path(args.output_dir))


def bounds(args: argparse.Namespace) -> dict[str, tuple[float, float]]:
    names = ("C", "lr", "wd")
    return {name: (getattr(args, f"clf_{name}_min"), getattr(args, f"clf_{name}_max")) for name in names}
