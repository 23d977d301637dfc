"""Few labels as a script: the images of a list, all penalties at once, refusals in one line."""

import json
import sys
from pathlib import Path

import pytest
import torch

from eval_semi_supervised.eval_semi_supervised import main
from evaluation.few_labels import listed, regress
from tests.launch import ROOT, SMALL, finish, make_images, start
from tests.sources import Stripes
from utils import UsageError, run_cli


@pytest.fixture
def evaluate(monkeypatch, tmp_path, capsys):
    """Run the script in this process: (exit code, standard output, standard error)."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["eval_semi_supervised.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            run_cli(main)
        return exit_.value.code, *capsys.readouterr()

    return run


def words(tmp_path: Path, folder: str) -> tuple:
    options = ("--arch", "vit_micro", "--patch_size", 8, "--crop_size", 16, "--device", "cpu", "--num_workers", 0)
    return (*options, "--data_path", tmp_path / "data", "--output_dir", tmp_path / folder)


def test_a_list_decides_which_images_are_learnt_from_on_one_process_and_on_two(evaluate, tmp_path):
    train = make_images(tmp_path / "data" / "train", 16, 4)
    make_images(tmp_path / "data" / "val", 8, 4)
    names = sorted(path.name for path in train.glob("*/*.jpg"))[:9]
    (tmp_path / "list.txt").write_text("\n".join(names))  # no end of the last line
    options = ("--target_list_path", tmp_path / "list.txt", "--lr_lambd", 0.1, 1)
    code, said, error = evaluate(*words(tmp_path, "one"), *options)
    assert code == 0 and "of which 9 are listed" in said, error
    one = json.loads((tmp_path / "one" / "eval_semi_supervised.json").read_text())
    runs = one["numbers"]["runs"]
    assert list(runs) == ["0.1", "1"] and one["numbers"]["top1"] == max(run["top1"] for run in runs.values())
    assert f"lambda 1: Top1: {runs['1']['top1']:.2f} (95 %: " in said
    script = [str(ROOT / "eval_semi_supervised" / "eval_semi_supervised.py"), *map(str, words(tmp_path, "two"))]
    finish(start(2, [*script, *map(str, options)], **dict.fromkeys(SMALL)))
    two = json.loads((tmp_path / "two" / "eval_semi_supervised.json").read_text())
    assert two["numbers"]["runs"]["1"]["objective"] == pytest.approx(runs["1"]["objective"], rel=1e-6)
    assert two["numbers"]["runs"]["1"]["top1"] == runs["1"]["top1"]
    kept = tmp_path / "one" / "eval_semi_supervised_right.npz"
    code, said, error = evaluate(*words(tmp_path, "three"), *options, "--patch_size", 4, "--compare", kept)
    assert code == 0 and "1, compared with" in said and " images only here, " in said, error
    (tmp_path / "few.txt").write_text("\n".join(names[:2]))
    for arguments, said in (
        (("--target_list_path", tmp_path / "few.txt"), "has no training image"),
        (("--target_list_path", tmp_path / "none.txt"), "No such file"),
        (("--lr_lambd", 0), "must be positive"),
        (("--lr_lambd", 1, 1), "every value once"),
    ):
        code, _, error = evaluate(*words(tmp_path, "no"), *arguments)
        assert code == 2 and said in error and error.rstrip().count("\n") == 0, error


def test_a_list_with_names_that_are_not_there_is_refused(tmp_path):
    path = tmp_path / "list.txt"
    path.write_text("3.png\nnowhere.png\n")
    with pytest.raises(UsageError, match=r"1 of its 2 names are not in stripes .* such as nowhere\.png"):
        listed(Stripes(), str(path))
    path.write_text("\n")
    with pytest.raises(UsageError, match="this list is empty"):
        listed(Stripes(), str(path))
    path.write_text("3.png\r\n17.png")
    found = listed(Stripes(), str(path))
    assert found.labels.tolist() == [3, 1] and found.image_name(1) == "stripes/17.png" and len(found.class_names) == 4


def test_a_penalty_is_divided_by_the_number_of_images_unless_it_is_raw():
    torch.manual_seed(0)
    features, labels = torch.randn(20, 3, dtype=torch.float64), torch.arange(20) % 2
    adjusted = regress(features, labels, features, labels, 2, [2.0], True)[0]["2"]
    assert adjusted["objective"] == pytest.approx(
        regress(features, labels, features, labels, 2, [0.1], False)[0]["0.1"]["objective"]
    )
