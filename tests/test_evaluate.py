"""Chosen evaluations in one report: every script is run as a user does, and not again when its result is there."""

import csv
import json
import os
import shutil
from pathlib import Path

import pytest
import torch

import evaluate
from tests.clips import davis
from tests.launch import ROOT, SMALL, finish, make_images, start
from tests.scripts import Scripts, micro

TINY = "--crop_size 32 --num_workers 0"


@pytest.fixture
def scripts(monkeypatch, capsys, tmp_path):
    return Scripts(monkeypatch, capsys, tmp_path / "out")


def run_of(folder: Path, seed: int) -> Path:
    """A run's folder: a checkpoint that says where it comes from, and its log."""
    folder.mkdir()
    path = micro(folder / "checkpoint.pth", seed)
    arguments = {"method": "dino", "config": "configs/dino/boosted.yaml"}
    torch.save(torch.load(path) | {"epoch": 40, "args": arguments}, path)
    (folder / "log.txt").write_text("".join(json.dumps({"epoch": e, "train_loss": 9 - e}) + "\n" for e in range(3)))
    return path


def words(tmp_path: Path, *protocols: str, **extra: str) -> list:
    """Of the runs that are in ``tmp_path``, on tiny data."""
    if not (tmp_path / "data").exists():
        make_images(tmp_path / "data" / "train", 12, 3)
        make_images(tmp_path / "data" / "val", 6, 3)
        davis(tmp_path / "DAVIS", videos=1, frames=3)
    runs = [f"{path.parent.name}={path}" for path in sorted(tmp_path.glob("*/checkpoint.pth"))]
    options = {"knn": f"{TINY} --nb_knn 3", "linear": f"{TINY} --epochs 1 --batch_size_per_gpu 4"}
    options |= {"video": f"--data_path {tmp_path / 'DAVIS'} --short_side 96 --partial --size_mask_neighborhood 2"}
    options |= {"attention": f"--image_path {tmp_path / 'data' / 'val' / 'class0'} --image_size 32 32"}
    options |= {"tsne": f"{TINY} --num_per_class 4 --iters 300 --perplexity 3"} | extra
    found = ["--checkpoints", *runs, "--protocols", *protocols, "--data_path", tmp_path / "data"]
    for name in protocols:
        found += ["--with", name, options[name]] if name in options else []
    return [*found, "--output_dir", tmp_path / "out", "--device", "cpu"]


def rows_of(tmp_path: Path) -> list[dict]:
    with open(tmp_path / "out" / "table.csv") as file:
        return list(csv.DictReader(file))


def test_two_checkpoints_and_every_protocol_in_one_report(scripts, tmp_path):
    for seed, name in enumerate(("ours", "theirs")):
        run_of(tmp_path / name, seed)
    protocols = ("knn", "linear", "video", "attention", "tsne")
    scripts.run(evaluate.main, *words(tmp_path, *protocols))
    rows = rows_of(tmp_path)
    said = [(row["checkpoint"], row["protocol"]) for row in rows]
    assert said == [(name, of) for of in ("knn, k = 3", "linear", "video, J&F-Mean") for name in ("ours", "theirs")]
    assert {(row["method"], row["preset"], row["epoch"], row["error"]) for row in rows} == {
        ("dino", "boosted", "40", "")
    }
    assert [row["published"] for row in rows] == ["73.3", "73.3", "76.0", "76.0", "", ""]
    assert [row["tokens"] for row in rows][::2] == [
        "class token of the last block", "class token of the last 4 blocks", "patch tokens of the last block"
    ]  # fmt: skip
    assert len({row["weights"] for row in rows}) == 2 and len({row["data"] for row in rows}) == 2
    found = json.loads(next((tmp_path / "out" / "results").glob("knn-*/eval_knn.json")).read_text())["numbers"]
    assert float(rows[0]["score"]) in (found["3"]["top1"], *[float(row["score"]) for row in rows[1:2]])
    html = (tmp_path / "out" / "report.html").read_text()
    for text in (
        ">Results<",
        ">Relative<",
        ">Training<",
        ">Attention<",
        ">Features in the plane (t-SNE)<",
        "train_loss",
    ):
        assert text in html
    assert html.count("<img") == 2 * 2 + 2

    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "results").rglob("*") if path.is_file()}
    said = scripts.run(evaluate.main, *words(tmp_path, *protocols))
    assert said.count("done before") == 10 and rows_of(tmp_path) == rows
    assert (tmp_path / "out" / "report.html").read_text() == html
    assert before == {path: path.stat().st_mtime_ns for path in before}


