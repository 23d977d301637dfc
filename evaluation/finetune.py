"""Fine-tuning a network: built, trained, tested."""

import argparse
import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F

from data.finetune_views import FinetuneViews
from data.loader import steps_per_epoch
from data.mixing import build_mixup, mix
from data.preprocess import MEAN, STD, eval_transform
from data.repeated import images_used
from evaluation.deit import distilled, lagged_rates, supervised_teacher
from evaluation.finetune_network import build_network
from evaluation.finetune_options import DEIT
from evaluation.finetune_run import FinetuneRun, load_to_test, open_writer, report, resume, save, write_scalars
from evaluation.finetune_steps import (
    Stepper,
    drop_path_draws,
    seed_dropout,
    smoothed,
    soft_cross_entropy,
    weight_average,
)
from evaluation.run import (
    all_hits,
    conduct,
    labelled_batches,
    means_over_images,
    no_hits,
    see_test_images,
    tell_replaced,
    tested_or_saved,
    training_pieces,
)
from models.checkpoints import weights_hash
from models.finetuned import decay_groups, layer_decay_groups
from utils import (
    UsageError,
    World,
    all_reduce_sum,
    autocast,
    batch_dtype,
    cosine_scheduler,
    distributed,
    has_bf16,
    init_world,
    keep_large_blocks,
    log,
)

LINES_EVERY = 10  # steps


def finetune(args: argparse.Namespace) -> None:
    """What every script that fine-tunes does with its options."""
    keep_large_blocks()
    world = init_world(args.device, args.dist_url, args.backend)
    if args.precision == "auto":
        args.precision = "bf16" if has_bf16(world.device) else "fp32"
    run = build_run(args, world)
    conduct(run, evaluate if args.eval else train, report, trains=not args.eval)


def build_run(args: argparse.Namespace, world: World) -> FinetuneRun:
    network, sets = build_network(args)
    images = args.batch_size_per_gpu * args.update_freq * world.size
    used = images_used(len(sets.train)) if getattr(args, "repeated_aug", False) else len(sets.train)
    niter = 1 if args.eval else steps_per_epoch(used, images)
    if args.warmup_steps > niter * args.epochs and not args.eval:
        raise UsageError(f"--warmup_steps {args.warmup_steps}: longer than the {niter * args.epochs} steps of training")
    start = weights_hash(network.model)[:16]
    model = network.model.to(world.device, batch_dtype(args.precision))
    if args.recipe == DEIT:
        groups = decay_groups(model, args.weight_decay)
    else:
        biases = not args.disable_weight_decay_on_rel_pos_bias
        groups = layer_decay_groups(model, args.layer_decay, args.weight_decay, biases)
    stepper = Stepper(model, groups, args.opt_betas, args.opt_eps, args.clip_grad, args.precision == "fp16")
    log.info(str(sets))
    run = FinetuneRun(
        args=args,
        world=world,
        network=network,
        sets=sets,
        model=model,
        stepper=stepper,
        niter=niter,
        lr=learning_rates(args, niter, images),
        weight_decay=cosine_scheduler(args.weight_decay, final_decay(args), args.epochs, niter).tolist(),
        mixup=build_mixup(args, sets.classes),
        start=start,
    )
    log.info(f"{run.n_parameters / 1e6:.2f} M parameters, {images} images per step, {niter} steps per epoch")
    if getattr(args, "teacher_path", "") and not args.eval:
        teacher = supervised_teacher(args.teacher_model, args.teacher_path, sets.classes)
        run.teacher = teacher.to(world.device, batch_dtype(args.precision))
        log.info(f"teacher: {args.teacher_model}, {args.teacher_path}, {args.distillation_type}")
    if args.model_ema:
        run.ema = weight_average(model, args.model_ema_decay, "cpu" if args.model_ema_force_cpu else None)
    if world.size > 1 and not args.eval:
        run.model = distributed(model, world.device)
    return run


def learning_rates(args: argparse.Namespace, niter: int, images: int) -> list[float]:
    """Of the head, for every step of the run; DeiT's is that of 512 ``images`` a step, and changes with the epoch."""
    if args.eval:
        return []
    if args.recipe == DEIT:
        lr = args.lr * images / 512
        rates = lagged_rates(lr, args.epochs, args.warmup_epochs, args.warmup_lr, args.min_lr)
        if args.min_lr > lr:
            log.warning(f"warning: --min_lr {args.min_lr:g} is above the rate of {lr:g}, which rises to it")
        return [rate for rate in rates for _ in range(niter)]
    warmup = {"warmup_epochs": args.warmup_epochs, "warmup_steps": args.warmup_steps}
    return cosine_scheduler(args.lr, args.min_lr, args.epochs, niter, **warmup).tolist()


