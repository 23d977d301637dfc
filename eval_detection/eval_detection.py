"""Detection on COCO: torchvision's Mask R-CNN on the pyramid of a vision transformer, trained as UDI, iBOT and Mugs do.

    torchrun --nproc_per_node=8 eval_detection/eval_detection.py --pretrained_weights udi.pth --data_path /coco

Wants pycocotools (requirements-eval.txt). Protocol, schedules and what differs from the originals: README.md here.
"""

import argparse
from pathlib import Path

from data.decode import add_reading_arguments
from evaluation.detection import PRESETS
from evaluation.detection_run import build_run, report, train
from evaluation.network import add_network_arguments, add_process_arguments
from evaluation.run import conduct
from evaluation.sets import SKIP_HELP
from models.dense import BLOCKS
from utils import Parser, UsageError, check_writable, init_world, keep_large_blocks, run_cli


def get_args_parser() -> Parser:
    parser = Parser(prog="eval_detection.py", description="Mask R-CNN on maps of a network.")
    group = parser.add_argument_group("what is evaluated")
    add_network_arguments(group)
    group.add_argument("--blocks", default=list(BLOCKS), nargs="+", type=int, help="whose maps, from 0 on")
    add = parser.add_argument_group("data").add_argument
    add("--data_path", default=None, help="COCO: annotations/instances_*2017.json, train2017/, val2017/")
    add("--scale", default=1.0, type=float, help="of all lengths of images; 1: shorter side 800 in testing")
    add("--num_workers", default=10, type=int, help="processes that decode images, per process")
    add_reading_arguments(parser)
    add("--skip_unreadable", action="store_true", help=SKIP_HELP)
    add = parser.add_argument_group("training; left out: the preset's").add_argument
    add("--preset", default="udi", choices=list(PRESETS), help="whose schedule")
    share = "images of a step and process; left out: the preset's batch, shared among the processes"
    add("--batch_size_per_gpu", default=None, type=int, help=share)
    add("--epochs", default=None, type=int, help="the learning rate falls after 8 and 11 of them, however many")
    add("--lr", default=0.0, type=float, help="0: the preset's")
    add("--eval_every", default=None, type=int, help="steps between tests; left out: an epoch; the last one counts")
    add("--save_every", default=1000, type=int, help="steps between saves")
    add("--seed", default=0, type=int, help="of the heads' weights, order of the images and crops")
    add = parser.add_argument_group("results").add_argument
    add("--output_dir", default=".", help="for log.txt, checkpoint.pth and eval_detection.json; a run is continued")
    add_process_arguments(parser.add_argument_group("processes"))
    return parser


def check_arguments(args: argparse.Namespace) -> None:
    if args.data_path is None:
        raise UsageError("--data_path: pass the folder of COCO, with annotations/, train2017/ and val2017/")
    for name in ("batch_size_per_gpu", "epochs", "eval_every", "save_every"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UsageError(f"--{name} {value}: must be at least 1")
    if not 0 <= args.lr < float("inf"):
        raise UsageError(f"--lr {args.lr:g}: must be positive, or 0 for the preset's")
    if not 0.02 <= args.scale <= 4:
        raise UsageError(f"--scale {args.scale:g}: between 0.02 and 4")
    if args.exif:
        raise UsageError("--exif true: boxes and masks belong to images as they lie in their files; leave it out")
    if args.num_workers < 0:
        raise UsageError(f"--num_workers {args.num_workers}: must be 0 (decode in this process) or more")
    check_writable(Path(args.output_dir))


def main() -> None:
    args = get_args_parser().parse_args()
    check_arguments(args)
    keep_large_blocks()
    world = init_world(args.device, args.dist_url, args.backend)
    run = build_run(args, world)
    conduct(run, train, report, trains=True)


if __name__ == "__main__":
    run_cli(main)
