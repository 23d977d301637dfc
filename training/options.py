"""The options of a pretraining run: one parser, presets, and everything that can be refused before work begins."""

import argparse
from pathlib import Path

import torch

from data.datasets import ALL, SPLITS, check_subset
from data.decode import add_reading_arguments
from data.published import DATASET_OPTIONS, add_dataset_arguments, place_from
from evaluation.network import add_feature_arguments
from methods import METHODS, method_class
from methods.base import Method
from models import LIBRARY, backbone_names, drop_path_of, family_of, our_names, unread_options
from models.esvit_configs import words_of
from training.optim import OPTIMIZERS
from training.presets import nearest_preset, read_preset
from utils import BACKENDS, PRECISIONS, Parser, UsageError, World, bool_flag, check_writable, escape, has_bf16, nearest

# Options that cannot change what a run computes, so that it may be continued with others. The batch may be divided
# differently among processes and pieces as long as its size stays (checked where a run is resumed).
FREE_OPTIONS = {
    *("config", "cfg", "data_path", "split", "output_dir", "num_workers", "device", "dist_url", "local_rank"),
    *("batch_size_per_gpu", "accum_iter", "grad_checkpointing", "compile", "deterministic", "saveckp_freq"),
    *("save_every_minutes", "knn_every", "knn_data", "knn_per_class", "nb_knn", "n_last_blocks"),
    *("avgpool_patchtokens", "knn_temperature", "class_token", "use_cuda", "print_freq", "max_bad_images"),
    *("max_skipped", "dry_run", "devices", "replay", "accept_changes", "use_fp16", "load_from", "backend"),
    *DATASET_OPTIONS,
    *("init_from", "init_progress", "refresh_index"),  # read once; where a run began is checked where it is resumed
}


