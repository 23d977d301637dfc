"""Unsupervised classification: do clusters that nobody named agree with classes?

    python eval_clustering/eval_clustering.py --pretrained_weights checkpoint.pth --data_path /imagenet
    python eval_clustering/eval_clustering.py --pretrained_weights checkpoint.pth --assign kmeans      photographs

An image's cluster is the prototype of the checkpoint's own head that it is nearest to, or a centre of k-means.
Published with iBOT, ViT-S/16 pretrained with 1000 prototypes: NMI 78.6, ARI 32.8, FMI 35.6, ACC 43.4. Protocol and more
numbers: README.md in this folder.
"""

from evaluation.clustering_run import cluster
from evaluation.images import add_loading_arguments, check_loading_arguments
from evaluation.network import (
    add_feature_arguments,
    add_network_arguments,
    add_process_arguments,
    of_every_key,
    parse_network_args,
)
from evaluation.sets import SKIP_HELP
from utils import Parser, UsageError, init_world, keep_large_blocks, run_cli


def get_args_parser() -> Parser:
    parser = Parser(prog="eval_clustering.py", description="Agreement of clusters with classes.")
    add_network_arguments(parser.add_argument_group("what is evaluated"))
    add = parser.add_argument_group("clusters").add_argument
    add("--assign", default="auto", choices=("auto", "prototypes", "kmeans"), help="auto: prototypes where there are")
    add("--clusters", default=None, type=int, help="centres of k-means; left out: as many as classes")
    add("--starts", default=5, type=int, help="of k-means, of which the best counts")
    add("--iterations", default=100, type=int, help="of a start, at most")
    add("--seed", default=0, type=int, help="of the starts")
    add_feature_arguments(parser.add_argument_group("feature of k-means"), n_last_blocks=1)
    data = parser.add_argument_group("data")
    add = data.add_argument
    add(
        "--data_path",
        default=None,
        help="images in class folders, or below val/ or test/; left out: bundled tiles",
    )
    add("--crop_size", default=None, type=int, help="pixels; left out: the checkpoint's own, else 224")
    add("--resize_size", default=None, type=int, help="shorter side before the crop; left out: crop * 256 / 224")
    add_loading_arguments(data)
    add("--skip_unreadable", action="store_true", help=SKIP_HELP)
    parser.add_argument("--output_dir", default=".", help="where eval_clustering.json is written")
    add_process_arguments(parser.add_argument_group("processes"))
    return parser


def main() -> None:
    args = parse_network_args(get_args_parser())
    check_loading_arguments(args)
    for name in ("clusters", "starts", "iterations"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UsageError(f"--{name} {value}: must be at least 1")
    keep_large_blocks()
    world = init_world(args.device, args.dist_url, args.backend)
    for chosen, append in of_every_key(args):
        cluster(chosen, world, append)


if __name__ == "__main__":
    run_cli(main)
