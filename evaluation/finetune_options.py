"""The options of fine-tuning, with the names and defaults of iBOT's and UDI's scripts, and what cannot work."""

import argparse
import math
from pathlib import Path

from data.datasets import check_subset
from data.decode import add_reading_arguments
from data.published import place_from
from evaluation.compared import add_compare_argument, check_compare
from evaluation.deit import add_distillation_arguments, check_distillation
from evaluation.network import add_process_arguments
from evaluation.sets import SKIP_HELP, add_path_arguments
from utils import PRECISIONS, Parser, UsageError, check_writable

# --data_set of DeiT's descendants -> data/labelled.py; the others are folders
LABELLED = {"CIFAR10": "cifar10", "CIFAR": "cifar100", "CIFAR100": "cifar100", "Cars": "cars196"}
LABELLED |= dict.fromkeys(("flowers", "Flowers", "Flwrs"), "flowers")
LABELLED |= {"INAT": "inat2018_names", "INAT18": "inat2018_names", "INAT19": "inat2019_names"}

BEIT, DEIT = "beit", "deit"  # a rate for every layer and step; one for all layers, that changes with the epoch


def get_args_parser(evaluation: str = "eval_finetuning") -> Parser:
    parser = Parser(prog=f"{evaluation}.py", description="Fine-tune a network with labels.")
    parser.set_defaults(recipe=BEIT, evaluation=evaluation)
    _add_network(parser.add_argument_group("network").add_argument)
    _add_optimisation(parser.add_argument_group("optimisation").add_argument)
    _add_augmentation(parser.add_argument_group("augmentation").add_argument)
    data = parser.add_argument_group("data and results")
    add_path_arguments(data)
    _add_data_and_results(data.add_argument)
    add_compare_argument(data)
    add_reading_arguments(data)
    add_process_arguments(parser.add_argument_group("processes"))
    return parser


def get_deit_parser(evaluation: str) -> Parser:
    """DeiT's recipe (2012.12877) with the defaults of iBOT's, AttMask's, Mugs's and UDI's scripts."""
    parser = get_args_parser(evaluation)
    parser.set_defaults(recipe=DEIT, lr=5e-4, epochs=300, min_lr=1e-5, warmup_epochs=5, layer_decay=1.0, init_scale=1.0)
    parser.set_defaults(rel_pos_bias=False, abs_pos_emb=True, use_mean_pooling=False, layer_scale_init_value=0.0)
    parser.set_defaults(imagenet_default_mean_and_std=True, mixup=0.8, cutmix=1.0, model_ema=True)
    parser.set_defaults(model_ema_decay=0.99996)
    (data_set,) = (action for action in parser._actions if action.dest == "data_set")
    data_set.choices = ["IMNET", "image_folder", *LABELLED]
    data_set.help = "official files at --data_path, or folders train/ and val/ (IMNET, image_folder)"
    add = parser.add_argument_group("DeiT's recipe").add_argument
    add("--warmup_lr", "--warmup-lr", default=1e-6, type=float, help="at the beginning of the warm-up; NOT scaled")
    add("--repeated_aug", "--repeated-aug", action="store_true", help="an epoch has a third of the images, three times")
    add("--no_repeated_aug", "--no-repeated-aug", action="store_false", dest="repeated_aug", help="without it")
    kept = "layers of the projection head that are kept below the new one (0 to 3)"
    add("--finetune_head_layer", default=0, type=int, choices=range(4), help=kept)
    add("--target_list_path", default=None, metavar="FILE", help="names of the training images, one a line; out: all")
    add("--any_counts", action="store_true", help="accept other numbers of images than the published ones")
    add_distillation_arguments(parser.add_argument_group("a supervised teacher"))
    return parser


