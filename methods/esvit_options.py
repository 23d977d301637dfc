"""Options of EsViT beyond DINO's, as its scripts name them: regions, images that are mixed, the augmentation."""

import argparse

from data.mixing import build_mixup
from methods.multicrop import local_crops
from models import LIBRARY, family_of
from utils import UsageError, bool_flag

AUGMENTATIONS = ("dino_aug", "deit_aug")
ONLY_NAMED = ("mocov2_aug", "basic_aug")  # in the original's help text, and nowhere else


def add_esvit_arguments(parser: argparse._ArgumentGroup) -> None:
    add = parser.add_argument
    add(
        "--use_dense_prediction",
        default=False,
        type=bool_flag,
        help="also match regions: the view loss and the region loss count half each",
    )
    add(
        *("--aug_opt", "--aug-opt"),
        default="dino_aug",
        metavar="{dino_aug,deit_aug}",
        help="how crops are made: as DINO's, or every one as DeiT trains (the options from --color_jitter on)",
    )
    add(*("--color_jitter", "--color-jitter"), default=0.4, type=float, help="where there is no --aa")
    add("--aa", default="rand-m9-mstd0.5-inc1", help="timm's policy; none: without")
    modes = ["bicubic", "bilinear", "random"]
    add(*("--train_interpolation", "--train-interpolation"), default="bicubic", choices=modes, help="of crops")
    add("--reprob", default=0.25, type=float, help="share of the crops of which a part is erased")
    add("--remode", default="pixel", choices=["pixel", "rand", "const"], help="what is painted there")
    add("--recount", default=1, type=int, help="how many parts at most")
    add(
        "--use_mixup",
        default=False,
        type=bool_flag,
        help="mix the student's images with each other, those of a process; not with --use_dense_prediction",
    )
    add("--num_mixup_views", default=10, type=int, help="of so many crops, the first ones")
    add("--mixup", default=0.8, type=float, help="alpha of mixup; 0: without")
    add("--cutmix", default=1.0, type=float, help="alpha of CutMix; 0: without")
    add(
        *("--cutmix_minmax", "--cutmix-minmax"),
        default=None,
        type=float,
        nargs=2,
        help="share of the sides, instead of --cutmix",
    )
    add(*("--mixup_prob", "--mixup-prob"), default=1.0, type=float, help="of mixing at all")
    add(*("--mixup_switch_prob", "--mixup-switch-prob"), default=0.5, type=float, help="of CutMix where both are on")
    add(
        *("--mixup_mode", "--mixup-mode"),
        default="batch",
        choices=["batch", "pair", "elem"],
        help="what shares one draw",
    )
    add("--smoothing", default=0.0, type=float, help="of what mixed images are compared with")


def check_esvit_arguments(args: argparse.Namespace) -> None:
    """Raises UsageError for what exists in a help text only, and for what does not go together."""
    if args.aug_opt in ONLY_NAMED:
        raise UsageError(
            f"--aug-opt {args.aug_opt}: the original names it in a help text and has no code for it; there are "
            f"{', '.join(AUGMENTATIONS)}"
        )
    if args.aug_opt not in AUGMENTATIONS:
        raise UsageError(f"--aug-opt {args.aug_opt}: there are {', '.join(AUGMENTATIONS)}")
    if args.use_dense_prediction and family_of(args.arch) is LIBRARY:
        raise UsageError(
            f"--use_dense_prediction true: --arch {args.arch} gives one vector for an image and no tokens; pass one of "
            "our networks, or --use_dense_prediction false"
        )
    for name in ("reprob", "mixup_prob", "mixup_switch_prob"):
        if not 0 <= getattr(args, name) <= 1:
            raise UsageError(f"--{name} {getattr(args, name):g}: must be between 0 and 1")
    for name in ("color_jitter", "mixup", "cutmix"):
        if not 0 <= getattr(args, name) < float("inf"):
            raise UsageError(f"--{name} {getattr(args, name):g}: must not be negative")
    if not 0 <= args.smoothing < 1:
        raise UsageError(f"--smoothing {args.smoothing:g}: must be at least 0 and below 1")
    if args.recount < 1:
        raise UsageError(f"--recount {args.recount}: must be at least 1")
    if args.use_mixup:
        _check_mixup(args)


def _check_mixup(args: argparse.Namespace) -> None:
    if args.use_dense_prediction:
        raise UsageError(
            "--use_mixup true with --use_dense_prediction true: a region of a mixed image belongs to two images, and "
            "the original leaves its targets out; pass one of them"
        )
    if args.batch_size_per_gpu % 2:
        raise UsageError(
            f"--batch_size_per_gpu {args.batch_size_per_gpu}: --use_mixup mixes images in pairs, so it has to be even"
        )
    if args.accum_iter > 1:
        raise UsageError(
            f"--accum_iter {args.accum_iter}: --use_mixup mixes the images of a process, of which a piece has fewer; "
            "leave it 1"
        )
    crops = 2 + sum(number for number, _ in local_crops(args))
    if args.num_mixup_views < 1:
        raise UsageError(f"--num_mixup_views {args.num_mixup_views}: of the {crops} crops at least 1 has to be mixed")
    if build_mixup(args, args.batch_size_per_gpu) is None:
        raise UsageError("--mixup 0 --cutmix 0: nothing would be mixed; pass --use_mixup false")


def deit_augmentation(args: argparse.Namespace) -> dict:
    """What ``DeiTCropViews`` is told besides the crops."""
    return {
        "color_jitter": args.color_jitter,
        "policy": None if args.aa.lower() == "none" else args.aa,
        "interpolation": args.train_interpolation,
        "erase": args.reprob,
        "erase_mode": args.remode,
        "erase_count": args.recount,
    }
