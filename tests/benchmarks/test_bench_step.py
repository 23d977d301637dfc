"""What is compared for speed computes the same."""

import importlib
from pathlib import Path

import numpy as np
import pytest
import torch

from methods import METHODS
from training.options import parse_options

BENCHMARKS = Path(__file__).resolve().parent.parent.parent / "benchmarks"
SMALL = "--arch vit_micro --patch_size 32 --batch 2 --steps 1 --device cpu"
CROPS = "--out_dim 64 --local_crops_number 2"
QUEUES = "--group_out_dim 64 --instance_queue_size 64 --local_group_queue_size 64"


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))  # as for a script that is started there
    return importlib.import_module("bench_step")


@pytest.mark.parametrize("method", METHODS)
def test_the_plain_formulation_of_a_method_gives_its_losses(bench, method, monkeypatch):
    own = {"mugs": QUEUES, **dict.fromkeys(("ibot", "attmask"), "--patch_out_dim 64")}.get(method, "").split()
    crops = {"unic": [], "mugs": CROPS.split()[2:]}.get(method, CROPS.split())
    args = bench.get_bench_parser().parse_args(["--method", method, *SMALL.split(), *crops])
    monkeypatch.setattr(bench, "TEACHERS", ("vit_micro", "vit_micro"))
    assert set(bench.SETTINGS) == set(METHODS)
    monkeypatch.setitem(bench.SETTINGS, method, " ".join([bench.SETTINGS[method], *own]))
    monkeypatch.setattr(bench, "product_rate", lambda device: 1.0)
    sides, _ = bench.compare(args, "fp32", *bench.build(args))  # raises UsageError where they differ
    assert [side.name for side in sides] == ["plain", "fast"] and all(len(side.times) == 2 for side in sides)


def test_the_plain_formulation_of_a_swin_gives_the_losses_of_its_regions(bench, monkeypatch):
    words = [*SMALL.replace("vit_micro --patch_size 32", "swin_micro").split(), *CROPS.split()]
    args = bench.get_bench_parser().parse_args(["--method", "esvit", *words])
    monkeypatch.setattr(bench, "product_rate", lambda device: 1.0)
    bench.compare(args, "fp32", *bench.build(args))  # raises UsageError where they differ


@pytest.mark.parametrize("method", METHODS)
def test_the_batch_of_a_benchmark_is_what_the_loader_would_make(bench, method):
    one = method == "unic"
    args = parse_options(["--method", method, *([] if one else ["--local_crops_number", "1"]), "--augment", "fast"])
    views = METHODS[method].views(args)
    batch = bench.noise_batch(views, 2, torch.device("cpu"))
    shapes = [(2, 3, 224, 224)] * (4 if method == "mugs" else 2) + [(2, 3, 96, 96)]
    assert [tuple(crop.shape) for crop in batch["crops"]] == (shapes[:1] if one else shapes)
    assert all(crop.dtype == torch.float32 and crop.abs().max() < 4 for crop in batch["crops"])
    sample = views(np.zeros((375, 500, 3), np.uint8), (0, 0, 0))
    for name, value in sample.items():  # masks and places depend on the key, not on the picture
        if name not in ("crops", "erased"):
            first = torch.stack([part[0] for part in batch[name]]) if isinstance(value, list) else batch[name][0]
            assert torch.equal(first, torch.stack(value) if isinstance(value, list) else torch.as_tensor(value)), name
