"""Fine-tuning a network with labels, every layer with its own learning rate: BEiT's recipe as iBOT and UDI use it.

    torchrun --nproc_per_node=8 eval_finetuning/eval_finetuning.py --finetune checkpoint.pth --data_path /imagenet \\
        --disable_rel_pos_bias --abs_pos_emb --use_cls --layer_scale_init_value 0 --imagenet_default_mean_and_std

Published (ImageNet-1k, top-1): iBOT ViT-S/16 82.3, ViT-B/16 84.0. Commands, protocol and numbers: README.md here.
"""

import argparse
import contextlib
import math
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

from data.loader import TrainLoader, steps_per_epoch, to_device_ahead
from evaluation.features import batches
from evaluation.finetune_options import check_arguments, get_args_parser
from evaluation.finetune_run import (
    Run,
    build_network,
    load_to_test,
    open_writer,
    report,
    resume,
    save,
    start_hash,
    write_scalars,
)
from evaluation.finetune_steps import Stepper, drop_path_draws, mix, seed_dropout, smoothed, soft_cross_entropy
from models.finetuned import layer_decay_groups
from utils import (
    UsageError,
    World,
    all_reduce_sum,
    autocast,
    batch_dtype,
    cosine_scheduler,
    has_bf16,
    init_world,
    keep_large_blocks,
    log,
    make_folder,
    run_cli,
)

LINES_EVERY = 10  # steps


def build_run(args: argparse.Namespace, world: World) -> Run:
    network, sets = build_network(args)
    images = args.batch_size_per_gpu * args.update_freq * world.size
    niter = 1 if args.eval else steps_per_epoch(len(sets.train), images)
    if args.warmup_steps > niter * args.epochs and not args.eval:
        raise UsageError(f"--warmup_steps {args.warmup_steps}: longer than the {niter * args.epochs} steps of training")
    start = start_hash(network.model)
    model = network.model.to(world.device, batch_dtype(args.precision))
    groups = layer_decay_groups(
        model, args.layer_decay, args.weight_decay, not args.disable_weight_decay_on_rel_pos_bias
    )
    stepper = Stepper(model, groups, args.opt_betas, args.opt_eps, args.clip_grad, args.precision == "fp16")
    log.info(f"{sets.train.name}; test: {sets.test.name}; {sets.size} of {sets.resize_size} pixels")
    run = Run(
        args=args,
        world=world,
        network=network,
        sets=sets,
        model=model,
        stepper=stepper,
        niter=niter,
        lr=learning_rates(args, niter),
        weight_decay=cosine_scheduler(args.weight_decay, final_decay(args), args.epochs, niter).tolist(),
        mixup=build_mixup(args, sets.classes),
        start=start,
    )
    log.info(f"{run.n_parameters / 1e6:.2f} M parameters, {images} images per step, {niter} steps per epoch")
    if args.model_ema:
        from timm.utils import ModelEmaV3

        run.ema = ModelEmaV3(model, decay=args.model_ema_decay, device="cpu" if args.model_ema_force_cpu else None)
    if world.size > 1 and not args.eval:
        on_gpu = {"device_ids": [world.device.index]} if world.device.type == "cuda" else {}
        run.model = DistributedDataParallel(model, broadcast_buffers=False, gradient_as_bucket_view=True, **on_gpu)
    return run


def learning_rates(args: argparse.Namespace, niter: int) -> list[float]:
    """Of the head, for every step of the run."""
    if args.eval:
        return []
    warmup = {"warmup_epochs": args.warmup_epochs, "warmup_steps": args.warmup_steps}
    return cosine_scheduler(args.lr, args.min_lr, args.epochs, niter, **warmup).tolist()


def final_decay(args: argparse.Namespace) -> float:
    return args.weight_decay if args.weight_decay_end is None else args.weight_decay_end


def build_mixup(args: argparse.Namespace, classes: int):  # noqa: ANN201 (timm is imported where it is used)
    if not (args.mixup > 0 or args.cutmix > 0 or args.cutmix_minmax):
        return None
    from timm.data import Mixup

    return Mixup(
        mixup_alpha=args.mixup,
        cutmix_alpha=args.cutmix,
        cutmix_minmax=args.cutmix_minmax,
        prob=args.mixup_prob,
        switch_prob=args.mixup_switch_prob,
        mode=args.mixup_mode,
        label_smoothing=args.smoothing,
        num_classes=classes,
    )


# ---------------------------------------------------------------------------------------------------------------------
# Training and testing
# ---------------------------------------------------------------------------------------------------------------------


def train(run: Run) -> None:
    args = run.args
    start, lines = resume(run)
    loader = TrainLoader(
        run.sets.train,
        run.sets.views(args),
        batch_size=args.batch_size_per_gpu * args.update_freq,
        pieces=args.update_freq,
        world=run.world,
        seed=args.seed,
        epochs=args.epochs,
        num_workers=args.num_workers,
        start_epoch=start,
    )
    pieces = to_device_ahead(loader, run.world.device) if start < args.epochs else iter(())
    if start < args.epochs:
        open_writer(run, start)
    for epoch in range(start, args.epochs):
        line = train_one_epoch(run, pieces, epoch)
        improved = False
        if not args.disable_eval_during_finetuning or epoch == args.epochs - 1:
            improved = judge(run, epoch, test(run))
            line |= {f"test_{name}": value for name, value in run.last.items()}
            write_scalars(run, (epoch + 1) * run.niter, {f"perf/test_{name}": run.last[name] for name in run.last})
        lines.append(line | {"epoch": epoch, "n_parameters": run.n_parameters})
        save(run, epoch, lines, is_best=improved)
    if run.writer is not None:
        run.writer.close()


