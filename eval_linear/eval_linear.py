"""Linear classifiers on a frozen network: many learning rates, numbers of blocks and poolings in one run.

    torchrun --nproc_per_node=8 eval_linear/eval_linear.py --pretrained_weights checkpoint.pth --data_path /imagenet
    python eval_linear/eval_linear.py --pretrained_weights checkpoint.pth --sweep_lr_only      on bundled photographs

Every image goes through the network once a step, whatever the number of heads (linear_heads.py). DINO's protocol
(2104.14294), iBOT's sweep (2111.07832); published: DINO ViT-S/16 77.0, ViT-B/16 78.2 % top-1. More: README.md here.
"""

import argparse
import json
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from data.loader import TrainLoader, to_device_ahead
from data.preprocess import eval_transform
from data.views import LinearViews
from evaluation import (
    add_data_arguments,
    add_feature_arguments,
    add_network_arguments,
    add_process_arguments,
    check_common_arguments,
    chosen_features,
    common_labels,
    crop_and_resize,
    network_from_options,
    open_train_and_test,
    write_result,
)
from features import Feature, batches, token_features, weights_hash
from linear_heads import (
    LinearHeads,
    Probe,
    Recipe,
    best_head,
    cosine_factor,
    heads_of,
    initial_heads,
    restore_heads,
    saved_heads,
)
from models.checkpoints import Network
from models.safe_load import load_file
from utils import (
    Parser,
    UsageError,
    World,
    all_reduce_sum,
    barrier,
    bool_flag,
    init_world,
    keep_large_blocks,
    log,
    make_folder,
    run_cli,
    save_atomically,
    save_torch,
)

SWEEP_LRS = [digit * 10.0**exponent for exponent in range(-4, 1) for digit in range(1, 10)]
SWEEP_DECAYS, SWEEP_OPTIMIZERS = (0.0, 1e-6), ("sgd", "lars")
LATEST = "checkpoint.pth.tar"
LINES_EVERY = 20  # steps


def sweep_recipes(lr_only: bool) -> list[Recipe]:
    """iBOT's grid (eval_linear_multi.py): rates, or for every rate all weight decays and for each both optimisers."""
    if lr_only:
        return [Recipe(lr) for lr in SWEEP_LRS]
    return [Recipe(lr, wd, name) for lr in SWEEP_LRS for wd in SWEEP_DECAYS for name in SWEEP_OPTIMIZERS]


class Sets:
    """Training and test images, what happens to them, and their labels under common class numbers."""

    def __init__(self, args: argparse.Namespace, network: Network):
        self.train, self.test = open_train_and_test(args.data_path, args.subset)
        self.train_labels, self.test_labels = common_labels(self.train, self.test)
        self.crop_size, self.resize_size = crop_and_resize(args, network)
        self.classes = args.num_labels or len(self.train.class_names)
        if self.classes < len(self.train.class_names):
            raise UsageError(
                f"--num_labels {self.classes}: {self.train.name} has {len(self.train.class_names)} classes"
            )