def get_args_parser(method: type[Method]) -> argparse.ArgumentParser:
    """All options of ``--method``, grouped, with the names and defaults of the original scripts."""
    parser = Parser(
        prog="main_pretrain.py",
        description="Pretrain a student network from a teacher, without labels.",
        epilog="Options of another method: main_pretrain.py --method NAME --help",
    )
    add = parser.add_argument_group("what to run").add_argument
    add("--method", default="dino", choices=list(METHODS), help="what the student learns, and from whom")
    add(
        "--config",
        metavar="FILE.yaml",
        help="preset (configs/<method>/*.yaml), or the argument file of an original's run (.json, with --method); the "
        "command line overrides it",
    )
    add(
        "--cfg",
        metavar="FILE",
        help="a configuration file of EsViT's, or its published name, for the network; KEY VALUE pairs may end the "
        "command",
    )
    add("--output_dir", default=".", help="checkpoints and logs; a run found there is continued")
    add("--dry_run", action="store_true", help="everything but training: settings, data, memory, first batch")
    add("--devices", type=int, help="with --dry_run: plan for so many GPUs; left out: as many as processes")
    add("--replay", metavar="FILE", help="run a step again that was not finite (the file the run wrote)")

    own = parser.add_argument_group(f"the method ({method.name})")

    add = parser.add_argument_group("backbone").add_argument
    add("--arch", default="vit_small", help=f"{', '.join(our_names())}, or timm/<name>")
    add("--patch_size", type=int, help="pixels; left out: 16, of a Swin 4. 8 is better and slower than 16")
    add("--window_size", default=7, type=int, help="patches along a side of Swin's windows; EsViT also has 14")
    add("--rel_pos_embed", default=False, type=bool_flag, help="biases in CvT's windows; not with crops of 96 pixels")
    add("--vil_arch", metavar="STAGES", help="of a ViL: l1,h3,d96,n2,s1,g1,p4,f7,a0_l2,...; left out: those of --arch")
    add(
        "--vil_mode",
        default=0,
        type=int,
        help="what a ViL's sparse attention sees: 0 all chunks around, 1 one, -1 none",
    )
    add("--drop_path_rate", "--drop_path", default=0.1, type=float, help="stochastic depth of the student's last block")

    group = parser.add_argument_group("data")
    add = group.add_argument
    add(
        *("--data_path", "--data_dir"),
        help="folder, list (.txt), zip or tar archives of images, or a folder in one (images.zip/data/train); "
        "left out: the bundled photographs",
    )
    add(
        "--split",
        default=SPLITS[0],
        choices=SPLITS,
        help="what is used of a --data_path with train/ beside val/ or test/ in it: only train/, or all, "
        "with its folders as classes",
    )
    add_dataset_arguments(group)
    add("--subset", type=int, metavar="N", help="only the first N images of every class; -1: all")
    add("--augment", default="fast", choices=["fast", "pil"], help="pil: the original's pixels, bit for bit; slower")
    add("--num_workers", default=10, type=int, help="data loading processes per GPU; no influence on the numbers")
    add("--max_bad_images", default=0.01, type=float, help="stop when a larger share of the images is unreadable")
    add_reading_arguments(group)

    add = parser.add_argument_group("optimisation").add_argument
    add("--batch_size_per_gpu", default=64, type=int, help="images per process and step")
    add("--accum_iter", default=1, type=int, help="compute that batch in so many pieces: same numbers, less memory")
    add("--epochs", default=100, type=int, help="epochs of training")
    add("--lr", default=0.0005, type=float, help="peak learning rate for 256 images; scaled with the whole batch")
    add("--warmup_epochs", default=10, type=int, help="epochs of linear learning rate warm-up")
    add("--min_lr", default=1e-6, type=float, help="learning rate at the end")
    add("--optimizer", default="adamw", choices=OPTIMIZERS, help="adamw for transformers, sgd or lars for ResNets")
    add("--weight_decay", "--wd", default=0.04, type=float, help="first weight decay; a small value works well")
    add(
        "--weight_decay_end",
        default=0.4,
        type=float,
        help="final weight decay, reached by a cosine; where a method has no default, the first one stays",
    )
    add("--clip_grad", default=3.0, type=float, help="largest gradient norm of a tensor; 0 clips nothing")
    add("--seed", default=0, type=int, help="of weights, order, crops and stochastic depth")

    add = parser.add_argument_group("precision and memory").add_argument
    add("--precision", default="auto", choices=["auto", *PRECISIONS], help="auto: bf16 where the hardware has it")
    add("--use_fp16", type=bool_flag, help="the original's switch: true is --precision fp16, false fp32")
    add("--grad_checkpointing", action="store_true", help="recompute activations: less memory, a third more time")
    add("--compile", action="store_true", help="torch.compile every block; measure whether your model gains by it")
    add("--deterministic", default=True, type=bool_flag, help="the same bits at every run on one kind of device")

    add = parser.add_argument_group("checkpoints and logs").add_argument
    add("--saveckp_freq", "--saveckpt_freq", default=20, type=int, help="epochs between two numbered checkpoints")
    add("--save_every_minutes", default=30.0, type=float, help="also save within an epoch; 0 does not")
    add(
        "--load_from",
        metavar="FILE",
        help="continue from this checkpoint in --output_dir; left out: from the newest, if there is one. "
        "A command that is started again and again goes on only without it",
    )
    add(
        *("--init_from", "--pretrained_weights_ckpt"),
        metavar="CKPT",
        help="begin with the networks of another run of this method; a run found in --output_dir goes on instead",
    )
    add(
        "--init_progress",
        default=False,
        type=bool_flag,
        help="of --init_from also the epoch, the optimiser's moments and the state of the loss",
    )
    add("--accept_changes", action="store_true", help="continue the run found although its options differ")
    add("--max_skipped", default=20, type=int, help="stop after so many steps in a row that were not finite")
    add("--print_freq", default=10, type=int, help="steps between two lines of progress and health")

    group = parser.add_argument_group("online k-NN")
    add = group.add_argument
    add(
        *("--knn_every", "--eval_every"),
        default=10,
        type=int,
        help="epochs between two tests (and attention maps), from the first epoch on; the last is tested too; 0: never",
    )
    add("--knn_data", metavar="DIR", help="with train/ and val/; left out: beside the training images, or bundled")
    add("--knn_per_class", default=100, type=int, help="training images per class, within --subset; -1: all")
    add("--nb_knn", default=[10, 20], nargs="+", type=int, help="numbers of neighbours")
    add_feature_arguments(group, n_last_blocks=1)
    add("--knn_temperature", default=0.07, type=float, help="of the votes exp(similarity / temperature)")
    add("--use_cuda", default=True, type=bool_flag, help="compare features on the GPU, if there is one")

    add = parser.add_argument_group("processes").add_argument
    add("--device", default="auto", choices=["auto", "cuda", "cpu"], help="auto: GPUs when there are any")
    add("--dist_url", default="env://", help="how processes find each other: env://, tcp://HOST:PORT or file:///PATH")
    add("--backend", choices=BACKENDS, help="how they talk; left out: nccl on GPUs, gloo on processors")
    add("--local_rank", "--local-rank", type=int, help="ignored; old launchers pass it")

    method.add_arguments(own)  # last, since it may set other defaults of the options above
    return parser