def _add_network(add) -> None:
    add("--finetune", default="", metavar="FILE", help="checkpoint of any known layout; left out: from scratch")
    add(
        "--checkpoint_key",
        default="teacher",
        help="which network of a file to start from: its key, or what its names begin with",
    )
    add("--model_key", default="model|module", help="where else the weights may stand")
    add("--model", "--arch", default=None, help="architecture; left out: the file's own, else vit_small")
    add("--patch_size", default=None, type=int, help="left out: the file's own, else 16 (Swin: 4)")
    add("--window_size", default=None, type=int, help="of a Swin; left out: the file's own, else 7")
    add("--input_size", default=None, type=int, help="pixels; left out: the file's own, else 224")
    add("--rel_pos_bias", action="store_true", default=True, help="a bias by relative position, per block")
    add("--disable_rel_pos_bias", action="store_false", dest="rel_pos_bias", help="without it")
    add("--abs_pos_emb", action="store_true", help="the file's positions")
    add("--layer_scale_init_value", default=0.1, type=float, help="0: no LayerScale")
    add("--use_mean_pooling", action="store_true", default=True, help="the head reads fc_norm of the mean patch")
    add("--use_cls", action="store_false", dest="use_mean_pooling", help="the head reads the class token")
    add("--init_scale", default=0.001, type=float, help="times the head's initial weights")
    add("--drop", default=0.0, type=float, help="dropout of tokens and of what a block adds")
    add("--attn_drop_rate", default=0.0, type=float, help="dropout of attention")
    add("--drop_path", default=0.1, type=float, help="stochastic depth of the last block")


def _add_optimisation(add) -> None:
    add("--batch_size", "--batch_size_per_gpu", dest="batch_size_per_gpu", default=128, type=int,
        help="images per process and pass")  # fmt: skip
    add("--update_freq", default=1, type=int, help="passes per step")
    add("--epochs", default=100, type=int, help="of training")
    add("--opt", default="adamw", choices=["adamw"], help="the one optimiser")
    add("--opt_eps", default=1e-8, type=float, help="of AdamW")
    add("--opt_betas", default=None, type=float, nargs=2, help="of AdamW; left out: 0.9 0.999")
    add("--clip_grad", default=None, type=float, help="norm of the whole gradient; left out: not clipped")
    add("--lr", default=4e-3, type=float, help="of the head; it is NOT scaled with the batch")
    add("--layer_decay", default=0.9, type=float, help="times the rate, for every layer below the head")
    add("--min_lr", default=1e-6, type=float, help="at the end of the cosine")
    add("--warmup_epochs", default=20, type=int, help="of linear warm-up from 0")
    add("--warmup_steps", default=-1, type=int, help="instead of --warmup_epochs")
    add("--weight_decay", default=0.05, type=float, help="of matrices")
    add("--weight_decay_end", default=None, type=float, help="at the end of a cosine; left out: the same")
    add("--disable_weight_decay_on_rel_pos_bias", action="store_true", help="bias tables are not decayed")
    add("--model_ema", action="store_true", help="keep an average of the weights in the checkpoints")
    add("--model_ema_decay", default=0.9999, type=float, help="of that average")
    add("--model_ema_force_cpu", action="store_true", help="keep it in the processor's memory")
    add("--precision", default="auto", choices=["auto", *PRECISIONS], help="auto: bf16 where the hardware has it")
    add("--seed", default=0, type=int, help="of the head, order of the images, augmentation, stochastic depth")


def _add_augmentation(add) -> None:
    add("--color_jitter", default=0.4, type=float, help="where there is no --aa")
    add("--aa", default="rand-m9-mstd0.5-inc1", help="timm's policy; none: without")
    add("--smoothing", default=0.1, type=float, help="of labels")
    modes = ["bicubic", "bilinear", "random"]
    add("--train_interpolation", default="bicubic", choices=modes, help="of training crops")
    add("--reprob", default=0.25, type=float, help="share of the images of which a part is erased")
    add("--remode", default="pixel", choices=["pixel", "rand", "const"], help="what is painted there")
    add("--recount", default=1, type=int, help="how many parts at most")
    add("--mixup", default=0.0, type=float, help="alpha of mixup; 0: without")
    add("--cutmix", default=0.0, type=float, help="alpha of CutMix; 0: without")
    add("--cutmix_minmax", default=None, type=float, nargs=2, help="share of the sides, instead of --cutmix")
    add("--mixup_prob", default=1.0, type=float, help="of mixing at all")
    add("--mixup_switch_prob", default=0.5, type=float, help="of CutMix where both are on")
    add("--mixup_mode", default="batch", choices=["batch", "pair", "elem"], help="what shares one draw")
    add("--crop_pct", default=None, type=float, help="of a test image; left out: 224/256, from 384 pixels on 1")
    add("--imagenet_default_mean_and_std", action="store_true", help="left out: 0.5 and 0.5")


