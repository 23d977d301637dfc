"""The script that shows what a Mugs run's memory finds, in this process, with a checkpoint made here."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data.datasets import open_training
from data.preprocess import eval_transform
from evaluation.neighbours import CELL, MARGIN, RING, mean_tokens, nearest_rows, stored_rows
from models import build_backbone
from tests.sources import Stripes
from utils import UsageError, run_cli
from visualize_neighbours import main

IMAGES, SIZE = 6, 16


@pytest.fixture
def folder(tmp_path) -> Path:
    for number in range(IMAGES):
        place = tmp_path / "images" / f"class{number % 2}"
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(Stripes(classes=6).array(number)).save(place / f"{number}.png")
    return tmp_path / "images"


@pytest.fixture
def checkpoint(folder, tmp_path) -> dict:
    """A run's file: the rows of the memory are what its images ask with, but for a few that were never written."""
    torch.manual_seed(0)
    model = build_backbone("vit_micro", 8, img_size=32).eval()
    source, transform = open_training(str(folder)), eval_transform(32, 37)
    rows = torch.randn(SIZE, model.embed_dim)
    images = torch.full((SIZE,), -1)
    for row, index in enumerate([3, 0, 5, 1, 1]):
        rows[row + 2] = 3.0 * mean_tokens(model, transform(source.pil(index))[None])[0]
        images[row + 2] = index
    memory = {f"block.{name}": rows for name in ("queue_q", "queue_k", "queue_v")}
    ours = {"method": "mugs", "arch": "vit_micro", "image_size": 32, "data": source.fingerprint}
    ours["epoch_state"] = {"memories": {"teacher_mem": {"images": images}}}
    arguments = {"arch": "vit_micro", "data_path": str(folder), "subset": None, "split": "train", "patch_size": 8}
    state = {f"backbone.{name}": tensor for name, tensor in model.state_dict().items()}
    return {"teacher": state, "teacher_mem": memory, "tutelage": ours, "args": arguments, "epoch": 1}


@pytest.fixture
def show(monkeypatch, tmp_path, capsys, folder):
    """Run the script with a checkpoint: (exit code, standard output, standard error)."""

    def run(checkpoint: dict, *arguments: object) -> tuple[int, str, str]:
        torch.save(checkpoint, tmp_path / "checkpoint.pth")
        options = ["--device", "cpu", "--output_dir", tmp_path / "out", "--image_path", folder]
        options += ["--pretrained_weights", tmp_path / "checkpoint.pth", *arguments]
        monkeypatch.setattr(sys, "argv", ["visualize_neighbours.py", *map(str, options)])
        with pytest.raises(SystemExit) as exit_:
            run_cli(main)
        return exit_.value.code, *capsys.readouterr()

    return run


def test_an_image_of_the_run_finds_its_own_row_first(checkpoint, folder, tmp_path):
    torch.save(checkpoint, tmp_path / "checkpoint.pth")
    rows = stored_rows(tmp_path / "checkpoint.pth", "teacher")
    assert rows.images.tolist() == [3, 0, 5, 1, 1] and (len(rows.keys), rows.size) == (5, SIZE)
    cosines, images = nearest_rows(rows, rows.keys * 7, 3)
    assert images[:3, 0].tolist() == [3, 0, 5] and images[4, :2].tolist() == [1, 1]
    torch.testing.assert_close(cosines[:, 0], torch.ones(5))
    assert nearest_rows(rows, rows.keys, 100)[0].shape == (5, 5)


def test_the_sheet_has_a_row_for_every_image_with_the_nearest_first(checkpoint, show, tmp_path):
    code, said, error = show(checkpoint, "--topk", 2)
    assert code == 0 and "5 of 16 rows are written" in said, error
    with Image.open(tmp_path / "out" / "neighbours.png") as picture:
        sheet = np.asarray(picture)
    ringed = (sheet[:, MARGIN - 3] == RING).all(axis=1)
    starts = np.flatnonzero(ringed[1:] & ~ringed[:-1]) + 5  # a query begins four pixels inside its ring
    assert len(starts) == IMAGES
    left = MARGIN + CELL + 34
    order = sorted(range(IMAGES), key=lambda number: (number % 2, number))  # of the files: class0/0, class0/2, ...
    numbers = [order.index(number) for number in order]  # their numbers among the run's images
    for start, index in zip(starts, numbers, strict=True):
        query, found = (
            sheet[start : start + CELL, MARGIN : MARGIN + CELL],
            sheet[start : start + CELL, left : left + CELL],
        )
        assert np.array_equal(query, found) == (index in (0, 1, 3, 5))


def test_what_a_checkpoint_lacks_is_said_in_one_line(checkpoint, show, folder, tmp_path):
    ours = checkpoint["tutelage"]
    never = {"memories": {"teacher_mem": {"images": torch.full((SIZE,), -1)}}}
    cases = [
        ({"teacher_mem": None}, (), "holds no memory of the teacher"),
        ({}, ("--checkpoint_key", "student"), "holds no memory of the student"),
        ({"tutelage": None}, (), "does not say which images its rows are of"),
        ({"tutelage": ours | {"epoch_state": never}}, (), "no row of its memory has been written"),
        ({"tutelage": ours | {"data": "others"}}, (), "is not what the run was trained on"),
        ({}, ("--data_path", folder / "class0"), "is not what the run was trained on"),
        ({}, ("--topk", 0), "--topk 0: must be at least 1"),
        ({}, ("--image_path", folder / "none.png"), "no such file"),
        ({}, ("--pretrained_weights", ""), "--pretrained_weights: pass a checkpoint"),
    ]
    for change, arguments, said in cases:
        changed = {name: value for name, value in (checkpoint | change).items() if value is not None}
        code, _, error = show(changed, *arguments)
        assert code == 2 and said in error and error.count("\n") == 1, (said, error)
    assert not (tmp_path / "out").exists()


def test_an_image_that_cannot_be_read_is_named_at_the_end_and_the_others_are_shown(checkpoint, show, folder, tmp_path):
    given = tmp_path / "given"
    given.mkdir()
    (given / "bad.png").write_bytes(b"no image")
    Image.fromarray(Stripes().array(0)).save(given / "good.png")
    code, _, error = show(checkpoint, "--image_path", given)
    assert code == 1 and "bad.png" in error and (tmp_path / "out" / "neighbours.png").exists()


def test_a_memory_of_another_width_is_refused(checkpoint, tmp_path, show):
    checkpoint["teacher_mem"] = {"block.queue_q": torch.randn(SIZE, 7)}
    code, _, error = show(checkpoint)
    assert code == 2 and "rows of the memory have 7 numbers" in error
    with pytest.raises(UsageError, match="holds no memory"):
        torch.save({"a": torch.zeros(1)}, tmp_path / "other.pth")
        stored_rows(tmp_path / "other.pth", "teacher")
