"""What every evaluation asks and answers: options, the network they describe, train and test sets, one line of JSON."""

import argparse
import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.nn as nn

from data.datasets import Source, check_subset, open_source
from evaluation.features import CLASS_TOKENS, CLS, INTERLEAVED, MEAN, OUTPUT, POOLINGS, Feature, labels_of
from models import ALIASES, build_backbone, is_swin, is_vision_transformer
from models.checkpoints import Network, network_from_file
from utils import BACKENDS, UsageError, check_writable, log, make_folder, save_atomically, save_torch


def add_network_arguments(parser: argparse._ActionsContainer) -> None:
    """The options by which every evaluation is told what to look at, named as in the originals."""
    add = parser.add_argument
    add("--pretrained_weights", default="", help="checkpoint of any known layout; left out: random weights")
    add("--checkpoint_key", default="teacher", help="which of a training checkpoint's networks to evaluate")
    add("--arch", default=None, help="architecture; left out: the checkpoint's own, else vit_small")
    add("--patch_size", default=None, type=int, help="left out: the checkpoint's own, else 16 (Swin: 4)")
    add("--window_size", default=None, type=int, help="of a Swin; left out: the checkpoint's own, else 7")


def add_data_arguments(parser: argparse._ActionsContainer) -> None:
    """The options by which evaluations on a train and a test set are told what to look at it with."""
    add = parser.add_argument
    add("--data_path", default=None, help="folder with train/ and val/; left out: tiles of the bundled photographs")
    add("--subset", default=None, type=int, help="training images per class; left out or -1: all")
    add("--crop_size", default=None, type=int, help="pixels; left out: the checkpoint's global_crops_size, else 224")
    add("--resize_size", default=None, type=int, help="shorter side before the crop; left out: crop * 256 / 224")
    add("--batch_size_per_gpu", default=128, type=int, help="images per forward pass and process")
    add("--num_workers", default=10, type=int, help="processes that decode images, per process")


def pooling(text: str) -> str:
    """``--avgpool_patchtokens``: iBOT's 0, 1, 2; DINO's false or off (0) and true or on (interleaved)."""
    words = {"false": POOLINGS[0], "off": POOLINGS[0], "true": INTERLEAVED, "on": INTERLEAVED}
    name = words.get(text.lower(), text.lower())
    if name not in POOLINGS:
        raise argparse.ArgumentTypeError(f"{text!r} is none of {', '.join(POOLINGS)}, false (0), true (interleaved)")
    return name


def add_feature_arguments(parser: argparse._ActionsContainer, n_last_blocks: int, several: bool = False) -> None:
    """The options that choose a feature by its class tokens and patch tokens, or ``several`` (features.Feature)."""

    def add(name: str, default: object, **options: object) -> None:
        several_values = {"nargs": "+", "default": [default]} if several else {"default": default}
        parser.add_argument(name, **options, **several_values)

    add("--n_last_blocks", n_last_blocks, type=int, help="class tokens of so many last blocks")
    means = (
        "0: no patch tokens; 1: only their mean, before the norm; 2: their mean as well; interleaved: as DINO's true"
    )
    add("--avgpool_patchtokens", POOLINGS[0], type=pooling, metavar="POOLING", help=means)
    add("--class_token", CLS, choices=tuple(CLASS_TOKENS), help="which one, of networks with two (UDI)")