def _add_data_and_results(add) -> None:
    add("--data_set", default="IMNET", choices=["IMNET", "image_folder"], help="accepted; the folders tell")
    add("--nb_classes", default=None, type=int, help="left out: those of the training images")
    add("--subset", default=None, type=int, help="training images per class; left out or -1: all")
    add("--num_workers", default=10, type=int, help="processes that decode images, per process")
    add("--output_dir", default=".", help="for log.txt, checkpoints and eval_finetuning.json")
    add("--log_dir", default=None, help="for TensorBoard; left out: tensorboard/ in --output_dir")
    add("--save_ckpt_freq", default=50, type=int, help="percent of --epochs between numbered checkpoints")
    add("--resume", default="", metavar="FILE", help="continue this run")
    add("--auto_resume", action="store_true", default=True, help="continue the run in --output_dir (the default)")
    add("--no_auto_resume", action="store_false", dest="auto_resume", help="begin anew, and replace it")
    add("--eval", action="store_true", help="train nothing, test --resume or the best of --output_dir")
    add("--dist_eval", action="store_true", help="accepted: test images are always shared, each counts once")
    add("--skip_unreadable", action="store_true", help=SKIP_HELP)
    add("--disable_eval_during_finetuning", action="store_true", help="test after the last epoch only")


def check_arguments(args: argparse.Namespace) -> None:
    """Raise UsageError for values that cannot work, before anything is read."""
    check_subset(args.subset)
    place_from(args)
    at_least_one = ("batch_size_per_gpu", "update_freq", "epochs", "save_ckpt_freq", "recount", "input_size")
    for name in (*at_least_one, "patch_size", "window_size", "nb_classes"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UsageError(f"--{name.removesuffix('_per_gpu')} {value}: must be at least 1")
    for name in ("drop", "attn_drop_rate", "drop_path", "smoothing", "model_ema_decay"):
        if not 0 <= getattr(args, name) < 1:
            raise UsageError(f"--{name} {getattr(args, name):g}: must be at least 0 and below 1")
    for name in ("reprob", "mixup_prob", "mixup_switch_prob"):
        if not 0 <= getattr(args, name) <= 1:
            raise UsageError(f"--{name} {getattr(args, name):g}: must be between 0 and 1")
    free = ("mixup", "cutmix", "weight_decay", "weight_decay_end", "min_lr", "layer_scale_init_value", "warmup_epochs")
    for name in (*free, "num_workers", "color_jitter"):
        value = getattr(args, name)
        if value is not None and not 0 <= value < math.inf:
            raise UsageError(f"--{name} {value:g}: must not be negative")
    if args.recipe == DEIT and not 0 <= args.warmup_lr < math.inf:
        raise UsageError(f"--warmup_lr {args.warmup_lr:g}: must not be negative")
    if args.recipe == DEIT:
        check_distillation(args)
    if args.data_set in LABELLED and (args.data_path is None or args.subset or args.eval_data_path):
        raise UsageError(f"--data_set {args.data_set}: pass --data_path, without --subset and --eval_data_path")
    if args.recipe == DEIT and (args.finetune_head_layer and not args.finetune):
        raise UsageError(f"--finetune_head_layer {args.finetune_head_layer}: of which head? pass --finetune")
    for name in ("lr", "layer_decay", "init_scale", "opt_eps", "clip_grad", "crop_pct"):
        value = getattr(args, name)
        if value is not None and not 0 < value < math.inf:
            raise UsageError(f"--{name} {value:g}: must be positive")
    if (args.crop_pct or 1) > 1 or args.layer_decay > 1:
        raise UsageError(f"--crop_pct {args.crop_pct} --layer_decay {args.layer_decay:g}: neither may be above 1")
    if args.warmup_steps <= 0 and args.warmup_epochs > args.epochs and not args.eval:
        raise UsageError(f"--warmup_epochs {args.warmup_epochs}: longer than --epochs {args.epochs}; lower it")
    if (args.mixup or args.cutmix or args.cutmix_minmax) and args.batch_size_per_gpu % 2:
        raise UsageError(f"--batch_size {args.batch_size_per_gpu}: images are mixed in pairs, so it has to be even")
    check_compare(args)
    check_writable(Path(args.output_dir))