def parse_options(argv: list[str]) -> argparse.Namespace:
    """Defaults, then the preset, then the command line. Raises UsageError for anything unknown."""
    first = Parser(add_help=False)
    first.add_argument("--method")
    first.add_argument("--config")
    early, _ = first.parse_known_args(argv)
    preset = read_preset(Path(early.config)) if early.config else None
    name = early.method or (preset.method if preset else None) or "dino"
    if preset and preset.method not in (None, name):
        raise UsageError(f"--config {early.config} is a preset of {preset.method}, not of --method {name}")
    if preset and preset.foreign and not (early.method or preset.method):
        raise UsageError(f"--config {early.config} names no method; pass --method with it")
    parser = get_args_parser(method_class(name))
    preset_argv = preset.argv(parser) if preset else []
    of_file, argv, arch = words_of(argv, parser._option_string_actions)
    args = parser.parse_args([*preset_argv, "--method", name, *of_file, *argv, *arch])
    resolve_defaults(args)
    return args


def unused_arguments(args: argparse.Namespace) -> list[str]:
    """A line that names what the argument file of an original's run says and nothing here reads, if there is one."""
    preset = read_preset(Path(args.config)) if args.config else None
    names = preset.left_out(get_args_parser(method_class(args.method))) if preset else []
    return [f"--config {args.config}: means nothing here: {', '.join(names)}"] if names else []


def resolve_defaults(args: argparse.Namespace) -> None:
    """Replace what was left out and follows from other options by its value, in place: it is what a run records."""
    if args.patch_size is None:
        args.patch_size = family_of(args.arch).options.get("patch_size")
    if args.drop_path_rate is None:
        args.drop_path_rate = drop_path_of(args.arch)
    if args.weight_decay_end is None:
        args.weight_decay_end = args.weight_decay


def options_named(args: argparse.Namespace, names: tuple[str, ...], argv: list[str]) -> dict:
    """Those of ``names``, with their values, that stand on the command line ``argv`` under any of their spellings."""
    words = {word.split("=")[0] for word in argv}
    actions = get_args_parser(method_class(args.method))._actions
    return {a.dest: getattr(args, a.dest) for a in actions if a.dest in names and words & {*a.option_strings}}


def resolve_precision(args: argparse.Namespace, device: torch.device) -> None:
    """Replace ``auto`` and ``--use_fp16`` by a precision this device has, in place."""
    if args.use_fp16 is not None:
        wanted = "fp16" if args.use_fp16 else "fp32"
        if args.precision not in ("auto", wanted):
            raise UsageError(f"--use_fp16 {args.use_fp16} contradicts --precision {args.precision}; pass one of them")
        args.precision = wanted
    if args.precision == "auto":
        args.precision = "bf16" if has_bf16(device) else ("fp16" if device.type == "cuda" else "fp32")
    if args.precision == "fp16" and device.type != "cuda":
        raise UsageError(
            "fp16 training needs a GPU and there is none; pass --precision bf16 or fp32 (--use_fp16 false)"
        )


