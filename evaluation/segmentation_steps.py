"""Segmentation: a run is built, trained and tested."""

import argparse
from collections.abc import Iterator

import torch

from data.ade20k import Splits
from data.decode import BadImage, reading_from
from data.segmentation import SegmentationViews, TestScale, blank
from evaluation.features import batches
from evaluation.finetune_steps import drop_path_draws
from evaluation.iterations import Work, average_gradients, only_read, pieces_from, train_by_iterations
from evaluation.network import network_from_options
from evaluation.run import settle
from evaluation.segmentation import (
    Window,
    build_optimizer,
    count_pixels,
    image_logits,
    learning_rate,
    pixel_loss,
    published,
    resized_classes,
    scores,
    train_step,
)
from evaluation.segmentation_protocols import (
    PROTOCOLS,
    build_segmenter,
    chosen_blocks,
    load_head,
    parameter_groups,
    read_head,
)
from evaluation.segmentation_run import SegmentationRun, options_of_trajectory, per_process, trained_state
from evaluation.unreadable import Unreadable
from models.batch_norm import synchronise_batch_norm
from models.checkpoints import weights_hash
from utils import RunStopped, UsageError, World, all_gather_objects, all_reduce_sum, log


def build_run(args: argparse.Namespace, world: World) -> SegmentationRun:
    given = None if args.head in PROTOCOLS else read_head(args.head)
    head = given[0] if given else args.head
    protocol, sets = PROTOCOLS[head], Splits(args.data_path, args.num_classes, args.incomplete, reading_from(args))
    network = network_from_options(args)
    blocks, start = chosen_blocks(network, protocol, args.blocks), weights_hash(network.model)[:16]
    segmenter = build_segmenter(network, head, blocks, args.num_classes, args.seed, protocol.drop_path)
    if given:
        load_head(segmenter, args.head, given[1], args.num_classes)
    segmenter = synchronise_batch_norm(segmenter).to(world.device)
    lr, optimizer = args.lr or protocol.lr, None
    if given is None:
        optimizer = build_optimizer(parameter_groups(segmenter, protocol.weight_decay), lr, protocol.weight_decay)
    stride = args.stride or max(1, args.crop_size * 2 // 3)
    window = Window((args.crop_size,) * 2, (stride,) * 2) if protocol.slides else None
    maps = f"the map{'s' * (len(blocks) > 1)} of block{'s' * (len(blocks) > 1)} {' '.join(map(str, blocks))}"
    log.info(f"{head} head on {maps}{' after the final norm' * protocol.out_norm}; {sets.data}")
    return SegmentationRun(
        args=args,
        world=world,
        network=network,
        sets=sets,
        head=head,
        protocol=protocol,
        segmenter=segmenter,
        optimizer=optimizer,
        window=window,
        start=start,
        batch=per_process(args, protocol, world.size),
        iterations=args.iterations or (args.iter_with_8_gpu or 0) * 8 or protocol.iterations,
        lr=lr,
    )


# ---------------------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------------------


def train(run: SegmentationRun) -> None:
    def rate(iteration: int) -> float:
        return learning_rate(iteration, run.lr, run.iterations, run.args.warmup)

    train_by_iterations(
        run,
        Work(
            options=options_of_trajectory(run),
            state=lambda: trained_state(run),
            load=lambda state: run.segmenter.load_state_dict(run.segmenter.state_dict() | state),
            pieces=lambda start: training_pieces(run, start),
            iterate=lambda piece, iteration: iterate(run, piece, iteration, rate(iteration)),
            measures=("loss", "acc_seg"),
            rate=rate,
            see=lambda: see_test_images(run),
            test=lambda: test(run),
            eval_every=run.args.eval_every or run.protocol.eval_every,
        ),
    )


def training_pieces(run: SegmentationRun, start: int) -> Iterator[dict]:
    """Batches from iteration ``start`` on, on the device."""
    return pieces_from(run, SegmentationViews(run.args.crop_size, long_side=run.protocol.long_side), start)


def iterate(run: SegmentationRun, piece: dict, iteration: int, lr: float) -> torch.Tensor:
    """One step; loss and right pixels in percent of this process's share."""
    segmenter, seed, first = run.segmenter.train(), run.args.seed, int(piece["first_sample"])
    images, draws = blank(piece["crops"][0], piece["extent"]), None
    if not segmenter.frozen:
        draws = drop_path_draws(segmenter.network.depth, len(images), seed, iteration, first)
    maps = segmenter.maps(images, draws)
    if run.head == "semfpn":
        logits = segmenter.decode_head(maps, segmenter.decode_head.drawn(seed, iteration, first, len(images)))
    else:
        logits = segmenter.decode_head(maps)
    loss, share = pixel_loss(logits, piece["labels"])
    loss.backward()
    average_gradients(run.optimizer)
    train_step(run.optimizer, lr)
    return torch.stack((loss.detach(), share))


# ---------------------------------------------------------------------------------------------------------------------
# Testing
# ---------------------------------------------------------------------------------------------------------------------


def see_test_images(run: SegmentationRun) -> None:
    """Read test images and their maps before anything is trained: what cannot be read is refused, or named, now."""
    bad = []
    for _, _, problem in tested_pixels(run, only_read):
        bad += problem
    settle(run, bad)


def tested_pixels(run: SegmentationRun, transform: object) -> Iterator[tuple]:
    """(image (1, ...), classes of its pixels, []), and at the end (None, None, [Unreadable of this process, ...])."""
    sets, unreadable, maps = run.sets, [], []
    options = {"batch_size": 1, "num_workers": run.args.num_workers, "device": run.world.device}
    for (index,), image in batches(sets.test, transform, world=run.world, **options, unreadable=unreadable):
        try:
            labels = torch.from_numpy(sets.test.class_map(int(index)))
        except BadImage as error:
            maps.append(Unreadable(int(index), error.name, error.reason))
            continue
        yield image, labels.to(run.world.device), []
    maps = [problem for part in all_gather_objects(maps) for problem in part]
    yield None, None, sorted(unreadable + maps)


@torch.no_grad()
def test(run: SegmentationRun) -> dict:
    """mIoU, mAcc and aAcc in percent, and the IoU of every class, null where it is nowhere."""
    segmenter, classes, device = run.segmenter.eval(), run.sets.classes, run.world.device
    counts, bad = torch.zeros(3, classes, dtype=torch.int64, device=device), []
    for image, labels, problems in tested_pixels(run, TestScale(run.args.crop_size, run.protocol.long_side)):
        if image is None:
            bad = problems
            continue
        logits = image_logits(segmenter, image, run.window, run.args.windows)
        if not torch.isfinite(logits.sum()):
            raise RunStopped(
                f"{run.network.label}: what it finds on an image is not finite; check its weights and the head"
            )
        counts += count_pixels(resized_classes(logits[0], labels.shape), labels, classes)
    settle(run, bad)
    found = scores(all_reduce_sum(counts))
    if torch.isnan(found["mIoU"]):
        raise UsageError(f"{run.sets.test.name}: no pixel has a class")
    numbers = {name: round(100 * published(found[name]), 2) for name in ("mIoU", "mAcc", "aAcc")}
    log.info(
        f"mIoU {numbers['mIoU']:.2f}, mAcc {numbers['mAcc']:.2f}, aAcc {numbers['aAcc']:.2f} of {run.tested} images"
    )
    each = [None if value != value else round(100 * value, 2) for value in found["IoU"].tolist()]
    return numbers | {"IoU": each}


def evaluate(run: SegmentationRun) -> None:
    """Test the head that was given."""
    run.last = test(run)