def final_decay(args: argparse.Namespace) -> float:
    return args.weight_decay if args.weight_decay_end is None else args.weight_decay_end


def normalisation(args: argparse.Namespace) -> tuple[Sequence[float], Sequence[float]]:
    """Mean and deviation of every colour."""
    return (MEAN, STD) if args.imagenet_default_mean_and_std else ((0.5,) * 3, (0.5,) * 3)


def train_views(args: argparse.Namespace, size: int) -> FinetuneViews:
    jitter, policy = args.color_jitter or None, args.aa if args.aa.lower() not in ("", "none") else None
    options = (args.train_interpolation, args.reprob, args.remode, args.recount)
    return FinetuneViews(size, *normalisation(args), jitter, policy, *options)


# ---------------------------------------------------------------------------------------------------------------------
# Training and testing
# ---------------------------------------------------------------------------------------------------------------------


def test_transform(run: FinetuneRun) -> Callable:
    return eval_transform(run.sets.crop_size, run.sets.resize_size, "bilinear", *normalisation(run.args))


def train(run: FinetuneRun) -> None:
    args = run.args
    start, lines = resume(run)
    if start == 0:
        see_test_images(run, test_transform(run))
    _, pieces = training_pieces(run, train_views(args, run.sets.crop_size), start, pieces=args.update_freq)
    if start < args.epochs or run.untested is not None:
        open_writer(run, start)
    if run.untested is not None:
        end_epoch(run, start - 1, run.untested, lines)
    for epoch in range(start, args.epochs):
        end_epoch(run, epoch, train_one_epoch(run, pieces, epoch), lines)
    if run.writer is not None:
        run.writer.close()


def end_epoch(run: FinetuneRun, epoch: int, line: dict, lines: list[dict]) -> None:
    """Test where it is time, add the epoch's ``line`` to those of log.txt, and save."""
    improved = False
    if not run.args.disable_eval_during_finetuning or epoch == run.args.epochs - 1:
        run.untested = line
        tested = tested_or_saved(lambda: test(run), lambda: save(run, epoch, lines, is_best=False))
        run.untested, improved = None, judge(run, epoch, *tested)
        line = line | {f"test_{name}": value for name, value in run.last.items()}
        write_scalars(run, (epoch + 1) * run.niter, {f"perf/test_{name}": run.last[name] for name in run.last})
    lines.append(line | {"epoch": epoch, "n_parameters": run.n_parameters})
    save(run, epoch, lines, is_best=improved)


def train_one_epoch(run: FinetuneRun, pieces: Iterator[dict], epoch: int) -> dict:
    """The epoch's line of log.txt: means over its steps, rates of its last."""
    args, device = run.args, run.world.device
    labels = run.sets.train_labels.to(device)
    run.model.train()
    totals = torch.zeros(4, dtype=torch.float64, device=device)  # loss, correct, unreadable images, gradient norm
    bad: dict[str, str] = {}
    since, per_step = time.monotonic(), args.batch_size_per_gpu * args.update_freq * run.world.size
    for step in range(run.niter):
        iteration, step_loss = epoch * run.niter + step, 0.0
        for number in range(args.update_freq):
            piece = next(pieces)
            last = number == args.update_freq - 1
            alone = contextlib.nullcontext() if last or run.world.size == 1 else run.model.no_sync()
            with alone:
                loss, correct = loss_of(run, piece, labels[piece["indices"]], iteration)
                run.stepper.backward(loss / args.update_freq)
            step_loss = step_loss + loss.detach() / args.update_freq
            totals[1] += correct
            totals[2] += len(piece["bad"])
            bad |= dict(piece["bad"])
        norm = run.stepper.step(run.lr[iteration], run.weight_decay[iteration])
        if run.ema is not None:
            run.ema.update(run.network.model)
        totals[0] += step_loss
        totals[3] += norm.nan_to_num(posinf=0.0)  # a scaled step that overflowed was left out
        if step % LINES_EVERY == 0 or step == run.niter - 1:
            rate = (step + 1) * per_step / (time.monotonic() - since)
            show(run, epoch, step, float(step_loss), float(norm), rate)
    loss, correct, unreadable, norm = all_reduce_sum(totals).tolist()
    tell_replaced(run, bad, unreadable)
    scale, steps = 1 / (run.niter * run.world.size), epoch * run.niter + run.niter - 1
    lowest = min(group["lr_scale"] for group in run.stepper.optimizer.param_groups)
    line = {"train_lr": run.lr[steps], "train_min_lr": run.lr[steps] * lowest, "train_loss": loss * scale}
    if run.mixup is None:
        line["train_class_acc"] = correct / (run.niter * per_step)
    if run.stepper.scaler is not None:
        line["train_loss_scale"] = run.stepper.scaler.get_scale()
    return line | {"train_weight_decay": run.weight_decay[steps], "train_grad_norm": norm * scale}


