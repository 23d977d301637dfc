"""The script that lays out features in the plane, in this process; t-SNE is replaced where it is not the point."""

import sys

import numpy as np
import pytest
import torch
from PIL import Image

from evaluation import plane_run
from evaluation.plane import Layout
from models import build_backbone
from tests.sources import Stripes
from utils import run_cli
from visualize_tsne import main


@pytest.fixture
def lay_out(monkeypatch, tmp_path, capsys):
    """Run the script: (exit code, standard error). The features themselves are the points."""

    def points(features, perplexity, iterations, seed, start):
        return Layout(features[:, :2].numpy() + seed, 0.5)

    monkeypatch.setattr(plane_run, "embed", points)
    monkeypatch.setattr("visualize_tsne.check_library", lambda: None)
    torch.save(build_backbone("vit_micro", 8, img_size=32).state_dict(), tmp_path / "weights.pth")
    for number in range(8):
        folder = tmp_path / "images" / f"class{number}"
        folder.mkdir(parents=True)
        for index in range(4):
            Image.fromarray(Stripes(classes=8).array(8 * index + number)).save(folder / f"{index}.png")

    def run(*arguments: object) -> tuple[int, str]:
        options = ["--device", "cpu", "--num_workers", 0, "--crop_size", 32, "--output_dir", tmp_path / "out"]
        options += ["--pretrained_weights", tmp_path / "weights.pth", "--data_path", tmp_path / "images", *arguments]
        monkeypatch.setattr(sys, "argv", ["visualize_tsne.py", *map(str, options)])
        with pytest.raises(SystemExit) as exit_:
            run_cli(main)
        return exit_.value.code, capsys.readouterr().err

    return run


def test_a_picture_and_the_coordinates_of_the_first_six_classes_are_written(lay_out, tmp_path):
    code, error = lay_out("--perplexity", 5, "--init", "random", "--seed", 0, 3)
    assert code == 0, error
    with Image.open(tmp_path / "out" / "tsne.png") as picture:
        assert picture.mode == "RGB" and picture.width > 2 * 900
    with np.load(tmp_path / "out" / "tsne.npz", allow_pickle=False) as file:
        assert file["coordinates"].shape == (2, 24, 2) and file["seeds"].tolist() == [0, 3]
        assert file["labels"].tolist() == [label for label in range(6) for _ in range(4)]
        assert file["classes"].tolist() == [f"class{number}" for number in range(6)]
        assert np.allclose(file["coordinates"][1] - file["coordinates"][0], 3)
        assert file["images"][4].endswith("class1/0.png") and file["divergences"].tolist() == [0.5, 0.5]


def test_an_unreadable_image_is_left_out_of_everything(lay_out, tmp_path):
    (tmp_path / "images" / "class2" / "1.png").write_bytes(b"no image")
    code, error = lay_out("--perplexity", 3, "--classes", "class2", "class0")
    assert code == 0, error
    with np.load(tmp_path / "out" / "tsne.npz", allow_pickle=False) as file:
        assert file["labels"].tolist() == [0] * 3 + [1] * 4 and file["coordinates"].shape == (1, 7, 2)


def test_what_cannot_work_is_refused_in_one_line_and_writes_nothing(lay_out, tmp_path, monkeypatch):
    cases = [
        (("--perplexity", 24), "--perplexity 24: 24 images are too few"),
        (("--perplexity", 3, "--num_per_class", 0), "--num_per_class 0: must be at least 1"),
        (("--perplexity", 3, "--classes", "cat"), "--classes cat: no class of"),
        (("--perplexity", 3, "--seed", 0, 1), "--seed: several differ only with --init random"),
        (("--perplexity", 3, "--seed", -1), "must be 0 or more"),
        (("--perplexity", 3, "--data_path", tmp_path / "images" / "class0"), "one folder per class"),
    ]
    for arguments, said in cases:
        code, error = lay_out(*arguments)
        assert code == 2 and said in error and error.count("\n") == 1, (arguments, error)
    assert not (tmp_path / "out").exists()


def test_a_missing_library_is_one_line(lay_out, monkeypatch, tmp_path):
    from evaluation.plane import check_library

    monkeypatch.setattr("visualize_tsne.check_library", check_library)
    monkeypatch.setitem(sys.modules, "sklearn.manifold", None)
    code, error = lay_out()
    assert code == 2 and "pip install -r requirements-eval.txt" in error and not (tmp_path / "out").exists()
