"""Linear classifiers on a frozen network: many learning rates, numbers of blocks and poolings in one run.

    torchrun --nproc_per_node=8 eval_linear/eval_linear.py --pretrained_weights checkpoint.pth --data_path /imagenet
    python eval_linear/eval_linear.py --pretrained_weights checkpoint.pth --sweep_lr_only      on bundled photographs

Every image goes through the network once a step, whatever the number of heads (evaluation/linear_heads.py). DINO's protocol
(2104.14294), iBOT's sweep (2111.07832); published: DINO ViT-S/16 77.0, ViT-B/16 78.2 % top-1. More: README.md here.
"""

import argparse
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from data.loader import TrainLoader, to_device_ahead
from data.preprocess import eval_transform
from data.views import LinearViews
from evaluation.features import CLS, Feature, batches, token_features
from evaluation.linear_heads import (
    LinearHeads,
    Probe,
    Recipe,
    best_head,
    cosine_factor,
    heads_of,
    initial_heads,
)
from evaluation.linear_run import (
    SWEEP_DECAYS,
    SWEEP_OPTIMIZERS,
    Run,
    Sets,
    best_path,
    log_line,
    report,
    resume,
    save,
    sweep_recipes,
)
from evaluation.network import (
    add_data_arguments,
    add_feature_arguments,
    add_network_arguments,
    add_process_arguments,
    check_common_arguments,
    chosen_features,
    network_from_options,
)
from models.safe_load import load_file
from utils import (
    Parser,
    UsageError,
    World,
    all_reduce_sum,
    bool_flag,
    init_world,
    keep_large_blocks,
    log,
    make_folder,
    run_cli,
)

LINES_EVERY = 20  # steps


def build_run(args: argparse.Namespace, world: World) -> Run:
    network = network_from_options(args)
    model = network.model.to(world.device).eval().requires_grad_(False)
    features = chosen_features(network, args.n_last_blocks, args.avgpool_patchtokens, args.class_token)
    sets = Sets(args, network)
    log.info(f"{sets.train.name}; test: {sets.test.name}; crop {sets.crop_size} of {sets.resize_size} pixels")
    recipes = [Recipe(lr) for lr in dict.fromkeys(args.lr or [0.001])]
    if args.sweep_lr_only is not None:
        recipes = sweep_recipes(args.sweep_lr_only)
    scale = args.batch_size_per_gpu * world.size / 256
    scaled = [recipe._replace(lr=recipe.lr * scale) for recipe in recipes]
    groups = []
    for width in feature_widths(model, features, sets.crop_size, world.device):
        heads = initial_heads(len(recipes), sets.classes, width, args.seed)
        groups.append(LinearHeads(*(tensor.to(world.device) for tensor in heads), scaled))
    run = Run(args, world, network, sets, features, recipes, Probe(groups))
    log.info(f"linear heads: {len(run.probe)}, on {'; '.join(map(str, features))}; lr is multiplied by {scale:g}")
    return run


@torch.no_grad()
def feature_widths(model, features: Sequence[Feature], crop_size: int, device: torch.device) -> list[int]:
    image = torch.zeros(1, 3, crop_size, crop_size, device=device)
    return [feature.shape[1] for feature in token_features(model, image, features)]


# ---------------------------------------------------------------------------------------------------------------------
# Training and testing
# ---------------------------------------------------------------------------------------------------------------------


def train(run: Run) -> None:
    args = run.args
    start, lines = resume(run)
    loader = TrainLoader(
        run.sets.train,
        LinearViews(run.sets.crop_size, args.augment),
        batch_size=args.batch_size_per_gpu,
        world=run.world,
        seed=args.seed,
        epochs=args.epochs,
        num_workers=args.num_workers,
        start_epoch=start,
        drop_last=False,
    )
    pieces = to_device_ahead(loader, run.world.device) if start < args.epochs else iter(())
    for epoch in range(start, args.epochs):
        losses = train_one_epoch(run, loader, pieces, epoch)
        tests, improved = None, False
        if epoch % args.val_freq == 0 or epoch == args.epochs - 1:
            tests = test(run)
            improved = judge(run, epoch, tests)
        lines.append(log_line(run, epoch, losses, tests))
        save(run, epoch + 1, lines, is_best=improved)


