"""Transfer as a script: features extracted once, settings chosen, means over seeds and sets, refusals in one line."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from eval_transfer.eval_transfer import main
from evaluation import search, transfer_run
from evaluation.transfer import log_odds
from tests.launch import ROOT, SMALL, finish, start
from utils import run_cli


@pytest.fixture
def evaluate(monkeypatch, tmp_path, capsys):
    """Run the script in this process: (exit code, standard output, standard error)."""

    def run(*arguments: object) -> tuple[int, str, str]:
        options = ["--device", "cpu", "--num_workers", 0, "--output_dir", tmp_path / "out", *arguments]
        monkeypatch.setattr(sys, "argv", ["eval_transfer.py", *map(str, options)])
        with pytest.raises(SystemExit) as exit_:
            run_cli(main)
        return exit_.value.code, *capsys.readouterr()

    return run


def numbers(tmp_path: Path, folder: str = "out") -> dict:
    return json.loads((tmp_path / folder / "eval_transfer.json").read_text())["numbers"]


def blobs(folder: Path, images: int = 60, dim: int = 5, classes: int = 3, seed: int = 0) -> Path:
    """UNIC's files, of classes that lie apart."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(classes, dim)) * 2
    for part in ("trainval", "test"):
        labels = np.arange(images) % classes
        rows = centres[labels] + rng.normal(size=(images, dim))
        torch.save({"X": torch.tensor(rows).float(), "Y": torch.tensor(labels)}, folder / f"features_{part}.pth")
    return folder


def textures(root: Path, size: int = 16) -> Path:
    """Describable Textures with two classes of six images each, as it is published."""
    rng, names = np.random.default_rng(0), []
    for label, name in enumerate(("banded", "zigzag")):
        (root / "images" / name).mkdir(parents=True)
        for number in range(6):
            names.append(f"{name}/{name}_{number}.jpg")
            pixels = rng.integers(0, 256, (size, size, 3)) // 2 + 120 * label
            Image.fromarray(pixels.astype(np.uint8)).save(root / "images" / names[-1])
    (root / "labels").mkdir()
    for part, chosen in {"train1": names[::3], "val1": names[1::3], "test1": names[2::3]}.items():
        (root / "labels" / f"{part}.txt").write_text("\n".join(chosen) + "\n")
    return root


MICRO = ("--arch", "vit_micro", "--patch_size", 8, "--image_size", 16)


def test_given_features_are_classified_by_every_kind_of_classifier(evaluate, tmp_path):
    features = ("--features_dir", blobs(tmp_path / "kept"), "--search", "random", "--n_optuna_trials", 4)
    for kind, more in {"logreg_sklearn": (), "logreg_torch": ("--clf_epochs", 5), "knn_torch": ("--knn_k", 5)}.items():
        code, said, error = evaluate(*features, "--clf_type", kind, *more)
        assert code == 0, error
        found = numbers(tmp_path)["sets"]["own"]
        assert found["clf_type"] == kind and found["top1"] > 60
        low, high = found["interval"]
        assert 60 < low < found["top1"] < high and f"95 %: {low:.2f} to {high:.2f}" in said


def test_several_seeds_are_averaged_and_what_is_finished_is_not_done_again(evaluate, tmp_path, monkeypatch):
    options = ("--features_dir", blobs(tmp_path / "kept"), "--search", "random", "--n_optuna_trials", 3)
    done, real = [], transfer_run.one_seed
    monkeypatch.setattr(transfer_run, "one_seed", lambda *a: (done.append(a[3]), real(*a))[1])
    assert evaluate(*options, "--seed", 1)[0] == 0
    alone = numbers(tmp_path)["sets"]["own"]
    assert evaluate(*options, "--seed", 1, 2)[0] == 0 and done == [1, 2]
    both = numbers(tmp_path)
    runs = both["sets"]["own"]["seeds"]
    assert runs["1"] == alone["seeds"]["1"]
    assert both["sets"]["own"]["top1"] == pytest.approx((runs["1"]["top1"] + runs["2"]["top1"]) / 2)
    assert both["mean_log_odds"] == pytest.approx(log_odds(both["mean_accuracy"]))
    assert evaluate(*options, "--seed", 1, "--clf_C_max", 10)[0] == 0 and done == [1, 2, 1]  # other settings


