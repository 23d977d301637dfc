"""A step that was not finite is rebuilt as all processes computed it; unreadable images are counted over a restart."""

import argparse

import pytest
import torch

import main_pretrain
from tests.launch import argv, make_images
from training.blackbox import BlackBox, replay
from training.consensus import Verdict
from training.options import check_options, parse_options
from utils import World

ALONE = World(0, 1, 0, torch.device("cpu"))
LIMIT = argparse.Namespace(max_bad_images=0.2, max_skipped=3)


@pytest.mark.parametrize(
    ("options", "pieces"), [({}, 2), ({"use_bn_in_head": "true"}, 1)], ids=["pieces", "batch norm"]
)
def test_pieces_are_those_of_the_processes_unless_batch_norm_saw_them_together(tmp_path, caplog, options, pieces):
    caplog.set_level("INFO", "tutelage")
    images, folder = make_images(tmp_path / "images", count=16), tmp_path / "out"
    folder.mkdir()
    args = parse_options(argv(data_path=images, output_dir=folder, batch_size_per_gpu=4, **options))
    check_options(args, ALONE)
    run = main_pretrain.build(args, ALONE)
    seen = (run.clock(0, 1), [torch.arange(4)])
    BlackBox(args, 16, World(0, 2, 0, ALONE.device)).record(run.method, Verdict(True, False, False, 0, seen))
    (box,) = folder.glob("nonfinite_*.pth")
    assert replay(box, {}, ALONE) == 0
    assert f"iteration 1 (epoch 0): 8 images in {pieces} pieces" in caplog.text


def read(box: BlackBox, bad_images: int) -> None:
    box.record(None, Verdict(skipped=False, stop=False, save=False, bad_images=bad_images, tag=None))


def make_box() -> BlackBox:
    return BlackBox(LIMIT, 10, ALONE)


def test_unreadable_images_are_counted_over_the_epoch_and_the_run():
    box = make_box()
    assert box.summary() == "no unreadable images"
    for count in (1, 2):
        box.begin_epoch()
        read(box, count)
    assert box.bad_images == {"epoch": 2, "run": 3} and box.summary().startswith("3 times")


def test_a_restart_counts_on_but_forgives_what_may_have_been_mended():
    first, second = make_box(), make_box()
    read(first, 3)
    assert first.reason_to_stop().startswith("3 of 10 images were unreadable")
    second.load_state_dict(first.state_dict())
    assert second.reason_to_stop() is None
    read(second, 2)
    assert second.bad_images == {"epoch": 5, "run": 5} and second.reason_to_stop() is None
    read(second, 1)
    assert second.reason_to_stop().startswith("3 of 10")
