"""Retrieval of images and detection of copies: features of several lists of images, ranked and scored."""

import argparse
from collections.abc import Callable

import torch
from PIL import Image
from torchvision import transforms

from data.copydays import COUNTS as COPIES
from data.copydays import ORIGINAL, open_copydays, positives
from data.datasets import open_source
from data.decode import BadImage, reading_from
from data.preprocess import MEAN, STD
from data.revisited import COUNTS, open_revisited
from data.source import Source
from evaluation.features import Feature, extract_features
from evaluation.images import check_count, check_finite, settled
from evaluation.network import chosen_features, network_from_options
from evaluation.results import write_result
from evaluation.retrieval import (
    KS,
    PROTOCOLS,
    Whitening,
    copies_mean_ap,
    copy_descriptor,
    multiscale,
    rank,
    score,
    similarities,
)
from models.checkpoints import Network
from utils import UsageError, World, log

NONE_UNREADABLE = {"train": 0, "test": 0}
_TENSOR = transforms.Compose([transforms.ToTensor(), transforms.Normalize(MEAN, STD)])


def thumbnail(image: Image.Image, longest: int) -> Image.Image:
    """A copy whose longer side is ``longest`` pixels (Lanczos, same aspect); smaller ones stay as they are."""
    image = image.copy()
    image.thumbnail((longest, longest), Image.Resampling.LANCZOS)
    return image


class Thumbnail:
    """PIL RGB -> normalised (3, height, width); both sides have at least ``least`` pixels, or BadImage is raised."""

    def __init__(self, longest: int, least: int):
        self.longest, self.least = longest, least

    def __call__(self, image: Image.Image) -> torch.Tensor:
        small = thumbnail(image, self.longest)
        if min(small.size) < self.least:
            raise BadImage(
                "image", f"{small.size[0]} x {small.size[1]} pixels, {self.least} are needed; raise --imsize"
            )
        return _TENSOR(small)


# ---------------------------------------------------------------------------------------------------------------------
# Revisited Oxford and Paris
# ---------------------------------------------------------------------------------------------------------------------


def retrieve(args: argparse.Namespace, world: World, append: bool) -> None:
    network = network_from_options(args)
    model = network.model.to(world.device)
    (feature,) = chosen_features(network, [args.n_last_blocks], [args.avgpool_patchtokens], [args.class_token])
    data = open_revisited(args.data_path, args.dataset, reading_from(args))
    for what, source, count in zip(("images", "queries"), data[:2], COUNTS[args.dataset], strict=True):
        check_count(args, f"{args.dataset}: {what}", len(source), count)
    least = network.arguments.get("patch_size", 1) * (2 if args.multiscale else 1)
    if args.imsize < least:
        raise UsageError(f"--imsize {args.imsize}: at least {least} pixels, for patches at every scale")
    log.info(f"feature: {feature}, images of at most {args.imsize} pixels" + ", three scales" * args.multiscale)
    whole = scaled(feature) if args.multiscale else feature
    images, queries = (
        features_of(args, world, network.label, model, source, Thumbnail(args.imsize, least), whole, batch_size=1)
        for source in data[:2]
    )
    ranks = rank(queries, images).numpy()
    scores = {name: score(ranks, data.lists, protocol) for name, protocol in PROTOCOLS.items()}
    percent = {name: round(100 * found.mean_ap, 2) for name, found in scores.items()}
    precisions = {name: [round(100 * share, 2) for share in found.precisions] for name, found in scores.items()}
    log.info(f">> {args.dataset}: mAP M: {percent['M']}, H: {percent['H']}, E: {percent['E']}")
    said = ", ".join(f"{name}: {precisions[name]}" for name in ("M", "H", "E"))
    log.info(f">> {args.dataset}: mP@k{list(KS)} {said}")
    if world.rank == 0:
        numbers = {name: {"mAP": 100 * scores[name].mean_ap} for name in scores}
        for name, found in scores.items():
            numbers[name] |= {f"mP@{k}": 100 * share for k, share in zip(KS, found.precisions, strict=True)}
        numbers |= {"queries": len(data.queries), "imsize": args.imsize, "multiscale": args.multiscale}
        numbers["feature"] = str(feature)
        write_result(args, "eval_retrieval", network, data.images.name, NONE_UNREADABLE, numbers, append)