@torch.no_grad()
def train_one_epoch(run: Run, loader: TrainLoader, pieces: Iterator[dict], epoch: int) -> list[float]:
    """Every head's loss, averaged over the steps."""
    factor, device = cosine_factor(epoch, run.args.epochs), run.world.device
    labels = run.sets.train_labels.to(device)
    totals = torch.zeros(len(run.probe) + 1, dtype=torch.float64, device=device)  # losses, unreadable images
    since = time.monotonic()
    for step in range(loader.niter):
        piece = next(pieces)
        images = min(loader.global_batch, loader.images - step * loader.global_batch)
        targets = labels[piece["indices"]]
        losses = run.probe.train_step(features_of(run, piece), targets, images, factor)
        totals[:-1] += losses
        totals[-1] += len(piece["bad"])
        for name, reason in piece["bad"]:
            if name not in run.unreadable:
                log.warning(f"warning: {name}: {reason}")
                run.unreadable.add(name)
        if step % LINES_EVERY == 0 or step == loader.niter - 1:
            lowest = losses.nan_to_num(nan=math.inf).min() * images / max(1, len(targets))
            rate = (step + 1) * loader.global_batch / (time.monotonic() - since)
            log.info(f"Epoch: [{epoch}]  [{step}/{loader.niter}]  loss: {lowest:.4f}  {rate:.0f} images/s")
    *losses, unreadable = all_reduce_sum(totals).tolist()
    if unreadable:
        log.warning(f"warning: {unreadable:.0f} times an image could not be read and another one took its place")
    return [loss / loader.niter for loss in losses]


def features_of(run: Run, piece: dict) -> list[torch.Tensor]:
    """Features of a piece's images, one tensor for every group of heads; of no images where this process has none."""
    if not len(piece["indices"]):
        return [group.weight.new_empty(0, group.weight.shape[2]) for group in run.probe.groups]
    return token_features(run.network.model, piece["crops"][0], run.features)


@torch.no_grad()
def test(run: Run) -> list[dict]:
    """Of every head: mean loss over the test images, top-1 and (from five classes on) top-5 accuracy in percent."""
    args, sets, world = run.args, run.sets, run.world
    sums = torch.zeros(3, len(run.probe), dtype=torch.float64, device=world.device)
    options = {"batch_size": args.batch_size_per_gpu, "num_workers": args.num_workers, "device": world.device}
    for indices, images in batches(sets.test, eval_transform(sets.crop_size, sets.resize_size), world=world, **options):
        features = token_features(run.network.model, images, run.features)
        sums += run.probe.test(features, sets.test_labels[indices].to(world.device))
    losses, first, five = (all_reduce_sum(sums) / len(sets.test)).tolist()
    columns = {"loss": losses, "acc1": [100 * share for share in first]}
    if sets.classes >= 5:
        columns["acc5"] = [100 * share for share in five]
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def judge(run: Run, epoch: int, tests: list[dict]) -> bool:
    """Keep the best head of this epoch if it equals or beats the best so far; whether it does."""
    accuracies = [result["acc1"] for result in tests]
    run.peaks = [max(pair) for pair in zip(run.peaks or accuracies, accuracies, strict=True)]
    only_lr = len(SWEEP_DECAYS) * len(SWEEP_OPTIMIZERS) if run.args.sweep_lr_only is False else 1
    run.best_acc_sweep_lr_only = max(run.best_acc_sweep_lr_only, *accuracies[::only_lr])
    head = best_head(accuracies)
    log.info(
        f"Accuracy at epoch {epoch} of the network on the {len(run.sets.test)} test images: {accuracies[head]:.1f}%"
    )
    improved = run.best is None or accuracies[head] >= run.best["acc1"]
    if improved:
        run.best = {"head": head, "epoch": epoch, **tests[head]}
    log.info(f"Max accuracy so far: {run.best['acc1']:.2f}% ({run.describe(run.best['head'])})")
    return improved


# ---------------------------------------------------------------------------------------------------------------------
# Testing a head that is given
# ---------------------------------------------------------------------------------------------------------------------


def evaluate(run: Run) -> None:
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
    (run.best,) = test(run)
    log.info(f"Accuracy of the network on the {len(run.sets.test)} test images: {run.best['acc1']:.1f}%")


