import json

import pytest

from evaluation.relative import compare, read_results, table
from utils import UsageError


def write(path, evaluation: str, numbers: dict, data: str = "here (3 images)") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as file:
        file.write(json.dumps({"evaluation": evaluation, "data": data, "numbers": numbers}) + "\n")


@pytest.fixture
def folder(tmp_path):
    """A student and two teachers, of which the second was tested by k-NN alone."""
    for name, top1 in (("student", 60.0), ("first", 50.0), ("second", 80.0)):
        numbers = {str(k): {"top1": top1 + k, "top5": 90.0} for k in (10, 20)} | {"bank": {"images": 9}}
        write(tmp_path / name / "eval_knn.json", "eval_knn", numbers)
    write(tmp_path / "student" / "eval_linear.json", "eval_linear", {"top1": 66.0})
    write(tmp_path / "first" / "eval_linear.json", "eval_linear", {"top1": 60.0})
    write(tmp_path / "student" / "more.json", "eval_linear", {"top1": 1.0}, data="elsewhere (2 images)")
    (tmp_path / "student" / "args.json").write_text('{"lr": 1}')
    return tmp_path


def read(folder) -> tuple[dict, dict]:
    return read_results(folder / "student"), {name: read_results(folder / name) for name in ("first", "second")}


def test_a_student_is_compared_where_a_teacher_saw_the_same_images(folder):
    axes = compare(*read(folder), k=None)
    assert [(axis.label, axis.student, axis.teachers) for axis in axes] == [
        ("k-NN, k = 20", 80.0, {"first": 70.0, "second": 100.0}),
        ("linear", 66.0, {"first": 60.0}),
    ]
    assert axes[0].relative("second") == pytest.approx(-20) and axes[1].relative("first") == pytest.approx(10)
    assert "student 80.00  first 70.00 (+14.3 %)  second 100.00 (-20.0 %)" in table(axes, ["first", "second"])
    assert compare(*read(folder), k=10)[0].label == "k-NN, k = 10"


def test_the_same_evaluation_on_two_sets_is_told_apart_by_their_names(folder):
    write(folder / "first" / "more.json", "eval_linear", {"top1": 2.0}, data="elsewhere (2 images)")
    assert [axis.label for axis in compare(*read(folder), k=None)[1:]] == ["linear, here", "linear, elsewhere"]


def test_what_cannot_be_compared_is_refused_in_one_line(folder):
    write(folder / "other" / "eval_knn.json", "eval_knn", {"10": {"top1": 3.0}}, data="elsewhere")
    write(folder / "zero" / "eval_linear.json", "eval_linear", {"top1": 0.0})
    write(folder / "twice" / "eval_linear.json", "eval_linear", {"top1": 1.0})
    write(folder / "twice" / "eval_linear.json", "eval_linear", {"top1": 2.0})
    (folder / "torn.json").write_text('{"evaluation": ')
    (folder / "list.json").write_text("[1]")
    student, _ = read(folder)
    for act, said in (
        (
            lambda: compare(student, {"o": read_results(folder / "other")}, None),
            "no teacher did; theirs: k-NN, k = 10 on",
        ),
        (lambda: compare(student, {"z": read_results(folder / "zero")}, None), "z: linear is 0; no share"),
        (lambda: compare(*read(folder), k=5), "--nb_knn 5: student and teachers have 10, 20 in common"),
        (lambda: read_results(folder / "twice"), "linear twice, 1.0 and 2.0; keep one network's lines"),
        (lambda: read_results(folder / "torn.json"), "torn.json: not the result of an evaluation"),
        (lambda: read_results(folder / "list.json"), "list.json: not the result of an evaluation"),
        (lambda: read_results(folder / "nowhere.json"), "nowhere.json: cannot be read"),
        (lambda: read_results(folder), "no result of an evaluation"),
    ):
        with pytest.raises(UsageError) as error:
            act()
        assert said in str(error.value) and "\n" not in str(error.value)
