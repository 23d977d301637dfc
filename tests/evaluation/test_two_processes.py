"""Evaluations without training: two processes find what one finds, though the images of neither divide by two."""

import importlib
import json

import pytest

from tests.eval_copy_detection.test_eval_copy_detection import copydays
from tests.eval_retrieval.test_eval_retrieval import landmarks
from tests.eval_robustness.test_eval_robustness import challenge_folder, head_file, stripes
from tests.launch import SMALL, finish, start
from tests.scripts import Scripts, micro, photograph, save

ROBUST = "eval_robustness.eval_robustness"


def test_two_processes_find_what_one_finds(monkeypatch, capsys, tmp_path):
    network = micro(tmp_path / "micro.pth")
    linear, nine = (head_file(tmp_path / f"{n}.pth", network, classes=n) for n in (0, 9))
    images = stripes(tmp_path / "data" / "val")
    next(images.rglob("*.png")).unlink()
    for number in range(11):
        save(photograph(100 + number), tmp_path / "others" / f"{number}.jpg")
    for severity in range(1, 6):
        for label in range(4):
            save(photograph(7 * severity + label), tmp_path / "c" / "fog" / str(severity) / f"c{label}" / "x.png")
    crop, robust = ["--crop_size", 32], ["--crop_size", 32, "--load_from", linear, "--data_path", tmp_path / "data"]
    background = [*crop, "--load_from", nine, "--in9", "--data_path", challenge_folder(tmp_path / "bg", images=1)]
    copies = ["--data_path", copydays(tmp_path / "copies"), "--imsize", 32, "--whitening_path", tmp_path / "others"]
    commands = [
        ("eval_retrieval.eval_retrieval", ["--data_path", landmarks(tmp_path), "--imsize", 32, "--multiscale", "true"]),
        ("eval_copy_detection.eval_copy_detection", [*copies, "--distractors_path", tmp_path / "others"]),
        ("eval_clustering.eval_clustering", [*crop, "--data_path", tmp_path / "data", "--assign", "kmeans"]),
        (ROBUST, ["masked", *robust, "--masking_ratio", 0.3, 0.8]),
        (ROBUST, ["occlusion", *robust, "--shuffle_size", 4]),
        (ROBUST, ["shuffle", *robust, "--shuffle_h", 2, "--shuffle_w", 4]),
        (ROBUST, ["salience", *robust]),
        (ROBUST, ["backgrounds", *background]),
        (ROBUST, ["challenge", *background, "--batch_size", 4]),
        (ROBUST, ["imagenet_c", *robust[:4], "--data_path", tmp_path / "c"]),
    ]
    common = ["--pretrained_weights", network, "--device", "cpu", "--num_workers", 0, "--partial"]
    commands = [(module, [str(word) for word in (*words, *common)]) for module, words in commands]
    one, two = tmp_path / "one", tmp_path / "two"
    scripts = Scripts(monkeypatch, capsys, one)
    for module, words in commands:
        scripts.run(importlib.import_module(module).main, *words, "--output_dir", one)
    listed = [(module, [*words, "--output_dir", str(two)]) for module, words in commands]
    (tmp_path / "commands.json").write_text(json.dumps(listed))
    script = ["-m", "tests.many", str(tmp_path / "commands.json")]
    finish(start(2, script, **dict.fromkeys(SMALL)))
    names = sorted(path.name for path in one.iterdir())
    assert names == sorted(path.name for path in two.iterdir()) and len(names) == len(commands)
    for name in names:
        ours, theirs = (json.loads((folder / name).read_text()) for folder in (one, two))
        assert close(ours, theirs), name


def close(one, other) -> bool:
    """The same to the rounding of sums in another order."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(close(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(close, one, other))
    return one == pytest.approx(other, rel=1e-5) if isinstance(one, float) else one == other
