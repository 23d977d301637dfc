"""Segmentation: a run is built, trained and tested."""

import argparse
import time
from collections.abc import Iterator

import torch

from data.ade20k import Splits
from data.decode import BadImage, reading_from
from data.loader import TrainLoader, to_device_ahead
from data.segmentation import SegmentationViews, TestScale, blank
from evaluation.features import batches
from evaluation.finetune_steps import drop_path_draws
from evaluation.network import network_from_options
from evaluation.run import tell_replaced
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
from evaluation.segmentation_run import SegmentationRun, per_process, resume, save
from evaluation.unreadable import Unreadable, leave_out, refuse
from models.batch_norm import synchronise_batch_norm
from models.checkpoints import weights_hash
from utils import UsageError, World, all_gather_objects, all_reduce_sum, log, world_size

LINES_EVERY = 50  # iterations


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
    args, start = run.args, resume(run)
    if start == 0:
        see_test_images(run)
    every, sums, bad = args.eval_every or run.protocol.eval_every, torch.zeros(3, device=run.world.device), {}
    pieces = training_pieces(run, start)
    if start and run.last is None and start % every == 0:  # stopped between a save and its test
        end_with_test(run, start)
    since, begun = time.monotonic(), start
    for iteration in range(start, run.iterations):
        done, piece = iteration + 1, next(pieces)
        sums += iterate(run, piece, iteration)
        bad |= dict(piece["bad"])
        if done % LINES_EVERY == 0 or done == run.iterations or done % args.save_every == 0 or done % every == 0:
            rate = (done - begun) * run.batch * run.world.size / (time.monotonic() - since)
            tell(run, done, sums, bad, rate)
            sums, bad = torch.zeros_like(sums), {}
        is_tested = done % every == 0 or done == run.iterations
        if is_tested:
            run.last = None
        if done % args.save_every == 0 or is_tested:
            save(run, done)
        if is_tested:
            end_with_test(run, done)
    if run.last is None:
        end_with_test(run, run.iterations)


def end_with_test(run: SegmentationRun, iteration: int) -> None:
    run.last = {"iteration": iteration} | test(run)
    run.lines.append(run.last)
    save(run, iteration)


def training_pieces(run: SegmentationRun, start: int) -> Iterator[dict]:
    """Batches from iteration ``start`` on, on the device."""
    args = run.args
    views = SegmentationViews(args.crop_size, long_side=run.protocol.long_side)
    common = {"batch_size": run.batch, "world": run.world, "seed": args.seed, "num_workers": args.num_workers}
    niter = len(run.sets.train) // (run.batch * run.world.size)
    epoch, step = divmod(start, max(1, niter))
    epochs = -(-run.iterations // max(1, niter))
    loader = TrainLoader(run.sets.train, views, **common, epochs=epochs, start_epoch=epoch, start_step=step)
    return to_device_ahead(loader, run.world.device)


def iterate(run: SegmentationRun, piece: dict, iteration: int) -> torch.Tensor:
    """One step; loss and right pixels in percent of this process's share, and how many images were replaced."""
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
    train_step(run.optimizer, learning_rate(iteration, run.lr, run.iterations, run.args.warmup))
    return torch.stack((loss.detach(), share, loss.new_tensor(len(piece["bad"]))))


def average_gradients(optimizer: torch.optim.Optimizer) -> None:
    """Means over processes, whose shares of a batch are equal, in one message."""
    if world_size() == 1:
        return
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    flat = all_reduce_sum(torch.cat([gradient.flatten() for gradient in gradients])).div_(world_size())
    parts = flat.split([gradient.numel() for gradient in gradients])
    torch._foreach_copy_(gradients, [part.view_as(g) for part, g in zip(parts, gradients, strict=True)])


def tell(run: SegmentationRun, iteration: int, sums: torch.Tensor, bad: dict[str, str], rate: float) -> None:
    """A line of log.txt about the iterations since the last one, and one for people."""
    before = next((line["iteration"] for line in reversed(run.lines)), 0)
    loss, share, replaced = all_reduce_sum(sums).tolist()
    count = (iteration - before) * run.world.size
    lr = learning_rate(iteration - 1, run.lr, run.iterations, run.args.warmup)
    run.lines.append({"iteration": iteration, "loss": loss / count, "acc_seg": share / count, "lr": lr})
    log.info(
        f"[{iteration}/{run.iterations}]  loss: {loss / count:.4f}  acc_seg: {share / count:.2f}  {rate:.1f} images/s"
    )
    tell_replaced(run, bad, replaced)


# ---------------------------------------------------------------------------------------------------------------------
# Testing
# ---------------------------------------------------------------------------------------------------------------------


def see_test_images(run: SegmentationRun) -> None:
    """Read test images and their maps before anything is trained: what cannot be read is refused, or named, now."""
    bad = []
    for _, _, problem in tested_pixels(run, lambda image: torch.zeros(0)):
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


def settle(run: SegmentationRun, unreadable: list[Unreadable]) -> None:
    """Refuse what cannot be read, or with --skip_unreadable name it."""
    if not run.args.skip_unreadable:
        refuse(run.sets.test, unreadable)
    leave_out(run.sets.test, unreadable, told=run.left_out)
    run.left_out = unreadable


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
