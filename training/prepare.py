"""What is set on a device and in a method before the first step."""

import argparse

import torch

from methods.base import Method
from models import LIBRARY, RESNET, family_of
from models.batch_norm import batch_norm_of_the_batch
from utils import UsageError, World, keep_large_blocks, log

GRAPHS = 128  # compiled of one block's code, at most


def refuse_pieces_of_batch_norm(method: Method, args: argparse.Namespace) -> None:
    """Raises UsageError where a batch that is divided would have other numbers than the whole one."""
    norm = batch_norm_of_the_batch(method)
    if args.accum_iter > 1 and norm is not None:
        raise UsageError(
            f"--accum_iter {args.accum_iter}: {norm} is a batch norm, which would see a piece instead of the batch; "
            "leave it 1, and make --batch_size_per_gpu smaller and processes more"
        )


def prepare_blocks(method: Method, args: argparse.Namespace) -> None:
    """Activation checkpointing and compilation, block by block: equal blocks share their graphs."""
    if args.compile:
        # teacher and student, first block and last, each once for its size and once for any: torch's own limit is 8,
        # beyond which it would run a block as it is and say so once
        torch._dynamo.config.cache_size_limit = GRAPHS
    for module in method.modules():
        if hasattr(module, "grad_checkpointing"):
            module.grad_checkpointing = args.grad_checkpointing
            module.skip_dropped = not args.compile  # graphs want constant shapes
        if args.compile and hasattr(module, "drop_path"):
            module.compile()


def prepare_device(args: argparse.Namespace, world: World) -> None:
    if world.device.type == "cpu":
        keep_large_blocks()
    # told only to warn, torch leaves the gradient of attention without an order; networks of libraries may need it
    ours = family_of(args.arch) not in (LIBRARY, RESNET)
    if args.deterministic and not ours and world.device.type == "cuda":
        log.info("--arch %s: kernels without a fixed order are used where it has no others, and named below", args.arch)
    torch.use_deterministic_algorithms(args.deterministic, warn_only=not ours)
    torch.utils.deterministic.fill_uninitialized_memory = False  # a debugging aid that costs a pass over every tensor
    torch.backends.cudnn.deterministic = args.deterministic
    torch.backends.cudnn.benchmark = not args.deterministic
