"""What --dry_run says a run will need of a GPU."""

import gc
import re
import warnings
from collections import Counter

import pytest
from torch._subclasses.fake_tensor import FakeTensor

import main_pretrain
from simulation.gpu import obstacle
from tests.launch import run_here
from training.options import parse_options
from training.planner import Plan, largest_batch, least_time, lines_of, simulate

pytestmark = pytest.mark.skipif(bool(obstacle()), reason=obstacle())
GB = 2**30
WORDS = "--arch vit_micro --patch_size 8 --out_dim 256 --global_crops_size 64 --local_crops_size 32 --precision bf16"


def plan(*options: object, devices: int = 1) -> Plan:
    args = parse_options([*WORDS.split(), "--epochs", "40", "--warmup_epochs", "1", *map(str, options)])
    return simulate(args, devices, main_pretrain.build, main_pretrain.train_one_epoch)


def test_memory_grows_with_the_images_of_a_piece_and_not_of_the_batch():
    small, middle, large = (plan("--batch_size_per_gpu", images) for images in (16, 40, 64))
    pieces = plan("--batch_size_per_gpu", 64, "--accum_iter", 4)
    assert small.peak < pieces.peak < middle.peak < large.peak
    assert middle.peak == pytest.approx((small.peak + large.peak) / 2, rel=0.05)  # what the largest batch stands on
    assert small.parts["weights"] == large.parts["weights"] == pieces.parts["weights"]
    assert large.flops / 64 == pytest.approx(small.flops / 16, rel=0.02) == pytest.approx(pieces.flops / 64, rel=0.02)


def test_recomputed_blocks_need_less_memory_and_more_products():
    kept, recomputed = plan(), plan("--grad_checkpointing")
    assert recomputed.parts["activations"] < 0.6 * kept.parts["activations"]
    assert recomputed.flops > 1.1 * kept.flops


def test_nothing_of_a_simulation_stays_alive():
    plan()
    gc.collect()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some objects warn when they are looked at
        assert not [thing for thing in gc.get_objects() if isinstance(thing, FakeTensor)]


def test_processes_keep_their_gradients_and_exchange_as_many_bytes_as_are_trained():
    alone, one_of_64 = plan(), plan(devices=64)
    assert alone.sent == 0
    assert one_of_64.parts["gradients"] > alone.parts["gradients"]
    assert one_of_64.sent == pytest.approx(one_of_64.parts["gradients"], rel=0.02)


def test_the_largest_batch_is_where_memory_ends_and_divides_into_pieces():
    one, two = (Plan(n, (2 + n) * GB // 10, {}, "", 0.0, 0, 1) for n in (10, 20))
    assert largest_batch(two, one, 16, 1) == 148  # 0.1 GB an image and 0.2 GB besides, of 15 GB
    assert largest_batch(two, one, 16, 32) == 128
    assert largest_batch(two, one, 1, 1) == 0


def test_the_least_time_is_called_a_bound_and_leaves_out_cards_without_the_precision():
    bound = least_time(Plan(1, 0, {}, "", 312e12, 0, 1), "bf16", 60)
    assert "a bound" in bound and "A100 1.0" in bound and "V100" not in bound
    assert "A100 0.5" in least_time(Plan(1, 0, {}, "", 312e12, 0, 2), "bf16", 60)


def test_a_dry_run_ends_with_the_plan(tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO", "tutelage")
    assert run_here(monkeypatch, output_dir=tmp_path, dry_run=True, devices=8, precision="bf16") == 0
    said = [record.getMessage() for record in caplog.records][-4:]
    assert re.match(r"simulated on a GPU, bf16, 8 images per process: memory at most [\d.]+ GB", said[0])
    assert said[1].startswith("largest --batch_size_per_gpu, 1 GB left to the driver: 16 GB: ")
    assert "a bound" in said[2] and said[3].startswith("8 processes: 8 images each, 64 per step; ")


def test_what_holds_little_is_not_listed():
    lines = lines_of(
        Plan(4, 3 * GB, Counter(activations=2 * GB, weights=GB, gradients=1), "models/vit.py:1", 1e9, 0, 1),
        Plan(2, 2 * GB, {}, "", 1e9, 0, 1),
        parse_options([]),
        10,
    )
    assert "(activations 2.00, weights 1.00)" in lines[0]