def test_only_what_is_missing_or_became_another_is_computed_again(scripts, tmp_path):
    run_of(tmp_path / "ours", 1)
    scripts.run(evaluate.main, *words(tmp_path, "knn", "video"))
    (video,) = (tmp_path / "out" / "results").glob("video-*")
    (video / "rows.json").unlink()  # as if stopped before its end
    said = scripts.run(evaluate.main, *words(tmp_path, "knn", "video"))
    assert "knn of ours: done before" in said and "== video of ours\n" in said and "from an earlier start" in said
    assert "done before" not in scripts.run(evaluate.main, *words(tmp_path, "knn", knn=f"{TINY} --nb_knn 1"))
    os.utime(tmp_path / "data" / "val" / "class0", (1, 1))  # an image came or went
    assert "done before" not in scripts.run(evaluate.main, *words(tmp_path, "knn"))
    shutil.rmtree(tmp_path / "ours")
    run_of(tmp_path / "ours", 2)
    assert "done before" not in scripts.run(evaluate.main, *words(tmp_path, "knn"))
    (tmp_path / "ours").rename(tmp_path / "renamed")  # the same weights below another name
    assert "knn of renamed: done before" in scripts.run(evaluate.main, *words(tmp_path, "knn"))
    assert [row["checkpoint"] for row in rows_of(tmp_path)] == ["renamed"]


def test_what_fails_is_said_and_the_rest_goes_on(scripts, tmp_path):
    run_of(tmp_path / "ours", 1)
    whole = words(tmp_path, "video", "knn")
    (tmp_path / "DAVIS" / "Annotations" / "480p" / "clip-0" / "00000.png").unlink()
    scripts.run(evaluate.main, *whole, code=1)
    assert "1 of 2 results are missing: video of ours" in scripts.error
    failed, found = rows_of(tmp_path)
    assert "the mask of a video's first frame" in failed["error"] and not failed["score"] and float(found["score"]) >= 0
    assert "first frame" in (tmp_path / "out" / "report.html").read_text()
    shutil.rmtree(tmp_path / "DAVIS")
    davis(tmp_path / "DAVIS", videos=1, frames=3)
    assert "knn of ours: done before" in scripts.run(evaluate.main, *whole)
    assert not [row for row in rows_of(tmp_path) if row["error"]]


def test_two_processes_write_what_one_does(scripts, tmp_path):
    """Every mask of every video, too: they are shared out."""
    run_of(tmp_path / "ours", 1)
    whole = words(tmp_path, "knn", "video", "attention")
    shutil.rmtree(tmp_path / "DAVIS")
    davis(tmp_path / "DAVIS", frames=4)
    written = lambda: {  # noqa: E731
        str(path.relative_to(tmp_path)): path.read_bytes()
        for path in (tmp_path / "out").rglob("*")
        if path.is_file() and "features" not in path.parts
    }
    scripts.run(evaluate.main, *whole)
    one = written()
    assert len([name for name in one if "/clip-" in name]) == 3 * (4 + 1)
    shutil.rmtree(tmp_path / "out")
    finish(start(2, [str(ROOT / "evaluate.py"), *map(str, whole)], **dict.fromkeys(SMALL)))
    assert written() == one


def test_bad_input_ends_in_one_line_before_anything_is_computed(scripts, tmp_path):
    path = run_of(tmp_path / "ours", 1)
    refused = lambda *more: scripts.refused(evaluate.main, *more, "--output_dir", tmp_path / "out")  # noqa: E731
    assert "--protocols kn: there are clustering, " in refused("--checkpoints", path, "--protocols", "kn")
    one = ("--checkpoints", path)
    assert "did you mean --nb_knn?" in refused(*one, "--with", "knn", "--nb_kn 3")
    assert "--with knn 'x: No closing quotation" in refused(*one, "--with", "knn", "'x")
    assert "--with video: not among --protocols knn" in refused(*one, "--with", "video", "")
    assert "--data_path" in refused(*one, "--data_path", tmp_path / "gone")
    assert "a name twice, or none" in refused("--checkpoints", f"a={path}", f"a={path}")
    twice = shutil.copy(path, tmp_path / "a=b.pth")  # a file of such a name is no file b.pth that is to be called a
    assert "a name twice" in refused("--checkpoints", twice, twice)
    assert "gone.pth" in refused("--checkpoints", tmp_path / "gone.pth")
    assert "required" in refused(*one, "--protocols", "video")
    assert not (tmp_path / "out").exists()