@dataclass
class Run:
    """Everything that exists once per run, and what it has reached."""

    args: argparse.Namespace
    world: World
    network: Network
    sets: Sets
    features: list[Feature]
    recipes: list[Recipe]  # as asked for: learning rates at 256 images per step
    probe: Probe  # every feature with every recipe, in this order
    best: dict | None = None  # the epoch and the head with the highest accuracy so far
    best_acc_sweep_lr_only: float = 0.0
    peaks: list[float] = field(default_factory=list)  # highest accuracy of every head so far
    unreadable: set[str] = field(default_factory=set)  # names of training images that were told

    @property
    def heads(self) -> list[dict]:
        """What tells the heads apart, in their order."""
        return [
            {"n_last_blocks": f.n_last_blocks, "avgpool_patchtokens": f.avgpool, **r._asdict()}
            for f in self.features
            for r in self.recipes
        ]

    def describe(self, head: int) -> str:
        feature, recipe = self.features[head // len(self.recipes)], self.recipes[head % len(self.recipes)]
        extras = f", weight decay {recipe.weight_decay:g}" * (recipe.weight_decay > 0) + ", LARS" * (
            recipe.optimizer == "lars"
        )
        return f"{feature}, lr {recipe.lr:g}{extras}"


def build_run(args: argparse.Namespace, world: World) -> Run:
    network = network_from_options(args)
    model = network.model.to(world.device).eval().requires_grad_(False)
    features = chosen_features(network, args.n_last_blocks, args.avgpool_patchtokens)
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
# What is written, and read again
# ---------------------------------------------------------------------------------------------------------------------


def log_line(run: Run, epoch: int, losses: list[float], tests: list[dict] | None) -> dict:
    """A line of log.txt: DINO's keys, of the best head of this epoch; of several heads ``heads`` holds each one's."""
    factor = cosine_factor(epoch, run.args.epochs)
    rows = [
        {"train_loss": finite(loss), "train_lr": recipe.lr * factor}
        for loss, recipe in zip(losses, run.probe.recipes, strict=True)
    ]
    head = run.best["head"] if run.best else 0
    if tests is not None:
        head = best_head([result["acc1"] for result in tests])
        for row, result in zip(rows, tests, strict=True):
            row |= {f"test_{name}": finite(value) for name, value in result.items()}
    line = {name: value for name, value in rows[head].items() if name.startswith("train")} | {"epoch": epoch}
    line |= rows[head]
    if len(rows) > 1:
        line |= {"head": head, "heads": [h | row for h, row in zip(run.heads, rows, strict=True)]}
    return line


def finite(value: float) -> float | None:
    """JSON knows no NaN: the loss of a head that diverged is null."""
    return value if math.isfinite(value) else None


def options_of_trajectory(run: Run) -> dict:
    """What a run must have in common with the one it continues."""
    args, sets = run.args, run.sets
    return {
        "network": f"{run.network.label} {weights_hash(run.network.model)[:16]}",
        "training images": sets.train.fingerprint,
        "test images": sets.test.fingerprint,
        "heads": run.heads,
        "classes": sets.classes,
        "images per step": args.batch_size_per_gpu * run.world.size,
        "crop and resize": [sets.crop_size, sets.resize_size],
        **{f"--{name}": getattr(args, name) for name in ("epochs", "seed", "val_freq", "augment")},
    }


def best_path(args: argparse.Namespace) -> Path:
    return Path(args.output_dir) / f"checkpoint_{args.checkpoint_key}_linear.pth"


def save(run: Run, epoch: int, lines: list[dict], is_best: bool) -> None:
    """log.txt, the best heads where these are, and what the run is continued from, in this order."""
    if run.world.rank == 0:
        folder = Path(run.args.output_dir)
        file = saved_heads(run.probe, epoch, run.args.epochs)
        if run.best is not None:
            file["best_acc"] = run.best["acc1"]
        if len(run.probe) > 1 and run.best is not None:
            file |= {"best_acc_hidx": run.best["head"], "best_acc_sweep_lr_only": run.best_acc_sweep_lr_only}
        names = ("best", "best_acc_sweep_lr_only", "peaks", "heads")
        file["tutelage"] = {"options": options_of_trajectory(run), **{name: getattr(run, name) for name in names}}
        text = "".join(json.dumps(line) + "\n" for line in lines)
        try:
            save_atomically(folder / "log.txt", lambda temporary: temporary.write_text(text))
            for path in [best_path(run.args)] * is_best + [folder / LATEST]:
                save_torch(file, path)
        except OSError as error:
            raise UsageError(
                f"--output_dir {folder}: cannot save ({error.strerror or error}); free some space"
            ) from None
    barrier()


def resume(run: Run) -> tuple[int, list[dict]]:
    """Continue from --load_from, else from the run in --output_dir: (epoch to begin with, lines of log.txt so far).

    Raises UsageError when that run is another one, naming every difference.
    """
    folder = Path(run.args.output_dir)
    path = folder / (run.args.load_from or LATEST)
    if run.args.load_from is None and not path.exists():
        return 0, []
    file = load_file(path)
    if record := file.get("tutelage"):
        refuse_another_run(path, record["options"], options_of_trajectory(run))
        run.best, run.peaks = record["best"], record["peaks"]
        run.best_acc_sweep_lr_only = record["best_acc_sweep_lr_only"]
    else:
        log.warning(f"warning: {path} was written by the original code; its options and data are not checked")
    epoch = restore_heads(run.probe, file, path)
    if run.best is None and "best_acc" in file:
        run.best = {"head": file.get("best_acc_hidx", 0), "epoch": epoch - 1, "acc1": file["best_acc"]}
        run.best_acc_sweep_lr_only = file.get("best_acc_sweep_lr_only", 0.0)
        run.peaks = [file["best_acc"] * (head == run.best["head"]) for head in range(len(run.probe))]
    log.info(f"continuing {path} at epoch {epoch} of {run.args.epochs}")
    written = (folder / "log.txt").read_text().splitlines() if (folder / "log.txt").exists() else []
    return epoch, [line for line in map(json.loads, written) if line["epoch"] < epoch]


def refuse_another_run(path: Path, theirs: dict, ours: dict) -> None:
    differences = []
    for name in ours:
        if theirs.get(name) == ours[name]:
            continue
        different = f"{name}: {theirs.get(name)} there, {ours[name]} here"
        differences.append(
            "other heads (--lr, --n_last_blocks, --avgpool_patchtokens)" if name == "heads" else different
        )
    if differences:
        raise UsageError(
            f"{path} belongs to another run ({'; '.join(differences)}); choose another --output_dir, or move it away"
        )


def report(run: Run) -> None:
    """The table of all heads, the JSON, and the originals' last line."""
    best = run.best
    if len(run.probe) > 1:
        log.info("highest top-1 accuracy of every head in percent\n" + table(run))
    numbers = {"top1": best["acc1"]} | ({"top5": best["acc5"]} if "acc5" in best else {})
    if "head" in best:
        peaks = zip(run.heads, run.peaks, strict=True)
        numbers |= {"epoch": best["epoch"], "head": run.heads[best["head"]], "epochs": run.args.epochs}
        numbers["heads"] = [head | {"top1": peak} for head, peak in peaks]
    if run.world.rank == 0:
        data = f"{run.sets.train.name}; {run.sets.test.name}"
        path = write_result(run.args.output_dir, "eval_linear", run.network, run.args.checkpoint_key, data, numbers)
        log.info(f"written to {path}")
    log.info(f"Top-1 test accuracy: {best['acc1']:.1f}")


def table(run: Run) -> str:
    """A line per head, best last."""
    order = sorted(range(len(run.probe)), key=lambda head: (run.peaks[head], head))
    names = {head: run.describe(head) for head in order}
    width = max(map(len, names.values()))
    return "\n".join(f"{names[head]:<{width}}{run.peaks[head]:9.2f}" for head in order)


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
            "pass the --n_last_blocks and --avgpool_patchtokens it was trained with"
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
        return path, Feature(recorded["n_last_blocks"], recorded["avgpool_patchtokens"]), *heads[number]
    if len(run.features) > 1:
        raise UsageError("--evaluate: pass the one --n_last_blocks and --avgpool_patchtokens the head was trained with")
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
