"""What frozen teachers cost: a batch of each, before the first step."""

import time
from pathlib import Path

import torch

from training.checkpointing import LATEST
from utils import autocast, batch_dtype, log


def measure_frozen(run) -> None:
    """Say how long each frozen network takes for the images of a piece, on the run's device and in its precision.

    Once in a run: not where one is continued. Nothing of it stays: grey images, generators put back, no gradients.
    """
    args, networks = run.args, run.method.frozen_networks()
    if not networks or (not args.dry_run and (Path(args.output_dir) / LATEST).exists()):
        return
    device, size, count = run.world.device, run.method.image_size(args), args.batch_size_per_gpu // args.accum_iter
    images = torch.zeros(count, 3, size, size, device=device, dtype=batch_dtype(args.precision))
    once_before = device.type == "cuda" or args.compile  # kernels are chosen, graphs compiled
    with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.no_grad():
        for name, network in networks.items():
            for timed in (False, True) if once_before else (True,):
                began = _now(device)
                with autocast(args.precision, device):
                    network(images)
                seconds = _now(device) - began
                if timed:
                    rate = count / seconds
                    log.info("teacher %s: %.1f ms for %d images, %.0f images/s", name, 1e3 * seconds, count, rate)


def _now(device: torch.device) -> float:
    """Seconds, when all that was asked of the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