def scaled(feature: Feature) -> Callable:
    return lambda model, images: multiscale(model, images, feature)


def features_of(
    args: argparse.Namespace,
    world: World,
    label: str,
    model: torch.nn.Module,
    source: Source,
    transform: Callable,
    feature: Callable,
    batch_size: int,
    needed: bool = True,
) -> torch.Tensor:
    """(images, dim); images that cannot be read are refused where they are ``needed``, left out where they are not."""
    options = {"batch_size": batch_size, "num_workers": args.num_workers, "device": world.device, "world": world}
    found, unreadable = extract_features(model, source, transform, feature=feature, **options)
    settled(source, unreadable, skip=not needed)
    return check_finite(label, found)


# ---------------------------------------------------------------------------------------------------------------------
# Copydays
# ---------------------------------------------------------------------------------------------------------------------


def detect_copies(args: argparse.Namespace, world: World, append: bool) -> None:
    network = network_from_options(args)
    check_has_patches(network)
    network.model.to(world.device)
    blocks = open_copydays(args.data_path, reading_from(args))
    for block, source in blocks.items():
        check_count(args, f"{args.data_path}: {block}/", len(source), COPIES[block])
    left = [block for block in COPIES if block not in blocks]
    if left:
        log.warning(f"warning: {args.data_path}: nothing in {', '.join(left)}, so nothing is said of them")
    wanted = {block: positives(block, blocks) for block in blocks}
    others = {name: folder_of(args, name) for name in ("distractors_path", "whitening_path")}
    side = transforms.Resize((args.imsize, args.imsize), transforms.InterpolationMode.BICUBIC)
    transform = transforms.Compose([side, _TENSOR])

    def features(source: Source, needed: bool = True) -> torch.Tensor:
        options = (network.label, network.model, source, transform, descriptor, args.batch_size_per_gpu)
        return features_of(args, world, *options, needed=needed)

    found = {block: features(source) for block, source in blocks.items()}
    database = found[ORIGINAL]
    if others["distractors_path"]:
        database = torch.cat((database, features(others["distractors_path"], needed=False)))
    whitening = None
    if others["whitening_path"]:
        log.info(f"whitened with {others['whitening_path'].name}")
        whitening = Whitening(features(others["whitening_path"], needed=False))
    results = {}
    for block, queries in found.items():
        results[block] = copies_mean_ap(similarities(queries, database, whitening), wanted[block], args.neighbours)
        log.info(f"eval on {block} mAP={results[block]:.3f}")
    if world.rank == 0:
        numbers = {"mAP": results, "database": len(database), "whitening": args.whitening_path, "imsize": args.imsize}
        data = f"{args.data_path}: {', '.join(blocks)}"
        write_result(args, "eval_copy_detection", network, data, NONE_UNREADABLE, numbers, append)


def check_has_patches(network: Network) -> None:
    if not hasattr(network.model, "get_intermediate_layers"):
        raise UsageError(f"{network.label}: has no patch tokens to describe copies with; use one of our transformers")


def descriptor(model: torch.nn.Module, images: torch.Tensor) -> torch.Tensor:
    return copy_descriptor(model.get_intermediate_layers(images, 1)[-1], model.num_prefix_tokens)


def folder_of(args: argparse.Namespace, option: str) -> Source | None:
    """The images of ``--<option>``, any folder, list or archive of them; None where it was not given."""
    path = getattr(args, option)
    if not path:
        return None
    try:
        return open_source(path).read_as(reading_from(args))
    except UsageError as error:
        raise UsageError(str(error).replace("--data_path", f"--{option}")) from None
