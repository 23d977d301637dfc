"""What is counted of unreadable images, over an epoch, a run, and a restart."""

import argparse

import torch

from training.blackbox import BlackBox
from training.consensus import Verdict
from utils import World

ALONE = World(0, 1, 0, torch.device("cpu"))
LIMIT = argparse.Namespace(max_bad_images=0.2, max_skipped=3)


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
