"""Semantic segmentation on ADE20K: a linear head on a frozen network (UNIC, iBOT), or a Semantic FPN with it (UDI).

    torchrun --nproc_per_node=8 eval_segmentation/eval_segmentation.py --pretrained_weights unic.pth --data_path /ade20k
    python eval_segmentation/eval_segmentation.py --pretrained_weights unic.pth --data_path /ade20k \\
        --head unic_head_ade20k.pth                                                       test a published head

Published: UNIC ViT-B/16 39.6 % mIoU, UNIC-L 48.3. Protocols, files and settings: README.md here.
"""

import argparse
from pathlib import Path

from data.ade20k import CLASSES
from data.decode import add_reading_arguments
from evaluation.network import add_network_arguments, add_process_arguments
from evaluation.run import conduct
from evaluation.segmentation_protocols import PROTOCOLS
from evaluation.segmentation_run import report
from evaluation.segmentation_steps import build_run, evaluate, train
from evaluation.sets import SKIP_HELP
from utils import Parser, UsageError, check_writable, init_world, keep_large_blocks, run_cli


def get_args_parser() -> Parser:
    parser = Parser(prog="eval_segmentation.py", description="Semantic segmentation with maps of a network.")
    group = parser.add_argument_group("what is evaluated")
    add_network_arguments(group)
    group.add_argument("--pretrained", dest="pretrained_weights", default=argparse.SUPPRESS, help="the same (UNIC)")
    add = parser.add_argument_group("head").add_argument
    kinds = "linear: UNIC's; linear4: iBOT's, on four maps; semfpn: UDI's Semantic FPN, which trains the network too"
    add("--head", "--head_type", default="linear", help=f"{kinds}; or the file of a linear head, which is tested")
    add("--blocks", default=None, nargs="+", type=int, help="whose maps, from 0 on; left out: the protocol's")
    add = parser.add_argument_group("data").add_argument
    add("--data_path", "--data_dir", default=None, help="ADE20K, as ADEChallengeData2016.zip unpacks")
    add("--dataset", default="ade20k", choices=["ade20k"], help="UNIC's; there is no other")
    add("--num_classes", default=CLASSES, type=int, help="of another set in the same layout")
    add("--incomplete", action="store_true", help="go on with another number of images than the official one")
    add("--crop_size", default=512, type=int, help="of training crops, windows, and the shorter side of test images")
    add("--stride", default=None, type=int, help="pixels from window to window; left out: 2/3 of the crop (341)")
    add("--num_workers", default=10, type=int, help="processes that decode images, per process")
    add_reading_arguments(parser)
    add("--skip_unreadable", action="store_true", help=SKIP_HELP)
    add = parser.add_argument_group("training; left out: the protocol's").add_argument
    share = "images of a step and process; left out: the protocol's batch, shared among the processes"
    add("--batch_size_per_gpu", "--samples_per_gpu", default=None, type=int, help=share)
    add("--iterations", default=None, type=int, help="steps")
    add("--iter_with_8_gpu", default=None, type=int, help="an eighth of them (UNIC)")
    add("--lr", default=0.0, type=float, help="0: the protocol's")
    add("--warmup", default=1500, type=int, help="steps in which the learning rate rises")
    add("--eval_every", default=None, type=int, help="steps between tests; the last one counts")
    add("--save_every", default=1000, type=int, help="steps between saves")
    add("--seed", default=0, type=int, help="of the head's weights, order of the images and crops")
    add = parser.add_argument_group("results").add_argument
    add("--windows", default=8, type=int, help="of an image at once, in testing")
    add("--output_dir", default=".", help="for log.txt, checkpoint.pth and eval_segmentation.json; a run is continued")
    add_process_arguments(parser.add_argument_group("processes"))
    return parser


def check_arguments(args: argparse.Namespace) -> None:
    if args.data_path is None:
        raise UsageError("--data_path: pass the folder of ADE20K, with images/ and annotations/")
    for name in (
        "num_classes",
        "crop_size",
        "stride",
        "batch_size_per_gpu",
        "iterations",
        "iter_with_8_gpu",
        "windows",
    ):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UsageError(f"--{name} {value}: must be at least 1")
    for name in ("eval_every", "save_every", "warmup"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UsageError(f"--{name} {value}: must be at least 1")
    if args.num_classes > 254:
        raise UsageError(f"--num_classes {args.num_classes}: maps of 8 bits hold at most 254")
    if args.iterations and args.iter_with_8_gpu:
        raise UsageError("--iterations, --iter_with_8_gpu: say one of them")
    if not 0 <= args.lr < float("inf"):
        raise UsageError(f"--lr {args.lr:g}: must be positive, or 0 for the protocol's")
    if args.exif:
        raise UsageError("--exif true: maps of classes belong to images as they lie in their files; leave it out")
    if args.num_workers < 0:
        raise UsageError(f"--num_workers {args.num_workers}: must be 0 (decode in this process) or more")
    if args.head not in PROTOCOLS and not Path(args.head).exists():
        raise UsageError(f"--head {args.head}: neither one of {', '.join(PROTOCOLS)} nor a file")
    check_writable(Path(args.output_dir))


def main() -> None:
    args = get_args_parser().parse_args()
    check_arguments(args)
    keep_large_blocks()
    world = init_world(args.device, args.dist_url, args.backend)
    run = build_run(args, world)
    trains = run.optimizer is not None
    conduct(run, train if trains else evaluate, report, trains=trains)


if __name__ == "__main__":
    run_cli(main)
