"""Segmentation as a script: it learns, continues exactly, shares its work, and refuses in one line."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from eval_segmentation.eval_segmentation import check_arguments, get_args_parser, main
from evaluation.segmentation_protocols import PROTOCOLS
from tests.eval_knn.test_eval_knn import micro
from tests.eval_linear.test_eval_linear import assert_same, saved
from tests.launch import ROOT, finish, start, wait_for_line
from tests.stamps import ade20k
from utils import run_cli

TINY = {"num_classes": 4, "crop_size": 32, "num_workers": 0, "batch_size_per_gpu": 4, "warmup": 3, "device": "cpu"}
TINY |= {"iterations": 12, "save_every": 4, "eval_every": 8, "lr": 0.02, "seed": 1}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return ade20k(tmp_path_factory.mktemp("ade20k"))


@pytest.fixture
def segment(monkeypatch, tmp_path, capsys, data):
    """Run the script in this process: (exit code, standard output, standard error)."""

    def run(*arguments: object, out: str = "out", **options: object) -> tuple[int, str, str]:
        monkeypatch.setattr(
            sys, "argv", ["eval_segmentation.py", *words(tmp_path / out, data, options), *map(str, arguments)]
        )
        with pytest.raises(SystemExit) as exit_:
            run_cli(main)
        return exit_.value.code, *capsys.readouterr()

    return run


def words(out: Path, data: Path, options: dict) -> list[str]:
    options = TINY | {"data_path": data, "output_dir": out} | options
    return [word for name, value in options.items() if value is not None for word in (f"--{name}", str(value))]


def result(folder: Path) -> dict:
    return json.loads((folder / "eval_segmentation.json").read_text())["numbers"]


def lines_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]


def test_a_linear_head_learns_is_continued_and_tested_alone(segment, tmp_path, data):
    """Killed from outside, continued, on two processes: the same bits and the same numbers as in one go."""
    weights = ("--pretrained_weights", micro(tmp_path))
    code, said, error = segment(*weights, out="whole")
    assert code == 0, error
    assert "linear head on the map of block 3 after the final norm" in said and "RANDOM" not in said
    numbers, whole = result(tmp_path / "whole"), saved(tmp_path / "whole", "checkpoint.pth")
    assert said.splitlines()[-1] == f"mIoU: {numbers['mIoU']:.2f}"
    background = 100 * 0.6 / 4  # what a head finds that knows the photograph alone
    assert numbers["mIoU"] > 2 * background and len(numbers["IoU"]) == numbers["classes"] == 4
    assert [line["iteration"] for line in lines_of(tmp_path / "whole")] == [4, 8, 8, 12, 12]
    assert whole["iteration"] == 12 and next(iter(whole["state_dict"])) == "decode_head.bn.weight"
    names = {name.removeprefix("decode_head.") for name in whole["state_dict"]}
    assert {"bn.running_var", "conv_seg.weight", "conv_seg.bias"} <= names and len(names) == 7

    script = [str(ROOT / "eval_segmentation" / "eval_segmentation.py"), *map(str, weights)]
    killed = start(script=[*script, *words(tmp_path / "parts", data, {})], **_nothing())
    wait_for_line(killed, "[8/12]")
    killed.kill()
    killed.communicate(timeout=60)
    code, said, _ = segment(*weights, out="parts")
    assert code == 0 and "at iteration" in said
    assert_same(whole, saved(tmp_path / "parts", "checkpoint.pth"))
    assert (tmp_path / "whole" / "log.txt").read_text() == (tmp_path / "parts" / "log.txt").read_text()
    code, said, _ = segment(*weights, out="parts")
    assert code == 0 and "images/s" not in said and f"mIoU: {numbers['mIoU']:.2f}" in said

    shared = start(2, [*script, *words(tmp_path / "two", data, {"batch_size_per_gpu": 2})], **_nothing())
    finish(shared)
    two = saved(tmp_path / "two", "checkpoint.pth")["state_dict"]
    for name, tensor in whole["state_dict"].items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-3, atol=1e-4)
    assert result(tmp_path / "two")["mIoU"] == pytest.approx(numbers["mIoU"], abs=0.1)

    head = tmp_path / "head.pth"
    torch.save({"state_dict": whole["state_dict"], "meta": {"CLASSES": ("wall",)}, "optimizer": {}}, head)
    code, said, error = segment(*weights, "--head", head, out="given")
    assert code == 0, error
    assert not (tmp_path / "given" / "log.txt").exists()
    assert result(tmp_path / "given")["mIoU"] == numbers["mIoU"]
    code, _, error = segment(*weights, "--head", head, num_classes=5, out="given")
    assert code == 2 and "4 classes, the images have 5" in error and error.count("\n") == 1
    code, _, error = segment(*weights, lr=0.5, out="whole")
    assert code == 2 and "learning rate: 0.02 there, 0.5 here" in error


def _nothing() -> dict:
    """No option of main_pretrain.py."""
    from tests.launch import SMALL

    return dict.fromkeys(SMALL)


@pytest.mark.parametrize("head", ["linear4", "semfpn"])
def test_heads_on_four_maps_are_trained_and_continued_exactly(segment, monkeypatch, tmp_path, head):
    """iBOT's alone, UDI's with the network: stochastic depth and dropout go on where they were."""
    from evaluation import segmentation_steps

    options = ("--pretrained_weights", micro(tmp_path), "--head", head, "--blocks", 0, 1, 2, 3)
    settings = {"iterations": 4, "save_every": 2, "eval_every": 4}
    assert segment(*options, out="whole", **settings)[0] == 0
    iterate = segmentation_steps.iterate

    def stop_in_the_fourth(run, piece, iteration, lr):
        if iteration == 3:
            raise KeyboardInterrupt
        return iterate(run, piece, iteration, lr)

    monkeypatch.setattr(segmentation_steps, "iterate", stop_in_the_fourth)
    with pytest.raises(KeyboardInterrupt):
        segment(*options, out="parts", **settings)
    monkeypatch.setattr(segmentation_steps, "iterate", iterate)
    code, said, error = segment(*options, out="parts", **settings)
    assert code == 0 and "at iteration 2 of 4" in said, error
    whole = saved(tmp_path / "whole", "checkpoint.pth")
    assert_same(whole, saved(tmp_path / "parts", "checkpoint.pth"))
    assert result(tmp_path / "whole")["blocks"] == [0, 1, 2, 3]
    trained = {name for name in whole["state_dict"] if name.startswith("network.")}
    assert bool(trained) == (head == "semfpn")
    if head == "linear4":
        assert whole["state_dict"]["decode_head.conv_seg.weight"].shape == (4, 4 * 128, 1, 1)


def test_what_cannot_work_is_said_in_one_line(segment, tmp_path, data):
    weights = ("--pretrained_weights", micro(tmp_path))

    def refused(*arguments, **options):
        code, _, error = segment(*arguments, **options)
        assert code == 2 and error.count("\n") == 1, error
        return error

    assert "--data_path: pass the folder" in refused(data_path=None)
    assert "no images/training" in refused(data_path=tmp_path) and "ADEChallengeData2016.zip" in refused(
        data_path=tmp_path
    )
    assert "ADE20K has 20210" in refused(num_classes=150)
    assert "neither one of linear, linear4, semfpn nor a file" in refused("--head", "nothing.pth")
    assert "holds no linear head" in refused("--head", micro(tmp_path))
    assert "vit_*" in refused("--arch", "swin_tiny")
    assert "pass --blocks" in refused(*weights, "--head", "linear4")
    assert "from 0 to 3" in refused(*weights, "--blocks", 4)
    assert "--lr -1" in refused(lr=-1.0)
    assert "--exif true" in refused(exif="true")
    assert "unknown option --lrr" in refused("--lrr", 3)
    assert "larger than the data set" in refused(*weights, batch_size_per_gpu=40)
    assert "class 4 of 3 (--num_classes)" in refused(*weights, num_classes=3)
    assert not (tmp_path / "out").exists()
    code, _, error = segment(*weights, lr=1e38)
    assert code == 1 and "not finite before step 4; lower --lr" in error and error.count("\n") == 1
    assert not list((tmp_path / "out").glob("*.pth"))


def test_the_options_of_unic_are_understood():
    words = "--pretrained unic.pth --data_dir /ade20k --head_type linear --samples_per_gpu 8 --iter_with_8_gpu 10000"
    args = get_args_parser().parse_args([*words.split(), "--dataset", "ade20k", "--lr", "0", "--seed", "0"])
    check_arguments(args)
    assert (args.pretrained_weights, args.data_path, args.batch_size_per_gpu) == ("unic.pth", "/ade20k", 8)
    assert (args.head, args.lr, args.iter_with_8_gpu * 8) == ("linear", 0, PROTOCOLS["linear"].iterations)


def test_maps_that_are_damaged_or_missing_are_named(segment, tmp_path):
    weights, root = ("--pretrained_weights", micro(tmp_path)), ade20k(tmp_path / "ade", 5, 2)
    maps = sorted((root / "annotations" / "validation").iterdir())
    maps[0].write_bytes(b"nothing")
    code, _, error = segment(*weights, data_path=root, iterations=1)
    assert code == 2 and "1 of its 2 test images cannot be read" in error and "--skip_unreadable" in error
    code, said, error = segment(*weights, "--skip_unreadable", data_path=root, iterations=1)
    assert code == 0 and "(unreadable: 1 test image)" in said, error
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(maps[0])
    code, _, error = segment(*weights, data_path=root, iterations=1, out="other")
    assert code == 2 and "one channel of 8 bits" in error
    maps[1].unlink()
    code, _, error = segment(*weights, data_path=root, iterations=1, out="other")
    assert code == 2 and "1 images have no map of classes, as annotations/validation" in error
