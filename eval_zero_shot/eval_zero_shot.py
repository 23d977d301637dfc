"""Zero-shot classification of a student of UNIC, by the texts of a teacher that has them (MetaCLIP).

    python eval_zero_shot/eval_zero_shot.py --pretrained_weights checkpoint.pth --apply_head metaclip_vithuge_14 \\
        --projection h14_fullcc2.5b.pt --texts imagenet_texts.npz --data_path /imagenet

The student's image in that teacher's space goes through the teacher's projection; the class whose text embedding is
nearest is the answer. Published with UNIC-L: 81.4 % top-1 on ImageNet. Files and protocol: README.md in this folder.
"""

from evaluation.network import (
    add_head_argument,
    add_network_arguments,
    add_process_arguments,
    parse_network_args,
)
from evaluation.sets import add_looking_arguments, check_looking_arguments
from evaluation.zero_shot_run import evaluate
from utils import Parser, init_world, keep_large_blocks, run_cli


def get_args_parser() -> Parser:
    parser = Parser(prog="eval_zero_shot.py", description="Zero-shot classification by a teacher's texts.")
    group = parser.add_argument_group("what is evaluated")
    add_network_arguments(group)
    add_head_argument(group, required=True)
    add = parser.add_argument_group("texts").add_argument
    what = ".npz, .npy, .pth or .safetensors"
    add("--projection", required=True, metavar="FILE", help=f"the teacher's, alone or in its own checkpoint: {what}")
    add("--texts", required=True, metavar="FILE", help=f"a row for every class, in the order of their names: {what}")
    data = parser.add_argument_group("data")
    what = "test images: folder of classes, list, zip, or a root with val/ or test/; left out: bundled photographs"
    data.add_argument("--data_path", default=None, help=what)
    add_looking_arguments(data)
    add = parser.add_argument_group("results").add_argument
    add("--output_dir", default=".", help="where eval_zero_shot.json is written")
    add_process_arguments(parser.add_argument_group("processes"))
    return parser


def main() -> None:
    args = parse_network_args(get_args_parser())
    check_looking_arguments(args)
    keep_large_blocks()
    evaluate(args, init_world(args.device, args.dist_url, args.backend))


if __name__ == "__main__":
    run_cli(main)
