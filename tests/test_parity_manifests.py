"""Manifests in every dialect: what a case expects, how far off it may be, and that comparing nothing is a failure."""

from pathlib import Path

import pytest

from tests.parity import judge, load_cases
from tests.parity.case import Case, checks
from tests.parity.compare import compare
from tests.parity.tolerance import Tolerance, named_tolerance

CASES = load_cases(Path(__file__).parent / "golden")


def test_all_golden_folders_are_here():
    assert len(CASES) == 215


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.method}/{case.name}")
def test_a_runner_that_yields_nothing_fails(case):
    result = judge(case, lambda case: iter(()))
    assert result.status == "FAIL" and "nothing was compared" in result.problems
    assert bool(case.outputs()) == any(problem.startswith("not checked: ") for problem in result.problems)


def test_what_is_expected_is_known_of_all_but_those_whose_numbers_stand_among_their_parameters():
    without = {f"{case.method}/{case.name}" for case in CASES if not case.outputs()}
    assert without == {"attmask/init", "attmask/ft_lr", "unic/knn"}


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.method}/{case.name}")
def test_every_output_has_a_tolerance_and_none_but_pictures_and_accuracies_a_wide_one(case):
    wide = {"statistics", "uint8/float32", "uint8 (Pillow 13.0.0)", "float32 features"}
    for output in ("", *case.outputs()):
        tolerance = case.tolerance_of(output)
        assert all(part >= 0 for part in tolerance) and tolerance.share <= 0.01
        precision = case.entry.get("computed_in", case.entry.get("compute_dtype"))
        assert max(tolerance) <= 0.03 or precision in wide, (output, tolerance)


@pytest.mark.parametrize(
    ("given", "output", "expected"),
    [
        ({"rtol": 1e-7, "atol": 1e-9}, "out/loss", (1e-7, 1e-9)),
        ({"atol": 1e-9}, "mean_log_odds", (0, 1e-9)),
        ({"exact": True}, "box", (0, 0)),
        ({"float64": {"rtol": 1e-9, "atol": 1e-10}, "float32": {"rtol": 2e-4, "atol": 2e-5}}, "", (1e-9, 1e-10)),
        ({"float64 implementation": "atol 1e-9, rtol 1e-8", "float32 implementation": "atol 2e-4"}, "", (1e-8, 1e-9)),
        ({"float32": {"atol": 0.005}}, "out.seed11", (0, 0.005)),
        ({"any": {"rtol": 1e-12, "atol": 1e-15}}, "out.lr", (1e-12, 1e-15)),
        ({"any": {"top1": "exact (percent with 1e-6)"}}, "out.results T=0.07 top1", (0, 1e-6)),
        ({"native": {"rtol": 1e-7}, "bigger": {"rtol": 2e-5}}, "out/dino/bigger/cls", (2e-5, 0)),
        ({"native": {"rtol": 1e-7}, "bigger": {"rtol": 2e-5}}, "out/48/cls", (1e-7, 0)),
        ({"atol": 1e-8, "rtol": 1e-7, "lr": 1e-12}, "out/lr_per_epoch", (0, 1e-12)),
        ({"atol": 1e-8, "rtol": 1e-7, "lr": 1e-12}, "out/w", (1e-7, 1e-8)),
        ({"float64": {"losses": {"rtol": 1e-7}, "final_tensors": "rtol 1e-5, atol 2e-6"}}, "out.loss_total", (1e-7, 0)),
        ({"float64": {"seg": {"rtol": 1e-9}, "labels": "exact"}}, "out.frame1.labels", (0, 0)),
        ({"logits": {"atol": 5e-5}, "pred": ">= 99.9 % equal"}, "v0/out/pred", (0, 0, 0.001)),
        ({"labels": "at most 1% of pixels may differ"}, "labels", (0, 0, 0.01)),
        ({"exact ops (Invert, Solarize*)": "exact", "others": "abs 1 grey level"}, "out.op2 Invert", (0, 0)),
        ({"exact ops (Invert, Solarize*)": "exact", "others": "abs 1 grey level"}, "others", (0, 1)),
        ("losses rtol 1e-8; final tensors rtol 1e-6 atol 1e-9 (float64)", "loss", (1e-8, 0)),
        ("losses rtol 1e-8; final tensors rtol 1e-6 atol 1e-9 (float64)", "final tensor", (1e-6, 1e-9)),
        ("loss rtol 1e-8, tensors rtol 1e-6", "tensors", (1e-6, 0)),
        ("loss/weights rtol 1e-7; acc 1e-4 (float32 percentages)", "log 0 acc1", (0, 1e-4)),
        ("logits rtol 1e-6; accuracy exact", "accuracy_mapped", (0, 0)),
        ("sums and L2 norms atol 1e-7*max(1,L2); full tensors atol 1e-8", "norms", (0, 1e-8)),
        ("exact percentages (1e-9)", "runs", (0, 1e-9)),
        ("exact (only if the same draw order and torch generator are used; otherwise skip)", "mask", (0, 0)),
        ("compare means within 4 * sqrt(stderr_ref^2 + stderr_yours^2)", "json", (0, 0)),
        ("1e-9", "nmi", (0, 1e-9)),
        ("-", "", (0, 0)),
    ],
)
def test_tolerances_in_every_dialect(given, output, expected):
    assert named_tolerance(given, output, "float64") == Tolerance(*expected)


