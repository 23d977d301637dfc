"""Linear classifiers on a frozen network, all of them from one pass: built, trained, tested."""

import argparse
import math
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from data.decode import reading_from
from data.index import refresh_indices
from data.linear_views import StrongLinearViews
from data.loader import TrainLoader
from data.preprocess import eval_transform
from data.published import place_from
from data.views import LinearViews
from evaluation.classifier import read_head
from evaluation.features import Feature, feature_widths, token_features
from evaluation.linear_heads import LinearHeads, Probe, Recipe, best_head, cosine_factor, heads_of, initial_heads
from evaluation.linear_run import (
    SWEEPS,
    LinearRun,
    best_path,
    log_line,
    resume,
    save,
)
from evaluation.network import chosen_features, network_from_options, part_features
from evaluation.run import (
    all_hits,
    labelled_batches,
    means_over_images,
    no_hits,
    see_test_images,
    tell_replaced,
    tested_or_saved,
    training_pieces,
)
from evaluation.sets import Sets, crop_and_resize, open_train_and_test
from models.safe_load import load_file
from utils import UsageError, World, all_reduce_sum, log

LINES_EVERY = 20  # steps


def build_run(args: argparse.Namespace, world: World) -> LinearRun:
    network = network_from_options(args)
    model = network.model.to(world.device).eval().requires_grad_(False)
    if args.topk:
        features = part_features(network, args.topk, args.reverse_top)
    else:
        features = chosen_features(network, args.n_last_blocks, args.avgpool_patchtokens, args.class_token)
    refresh_indices(args.refresh_index)
    images = open_train_and_test(place_from(args), args.subset, eval_data_path=args.eval_data_path)
    sets = Sets(images, reading_from(args), crop_and_resize(args, network), args.num_labels)
    log.info(str(sets))
    recipes = [Recipe(lr) for lr in dict.fromkeys(args.lr or [0.001])]
    if args.sweep_lr_only is not None:
        recipes = SWEEPS[args.sweep].recipes(args.sweep_lr_only)
    scale = args.batch_size_per_gpu * world.size / 256
    scaled = [recipe._replace(lr=recipe.lr * scale) for recipe in recipes]
    groups = []
    for width in feature_widths(model, features, sets.crop_size, world.device):
        heads = initial_heads(len(recipes), sets.classes, width, args.seed)
        groups.append(LinearHeads(*(tensor.to(world.device) for tensor in heads), scaled, floor=args.lr_min))
    common = {"args": args, "world": world, "network": network, "sets": sets}
    run = LinearRun(**common, features=features, recipes=recipes, probe=Probe(groups))
    log.info(f"linear heads: {len(run.probe)}, on {'; '.join(map(str, features))}; lr is multiplied by {scale:g}")
    return run


# ---------------------------------------------------------------------------------------------------------------------
# Training and testing
# ---------------------------------------------------------------------------------------------------------------------


def train(run: LinearRun) -> None:
    args = run.args
    start, lines = resume(run)
    if start == 0:
        see_test_images(run, eval_transform(run.sets.crop_size, run.sets.resize_size))
    loader, pieces = training_pieces(run, training_views(args, run.sets.crop_size), start, drop_last=False)
    if run.untested is not None:
        end_epoch(run, start - 1, run.untested, lines)
    for epoch in range(start, args.epochs):
        end_epoch(run, epoch, train_one_epoch(run, loader, pieces, epoch), lines)


def training_views(args: argparse.Namespace, crop_size: int) -> LinearViews | StrongLinearViews:
    return StrongLinearViews(crop_size) if args.augment == "strong" else LinearViews(crop_size, args.augment)


def end_epoch(run: LinearRun, epoch: int, losses: list[float], lines: list[dict]) -> None:
    """Test where it is time, add the epoch's line to those of log.txt, and save."""
    tests, improved = None, False
    if epoch % run.args.val_freq == 0 or epoch == run.args.epochs - 1:
        run.untested = losses
        tests = tested_or_saved(lambda: test(run), lambda: save(run, epoch + 1, lines, is_best=False))
        run.untested, improved = None, judge(run, epoch, *tests)
        tests, _ = tests
    lines.append(log_line(run, epoch, losses, tests))
    save(run, epoch + 1, lines, is_best=improved)


@torch.no_grad()
def train_one_epoch(run: LinearRun, loader: TrainLoader, pieces: Iterator[dict], epoch: int) -> list[float]:
    """Every head's loss, averaged over the steps."""
    factor, device = cosine_factor(epoch, run.args.epochs), run.world.device
    labels = run.sets.train_labels.to(device)
    totals = torch.zeros(len(run.probe) + 1, dtype=torch.float64, device=device)  # losses, unreadable images
    bad: dict[str, str] = {}
    since = time.monotonic()
    for step in range(loader.niter):
        piece = next(pieces)
        images = min(loader.global_batch, loader.images - step * loader.global_batch)
        targets = labels[piece["indices"]]
        losses = run.probe.train_step(features_of(run, piece), targets, images, factor)
        totals[:-1] += losses
        totals[-1] += len(piece["bad"])
        bad |= dict(piece["bad"])
        if step % LINES_EVERY == 0 or step == loader.niter - 1:
            lowest = losses.nan_to_num(nan=math.inf).min() * images / max(1, len(targets))
            rate = (step + 1) * loader.global_batch / (time.monotonic() - since)
            log.info(f"Epoch: [{epoch}]  [{step}/{loader.niter}]  loss: {lowest:.4f}  {rate:.0f} images/s")
    *losses, unreadable = all_reduce_sum(totals).tolist()
    tell_replaced(run, bad, unreadable)
    return [loss / loader.niter for loss in losses]


