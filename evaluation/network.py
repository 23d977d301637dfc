"""Which network an evaluation looks at, and at which of its outputs: options, and what they describe."""

import argparse
import itertools
import sys
from collections.abc import Iterator, Sequence

import torch
import torch.nn as nn

from evaluation.features import CLASS_TOKENS, CLS, INTERLEAVED, MEAN, NORMALISED_MEAN, OUTPUT, POOLINGS, Feature
from models import ALIASES, build_backbone, family_of
from models.checkpoints import Network, add_unseen_arguments, network_from_file
from models.esvit_configs import words_of
from models.teacher_space import teacher_space_from_file
from utils import BACKENDS, Parser, UsageError, log

ASKED = ("arch", "patch_size", "window_size", "num_heads", "act", "grid")  # what options may say of a network in a file


def add_network_arguments(parser: argparse._ActionsContainer) -> None:
    """The options by which every evaluation is told what to look at, named as in the originals."""
    add = parser.add_argument
    add("--pretrained_weights", default="", help="checkpoint of any known layout; left out: random weights")
    add(
        "--checkpoint_key",
        default="teacher",
        help="which network of a file to evaluate: its key, or what its names begin with",
    )
    add("--arch", default=None, help="architecture; left out: the checkpoint's own, else vit_small")
    add("--patch_size", default=None, type=int, help="left out: the checkpoint's own, else 16 (Swin: 4)")
    add_unseen_arguments(parser)
    add("--window_size", default=None, type=int, help="of a Swin; left out: the checkpoint's own, else 7")
    add(
        "--cfg",
        metavar="FILE",
        help="a configuration file of EsViT's, or its published name; KEY VALUE pairs may follow",
    )