def given_head(run: Run) -> tuple[Path, Feature, torch.Tensor, torch.Tensor]:
    """Path, feature, weight and bias: of --pretrained_linear, else from the network's own file, else the run's best."""
    args = run.args
    paths = [Path(args.pretrained_linear)] if args.pretrained_linear else []
    if not paths and args.pretrained_weights and heads_of(load_file(args.pretrained_weights)):
        paths = [Path(args.pretrained_weights)]
    path = (paths or [best_path(args)])[0]
    if not paths and not path.exists():
        raise UsageError(f"--evaluate: there is no {path}; name the head to be tested with --pretrained_linear")
    file = load_file(path)
    heads = heads_of(file)
    if not heads:
        raise UsageError(f"{path}: holds no linear head; pass the head to test with --pretrained_linear")
    number = file.get("best_acc_hidx", 0)
    if "tutelage" in file and "heads" in file["tutelage"]:
        recorded = file["tutelage"]["heads"][number]
        feature = Feature(recorded["n_last_blocks"], recorded["avgpool_patchtokens"], recorded.get("class_token", CLS))
        return path, feature, *heads[number]
    if len(run.features) > 1:
        raise UsageError(
            "--evaluate: pass the one --n_last_blocks, --avgpool_patchtokens and --class_token of this head"
        )
    return path, run.features[0], *heads[number]


# ---------------------------------------------------------------------------------------------------------------------
# Options
# ---------------------------------------------------------------------------------------------------------------------


def get_args_parser() -> Parser:
    parser = Parser(prog="eval_linear.py", description="Linear classifiers on frozen features.")
    add_network_arguments(parser.add_argument_group("what is evaluated"))
    group = parser.add_argument_group("heads: one for every combination of what follows")
    add_feature_arguments(group, n_last_blocks=4, several=True)
    add = group.add_argument
    add("--lr", default=None, nargs="+", type=float, help="at 256 images per step, scaled linearly; left out: 0.001")
    add(
        "--sweep_lr_only",
        default=None,
        nargs="?",
        const=True,
        type=bool_flag,
        help="instead of --lr, iBOT's 45 from 0.0001 to 9; false: each also with 2 weight decays and SGD and LARS",
    )
    add_data_arguments(parser.add_argument_group("data"))
    add = parser.add_argument_group("training").add_argument
    add("--epochs", default=100, type=int, help="of training; the rate falls to 0 along half a cosine")
    add("--val_freq", default=1, type=int, help="epochs between tests")
    add("--num_labels", default=None, type=int, help="classes of a head; left out: those of the training images")
    add("--augment", default="fast", choices=["fast", "pil"], help="pil: the original's pixels, bit for bit; slower")
    add("--seed", default=0, type=int, help="of weights, order of the images and crops")
    add("--load_from", default=None, metavar="FILE", help="continue from this file of --output_dir (or a whole path)")
    add = parser.add_argument_group("testing only").add_argument
    add("--evaluate", action="store_true", help="train nothing, test a head that is there")
    add(
        "--pretrained_linear", default=None, metavar="FILE", help="the head; left out: --pretrained_weights', the run's"
    )
    add = parser.add_argument_group("results").add_argument
    add("--output_dir", default=".", help="for log.txt, checkpoints and eval_linear.json; a run there is continued")
    add_process_arguments(parser.add_argument_group("processes"))
    return parser


def check_arguments(args: argparse.Namespace) -> None:
    if args.lr is not None and args.sweep_lr_only is not None:
        raise UsageError("--sweep_lr_only brings its own learning rates: leave out --lr")
    for lr in args.lr or ():
        if not 0 < lr < math.inf:
            raise UsageError(f"--lr {lr:g}: must be positive")
    for name in ("epochs", "val_freq", "num_labels"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UsageError(f"--{name} {value}: must be at least 1")
    if args.pretrained_linear and not args.evaluate:
        raise UsageError("--pretrained_linear is a head to be tested: add --evaluate")
    check_common_arguments(args)


def main() -> None:
    args = get_args_parser().parse_args()
    check_arguments(args)
    keep_large_blocks()
    world = init_world(args.device, args.dist_url, args.backend)
    run = build_run(args, world)
    make_folder(Path(args.output_dir))
    if args.evaluate:
        evaluate(run)
    else:
        train(run)
    report(run)


if __name__ == "__main__":
    run_cli(main)
