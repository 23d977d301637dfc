"""Golden cases: inputs and outputs computed with the authors' code, run through this repository's own code.

A folder holds one method: ``manifest.json`` describes its cases, ``<case>.npz`` the arrays. A *runner* computes a kind
of case and yields ``(label, actual, expected)`` or ``(label, actual, expected, (rtol, atol))``; everything it needs to
know about the case (sizes, steps, file names) it reads from the manifest and from the names of the arrays. Labels start
with the name of the output they check; an output that nothing checked is a failure, and so is a case in which nothing
was compared. ``case.py`` reads manifests, ``tolerance.py`` what they say about tolerances, ``compare.py`` compares.
"""

import fnmatch
import importlib
import json
import pkgutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tests.parity.case import Case, checks
from tests.parity.compare import compare, count
from utils import UsageError

__all__ = ["Case", "Result", "compare", "find_runner", "load_cases", "run_case"]


@dataclass
class Result:
    """How a case went: ``status`` is ok, FAIL or not covered; ``deviation`` the largest absolute difference seen."""

    case: Case
    status: str
    deviation: float = 0.0
    worst: str = ""
    problems: list[str] = field(default_factory=list)


def load_cases(folder: Path, methods: list[str] | None = None) -> list[Case]:
    """The cases below ``folder``: one folder for every method, or itself the folder of one.

    Raises UsageError when there is no manifest, or none of a method that was asked for.
    """
    manifests = [folder / "manifest.json"] if (folder / "manifest.json").is_file() else []
    manifests = manifests or sorted(folder.glob("*/manifest.json"))
    if not manifests:
        raise UsageError(f"--golden {folder}: no manifest.json there or one folder below")
    cases: dict[str, list[Case]] = {}
    for path in manifests:
        try:
            manifest = json.loads(path.read_text())
            title = manifest.get("method", manifest.get("title", path.parent.name))
            method = title.split()[0].lower()
            cases[method] = [Case(path.parent, method, entry) for entry in manifest["cases"]]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise UsageError(f"{path}: not a manifest of golden cases ({error!r})") from error
    missing = set(methods or ()) - set(cases)
    if missing:
        raise UsageError(f"--method {' '.join(sorted(missing))}: {folder} holds only {', '.join(cases)}")
    return [case for method, found in cases.items() if not methods or method in methods for case in found]


def find_runner(case: Case) -> Callable[[Case], Iterator[tuple]] | None:
    """The runner whose pattern ``method/case`` matches, from the modules of this package."""
    for info in pkgutil.iter_modules(__path__):
        module = importlib.import_module(f"{__name__}.{info.name}")
        for pattern, runner in getattr(module, "RUNNERS", {}).items():
            if fnmatch.fnmatch(f"{case.method}/{case.name}", pattern):
                return runner
    return None


def run_case(case: Case) -> Result:
    """Run a case and compare everything it yields; an exception is a failure that names itself."""
    runner = find_runner(case)
    return Result(case, "not covered") if runner is None else judge(case, runner)


def judge(case: Case, runner: Callable[[Case], Iterator[tuple]]) -> Result:
    """What a runner's comparisons come to: a case passes when all agree, and there is one of every output."""
    result, compared, unchecked = Result(case, "ok"), 0, set()
    try:
        unchecked = set(case.outputs())
        for label, actual, expected, *tolerance in runner(case):
            deviation, excess = compare(actual, expected, *(tolerance[0] if tolerance else case.tolerance_of(label)))
            if deviation >= result.deviation:
                result.deviation, result.worst = deviation, label
            if excess:
                result.problems.append(f"{label}: {excess}")
            compared += count(expected)
            unchecked -= {name for name in unchecked if checks(label, name)}
    except Exception as error:
        result.problems.append(f"{type(error).__name__}: {error}")
    if unchecked:
        result.problems.append(f"not checked: {', '.join(sorted(unchecked))}")
    if not compared:
        result.problems.append("nothing was compared")
    if result.problems:
        result.status = "FAIL"
    return result
