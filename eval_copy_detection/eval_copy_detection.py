"""Copy detection: does a network know an image again that was cropped, compressed, printed or painted over?

    python eval_copy_detection/eval_copy_detection.py --pretrained_weights checkpoint.pth --data_path /copydays \\
        --imsize 320 --whitening_path /whitening --distractors_path /distractors

INRIA Copydays. Published with DINO, ViT-B/8, strong copies: mAP 85.5. Protocol and numbers: README.md in this folder.
"""

from evaluation.images import add_loading_arguments, check_loading_arguments
from evaluation.network import add_network_arguments, add_process_arguments, of_every_key, parse_network_args
from evaluation.retrieval_run import detect_copies
from utils import Parser, UsageError, init_world, keep_large_blocks, run_cli


def get_args_parser() -> Parser:
    parser = Parser(prog="eval_copy_detection.py", description="Copy detection on INRIA Copydays.")
    add_network_arguments(parser.add_argument_group("what is evaluated"))
    data = parser.add_argument_group("data")
    add = data.add_argument
    add("--data_path", required=True, help="folder that holds original/, strong/, jpegqual/ and crops/")
    add("--whitening_path", default="", help="images that directions of equal variance are learnt from")
    add("--distractors_path", default="", help="images that are copies of nothing")
    add("--imsize", default=320, type=int, help="pixels of both sides; iBOT takes 224")
    add("--neighbours", default=20, type=int, help="so many of the most similar images are looked at")
    add_loading_arguments(data, batch_size=16)
    parser.add_argument("--output_dir", default=".", help="where eval_copy_detection.json is written")
    add_process_arguments(parser.add_argument_group("processes"))
    return parser


def main() -> None:
    args = parse_network_args(get_args_parser())
    check_loading_arguments(args)
    if args.neighbours < 1:
        raise UsageError(f"--neighbours {args.neighbours}: must be at least 1")
    keep_large_blocks()
    world = init_world(args.device, args.dist_url, args.backend)
    for chosen, append in of_every_key(args):
        detect_copies(chosen, world, append)


if __name__ == "__main__":
    run_cli(main)
