"""The golden cases, and that the check itself can fail."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import check_parity
from tests.parity import compare, find_runner, load_cases, run_case
from utils import UsageError

GOLDEN = Path(__file__).parent / "golden"
CASES = load_cases(GOLDEN)
COVERED = [case for case in CASES if find_runner(case)]
# of which every case must be covered
FINISHED = {"attmask", "dino", "esvit", "eval_core", "ibot", "mugs", "udi", "unic"}


@pytest.mark.parametrize("case", COVERED, ids=lambda case: f"{case.method}/{case.name}")
def test_golden(case):
    result = run_case(case)
    assert result.status == "ok", "\n".join(result.problems)


def test_every_case_of_a_finished_method_is_covered():
    assert not [case.name for case in CASES if case.method in FINISHED and case not in COVERED]


def copy_folder(source: Path, target: Path, keep: set[str]) -> dict:
    shutil.copytree(source, target)
    manifest = json.loads((target / "manifest.json").read_text())
    manifest["cases"] = [entry for entry in manifest["cases"] if entry["name"] in keep]
    return manifest


def test_a_folder_of_its_own_with_fewer_steps_and_crops_is_read_unchanged(tmp_path, capsys, monkeypatch):
    """Nothing about a case may be assumed: drop a step of the loss, a crop, an optional array, and rename the file."""
    manifest = copy_folder(GOLDEN / "dino", tmp_path / "other", {"loss_multicrop", "vit_forward", "augmentation_ops"})
    cases = {entry["name"]: entry for entry in manifest["cases"]}
    loss, vit = cases["loss_multicrop"], cases["vit_forward"]
    loss["params"]["epoch_of_step"] = loss["params"]["epoch_of_step"][:2]
    loss["outputs"] = {k: v for k, v in loss["outputs"].items() if not k.endswith(("2", "3", "4", "5"))}
    with np.load(tmp_path / "other" / loss["file"]) as file:
        np.savez(tmp_path / "other" / "renamed.npz", **dict(file))
    loss["file"] = "renamed.npz"
    with np.load(tmp_path / "other" / vit["file"]) as file:
        fewer = {k: v for k, v in file.items() if k not in ("in/x_swap", "out/cls_swap", "out/pos_swap")}
    np.savez(tmp_path / "other" / vit["file"], **fewer)
    vit["outputs"] = {k: v for k, v in vit["outputs"].items() if k in fewer}
    (tmp_path / "other" / "manifest.json").write_text(json.dumps(manifest))

    monkeypatch.setattr("sys.argv", ["check_parity.py", "--golden", str(tmp_path / "other")])
    assert check_parity.main() == 0
    assert capsys.readouterr().out.splitlines()[-1] == "3 cases, 3 passed, 0 failed, 0 not covered"


def test_a_wrong_number_fails(tmp_path, capsys, monkeypatch):
    manifest = copy_folder(GOLDEN / "dino", tmp_path / "dino", {"lars"})
    (tmp_path / "dino" / "manifest.json").write_text(json.dumps(manifest))
    with np.load(tmp_path / "dino" / "lars.npz") as file:
        arrays = dict(file)
    arrays["out/p2_0"] = arrays["out/p2_0"] + 1e-8
    np.savez(tmp_path / "dino" / "lars.npz", **arrays)
    monkeypatch.setattr("sys.argv", ["check_parity.py", "--golden", str(tmp_path), "--json"])
    assert check_parity.main() == 1
    report = json.loads(capsys.readouterr().out)
    assert (report["passed"], report["failed"]) == (0, 1)
    assert report["cases"][0]["worst"] == "out/p2_0"


def test_an_output_that_nothing_checks_fails(tmp_path):
    manifest = copy_folder(GOLDEN / "dino", tmp_path / "dino", {"lars"})
    manifest["cases"][0]["outputs"]["out/secret"] = {"shape": [1], "dtype": "float64", "meaning": ""}
    (tmp_path / "dino" / "manifest.json").write_text(json.dumps(manifest))
    (case,) = load_cases(tmp_path)
    assert run_case(case).problems == ["not checked: out/secret"]


def test_what_no_runner_knows_is_not_covered_and_fails_the_certificate(tmp_path, capsys, monkeypatch):
    manifest = copy_folder(GOLDEN / "dino", tmp_path / "dino", {"lars"})
    manifest["cases"][0]["name"] = "a_new_kind"
    (tmp_path / "dino" / "manifest.json").write_text(json.dumps(manifest))
    monkeypatch.setattr("sys.argv", ["check_parity.py", "--golden", str(tmp_path)])
    assert check_parity.main() == 1
    assert capsys.readouterr().out.splitlines()[-1] == "1 cases, 0 passed, 0 failed, 1 not covered"


def test_a_failing_optional_case_is_shown_and_does_not_count(tmp_path, capsys, monkeypatch):
    manifest = copy_folder(GOLDEN / "dino", tmp_path / "dino", {"lars"})
    manifest["cases"][0] |= {"level": "optional"}
    manifest["cases"][0]["outputs"]["out/secret"] = {"shape": [1], "dtype": "float64", "meaning": ""}
    (tmp_path / "dino" / "manifest.json").write_text(json.dumps(manifest))
    monkeypatch.setattr("sys.argv", ["check_parity.py", "--golden", str(tmp_path)])
    assert check_parity.main() == 0
    out = capsys.readouterr().out
    assert "FAIL" in out and out.splitlines()[-1] == "1 cases, 0 passed, 0 failed, 0 not covered"


@pytest.mark.parametrize(
    ("actual", "expected", "fine"),
    [
        ([1.0, 2.0], [1.0, 2.0 + 1e-7], True),
        ([1.0, 2.0], [1.0, 2.1], False),
        ([1.0], [1.0, 1.0], False),
        ([float("nan")], [1.0], False),
        ([float("nan")], [float("nan")], True),
        ([float("inf")], [1.0], False),
        ([True, False], [True, True], False),
        ("a", "b", False),
        ({"a": [1]}, {"a": [1]}, True),
        (3, 3, True),
        (np.float64(1.0), 1.1, False),
    ],
)
def test_compare_sees_what_differs(actual, expected, fine):
    _, problem = compare(actual, expected, rtol=0.0, atol=1e-6)
    assert (problem == "") == fine


def test_a_folder_without_cases_is_refused(tmp_path):
    with pytest.raises(UsageError, match=r"no manifest\.json"):
        load_cases(tmp_path)
    with pytest.raises(UsageError, match="--method mugs"):
        load_cases(GOLDEN / "dino", ["mugs"])
