"""What the simulation says of memory, against what a card needed."""

import argparse
import dataclasses
import gc

import pytest
import torch

import main_pretrain
from data.device import to_device_ahead
from data.loader import TrainLoader
from methods import METHODS, method_class
from tests.fake_cuda import RECIPES
from training.options import check_options, parse_options
from training.planner import Noise, simulate
from utils import World, batch_dtype

CARD = World(0, 1, 0, torch.device("cuda", 0))


def measured_peak(args: argparse.Namespace) -> int:
    """Bytes of tensors at the peak of two steps on the card, beyond what was there before."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    source = Noise(2 * args.batch_size_per_gpu)
    run = main_pretrain.build(args, CARD, source)
    run.monitor.world = dataclasses.replace(CARD, rank=1)  # which writes nothing
    views = method_class(args.method).views(args)
    options = {"pieces": args.accum_iter, "seed": 0, "epochs": args.epochs, "num_workers": 0}
    options |= {"batch_size": args.batch_size_per_gpu, "start_epoch": args.epochs - 1, "world": CARD}
    pieces = to_device_ahead(TrainLoader(source, views, **options), CARD.device, batch_dtype(args.precision))
    main_pretrain.train_one_epoch(run, args.epochs - 1, pieces)
    return torch.cuda.max_memory_allocated() - before


@pytest.mark.parametrize(
    ("method", "options"),
    [
        *((method, ["--precision", "bf16"]) for method in METHODS),
        ("dino", ["--precision", "fp32"]),
        ("dino", ["--precision", "fp16", "--accum_iter", "2"]),
        ("ibot", ["--precision", "bf16", "--grad_checkpointing"]),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_the_simulated_peak_is_within_a_tenth_of_the_measured_one(method, options):
    words = ["--method", method, "--arch", "vit_small", "--batch_size_per_gpu", "32", "--knn_every", "0"]
    args = parse_options([*words, "--output_dir", "out", "--num_workers", "0", *RECIPES[method], *options])
    check_options(args, CARD)
    plan = simulate(args, 1, main_pretrain.build, main_pretrain.train_one_epoch)
    main_pretrain.prepare_device(args, CARD)
    assert plan.peak == pytest.approx(measured_peak(args), rel=0.1)
