"""A run of detection: built, trained, tested, reported."""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torchvision.models.detection import MaskRCNN

from data.coco import InstanceViews, Splits, Whole, masks_module
from data.decode import reading_from
from data.loader import steps_per_epoch
from evaluation.detection import (
    PRESETS,
    Preset,
    average_precision,
    build_detector,
    detector_groups,
    learning_rate,
    losses_of,
    results_of,
)
from evaluation.features import batches
from evaluation.finetune_steps import drop_path_draws
from evaluation.iterations import IterationRun, Work, average_gradients, only_read, pieces_from, train_by_iterations
from evaluation.network import network_from_options
from evaluation.results import write_result
from evaluation.run import settle
from evaluation.segmentation import build_optimizer, train_step
from evaluation.unreadable import Unreadable, remark
from models.batch_norm import synchronise_batch_norm
from models.checkpoints import weights_hash
from models.vit import VisionTransformer
from utils import UsageError, World, all_gather_objects, log

LOSSES = ("loss_classifier", "loss_box_reg", "loss_mask", "loss_objectness", "loss_rpn_box_reg")


@dataclass(kw_only=True)
class DetectionRun(IterationRun):
    sets: Splits
    preset: Preset
    model: MaskRCNN
    niter: int  # steps of an epoch
    start: str  # what the network's weights were before


def build_run(args: argparse.Namespace, world: World) -> DetectionRun:
    masks_module()
    preset, sets, network = PRESETS[args.preset], Splits(args.data_path, reading_from(args)), network_from_options(args)
    vit = network.model
    if not isinstance(vit, VisionTransformer) or vit.patch_size not in (8, 16):
        raise UsageError(
            f"{network.label}: detectors stand on vision transformers of ours with patches of 8 or 16 pixels"
        )
    if sorted(set(args.blocks)) != args.blocks or len(args.blocks) != 4 or not 0 <= args.blocks[-1] < vit.depth:
        raise UsageError(f"--blocks {' '.join(map(str, args.blocks))}: four, ascending, from 0 to {vit.depth - 1}")
    start, scale = weights_hash(vit)[:16], args.scale
    model = build_detector(vit, sets.classes, preset, args.blocks, scale, args.seed)
    model = synchronise_batch_norm(model).to(world.device)
    batch = args.batch_size_per_gpu or max(1, preset.batch // world.size)
    niter, lr = steps_per_epoch(len(sets.train), batch * world.size), args.lr or preset.lr
    epochs = args.epochs or preset.epochs
    log.info(f"Mask R-CNN on maps of blocks {' '.join(map(str, args.blocks))}, {epochs} epochs; {sets.data}")
    return DetectionRun(
        args=args,
        world=world,
        network=network,
        sets=sets,
        optimizer=build_optimizer(detector_groups(model, preset, vit.depth), lr, preset.weight_decay),
        batch=batch,
        iterations=niter * epochs,
        lr=lr,
        preset=preset,
        model=model,
        niter=niter,
        start=start,
    )


def train(run: DetectionRun) -> None:
    def rate(iteration: int) -> float:
        return learning_rate(iteration, run.lr, run.niter, run.preset)

    options = {
        "network": f"{run.network.label} {run.start}",
        "training images": run.sets.train.fingerprint,
        "test images": run.sets.test.fingerprint,
        "images per step": run.batch * run.world.size,
        "iterations": run.iterations,
        "learning rate": run.lr,
        **{f"--{name}": getattr(run.args, name) for name in ("preset", "blocks", "scale", "seed")},
    }
    train_by_iterations(
        run,
        Work(
            options=options,
            state=run.model.state_dict,
            load=run.model.load_state_dict,
            pieces=lambda start: pieces_from(run, InstanceViews(run.args.scale), start),
            iterate=lambda piece, iteration: iterate(run, piece, iteration, rate(iteration)),
            measures=("loss", *LOSSES),
            rate=rate,
            see=lambda: see_test_images(run),
            test=lambda: test(run),
            eval_every=run.args.eval_every or run.niter,
        ),
    )


def iterate(run: DetectionRun, piece: dict, iteration: int, lr: float) -> torch.Tensor:
    """One step; the sum of the losses, and each."""
    model, seed, first = run.model.train(), run.args.seed, int(piece["first_sample"])
    draws = drop_path_draws(len(run.network.model.blocks), len(piece["image"]), seed, iteration, first)
    losses = losses_of(model, piece, draws, (seed, iteration, first))
    values = torch.stack([losses[name] for name in LOSSES])
    values.sum().backward()
    average_gradients(run.optimizer)
    train_step(run.optimizer, lr)
    return torch.cat((values.sum()[None], values)).detach()


def tested_images(run: DetectionRun, transform: object, unreadable: list[Unreadable]) -> Iterator[tuple]:
    options = {"batch_size": 1, "num_workers": run.args.num_workers, "device": run.world.device}
    for (index,), image in batches(run.sets.test, transform, world=run.world, **options, unreadable=unreadable):
        yield int(index), image[0]


def see_test_images(run: DetectionRun) -> None:
    bad: list[Unreadable] = []
    for _ in tested_images(run, only_read, bad):
        pass
    settle(run, bad)


@torch.no_grad()
def test(run: DetectionRun) -> dict[str, float]:
    """AP of boxes and masks in percent."""
    model, results, bad, seen = run.model.eval(), [], [], []
    for index, image in tested_images(run, Whole(), bad):
        results += results_of(model, image, index, run.sets.test)
        seen.append(index)
    settle(run, bad)
    everyone = all_gather_objects((results, seen))
    seen = sorted(index for _, indices in everyone for index in indices)
    numbers = average_precision(run.sets.test, [result for part, _ in everyone for result in part], seen)
    log.info(f"box AP {numbers['AP']:.2f}, mask AP {numbers['mask_AP']:.2f} of {run.tested} images")
    return numbers


def report(run: DetectionRun) -> None:
    """The JSON, and the last line."""
    numbers = run.last | {"preset": run.args.preset, "iterations": run.iterations, "lr": run.lr}
    if run.world.rank == 0:
        write_result(run.args, "eval_detection", run.network, run.sets, run.unreadable, numbers)
    log.info(f"box AP: {run.last['AP']:.2f}, mask AP: {run.last['mask_AP']:.2f}{remark(run.unreadable)}")