def test_the_other_precision_has_its_own_tolerance():
    given = {"float64": {"rtol": 1e-9}, "float32 implementation": "atol 2e-4, rtol 1e-3"}
    assert named_tolerance(given, "", "float32") == Tolerance(1e-3, 2e-4)


def test_several_files_and_json_are_arrays_of_one_case(tmp_path):
    (tmp_path / "a.json").write_text('{"final": {"w": [1.0]}, "lr": [1, 2]}')
    (tmp_path / "b.json").write_text("[1, 2]")
    entry = {"name": "x", "file": "a.json + b.json, c.pth", "key_meaning": {"json final": "", "sd/*": "", "<v>/lr": ""}}
    case = Case(tmp_path, "m", entry)
    assert case.files == ["a.json", "b.json", "c.pth"] and case.extra_files == ["c.pth"]
    assert case.arrays == {"final": {"w": [1.0]}, "lr": [1, 2], "b": [1, 2]}
    assert case.outputs() == ["final"]


def test_a_pattern_of_a_manifest_stands_for_all_arrays_it_fits(tmp_path):
    def outputs(names: tuple[str, ...], **entry) -> list[str]:
        case = Case(tmp_path, "m", {"name": "x", **entry})
        case.__dict__["arrays"] = dict.fromkeys(names)
        return case.outputs()

    steps = ("step0_mask", "step0_center", "step0_center2", "step1_center", "step1_center2", "step10_center")
    assert outputs(steps, outputs={"step<s>_center/center2": "buffers"}) == list(steps[1:])
    assert outputs(("a/x", "b/y", "c"), outputs={"a/*, b/*": "tensors"}) == ["a/x", "b/y"]
    assert outputs(("c",), outputs={"final/*": "when present"}) == ["final/*"]
    assert outputs(("c",), outputs={"final/*": {"keys": {}}}) == []
    assert outputs(("a", "b"), outputs={"a/b": "both"}) == ["a", "b"]
    assert outputs(("in/x", "v/out/y", "w/out/y", "v/in/u", "aug/z"), key_meaning={"aug/*": ""}) == [
        "v/out/y",
        "w/out/y",
        "aug/z",
    ]
    assert outputs(("p", "q"), outputs=[{"key": "see file"}]) == ["p", "q"]


@pytest.mark.parametrize(
    ("label", "output", "about"),
    [
        ("out/loss1", "out/loss1", True),
        ("out/loss1 of rank 0", "out/loss1", True),
        ("out/loss1, without a copy", "out/loss1", True),
        ("out/loss1: mean", "out/loss1", True),
        ("out/loss10", "out/loss1", False),
        ("out/cls_eval", "out/cls", False),
        ("grad::mlp", "grad", False),
        ("final/w", "final/*", True),
    ],
)
def test_a_label_is_about_the_output_whose_name_it_starts_with(label, output, about):
    assert checks(label, output) == about


def test_a_share_of_the_elements_may_differ_and_no_more():
    expected = list(range(1000))
    off = [*expected[:-1], -1]
    assert compare(off, expected, 0, 0, 0.001)[1] == "" and compare(off, expected, 0, 0)[1]
    assert compare([-1, *off[1:]], expected, 0, 0, 0.001)[1]


def test_comparisons_of_empty_arrays_are_none(tmp_path):
    case = Case(tmp_path, "m", {"name": "x", "outputs": {"a": {}}})
    assert judge(case, lambda case: iter([("a", [], [])])).problems == ["nothing was compared"]
    assert judge(case, lambda case: iter([("a", 1, 1)])).status == "ok"
