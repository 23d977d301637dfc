"""One golden case: what its manifest says, in any of the dialects that the manifests are written in.

What a case expects stands in a manifest in one of three ways: ``outputs`` by name (with shape, value or words),
``outputs`` as a list of ``{"key": ...}``, or none at all, where ``arrays`` and ``key_meaning`` describe inputs and
outputs alike and an output has ``out/`` in its name. A pattern (``mask_<i>``, ``final/*``) is all arrays it fits.
"""

import fnmatch
import json
import re
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.parity.tolerance import Tolerance, named_tolerance

INPUTS = {"in", "sd"}  # parts of a name that mark an input


class Case:
    """One golden case of a manifest."""

    def __init__(self, folder: Path, method: str, entry: dict):
        self.folder = folder
        self.method = method
        self.entry = entry
        self.name: str = entry["name"]
        self.params: dict = entry.get("params", entry.get("parameters", {}))
        files = entry.get("file") or []
        self.files: list[str] = re.split(r"\s*[+,]\s*", files) if isinstance(files, str) else files
        self.extra_files: list[str] = list(
            entry.get("extra_files", [name for name in self.files if name.endswith(".pth")])
        )
        self.optional = entry.get("level") == "optional"

    @property
    def tolerance(self) -> Tolerance:
        """What holds for an output that has none of its own."""
        return self.tolerance_of("")

    def tolerance_of(self, output: str) -> Tolerance:
        """How far an output may be from what is expected, as the manifest says it of this output."""
        return named_tolerance(self.entry.get("tolerance", "exact"), output, str(self.dtype).removeprefix("torch."))

    @property
    def dtype(self) -> torch.dtype:
        """The precision the case was computed in."""
        keys = ("compute_precision", "computed_in", "compute_dtype")
        named = re.search(r"float(32|64)", next((self.entry[key] for key in keys if key in self.entry), ""))
        return torch.float32 if named and named[1] == "32" else torch.float64

    @cached_property
    def arrays(self) -> dict[str, Any]:
        """Everything in the case's files: arrays by name, and what stands at the top of a JSON file."""
        arrays: dict[str, Any] = {}
        for name in self.files:
            if name.endswith(".npz"):
                with np.load(self.folder / name, allow_pickle=False) as file:
                    arrays |= dict(file)
            elif name.endswith(".json"):
                content = json.loads((self.folder / name).read_text())
                arrays |= content if isinstance(content, dict) else {name.removesuffix(".json"): content}
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

    def meaning(self, name: str) -> str:
        """What the manifest says in words about an input or an output."""
        for side in ("inputs", "outputs"):
            described = self.entry.get(side, {})
            if isinstance(described, list):
                described = {entry["key"]: entry for entry in described}
            said = described.get(name)
            if said:
                return said if isinstance(said, str) else said.get("meaning", "")
        return ""

    def outputs(self) -> list[str]:
        """What a runner has to check. A name that ends in ``*`` is met by any label that starts so."""
        outputs = self.entry.get("outputs")
        if outputs is None:
            return self._outputs_among_arrays()
        keys = outputs if isinstance(outputs, dict) else [output["key"] for output in outputs]
        in_words = isinstance(outputs, dict) and all(isinstance(value, str) for value in outputs.values())
        names: list[str] = []
        for key in (key for key in keys if not key.endswith("_note")):
            if re.match(r"see file|\(json\)", key):
                names += self.arrays
            elif not re.search(r"[*<]", key):
                names += [key] if key in self.arrays else self._fitting(key) or [key]
            else:  # arrays of an optional pattern may be absent; one in words may stand for values of the manifest
                names += self._fitting(key) or ([stem(key)] if in_words or not self.arrays else [])
        return list(dict.fromkeys(names))

    def _outputs_among_arrays(self) -> list[str]:
        described = [key.removeprefix("json ") for key in self.entry.get("key_meaning", {})]
        described = [pattern(key) for key in described if not INPUTS & set(key.split("/"))]
        names = [name for name in self.arrays if "out" in name.split("/") or fits(name, described)]
        return names or [name for file in self.files if file.endswith(".json") for name in self.arrays]

    def _fitting(self, key: str) -> list[str]:
        """The arrays that a key of the manifest stands for: ``a_<i>``, ``a/*, b/*``, ``a_*/b_*`` or ``step<s>_a/b``."""
        first, *others = key.split("/")
        before = ["", first.rpartition("_")[0] + "_"]
        alternatives = [first, *(start + other for other in others for start in before)]
        for keys in ([key], key.split(", "), alternatives):
            patterns = [pattern(part) for part in keys]
            found = [name for name in self.arrays if fits(name, [p for p in patterns if re.search(r"\w", p)])]
            if found:
                return found
        return []


def pattern(key: str) -> str:
    return re.sub(r"<[^>]*>|\{[^}]*\}", "*", key)


def fits(name: str, patterns: list[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def stem(pattern: str) -> str:
    return re.split("[*<]", pattern)[0] + "*"


def checks(label: str, output: str) -> bool:
    """Whether a label is about an output: its name, and then nothing or words.

    ``out/loss1 of rank 0`` is about ``out/loss1``, ``out/loss10`` is not.
    """
    if output.endswith("*"):
        return label.startswith(output[:-1])
    return label.startswith(output) and not re.match(r"[\w./-]|:\S", label[len(output) :])
