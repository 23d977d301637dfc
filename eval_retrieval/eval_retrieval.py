"""Retrieval of landmarks: are photographs of the same building nearest to each other?

    python eval_retrieval/eval_retrieval.py --pretrained_weights checkpoint.pth --data_path /revisitop \\
        --dataset rparis6k --imsize 512 --multiscale true

Revisited Oxford and Paris (1803.11285). Published with DINO, ViT-S/16 on ImageNet, mAP medium and hard: Oxford 41.8 and
13.7, Paris 63.1 and 34.4. Protocol and more numbers: README.md in this folder.
"""

from data.revisited import COUNTS
from evaluation.images import add_loading_arguments, check_loading_arguments
from evaluation.network import (
    add_feature_arguments,
    add_network_arguments,
    add_process_arguments,
    of_every_key,
    parse_network_args,
)
from evaluation.retrieval_run import retrieve
from utils import Parser, bool_flag, init_world, keep_large_blocks, run_cli


def get_args_parser() -> Parser:
    parser = Parser(prog="eval_retrieval.py", description="Image retrieval on the revisited Oxford and Paris.")
    add_network_arguments(parser.add_argument_group("what is evaluated"))
    add_feature_arguments(parser.add_argument_group("feature"), n_last_blocks=1)
    data = parser.add_argument_group("data")
    add = data.add_argument
    add("--data_path", required=True, help="folder that holds roxford5k/ and rparis6k/")
    add("--dataset", default="roxford5k", choices=tuple(COUNTS), help="which of them")
    add("--imsize", default=224, type=int, help="pixels of an image's longer side")
    add("--multiscale", default=False, type=bool_flag, help="mean feature over three scales")
    add_loading_arguments(data, batch_size=1)
    add("--use_cuda", default=True, type=bool_flag, help="accepted and ignored: ranking takes no time")
    parser.add_argument("--output_dir", default=".", help="where eval_retrieval.json is written")
    add_process_arguments(parser.add_argument_group("processes"))
    return parser


def main() -> None:
    args = parse_network_args(get_args_parser())
    check_loading_arguments(args)
    keep_large_blocks()
    world = init_world(args.device, args.dist_url, args.backend)
    for chosen, append in of_every_key(args):
        retrieve(chosen, world, append)


if __name__ == "__main__":
    run_cli(main)
