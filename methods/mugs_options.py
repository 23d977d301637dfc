"""The options of Mugs: names and defaults of the original, and what cannot work."""

import argparse
import math

from methods.mugs_crops import add_mugs_crop_arguments, check_mugs_crop_arguments
from methods.teacher import (
    add_following_arguments,
    add_temperature_arguments,
    check_following_arguments,
    check_temperature_arguments,
    check_temperatures,
)
from models import families_that, family_of
from utils import UsageError, bool_flag, world_size

LOSS_OPTIONS = ("instance", "local_group", "group")


def add_mugs_arguments(parser: argparse._ArgumentGroup) -> None:
    add = parser.add_argument
    add(
        "--loss_weights",
        default=[1.0, 1.0, 1.0],
        nargs=3,
        type=float,
        help="instance, local group, group: the sum of the losses is divided by the sum of these; 0 leaves one out",
    )
    add("--use_bn_in_head", default=False, type=bool_flag, help="batch norm in all projectors")
    add("--norm_before_pred", default=True, type=bool_flag, help="the predictor is shown unit vectors")
    add("--patch_embed_lr_mult", default=0.2, type=float, help="learning rate of the patch embedding, times this")
    for name, what in (("instance", "the instance loss"), ("local_group", "the local-group loss")):
        add(f"--{name}_out_dim", default=256, type=int, help=f"width of the vectors of {what}")
        more = "" if name == "instance" else ", and rows of both memories"
        add(f"--{name}_queue_size", default=65536, type=int, help=f"earlier keys that {what} contrasts with{more}")
        add(f"--{name}_temp", default=0.2, type=float, help=f"temperature of {what}")
    add("--local_group_knn_top_n", default=8, type=int, help="rows of the memory that an image is related to")
    add(
        "--local_group_advance_once",
        default=False,
        type=bool_flag,
        help="write the memory row after row; the original leaves out as many as it writes",
    )
    add("--group_out_dim", default=65536, type=int, help="prototypes of the group loss")
    add("--group_bottleneck_dim", default=256, type=int, help="width of the vectors that meet prototypes")
    add("--group_student_temp", default=0.1, type=float, help="student temperature of the group loss")
    add_following_arguments(parser)
    add_temperature_arguments(parser, "group_")
    add_mugs_crop_arguments(parser)
    for name in ("debug", "ddpjob"):
        add(f"--{name}", default=False, type=bool_flag, help="accepted and ignored; --subset takes fewer images")
    for name in ("rank", "world_size"):
        add(f"--{name}", type=int, help="accepted and ignored: torchrun sets it in the environment")
    parser.set_defaults(
        lr=0.0008,
        weight_decay_end=0.2,
        saveckp_freq=50,
        output_dir="./exp/",
        num_workers=12,
    )


def check_mugs_arguments(args: argparse.Namespace) -> None:
    """Raises UsageError for what cannot work."""
    weights = " ".join(f"{weight:g}" for weight in args.loss_weights)
    if not all(0 <= weight < math.inf for weight in args.loss_weights):
        raise UsageError(f"--loss_weights {weights}: must not be negative, and are numbers")
    if not any(args.loss_weights):
        raise UsageError(f"--loss_weights {weights}: nothing would be learnt; give one of the three a weight")
    family = family_of(args.arch)
    if not family.class_attention:
        known = families_that(lambda family: family.class_attention)
        raise UsageError(f"--arch {args.arch}: mugs reads class tokens and patches; pass a {known}")
    for name in ("out_dim", "queue_size", "knn_top_n", "bottleneck_dim"):
        for option in (f"{loss}_{name}" for loss in LOSS_OPTIONS):
            if getattr(args, option, 1) < 1:
                raise UsageError(f"--{option} {getattr(args, option)}: must be at least 1")
    if not 0 <= args.patch_embed_lr_mult < math.inf:
        raise UsageError(f"--patch_embed_lr_mult {args.patch_embed_lr_mult}: must not be negative")
    _check_sizes(args)
    check_temperatures(args, "instance_temp", "local_group_temp", "group_student_temp")
    check_following_arguments(args)
    check_temperature_arguments(args, "group_")
    check_mugs_crop_arguments(args)


def _check_sizes(args: argparse.Namespace) -> None:
    """The queues and memories of the losses that count, against what is written to them and looked for in them."""
    instance, local_group, _ = args.loss_weights
    images = args.batch_size_per_gpu * world_size()
    for weight, option in ((instance, "instance_queue_size"), (local_group, "local_group_queue_size")):
        size = getattr(args, option)
        if weight and images > size:
            raise UsageError(
                f"--{option} {size}: a step writes {images} images (--batch_size_per_gpu times processes), and they do "
                "not fit; make it at least as large"
            )
    if local_group and args.local_group_knn_top_n > args.local_group_queue_size:
        raise UsageError(
            f"--local_group_knn_top_n {args.local_group_knn_top_n}: the memory has --local_group_queue_size "
            f"{args.local_group_queue_size} rows; look for at most as many"
        )