def check_options(args: argparse.Namespace, world: World) -> None:
    """Refuse what cannot work, before data is listed or a network built. Every message names value and remedy."""
    positive = {
        *("batch_size_per_gpu", "accum_iter", "epochs", "patch_size", "window_size"),
        *("saveckp_freq", "print_freq", "max_skipped", "n_last_blocks", "devices"),
    }
    for name in sorted(positive):
        value = getattr(args, name)
        if value is not None and value < 1:  # None: the network has no patches
            raise UsageError(f"--{name} {value}: must be at least 1")
    for name in ("warmup_epochs", "num_workers", "clip_grad", "knn_every", "save_every_minutes"):
        if getattr(args, name) < 0:
            raise UsageError(f"--{name} {getattr(args, name)}: must not be negative")
    if not 0 <= args.max_bad_images <= 1:
        raise UsageError(f"--max_bad_images {args.max_bad_images}: a share of the images, from 0 to 1")
    place_from(args)
    check_subset(args.subset)
    args.subset = None if args.subset == ALL else args.subset  # two ways to write the same run
    if args.warmup_epochs > args.epochs:
        raise UsageError(f"--warmup_epochs {args.warmup_epochs} is longer than --epochs {args.epochs}")
    if not 0 <= args.drop_path_rate < 1:
        raise UsageError(f"--drop_path_rate {args.drop_path_rate}: must be in [0, 1)")
    if args.batch_size_per_gpu % args.accum_iter:
        fewer = args.batch_size_per_gpu - args.batch_size_per_gpu % args.accum_iter
        near = [str(value) for value in (fewer, fewer + args.accum_iter) if value]
        raise UsageError(
            f"--batch_size_per_gpu {args.batch_size_per_gpu} with --accum_iter {args.accum_iter}: must divide; "
            f"nearest {' or '.join(near)}"
        )
    _check_arch(args)
    _check_knn(args)
    method_class(args.method).check_arguments(args)
    resolve_precision(args, world.device)
    check_writable(Path(args.output_dir))
    if args.load_from and not (Path(args.output_dir) / args.load_from).is_file():
        raise UsageError(f"--load_from {args.load_from}: no such file in --output_dir {args.output_dir}")
    goes_on = any(Path(args.output_dir).glob("checkpoint*.pth"))  # and needs no other run any more
    if args.init_from and not goes_on and not Path(args.init_from).is_file():
        raise UsageError(f"--init_from {escape(args.init_from)}: no such file; pass the checkpoint.pth of a run")


def _check_arch(args: argparse.Namespace) -> None:
    family = family_of(args.arch)
    if family is LIBRARY and not args.arch.startswith("timm/") and args.arch not in backbone_names():
        raise UsageError(f"--arch {args.arch}: unknown architecture{nearest(args.arch, backbone_names())}")
    family.check_patch(family.arguments(vars(args)))


def _check_knn(args: argparse.Namespace) -> None:
    if args.knn_per_class < 1 and args.knn_per_class != ALL:
        raise UsageError(f"--knn_per_class {args.knn_per_class}: must be at least 1 ({ALL}: all)")
    if min(args.nb_knn) < 1:
        raise UsageError(f"--nb_knn {min(args.nb_knn)}: a vote needs at least one neighbour")
    if args.knn_temperature is not None and not args.knn_temperature > 0:  # None: a method's teacher_temp
        raise UsageError(f"--knn_temperature {args.knn_temperature}: must be positive (the default is 0.07)")


def free_options(args: argparse.Namespace) -> set[str]:
    """Options that say nothing of what this run computes."""
    return FREE_OPTIONS | method_class(args.method).free_options | unread_options(args.arch)


def compare_with_presets(args: argparse.Namespace, world_size: int) -> list[str]:
    """What differs from the nearest preset, of the options that decide a result."""
    ignored = free_options(args) | {"seed", "precision", "augment"}
    return nearest_preset(args, parse_options, world_size, ignored)


def trajectory_options(args: argparse.Namespace) -> dict:
    """The options that decide what a run computes, as plain values."""
    free = free_options(args)
    return {k: list(v) if isinstance(v, tuple) else v for k, v in sorted(vars(args).items()) if k not in free}
