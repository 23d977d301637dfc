"""One picture of two hundred and one is cut off in the middle, and nothing that is done with them ends early."""

import json
import sys

import pytest

from eval_finetuning import eval_finetuning
from eval_knn import eval_knn
from eval_linear import eval_linear
from tests.launch import load, make_images, run_here
from utils import UsageError, run_cli


@pytest.fixture
def root(tmp_path):
    """train/ with 201 images, of which one cannot be read, and val/."""
    make_images(tmp_path / "data" / "train", 201)
    make_images(tmp_path / "data" / "val", 9)
    broken = tmp_path / "data" / "train" / "class2" / "002.jpg"
    broken.write_bytes(broken.read_bytes()[:200])
    return tmp_path / "data"


def test_a_refusal_at_the_first_piece_leaves_nothing_in_the_output_folder(tmp_path, monkeypatch):
    for picture in make_images(tmp_path / "data", 8).rglob("*.jpg"):
        picture.write_bytes(picture.read_bytes()[:200])
    for folder in (tmp_path / "out", tmp_path):  # one to be made, and one that is there
        before = set(tmp_path.rglob("*"))
        with pytest.raises(UsageError, match="none of 100 images could be read"):
            run_here(monkeypatch, data_path=tmp_path / "data", output_dir=folder)
        assert set(tmp_path.rglob("*")) == before


def test_one_unreadable_image_ends_neither_training_nor_any_evaluation(root, tmp_path, monkeypatch, capsys):
    options = {"data_path": root, "output_dir": tmp_path, "batch_size_per_gpu": 67, "precision": "fp32"}
    assert run_here(monkeypatch, **options, epochs=2, knn_every=1, knn_per_class=-1) == 0
    lines = [json.loads(line) for line in (tmp_path / "log.txt").read_text().splitlines()]
    assert [line["k-NN_unreadable"] for line in lines] == [{"train": 1, "test": 0}] * 2
    assert all(line["k-NN"]["10"]["top1"] >= 0 for line in lines) and load(tmp_path)["epoch"] == 2
    said = capsys.readouterr().out
    assert said.count("1 of its 201 images left out as unreadable: ") == 1

    weights, data = tmp_path / "checkpoint.pth", ["--data_path", root, "--device", "cpu", "--num_workers", 0]
    plain = ["--disable_rel_pos_bias", "--abs_pos_emb", "--use_cls", "--layer_scale_init_value", 0, "--epochs", 1]
    for script, words, last in (
        (eval_knn, ["--pretrained_weights", weights, "--nb_knn", 5], "5-NN classifier result: "),
        (eval_linear, ["--pretrained_weights", weights, "--epochs", 1, "--lr", 0.1], "Top-1 test accuracy: "),
        (eval_finetuning, ["--finetune", weights, *plain, "--warmup_epochs", 0], "Max accuracy: "),
    ):
        name = script.__name__.split(".")[-1]
        words = [name, *words, *data, "--batch_size_per_gpu", 67, "--output_dir", tmp_path / name]
        monkeypatch.setattr(sys, "argv", [*map(str, words)])
        with pytest.raises(SystemExit) as exit_:
            run_cli(script.main)
        said, error = capsys.readouterr()
        assert exit_.value.code == 0, error
        (result,) = [line for line in said.splitlines() if line.startswith(last)]
        assert result.endswith(" (unreadable: 1 training image)") and said.count("class2/002.jpg") == 1
        assert json.loads((tmp_path / name / f"{name}.json").read_text())["unreadable"] == {"train": 1, "test": 0}
