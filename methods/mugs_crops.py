"""The options that describe the crops of Mugs (2203.14415)."""

import argparse

import numpy as np

from data.mugs_views import MugsViews, erase_
from data.pictures import crops_grid
from data.randaugment import parse_policy
from methods.multicrop import add_crop_arguments, check_crop_arguments, crop_settings
from utils import UsageError, bool_flag


def add_mugs_crop_arguments(parser: argparse._ArgumentGroup) -> None:
    """Names and defaults of the original, and the sizes that are constants there."""
    add_crop_arguments(parser, also=["--size_crops"])
    parser.set_defaults(global_crops_scale=(0.25, 1.0), local_crops_scale=(0.05, 0.25), local_crops_number=10)
    add = parser.add_argument
    policy = "rand-m9-mstd0.5-inc1"
    add("--timm_auto_augment_par", default=policy, help="RandAugment of strong crops: level, its deviation, list")
    add("--color_aug", default=False, type=bool_flag, help="jitter and greyscale in strong crops as well")
    add("--re_prob", default=0.25, type=float, help="probability that a box of a strong crop is erased")
    add("--prob", default=0.5, type=float, help="probability that the student's crops are weak; 1: all are")
    add("--vanilla_weak_augmentation", default=False, type=bool_flag, help="student's global crops are the teacher's")
    add("--use_prefetcher", default=True, type=bool_flag, help="erased pixels are normalised; false: they are N(0, 1)")
    add("--strong_ratio", default=0.45, type=float, help="accepted and without effect, as in the original")


def check_mugs_crop_arguments(args: argparse.Namespace) -> None:
    """Raises UsageError for what ``check_crop_arguments`` refuses, crops that cannot be told apart by their size,
    probabilities outside [0, 1], and a policy with an unknown part."""
    check_crop_arguments(args)
    if args.local_crops_number and args.local_crops_size == args.global_crops_size:
        raise UsageError(
            f"--size_crops {args.local_crops_size} --global_crops_size {args.global_crops_size}: they have to differ; "
            "crops are told apart by their size"
        )
    for name in ("prob", "re_prob"):
        if not 0 <= getattr(args, name) <= 1:
            raise UsageError(f"--{name} {getattr(args, name):g}: a probability, from 0 to 1")
    parse_policy(args.timm_auto_augment_par)


def mugs_views(args: argparse.Namespace) -> MugsViews:
    return MugsViews(
        **crop_settings(args),
        local_crops_number=args.local_crops_number,
        local_crops_size=args.local_crops_size,
        policy=args.timm_auto_augment_par,
        color_aug=args.color_aug,
        erase=args.re_prob,
        prob=args.prob,
        vanilla=args.vanilla_weak_augmentation,
        prefetched=args.use_prefetcher,
    )


def crops_picture(batch: dict) -> np.ndarray:
    """The crops of a batch as the networks see them, with what is erased; strong ones are framed."""
    crops = [crop.clone() for crop in batch["crops"]]
    erase_(crops, batch["erased"])
    return crops_grid(crops, framed=batch["strong"])