def train_one_epoch(run: Run, pieces: Iterator[dict], epoch: int) -> dict:
    """The epoch's line of log.txt: means over its steps, rates of its last."""
    args, device = run.args, run.world.device
    labels = run.sets.train_labels.to(device)
    run.model.train()
    totals = torch.zeros(4, dtype=torch.float64, device=device)  # loss, correct, unreadable images, gradient norm
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
            totals[2] += tell_unreadable(run, piece["bad"])
        norm = run.stepper.step(run.lr[iteration], run.weight_decay[iteration])
        if run.ema is not None:
            run.ema.update(run.network.model)
        totals[0] += step_loss
        totals[3] += norm.nan_to_num(posinf=0.0)  # a scaled step that overflowed was left out
        if step % LINES_EVERY == 0 or step == run.niter - 1:
            rate = (step + 1) * per_step / (time.monotonic() - since)
            show(run, epoch, step, float(step_loss), float(norm), rate)
    loss, correct, unreadable, norm = all_reduce_sum(totals).tolist()
    if unreadable:
        log.warning(f"warning: {unreadable:.0f} times an image could not be read and another one took its place")
    scale, steps = 1 / (run.niter * run.world.size), epoch * run.niter + run.niter - 1
    lowest = min(group["lr_scale"] for group in run.stepper.optimizer.param_groups)
    line = {"train_lr": run.lr[steps], "train_min_lr": run.lr[steps] * lowest, "train_loss": loss * scale}
    if run.mixup is None:
        line["train_class_acc"] = correct / (run.niter * per_step)
    if run.stepper.scaler is not None:
        line["train_loss_scale"] = run.stepper.scaler.get_scale()
    return line | {"train_weight_decay": run.weight_decay[steps], "train_grad_norm": norm * scale}


def loss_of(run: Run, piece: dict, labels: torch.Tensor, iteration: int) -> tuple[torch.Tensor, torch.Tensor]:
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
    correct = torch.zeros((), device=logits.device)
    if run.mixup is None:
        correct = (logits.argmax(dim=1) == labels).sum()
    return soft_cross_entropy(logits, targets), correct


def show(run: Run, epoch: int, step: int, loss: float, norm: float, rate: float) -> None:
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


def tell_unreadable(run: Run, bad: list[tuple[str, str]]) -> int:
    for name, reason in bad:
        if name not in run.unreadable:
            log.warning(f"warning: {name}: {reason}")
            run.unreadable.add(name)
    return len(bad)


@torch.no_grad()
def test(run: Run) -> dict:
    """Mean loss over the test images, top-1 and (from five classes on) top-5 accuracy in percent; every image once."""
    args, sets, world = run.args, run.sets, run.world
    model = run.network.model.eval()
    sums = torch.zeros(3, dtype=torch.float64, device=world.device)
    options = {"batch_size": int(1.5 * args.batch_size_per_gpu), "num_workers": args.num_workers}
    for indices, images in batches(sets.test, sets.test_transform(), world=world, device=world.device, **options):
        labels = sets.test_labels[indices].to(world.device)
        with autocast(args.precision, world.device):
            logits = model(images.to(batch_dtype(args.precision)))
        sums[0] += F.cross_entropy(logits.double(), labels, reduction="sum")
        found = logits.topk(min(5, sets.classes)).indices == labels[:, None]
        sums[1] += found[:, 0].sum()
        sums[2] += found.sum()
    loss, first, five = (all_reduce_sum(sums) / len(sets.test)).tolist()
    return {"loss": loss, "acc1": 100 * first} | ({"acc5": 100 * five} if sets.classes >= 5 else {})


def judge(run: Run, epoch: int, tested: dict) -> bool:
    """Keep this epoch if it beats the best so far; whether it does."""
    run.last = tested
    improved = run.best is None or tested["acc1"] > run.best["acc1"]
    if improved:
        run.best = {"epoch": epoch, **tested}
    log.info(
        f"Accuracy at epoch {epoch} of the network on the {len(run.sets.test)} test images: {tested['acc1']:.1f}%; "
        f"max accuracy so far: {run.best['acc1']:.2f}%"
    )
    return improved


# ---------------------------------------------------------------------------------------------------------------------
# The command
# ---------------------------------------------------------------------------------------------------------------------


def main() -> None:
    args = get_args_parser().parse_args()
    check_arguments(args)
    keep_large_blocks()
    world = init_world(args.device, args.dist_url, args.backend)
    if args.precision == "auto":
        args.precision = "bf16" if has_bf16(world.device) else "fp32"
    run = build_run(args, world)
    make_folder(Path(args.output_dir))
    if args.eval:
        path = load_to_test(run)
        judge(run, -1, test(run))
        run.best["epoch"] = None
        log.info(f"{path}: {run.best['acc1']:.1f}% of {len(run.sets.test)} test images")
    else:
        train(run)
    report(run)


if __name__ == "__main__":
    run_cli(main)