def features_of(run: LinearRun, piece: dict) -> list[torch.Tensor]:
    """Features of a piece's images, one tensor for every group of heads; of no images where this process has none."""
    if not len(piece["indices"]):
        return [group.weight.new_empty(0, group.weight.shape[2]) for group in run.probe.groups]
    return token_features(run.network.model, piece["crops"][0], run.features)


@torch.no_grad()
def test(run: LinearRun) -> tuple[list[dict], torch.Tensor]:
    """Of every head: mean loss over the test images, top-1 and (from five classes on) top-5 accuracy in percent; and
    which images of this process's share it gets right (heads, test images).
    """
    transform = eval_transform(run.sets.crop_size, run.sets.resize_size)
    sums = torch.zeros(3, len(run.probe), dtype=torch.float64, device=run.world.device)
    hits = no_hits(run, len(run.probe))
    for indices, images, labels in labelled_batches(run, transform, run.args.batch_size_per_gpu):
        found, right = run.probe.test(token_features(run.network.model, images, run.features), labels)
        sums += found
        hits[:, indices.to(hits.device)] = right.to(hits.dtype)
    columns = {name: values.tolist() for name, values in means_over_images(run, sums).items()}
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)], hits


def judge(run: LinearRun, epoch: int, tests: list[dict], hits: torch.Tensor) -> bool:
    """Keep the best head of this epoch if it equals or beats the best so far; whether it does."""
    accuracies = [result["acc1"] for result in tests]
    run.peaks = [max(pair) for pair in zip(run.peaks or accuracies, accuracies, strict=True)]
    only_lr = SWEEPS[run.args.sweep].beside if run.args.sweep_lr_only is False else 1
    run.best_acc_sweep_lr_only = max(run.best_acc_sweep_lr_only, *accuracies[::only_lr])
    head = best_head(accuracies)
    log.info(f"Accuracy at epoch {epoch} of the network on the {run.tested} test images: {accuracies[head]:.1f}%")
    improved = run.best is None or accuracies[head] >= run.best["acc1"]
    if improved:
        run.best = {"head": head, "epoch": epoch, **tests[head]}
        run.right = all_hits(run, hits[head])
    log.info(f"Max accuracy so far: {run.best['acc1']:.2f}% ({run.describe(run.best['head'])})")
    return improved


# ---------------------------------------------------------------------------------------------------------------------
# Testing a head that is given
# ---------------------------------------------------------------------------------------------------------------------


def evaluate(run: LinearRun) -> None:
    """Replace the run's heads by the best of a file, and test it."""
    path, feature, weight, bias = given_head(run)
    classes, width = weight.shape
    if classes < len(run.sets.train.class_names) or (run.args.num_labels or classes) != classes:
        raise UsageError(f"{path}: a head of {classes} classes, {run.sets.train.name} has {run.sets.classes}")
    model, device = run.network.model, run.world.device
    (expected,) = feature_widths(model, [feature], run.sets.crop_size, device)
    if width != expected:
        raise UsageError(
            f"{path}: a head on features of width {width}, but the {feature} of {run.network.label} has {expected}; "
            "pass the --n_last_blocks, --avgpool_patchtokens and --class_token it was trained with"
        )
    run.features, run.recipes, run.sets.classes = [feature], [Recipe(0.0)], classes
    run.probe = Probe([LinearHeads(weight[None].to(device), bias[None].to(device), run.recipes)])
    log.info(f"{path}: a linear head on the {feature}")
    (run.best,), (hits,) = test(run)
    run.right = all_hits(run, hits)
    log.info(f"Accuracy of the network on the {run.tested} test images: {run.best['acc1']:.1f}%")


def given_head(run: LinearRun) -> tuple[Path, Feature, torch.Tensor, torch.Tensor]:
    """Path, feature, weight and bias: of --pretrained_linear, else from the network's own file, else the run's best."""
    args = run.args
    paths = [Path(args.pretrained_linear)] if args.pretrained_linear else []
    if not paths and args.pretrained_weights and heads_of(load_file(args.pretrained_weights)):
        paths = [Path(args.pretrained_weights)]
    path = (paths or [best_path(args)])[0]
    if not paths and not path.exists():
        raise UsageError(f"--evaluate: there is no {path}; name the head to be tested with --pretrained_linear")
    head = read_head(path, run.network)
    if head.feature is None and len(run.features) > 1:
        raise UsageError(
            "--evaluate: pass the one --n_last_blocks, --avgpool_patchtokens and --class_token of this head"
        )
    return path, head.feature or run.features[0], head.weight, head.bias