def chosen_features(
    network: Network, n_last_blocks: Sequence[int], poolings: Sequence[str], tokens: Sequence[str] = (CLS,)
) -> list[Feature]:
    """Every combination that differs from the others. Raises UsageError for what ``network`` does not have."""
    combinations = itertools.product(n_last_blocks, poolings, tokens)
    features = [Feature(1, p) if p == MEAN else Feature(n, p, token) for n, p, token in combinations]
    features = list(dict.fromkeys(features))
    if min(n_last_blocks) < 1:
        raise UsageError(f"--n_last_blocks {min(n_last_blocks)}: must be at least 1")
    for feature in features:
        if feature.avgpool == INTERLEAVED and feature.n_last_blocks > 1:
            raise UsageError(
                f"--n_last_blocks {feature.n_last_blocks} --avgpool_patchtokens interleaved (DINO's true): exists for "
                "one block only; pass --n_last_blocks 1, or --avgpool_patchtokens 2 (one after the other)"
            )
        if feature.avgpool == INTERLEAVED and len(CLASS_TOKENS[feature.token]) > 1:
            raise UsageError(
                f"--class_token {feature.token} --avgpool_patchtokens interleaved (DINO's true): exists for one class "
                "token only; pass --class_token cls or cls+, or --avgpool_patchtokens 2 (one after the other)"
            )
    model = network.model
    pools = network.arch.startswith("timm/") or getattr(model, "fc_norm", None) is not None
    others = [token for token in tokens if token != CLS]
    if others and (pools or getattr(model, "num_class_tokens", 1) < 2):
        raise UsageError(f"--class_token {others[0]}: {network.label} has no second class token; leave the option out")
    if pools or not hasattr(model, "get_intermediate_layers"):
        if features != [OUTPUT]:
            raise UsageError(
                f"{network.label}: only its pooled output can be taken; pass --n_last_blocks 1 --avgpool_patchtokens 0"
            )
        log.info(f"{network.label}: its pooled output is taken")
    elif max(n_last_blocks) > len(model.blocks):
        raise UsageError(f"--n_last_blocks {max(n_last_blocks)}: {network.label} has {len(model.blocks)} blocks")
    return features


def add_process_arguments(parser: argparse._ActionsContainer) -> None:
    add = parser.add_argument
    add("--device", default="auto", choices=("auto", "cpu", "cuda"), help="auto: the GPU if there is one")
    add("--dist_url", default="env://", help="how processes find each other")
    add("--backend", choices=BACKENDS, help="how they talk; left out: nccl on GPUs, gloo on processors")
    add("--local_rank", default=0, type=int, help="accepted and ignored: torchrun sets it in the environment")


