"""A student beside its teachers, on the evaluations that both of them took: from the JSON that evaluations write."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from utils import UsageError, escape

HEADLINES = ("top1", "acc1", "miou", "mIoU", "map", "accuracy")  # which number of a result stands for it
USUAL_K = 20  # neighbours that k-NN is quoted with
WORDS = {"knn": "k-NN", "linear": "linear", "finetuning": "fine-tuning", "zero_shot": "zero-shot"}


class Test(NamedTuple):
    """An evaluation, as it was asked for, and the images it looked at."""

    label: str
    neighbours: int | None
    data: str


class Axis(NamedTuple):
    """What a student and some of its teachers reached in one test, in percent."""

    label: str
    student: float
    teachers: dict[str, float]

    def relative(self, teacher: str) -> float:
        """How much better than ``teacher`` the student is, in percent of what the teacher reached."""
        return 100 * (self.student / self.teachers[teacher] - 1)


def read_results(path: str | Path) -> dict[Test, float]:
    """Everything that one network reached, of a result's file or a folder of such. Raises UsageError."""
    path = Path(path)
    files = sorted(path.glob("*.json")) if path.is_dir() else [path]
    found: dict[Test, float] = {}
    for file in files:
        for test, value in _read_file(file, strict=not path.is_dir()):
            if found.setdefault(test, value) != value:
                raise UsageError(
                    f"{escape(file)}: {test.label} twice, {found[test]} and {value}; keep one network's lines"
                )
    if not found:
        raise UsageError(f"{escape(path)}: no result of an evaluation (eval_knn.json, ...); run one on this network")
    return found


def _read_file(file: Path, strict: bool) -> list[tuple[Test, float]]:
    try:
        lines = [json.loads(line) for line in file.read_text().splitlines() if line.strip()]
        numbers = [(line["evaluation"].removeprefix("eval_"), line["data"], line["numbers"]) for line in lines]
        return [pair for evaluation, data, of in numbers for pair in _tests_in(str(evaluation), str(data), of)]
    except OSError as error:
        raise UsageError(f"{escape(file)}: cannot be read ({error.strerror or error})") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if not strict:  # a folder of runs holds other files as well
            return []
        raise UsageError(f"{escape(file)}: not the result of an evaluation; pass an eval_*.json") from error


def _tests_in(evaluation: str, data: str, numbers: Mapping) -> list[tuple[Test, float]]:
    word = WORDS.get(evaluation, evaluation.replace("_", " "))
    found = [(Test(word, None, data), numbers[name]) for name in HEADLINES if name in numbers][:1]
    nested = [(int(k), row) for k, row in numbers.items() if k.isdecimal() and isinstance(row, dict) and "top1" in row]
    found += [(Test(f"{word}, k = {k}", k, data), row["top1"]) for k, row in nested]
    return [(test, float(value)) for test, value in found if float(value) == float(value)]


def compare(student: Mapping[Test, float], teachers: Mapping[str, Mapping[Test, float]], k: int | None) -> list[Axis]:
    """An axis for every test that the student and a teacher took on the same images; of k-NN one, ``k`` or the usual.

    Raises UsageError where there is none, or where a teacher reached nothing that could be compared with.
    """
    shared = [test for test in student if any(test in results for results in teachers.values())]
    if not shared:
        took = "; ".join(sorted({f"{test.label} on {test.data}" for results in teachers.values() for test in results}))
        raise UsageError(f"nothing to compare: of what the student took, no teacher did; theirs: {escape(took)[:300]}")
    counts = sorted({test.neighbours for test in shared if test.neighbours})
    if k is not None and counts and k not in counts:
        raise UsageError(f"--nb_knn {k}: student and teachers have {', '.join(map(str, counts))} in common")
    chosen = k if k is not None else USUAL_K if USUAL_K in counts else next(iter(counts), None)
    shared = [test for test in shared if test.neighbours in (None, chosen)]
    labels = [test.label for test in shared]
    axes = []
    for test in shared:
        label = test.label if labels.count(test.label) == 1 else f"{test.label}, {_short(test.data)}"
        reached = {name: results[test] for name, results in teachers.items() if test in results}
        if worthless := next((name for name, value in reached.items() if value <= 0), None):
            raise UsageError(f"{worthless}: {test.label} is {reached[worthless]:g}; no share can be taken of that")
        axes.append(Axis(label, student[test], reached))
    return axes


def _short(data: str) -> str:
    return Path(data.split(" (")[0]).name


def table(axes: Sequence[Axis], teachers: Sequence[str]) -> str:
    """A line per test: the student, and every teacher with how much better the student is."""
    width = max(len(axis.label) for axis in axes)
    lines = []
    for axis in axes:
        cells = [
            f"{name} {axis.teachers[name]:.2f} ({axis.relative(name):+.1f} %)"
            for name in teachers
            if name in axis.teachers
        ]
        lines.append(f"{axis.label:<{width}}  student {axis.student:.2f}  {'  '.join(cells)}")
    return "\n".join(lines)