def loss_of(run: FinetuneRun, piece: dict, labels: torch.Tensor, iteration: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean loss over a piece, and how many of its images are classified correctly (0 where they are mixed)."""
    args, first = run.args, piece["first_sample"]
    images = piece["images"].to(batch_dtype(args.precision))
    if run.mixup is None:
        targets = smoothed(labels, run.sets.classes, args.smoothing)
    else:
        images, targets = mix(run.mixup, images, labels, (args.seed, iteration, first))
    draws = None
    if args.drop_path > 0:
        draws = drop_path_draws(run.network.model.depth, len(images), args.seed, iteration, first)
    if args.drop or args.attn_drop_rate:
        seed_dropout(args.seed, iteration, first)
    with autocast(args.precision, run.world.device):
        logits = run.model(images, draws)
        said = None
        if run.teacher is not None:
            with torch.no_grad():
                said = run.teacher(images)
    correct = torch.zeros((), device=logits.device)
    if run.mixup is None:
        correct = (logits.argmax(dim=1) == labels).sum()
    if said is None:
        return soft_cross_entropy(logits, targets), correct
    logits, said = (t if t.dtype == torch.float64 else t.float() for t in (logits, said))
    kind = (args.distillation_type, args.distillation_alpha, args.distillation_tau)
    return distilled(logits, targets, logits, said, *kind), correct


def show(run: FinetuneRun, epoch: int, step: int, loss: float, norm: float, rate: float) -> None:
    """A line of progress, and the same in TensorBoard. Raises UsageError when the loss is not a number any more."""
    if not math.isfinite(loss):
        raise UsageError(f"the loss is {loss} in epoch {epoch}; lower --lr, pass --clip_grad, or --precision fp32")
    iteration = epoch * run.niter + step
    lr, decay = run.lr[iteration], run.weight_decay[iteration]
    log.info(
        f"Epoch: [{epoch}]  [{step}/{run.niter}]  lr: {lr:.6f}  loss: {loss:.4f}  grad_norm: {norm:.4f}  "
        f"{rate:.0f} images/s"
    )
    values = {"loss/loss": loss, "opt/lr": lr, "opt/weight_decay": decay, "opt/grad_norm": norm}
    write_scalars(run, iteration, values)


@torch.no_grad()
def test(run: FinetuneRun) -> tuple[dict, torch.Tensor]:
    """Mean loss over the test images, top-1 and (from five classes on) top-5 accuracy in percent, every image once;
    and which of this process's share are right (test images,).
    """
    args, device, model = run.args, run.world.device, run.network.model.eval()
    transform = test_transform(run)
    sums, hits = torch.zeros(3, dtype=torch.float64, device=device), no_hits(run)
    for indices, images, labels in labelled_batches(run, transform, int(1.5 * args.batch_size_per_gpu)):
        with autocast(args.precision, device):
            logits = model(images.to(batch_dtype(args.precision)))
        sums[0] += F.cross_entropy(logits.double(), labels, reduction="sum")
        found = logits.topk(min(5, run.sets.classes)).indices == labels[:, None]
        hits[indices.to(device)] = found[:, 0].to(hits.dtype)
        sums[1] += found[:, 0].sum()
        sums[2] += found.sum()
    return {name: float(value) for name, value in means_over_images(run, sums).items()}, hits


def judge(run: FinetuneRun, epoch: int, tested: dict, hits: torch.Tensor) -> bool:
    """Keep this epoch if it beats the best so far; whether it does."""
    run.last = tested
    improved = run.best is None or tested["acc1"] > run.best["acc1"]
    if improved:
        run.best, run.right = {"epoch": epoch, **tested}, all_hits(run, hits)
    log.info(
        f"Accuracy at epoch {epoch} of the network on the {run.tested} test images: {tested['acc1']:.1f}%; "
        f"max accuracy so far: {run.best['acc1']:.2f}%"
    )
    return improved


def evaluate(run: FinetuneRun) -> None:
    """Test what was trained before."""
    path = load_to_test(run)
    judge(run, -1, *test(run))
    run.best["epoch"] = None
    log.info(f"{path}: {run.best['acc1']:.1f}% of {run.tested} test images")