def check_common_arguments(args: argparse.Namespace) -> None:
    """Raise UsageError for values that cannot work, before anything is read."""
    check_subset(args.subset)
    for name in ("crop_size", "resize_size", "batch_size_per_gpu", "patch_size", "window_size"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UsageError(f"--{name} {value}: must be at least 1")
    if args.num_workers < 0:
        raise UsageError(f"--num_workers {args.num_workers}: must be 0 (decode in this process) or more")
    check_writable(Path(args.output_dir))


def crop_and_resize(args: argparse.Namespace, network: Network) -> tuple[int, int]:
    """Crop and shorter side in pixels: as asked, else as the network was trained, else 224 of 256."""
    recorded = network.report.info.arguments.get("global_crops_size") if network.report else None
    crop = args.crop_size or (recorded if isinstance(recorded, int) else 224)
    margin = 1 if args.data_path is None else 256 / 224  # a bundled tile has no border to cut off
    resize, patch = args.resize_size or round(crop * margin), network.arguments.get("patch_size", 1)
    if not patch <= crop <= resize:
        raise UsageError(f"--crop_size {crop} --resize_size {resize}: need patch size ({patch}) <= crop <= resize")
    return crop, resize


def open_train_and_test(data_path: str | None, subset: int | None, start: int = 0) -> tuple[Source, Source]:
    """``data_path``/train, all or ``subset`` images of every class, and ``data_path``/val; None: the photographs.

    ``start``: which image of every class is the subset's first.
    """
    if data_path is None:
        return open_source(None, subset, "train", start), open_source(None, split="test")
    folders = [Path(data_path) / part for part in ("train", "val")]
    for folder in folders:
        if not folder.is_dir():
            raise UsageError(f"--data_path {data_path}: has no {folder.name}/ with a folder per class")
    return open_source(str(folders[0]), subset, "train", start), open_source(str(folders[1]), split="val")


def common_labels(train: Source, test: Source) -> tuple[torch.Tensor, torch.Tensor]:
    """Labels of both sets in the train set's numbering; classes are matched by name."""
    train_labels, test_labels = labels_of(train), labels_of(test)
    for source, labels in ((train, train_labels), (test, test_labels)):
        if (labels < 0).any():
            raise UsageError(f"{source.name}: images without a class; needs one folder per class")
    numbers = {name: number for number, name in enumerate(train.class_names)}
    unknown = [name for name in test.class_names if name not in numbers]
    if unknown:
        raise UsageError(f"{test.name}: {len(unknown)} classes are not in {train.name}, such as {unknown[0]}")
    return train_labels, torch.tensor([numbers[name] for name in test.class_names])[test_labels]


def network_from_options(args: argparse.Namespace) -> Network:
    """The network that ``add_network_arguments`` describes; says loudly when its weights are random (seed 0)."""
    if args.pretrained_weights:
        network = network_from_file(
            args.pretrained_weights, args.checkpoint_key, args.arch, args.patch_size, args.window_size
        )
        info = network.report.info
        log.info(f"{info.path}: {info.layout.name}, {network.arch}: {network.report}")
        for note in info.notes:
            log.info(f"{info.path}: {note}")
        return network
    arch, arguments = ALIASES.get(args.arch, args.arch) or "vit_small", {}
    if is_vision_transformer(arch):
        arguments = {"patch_size": args.patch_size or 16}
        if 224 % arguments["patch_size"]:
            raise UsageError(
                f"--patch_size {args.patch_size}: must divide 224, the size at which positions are laid out"
            )
    if is_swin(arch):
        arguments = {"patch_size": args.patch_size or 4, "window_size": args.window_size or 7}
    log.warning(
        f"NO --pretrained_weights: {arch} WITH RANDOM WEIGHTS IS EVALUATED; its numbers say nothing of training"
    )
    return Network(untrained(arch, arguments), arch, arguments, None)


def untrained(arch: str, arguments: dict, seed: int = 0) -> nn.Module:
    """The same architecture with the weights that ``seed`` draws; the caller's generators are left as they were."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build_backbone(arch, **arguments)


def write_result(
    output_dir: str, evaluation: str, network: Network, checkpoint_key: str, data: str, numbers, append: bool = False
) -> Path:
    """``<output_dir>/<evaluation>.json``: one line, with the same fields in every evaluation.

    ``append``: after the lines that are there, of further networks of the same command.
    """
    info = network.report.info if network.report else None
    result = {
        "evaluation": evaluation,
        "checkpoint": str(info.path) if info else None,
        "checkpoint_key": (info.key or checkpoint_key) if info else None,
        "arch": network.label,
        "data": data,
        "numbers": numbers,
    }
    path = Path(output_dir) / f"{evaluation}.json"
    make_folder(path.parent)
    try:
        before = path.read_text() if append else ""
        save_atomically(path, lambda temporary: temporary.write_text(before + json.dumps(result) + "\n"))
    except OSError as error:
        raise UsageError(f"--output_dir {output_dir}: {path.name} cannot be written: {error}") from error
    return path


# ---------------------------------------------------------------------------------------------------------------------
# Evaluations that train: written epoch by epoch, and continued
# ---------------------------------------------------------------------------------------------------------------------


def save_run(folder: Path, lines: Sequence[dict], file: dict, names: Sequence[str]) -> None:
    """log.txt with ``lines``, then ``file`` under every one of ``names``, what is continued last: a run that dies in
    between repeats the epoch. Raises UsageError when the disk does not take it.
    """
    text = "".join(json.dumps(line) + "\n" for line in lines)
    try:
        save_atomically(folder / "log.txt", lambda temporary: temporary.write_text(text))
        for name in names:
            save_torch(file, folder / name)
    except OSError as error:
        raise UsageError(f"--output_dir {folder}: cannot save ({error.strerror or error}); free some space") from None


def log_before(folder: Path, epoch: int) -> list[dict]:
    """The lines of log.txt that are of epochs before ``epoch``."""
    path = folder / "log.txt"
    lines = map(json.loads, path.read_text().splitlines()) if path.exists() else ()
    return [line for line in lines if line["epoch"] < epoch]


def refuse_another_run(path: Path, theirs: dict, ours: dict, said: Mapping[str, str] | None = None) -> None:
    """Raise UsageError, naming every difference, unless ``path`` belongs to a run with our options.

    ``said``: what to say of options whose values would fill pages.
    """
    differences = [
        (said or {}).get(name, f"{name}: {theirs.get(name)} there, {value} here")
        for name, value in ours.items()
        if theirs.get(name) != value
    ]
    if differences:
        raise UsageError(
            f"{path} belongs to another run ({'; '.join(differences)}); choose another --output_dir, or move it away"
        )
