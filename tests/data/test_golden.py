"""The golden augmentation cases through tests/parity/augmentation.py."""

import json
from fnmatch import fnmatch
from pathlib import Path

import numpy as np
import pytest

from tests.parity.augmentation import RUNNERS

FOLDER = Path(__file__).parent.parent / "golden" / "dino"
CASES = {case["name"]: case for case in json.loads((FOLDER / "manifest.json").read_text())["cases"]}


class Case:
    def __init__(self, entry: dict):
        self.entry, self.name, self.params, self.folder = entry, entry["name"], entry["params"], FOLDER
        self.arrays = np.load(FOLDER / entry["file"]) if entry["file"] else {}

    def value(self, name: str):
        return {**self.entry["inputs"], **self.entry["outputs"]}[name]["value"]

    def names(self, prefix: str) -> list[str]:
        return [name for name in self.arrays if name.startswith(prefix)]


@pytest.mark.parametrize("name", [name for name in CASES if any(fnmatch(name, pattern) for pattern in RUNNERS)])
def test_augmentation_equals_the_original(name):
    case = Case(CASES[name])
    compared = 0
    for label, actual, expected, *tolerance in RUNNERS[name](case):
        rtol, atol = tolerance[0] if tolerance else (case.entry["tolerance"]["rtol"], case.entry["tolerance"]["atol"])
        assert np.shape(actual) == np.shape(expected), label
        actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
        assert (np.abs(actual - expected) <= atol + rtol * np.abs(expected)).all(), label
        compared += 1
    assert compared
