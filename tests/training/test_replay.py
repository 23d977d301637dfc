"""A step that was not finite is rebuilt as all processes computed it."""

import pytest
import torch

import main_pretrain
from tests.launch import argv, make_images
from training.blackbox import BlackBox, replay
from training.consensus import Verdict
from training.options import check_options, parse_options
from utils import World

ALONE = World(0, 1, 0, torch.device("cpu"))


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
