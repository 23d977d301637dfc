"""The script: its picture, its table, and what it refuses."""

import json
import sys

import numpy as np
import pytest
from PIL import Image

import visualize_relative
from data.pictures import was_written_here
from utils import run_cli


@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
    for name, top1 in (("s", 60.0), ("a", 50.0), ("b", 80.0)):
        line = {"evaluation": "eval_linear", "data": "here", "numbers": {"top1": top1}}
        (tmp_path / f"{name}.json").write_text(json.dumps(line))

    def call(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["visualize_relative.py", *map(str, words)])
        with pytest.raises(SystemExit) as exit_:
            run_cli(visualize_relative.main)
        return exit_.value.code or 0, *capsys.readouterr()

    return call


def test_it_draws_the_bars_and_prints_their_numbers(run, tmp_path):
    options = ("--student", tmp_path / "s.json", "--teachers", f"DINO={tmp_path}/a.json, iBOT={tmp_path}/b.json")
    code, said, error = run(*options, "--output_dir", tmp_path / "out")
    assert code == 0, error
    assert "linear  student 60.00  DINO 50.00 (+20.0 %)  iBOT 80.00 (-25.0 %)" in said
    path = tmp_path / "out" / "relative.png"
    assert was_written_here(path) and np.asarray(Image.open(path)).std() > 5


def test_what_it_cannot_draw_is_refused_in_one_line_and_nothing_is_written(run, tmp_path):
    student = ("--student", tmp_path / "s.json", "--output_dir", tmp_path / "out", "--teachers")
    for teachers, said in (
        ("", "--teachers is empty"),
        ("a", "--teachers a: write NAME=RESULT"),
        (f"a={tmp_path}/a.json,a={tmp_path}/b.json", "--teachers a: named twice"),
        (f"a={tmp_path}/nowhere.json", "nowhere.json: cannot be read"),
    ):
        code, _, error = run(*student, teachers)
        assert code == 2 and said in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()