def parse_network_args(parser: Parser, argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The options of an evaluation, with what --cfg says of the network among them; left out, the command line's."""
    of_file, rest, arch = words_of(sys.argv[1:] if argv is None else argv, parser._option_string_actions)
    return parser.parse_args([*of_file, *rest, *arch])


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

    add("--n_last_blocks", n_last_blocks, type=int, help="class tokens of so many last blocks, or of all there are")
    means = (
        "0: no patch tokens; 1: only their mean, before the norm; mean: after it; 2: their mean as well; "
        "interleaved: as DINO's true"
    )
    add("--avgpool_patchtokens", POOLINGS[0], type=pooling, metavar="POOLING", help=means)
    add("--class_token", CLS, choices=tuple(CLASS_TOKENS), help="which one, of networks with two (UDI)")


def add_head_argument(parser: argparse._ActionsContainer, required: bool = False) -> None:
    what = "of a training checkpoint of UNIC: the student's image in the space of this teacher, through its ladder"
    parser.add_argument("--apply_head", default=None, required=required, metavar="TEACHER", help=what)


def chosen_features(
    network: Network, n_last_blocks: Sequence[int], poolings: Sequence[str], tokens: Sequence[str] = (CLS,)
) -> list[Feature]:
    """Every combination that differs from the others. Raises UsageError for what ``network`` does not have.

    More blocks than it has are all it has.
    """
    combinations = itertools.product(n_last_blocks, poolings, tokens)
    features = [Feature(1, p) if p in (MEAN, NORMALISED_MEAN) else Feature(n, p, token) for n, p, token in combinations]
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
    pools = network.arch.startswith("timm/") or getattr(model, "pools_patches", False)
    others = [token for token in tokens if token != CLS]
    if others and (pools or getattr(model, "num_class_tokens", 1) < 2):
        raise UsageError(f"--class_token {others[0]}: {network.label} has no second class token; leave the option out")
    if pools or not hasattr(model, "get_intermediate_layers"):
        if features != [OUTPUT]:
            raise UsageError(
                f"{network.label}: only its pooled output can be taken; pass --n_last_blocks 1 --avgpool_patchtokens 0"
            )
        log.info(f"{network.label}: its pooled output is taken")
        return features
    return within_depth(network, features)


def part_features(network: Network, counts: Sequence[int], least: bool) -> list[Feature]:
    """Means of so many patches, those that the class token attends to most or least. Raises UsageError."""
    depth = len(getattr(network.model, "blocks", ()))
    if not hasattr(network.model, "attention_from") or depth < 2:
        raise UsageError(f"--topk: {network.label} has no class token's attention to choose patches by; use a vit_*")
    if min(counts) < 1:
        raise UsageError(f"--topk {min(counts)}: must be at least 1 patch")
    return [Feature(1, f"{'least' if least else 'top'}{count}") for count in dict.fromkeys(counts)]


def within_depth(network: Network, features: Sequence[Feature]) -> list[Feature]:
    """The same features, of all blocks where they ask for more than a transformer of ours has; the log says so."""
    most = max(feature.n_last_blocks for feature in features)
    depth = len(network.model.blocks) if hasattr(network.model, "get_intermediate_layers") else most
    if most > depth:
        log.info(f"--n_last_blocks {most}: {network.label} has {depth} blocks, and all of them are taken")
    return list(dict.fromkeys(f._replace(n_last_blocks=min(f.n_last_blocks, depth)) for f in features))


def add_process_arguments(parser: argparse._ActionsContainer) -> None:
    add = parser.add_argument
    add("--device", default="auto", choices=("auto", "cpu", "cuda"), help="auto: the GPU if there is one")
    add("--dist_url", default="env://", help="how processes find each other: env://, tcp://HOST:PORT or file:///PATH")
    add("--backend", choices=BACKENDS, help="how they talk; left out: nccl on GPUs, gloo on processors")
    add("--local_rank", default=0, type=int, help="accepted and ignored: torchrun sets it in the environment")


def of_every_key(args: argparse.Namespace) -> Iterator[tuple[argparse.Namespace, bool]]:
    """The options for every network of ``--checkpoint_key student,teacher``, and whether it is a further one."""
    keys = args.checkpoint_key.split(",")
    for number, key in enumerate(keys):
        if len(keys) > 1:
            log.info(f"checkpoint key: {key}")
        yield argparse.Namespace(**{**vars(args), "checkpoint_key": key}), number > 0


def second_network(path: str, checkpoint_key: str = "teacher", **asked: object) -> Network:
    """Another network that an evaluation looks at, from a file of its own; of ASKED what is not given is left to it."""
    told = dict.fromkeys(ASKED) | {"pretrained_weights": path, "checkpoint_key": checkpoint_key} | asked
    return network_from_options(argparse.Namespace(**told))


def network_from_options(args: argparse.Namespace) -> Network:
    """The network that ``add_network_arguments`` describes; says loudly when its weights are random (seed 0)."""
    head = getattr(args, "apply_head", None)  # of evaluations that read features
    if head is not None and not args.pretrained_weights:
        raise UsageError(f"--apply_head {head}: names a part of a checkpoint; pass it as --pretrained_weights")
    if args.pretrained_weights:
        where = (args.pretrained_weights, args.checkpoint_key)
        asked = {name: getattr(args, name) for name in ASKED}
        network = network_from_file(*where, **asked) if head is None else teacher_space_from_file(*where, head, **asked)
        info = network.report.info
        log.info(f"{info.path}: {info.layout.name}, {network.label if head else network.arch}: {network.report}")
        for note in (*info.notes, *[f"assumed: {words}" for words in [network.report.assumed] if words]):
            log.info(f"{info.path}: {note}")
        return network
    if args.num_heads or args.act or args.grid:
        raise UsageError("--num_heads, --act, --grid: describe the network of a file; pass --pretrained_weights")
    arch = ALIASES.get(args.arch, args.arch) or "vit_small"
    arguments = family_of(arch).arguments(vars(args))
    log.warning(
        f"NO --pretrained_weights: {arch} WITH RANDOM WEIGHTS IS EVALUATED; its numbers say nothing of training"
    )
    return Network(untrained(arch, arguments), arch, arguments, None)


def untrained(arch: str, arguments: dict, seed: int = 0) -> nn.Module:
    """The same architecture with the weights that ``seed`` draws; the caller's generators are left as they were."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build_backbone(arch, **arguments)
