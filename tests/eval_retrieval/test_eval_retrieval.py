"""Retrieval as a script, on a tiny copy of the published layout whose answers are known."""

import os
import pickle
from pathlib import Path

import numpy as np
import pytest

from eval_retrieval.eval_retrieval import main
from tests.scripts import Scripts, micro, photograph, save

IMAGES, QUERIES = 12, 3


@pytest.fixture
def scripts(monkeypatch, capsys, tmp_path):
    return Scripts(monkeypatch, capsys, tmp_path / "out")


def landmarks(root: Path, dataset: str = "roxford5k", as_arrays: bool = True, **changed) -> Path:
    """Query q is also image 2 q (easy); image 2 q + 1 is it in other light (hard); the rest is something else."""
    names = [f"place_{number:06}" for number in range(IMAGES)]
    queries = [f"query_{number:06}" for number in range(QUERIES)]
    for number, name in enumerate(names):
        image = photograph(number // 2 if number < 2 * QUERIES else number + 50)
        save(image.point(lambda v: v * 0.8) if number % 2 else image, root / dataset / "jpg" / f"{name}.jpg")
    for number, name in enumerate(queries):
        save(photograph(number), root / dataset / "jpg" / f"{name}.jpg")
    array = np.array if as_arrays else list
    gnd = [{"bbx": [0.0, 0.0, 9.0, 9.0], "easy": array([2 * q]), "hard": array([2 * q + 1]), "junk": array([])}
           for q in range(QUERIES)]  # fmt: skip
    content = {"imlist": names, "qimlist": queries, "gnd": gnd} | changed
    (root / dataset / f"gnd_{dataset}.pkl").write_bytes(pickle.dumps(content, protocol=2))
    return root


def options(tmp_path: Path, *more: object) -> list:
    path = micro(tmp_path / "micro.pth")
    common = ["--pretrained_weights", path, "--data_path", tmp_path, "--imsize", 32, "--device", "cpu"]
    return [*common, "--num_workers", 0, "--output_dir", tmp_path / "out", "--partial", *more]


def test_what_is_the_same_is_found_first_at_every_scale_and_in_both_data_sets(scripts, tmp_path):
    landmarks(tmp_path)
    said = scripts.run(main, *options(tmp_path))
    numbers = scripts.result("eval_retrieval")
    assert numbers["E"]["mAP"] == 100 and numbers["E"]["mP@1"] == 100
    assert f">> roxford5k: mAP M: {round(numbers['M']['mAP'], 2)}, H: {round(numbers['H']['mAP'], 2)}" in said
    assert ">> roxford5k: mP@k[1, 5, 10] M: [100.0, " in said
    assert "images: 12 there, 4993 published" in said + scripts.error
    landmarks(tmp_path, "rparis6k", as_arrays=False)
    more = ("--dataset", "rparis6k", "--multiscale", "true", "--n_last_blocks", 2, "--avgpool_patchtokens", 2)
    scripts.run(main, *options(tmp_path, *more))
    assert scripts.result("eval_retrieval")["E"]["mAP"] == 100


def test_bad_input_ends_in_one_line(scripts, tmp_path):
    assert "no roxford5k/gnd_roxford5k.pkl there" in scripts.refused(main, *options(tmp_path))
    landmarks(tmp_path)
    assert "12 there, 4993 published" in scripts.refused(main, *[o for o in options(tmp_path) if o != "--partial"])
    assert "--imsize 12" in scripts.refused(main, *options(tmp_path, "--imsize", 12, "--multiscale", "true"))
    flat = save(photograph(1, (400, 30)), tmp_path / "roxford5k" / "jpg" / "place_000003.jpg")
    assert (
        "32 x 2 pixels, 8 are needed" in scripts.refused(main, *options(tmp_path)) and "place_000003" in scripts.error
    )
    flat.unlink()
    assert "place_000003.jpg" in scripts.refused(main, *options(tmp_path)) and "1 of 12 images" in scripts.error
    (tmp_path / "roxford5k" / "jpg" / "place_000003.jpg").write_bytes(b"no image")
    assert "place_000003.jpg" in scripts.refused(main, *options(tmp_path))
    for changed, words in (
        ({"gnd": [{"easy": [99], "hard": [], "junk": []}] * QUERIES}, "a list names image 99 of 12"),
        ({"gnd": []}, "3 queries, and lists of 0"),
        ({"imlist": ["../../secret"] * IMAGES}, "an image is called '../../secret'"),
        ({"qimlist": 3}, "not the lists"),
    ):
        landmarks(tmp_path, **changed)
        assert words in scripts.refused(main, *options(tmp_path))


class Opens:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_list_that_would_run_something_is_refused_unopened(scripts, tmp_path):
    landmarks(tmp_path, simlist=Opens(tmp_path / "harm"))
    assert "mkdir" in scripts.refused(main, *options(tmp_path))
    assert not (tmp_path / "harm").exists()