def test_an_official_layout_is_extracted_once_and_evaluated_from_the_command_line(evaluate, tmp_path):
    """Killed after the features, on one process and on two: the same numbers."""
    textures(tmp_path / "dtd")
    data = ("--data_path", tmp_path, "--dataset", "dtd")
    code, _, error = evaluate(*MICRO, *data)
    assert code == 2 and "dtd, trainval: 8 images instead of the official 3760" in error and error.count("\n") == 1
    choose = ("--any_counts", "--search", "random", "--n_optuna_trials", 3, "--val_perc", 0.3)
    code, said, error = evaluate(*MICRO, *data, *choose, "--dump_features", tmp_path / "dumped")
    assert code == 0 and "to be extracted" in said, error
    code, said, error = evaluate(*MICRO, *data, *choose, "--purge_output_dir")
    assert code == 0 and "to be extracted" not in said and "same network and images" in said, error
    here = numbers(tmp_path)
    given = ("--features_dir", tmp_path / "dumped" / "dtd", "--dataset", "dtd")
    assert evaluate(*given, *choose)[0] == 0
    assert numbers(tmp_path)["sets"]["dtd"] == here["sets"]["dtd"]
    script = [str(ROOT / "eval_transfer" / "eval_transfer.py"), *map(str, (*MICRO, *data, *choose))]
    script += ["--output_dir", str(tmp_path / "two"), "--device", "cpu", "--num_workers", "0"]
    finish(start(2, script, **dict.fromkeys(SMALL)))
    assert numbers(tmp_path, "two") == here


def test_mistakes_end_in_one_line(evaluate, tmp_path, monkeypatch):
    kept = blobs(tmp_path / "kept")
    lonely = blobs(tmp_path / "lonely", images=3)
    broken = blobs(tmp_path / "broken")
    torch.save({"X": torch.full((4, 5), float("nan")), "Y": torch.arange(4)}, broken / "features_test.pth")
    unseen = blobs(tmp_path / "unseen")
    torch.save({"X": torch.randn(4, 5), "Y": torch.arange(4) + 7}, unseen / "features_test.pth")
    wide = blobs(tmp_path / "wide")
    torch.save({"X": torch.randn(4, 9), "Y": torch.zeros(4).long()}, wide / "features_test.pth")
    (tmp_path / "none").mkdir()
    monkeypatch.setitem(sys.modules, "optuna", None)
    random = ("--search", "random")
    for arguments, words in (
        (("--features_dir", kept), "optuna is not installed; pip install -r requirements-eval.txt"),
        (("--features_dir", lonely, *random), "class 0 has one training image"),
        (("--features_dir", broken, *random), "not finite"),
        (("--features_dir", unseen, *random), "no training images, such as 7"),
        (("--features_dir", wide, *random), "features of 5 and 9 numbers"),
        (("--features_dir", tmp_path / "none"), "features_trainval.pth"),
        (("--features_dir", kept, "--clf_C_min", 5, "--clf_C_max", 1), "in this order"),
        (("--features_dir", kept, "--val_perc", 1), "between 0 and 1"),
        (("--features_dir", kept, "--dataset", "dtd", "pets"), "pass one --dataset"),
        (("--dataset", "pets"), "where are its files"),
        (
            ("--dataset", "pets", "--data_path", tmp_path / "none", *MICRO),
            "annotations/trainval.txt: No such file or directory; pets comes from Oxford-IIIT Pets",
        ),
        (("--dataset", "pets", "--data_path", tmp_path / "nowhere", *MICRO), "Oxford-IIIT Pets"),
        (("--dataset", "pets", "dtd", "--data_path", tmp_path / "none", *MICRO), "has no folder pets"),
    ):
        code, _, error = evaluate(*arguments)
        assert code == 2 and words in error and error.rstrip().count("\n") == 0, (arguments, error)
    assert not (tmp_path / "out" / "eval_transfer.json").exists()


def test_drawn_settings_are_those_that_optuna_begins_with():
    ranges = {"C": search.Range(1e-5, 1e6)}
    drawn = search.Drawn(ranges, 22)
    first, rest = drawn.ask(1), drawn.ask(2)
    assert [*first, *rest] == search.Drawn(ranges, 22).ask(3)
    assert first[0]["C"] == pytest.approx(1.96365827e-03)
    assert search.best_trial([1.0, 3.0, 3.0, 2.0]) == 1
