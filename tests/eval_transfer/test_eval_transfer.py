"""Transfer as a script: features extracted once, settings chosen, means over seeds and sets, refusals in one line."""

import json
import signal
import subprocess
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
from tests.students import student_file
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
        right = dict(np.load(tmp_path / "out" / "eval_transfer_right.npz"))
        assert 100 * right["own, " + ("5-NN" if kind == "knn_torch" else "seed 22")].mean() == found["top1"]
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


def test_features_of_several_sets_are_averaged_in_one_call_and_compared_with_those_of_another_network(
    evaluate, tmp_path
):
    sets = [blobs(tmp_path / "ours" / name, seed=seed) for seed, name in enumerate(("cog_l1", "dtd", "in1k"))]
    settings = ("--search", "random", "--n_optuna_trials", 2, "--clf_epochs", 2)
    assert evaluate("--features_dirs", *sets, *settings)[0] == 0
    found = numbers(tmp_path)
    assert {name: values["clf_type"] for name, values in found["sets"].items()} == {
        "cog_l1": "logreg_torch", "dtd": "logreg_sklearn", "in1k": "logreg_torch"
    }  # fmt: skip
    two = [found["sets"][name]["top1"] for name in ("cog_l1", "dtd")]
    assert found["mean_accuracy"] == pytest.approx(sum(two) / 2)
    assert found["mean_log_odds"] == pytest.approx(sum(map(log_odds, two)) / 2)
    right = tmp_path / "out" / "eval_transfer_right.npz"
    theirs = blobs(tmp_path / "theirs", seed=5)
    compare = ("--compare", right.rename(tmp_path / "ours.npz"), "--output_dir", tmp_path / "out2")
    code, said, error = evaluate("--features_dir", theirs, "--dataset", "dtd", *settings, *compare)
    assert code == 0 and "dtd, seed 22, compared with" in said, error
    other = numbers(tmp_path, "out2")
    difference = other["compared"]["results"]["dtd, seed 22"]["difference"]
    assert difference == pytest.approx(other["sets"]["dtd"]["top1"] - found["sets"]["dtd"]["top1"])
    fewer = blobs(tmp_path / "fewer", images=30)
    code, _, error = evaluate("--features_dir", fewer, "--dataset", "dtd", *settings, *compare)
    assert code == 2 and "of other test images" in error and error.count("\n") == 1


KILLED = """
import os, signal
from evaluation import cache
from utils import run_cli
cache.FeatureStore.__init__.__defaults__ = (3,)
note = cache._Place.note
def killed(place, feature, rows, done, unreadable):
    note(place, feature, rows, done, unreadable)
    if place.images == 8 and done == 6:
        os.kill(os.getpid(), signal.SIGKILL)
cache._Place.note = killed
from eval_transfer.eval_transfer import main
run_cli(main)
"""


def test_an_official_layout_is_extracted_once_and_evaluated_from_the_command_line(evaluate, tmp_path):
    """Killed after the features and in the middle of them, on one process and on two: the same numbers."""
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
    out = ("--output_dir", tmp_path / "killed", "--device", "cpu", "--num_workers", 0)
    words = [sys.executable, "-c", KILLED, *map(str, (*MICRO, *data, *choose, *out))]
    assert subprocess.run(words, cwd=ROOT, timeout=200).returncode == -signal.SIGKILL
    code, said, error = evaluate(*MICRO, *data, *choose, *out)
    assert code == 0 and "taken up at image 6 of 8" in said, error
    assert numbers(tmp_path, "killed") == here
    student_file(tmp_path)
    network = ("--pretrained_weights", tmp_path / "unic.pth", "--apply_head", "timm/b.c", "--image_size", 16)
    code, said, error = evaluate(*network, *data, *choose, "--dump_features", tmp_path / "space")
    assert code == 0 and "in the space of timm/b.c" in said, error
    assert torch.load(tmp_path / "space" / "dtd" / "features_test.pth")["X"].shape == (4, 5)


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
        (("--features_dir", kept, "--dataset", "dtd", "pets"), "a folder for every --dataset"),
        (("--features_dir", kept, kept, *random), "kept: is the name of two data sets"),
        (("--features_dir", kept, "--apply_head", "dino"), "leave out --data_path, --pretrained_weights and"),
        (("--apply_head", "dino", "--token_type", "patch"), "is of the class token"),
        (("--apply_head", "dino"), "--apply_head dino: names a part of a checkpoint"),
        (("--features_dir", kept, *random, "--compare", tmp_path / "none.npz"), "No such file"),
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
