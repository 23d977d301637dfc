"""Transfer: how well does a classifier on a frozen network's features do on data sets that it was not trained on?

    torchrun --nproc_per_node=8 eval_transfer/eval_transfer.py --pretrained_weights checkpoint.pth --data_path /data \\
        --dataset aircraft cars196 dtd eurosat flowers pets food101 sun397
    python eval_transfer/eval_transfer.py --pretrained_weights checkpoint.pth           on the bundled photographs

t-ReX (2206.15369), UNIC (2408.05088). Features are extracted once and kept; settings of the classifier are chosen on
part of the training images. Protocol, published numbers and commands: README.md in this folder.
"""

from evaluation.network import parse_network_args
from evaluation.transfer_options import check_arguments, get_args_parser
from evaluation.transfer_run import evaluate
from utils import init_world, keep_large_blocks, run_cli


def main() -> None:
    args = parse_network_args(get_args_parser())
    check_arguments(args)
    keep_large_blocks()
    evaluate(args, init_world(args.device, args.dist_url, args.backend))


if __name__ == "__main__":
    run_cli(main)
