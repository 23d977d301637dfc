"""Golden cases: inputs and outputs computed with the authors' code, run through this repository's own code.

A folder holds one method: ``manifest.json`` describes its cases, ``<case>.npz`` the arrays. A *runner* computes a kind
of case and yields ``(label, actual, expected)`` or ``(label, actual, expected, (rtol, atol))``; everything it needs to
know about the case (sizes, steps, file names) it reads from the manifest and from the names of the arrays. Labels start
with the name of the output they check; an output that nothing checked is a failure.
"""

import fnmatch
import importlib
import json
import pkgutil
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from utils import UsageError

NUMBER = r"\d+(?:\.\d+)?(?:e-?\d+)?"


class Case:
    """One golden case of a manifest."""

    def __init__(self, folder: Path, method: str, entry: dict):
        self.folder = folder
        self.method = method
        self.entry = entry
        self.name: str = entry["name"]
        self.params: dict = entry.get("params", entry.get("parameters", {}))
        files = entry.get("file") or []
        self.files: list[str] = [files] if isinstance(files, str) else files
        self.extra_files: list[str] = entry.get("extra_files", [name for name in self.files if name.endswith(".pth")])
        self.optional = entry.get("level") == "optional"

    @property
    def tolerance(self) -> tuple[float, float]:
        """(rtol, atol). In words, it is the first of each that is named; a number by itself is absolute.

        Where each precision has its own, it is that of the case's.
        """
        tolerance = self.entry.get("tolerance", "exact")
        if isinstance(tolerance, dict) and "rtol" in tolerance:
            return tolerance["rtol"], tolerance["atol"]
        if isinstance(tolerance, dict) and tolerance.get("exact"):
            return 0.0, 0.0
        if isinstance(tolerance, dict):
            tolerance = tolerance[f"{str(self.dtype).removeprefix('torch.')} implementation"]
        named = {name: float(value) for name, value in reversed(re.findall(rf"(rtol|atol) ({NUMBER})", tolerance))}
        bare = re.match(rf"\D*?({NUMBER})", tolerance) if not named else None
        return named.get("rtol", 0.0), named.get("atol", float(bare[1]) if bare else 0.0)

    @property
    def dtype(self) -> torch.dtype:
        """The precision the case was computed in."""
        precision = self.entry.get("compute_precision", self.entry.get("computed_in", "float64"))
        return torch.float32 if precision.startswith("float32") else torch.float64

    @cached_property
    def arrays(self) -> dict[str, np.ndarray]:
        arrays = {}
        for name in self.files:
            if name.endswith(".npz"):
                with np.load(self.folder / name, allow_pickle=False) as file:
                    arrays |= dict(file)
        return arrays

    def names(self, prefix: str) -> list[str]:
        """Names of the arrays that start with ``prefix``, in the order of the file."""
        return [name for name in self.arrays if name.startswith(prefix)]

    def tensor(self, name: str) -> torch.Tensor:
        """An array as a tensor; floating point ones in the case's precision."""
        tensor = torch.from_numpy(np.array(self.arrays[name]))
        return tensor.to(self.dtype) if tensor.is_floating_point() else tensor

    def state(self, prefix: str) -> dict[str, torch.Tensor]:
        """The state dict stored under ``prefix/``."""
        return {name.removeprefix(f"{prefix}/"): self.tensor(name) for name in self.names(f"{prefix}/")}

    def value(self, name: str):
        """A value that stands in the manifest itself, among the inputs or the outputs."""
        for side in ("inputs", "outputs"):
            if name in self.entry[side]:
                return self.entry[side][name]["value"]
        raise KeyError(f"{self.name}: no value {name} in the manifest")

    def outputs(self) -> list[str]:
        """What a runner has to check."""
        outputs = self.entry.get("outputs", {})
        names = outputs if isinstance(outputs, dict) else [output["key"] for output in outputs]
        stems = {name: re.split("[*<]", name)[0] for name in names}  # "mask_<i>" stands for all that start with "mask_"
        in_words = isinstance(outputs, dict) and all(isinstance(value, str) for value in outputs.values())
        absent = {n for n, stem in stems.items() if n != stem and not in_words and self.arrays and not self.names(stem)}
        return [stem for name, stem in stems.items() if name not in absent]


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
        runners = importlib.import_module(f"{__name__}.{info.name}").RUNNERS
        for pattern, runner in runners.items():
            if fnmatch.fnmatch(f"{case.method}/{case.name}", pattern):
                return runner
    return None


def run_case(case: Case) -> Result:
    """Run a case and compare everything it yields; an exception is a failure that names itself."""
    runner = find_runner(case)
    if runner is None:
        return Result(case, "not covered")
    result = Result(case, "ok")
    unchecked = set(case.outputs())
    try:
        for label, actual, expected, *tolerance in runner(case):
            rtol, atol = tolerance[0] if tolerance else case.tolerance
            deviation, excess = compare(actual, expected, rtol, atol)
            if deviation >= result.deviation:
                result.deviation, result.worst = deviation, label
            if excess:
                result.problems.append(f"{label}: {excess}")
            unchecked -= {name for name in unchecked if label.startswith(name)}
    except Exception as error:
        result.problems.append(f"{type(error).__name__}: {error}")
    if unchecked:
        result.problems.append(f"not checked: {', '.join(sorted(unchecked))}")
    if result.problems:
        result.status = "FAIL"
    return result


def compare(actual, expected, rtol: float, atol: float) -> tuple[float, str]:
    """Largest absolute difference, and what is wrong ('' when every element is within atol + rtol * |expected|)."""
    if isinstance(expected, (str, bool, type(None))) or (
        isinstance(expected, (list, tuple, dict)) and not _is_numeric(expected)
    ):
        same = actual == expected
        return (0.0, "") if same else (float("inf"), f"{str(actual)[:200]} instead of {str(expected)[:200]}")
    actual, expected = _as_array(actual), _as_array(expected)
    if actual.shape != expected.shape:
        return float("inf"), f"shape {actual.shape} instead of {expected.shape}"
    if not expected.size:
        return 0.0, ""
    if expected.dtype == bool or actual.dtype == bool:
        wrong = int((actual != expected).sum())
        return float(wrong > 0), f"{wrong} of {expected.size} differ" if wrong else ""
    actual, expected = (np.atleast_1d(x).astype(np.float64) for x in (actual, expected))
    difference = np.abs(actual - expected)
    difference[np.isnan(actual) & np.isnan(expected)] = 0.0
    excess = ~(difference <= atol + rtol * np.abs(np.nan_to_num(expected)))
    deviation = float(np.nanmax(difference)) if not np.isnan(difference).all() else float("inf")
    if not excess.any():
        return deviation, ""
    where = np.unravel_index(np.argmax(np.where(excess, np.nan_to_num(difference, nan=np.inf), -1)), difference.shape)
    return deviation, f"{actual[where]!r} instead of {expected[where]!r} at {tuple(map(int, where))}"


def _is_numeric(value) -> bool:
    try:
        return np.asarray(value).dtype.kind in "fiub"
    except ValueError:
        return False


def _as_array(value) -> np.ndarray:
    return value.detach().cpu().numpy() if isinstance(value, torch.Tensor) else np.asarray(value)
