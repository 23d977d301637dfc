"""Golden cases with other numbers: a copy of a case in memory, and one in which every expected number is wrong."""

from copy import deepcopy
from pathlib import Path

import numpy as np
import torch

from tests.parity import Case, find_runner, judge, load_cases
from tests.parity.case import checks

GOLDEN = Path(__file__).parent / "golden"


def golden(method: str, name: str) -> Case:
    """A case whose manifest entry and arrays may be changed."""
    (case,) = (case for case in load_cases(GOLDEN / method) if case.name == name)
    return copied(case)


def copied(case: Case) -> Case:
    twin = Case(case.folder, case.method, deepcopy(case.entry))
    twin.__dict__["arrays"] = dict(case.arrays)
    return twin


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def randomise(module: torch.nn.Module, seed: int = 1) -> torch.nn.Module:
    """Weights in double precision that let every part of the network be seen."""
    module = module.double()
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.data = noise * 0.3 + (parameter.ndim == 1)
    return module


def stored(prefix: str, state: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    return {f"{prefix}/{name}": tensor.detach().numpy() for name, tensor in state.items()}


def as_arrays(values: dict) -> dict[str, np.ndarray]:
    return {n: v.detach().numpy() if isinstance(v, torch.Tensor) else np.asarray(v) for n, v in values.items()}


def rewrite(case: Case, inputs: dict, outputs: dict, values: dict | None = None, words: dict | None = None) -> Case:
    """The case with these arrays and no others, these values in its manifest, and these words about an output."""
    case.__dict__["arrays"] = as_arrays(inputs | outputs)
    described = {name: {"meaning": (words or {}).get(name, "")} for name in (outputs | (values or {}))}
    for name, value in (values or {}).items():
        described[name]["value"] = value
    case.entry["outputs"] = described
    return case


def agrees(case: Case) -> None:
    """The runner follows a case, and notices when an expected number of any output is another."""
    result = judge(case, find_runner(case))
    assert result.status == "ok", result.problems
    assert unnoticed(case) == []


def unnoticed(case: Case) -> list[str]:
    """Outputs of which the runner does not say that they are wrong when all are; [] is what one wants."""
    wrong = copied(case)
    for name in case.outputs():
        if name in wrong.arrays:
            wrong.arrays[name] = altered(wrong.arrays[name])
            continue
        outputs = wrong.entry.get("outputs", {})
        if isinstance(outputs, dict) and isinstance(outputs.get(name), dict) and "value" in outputs[name]:
            outputs[name]["value"] = altered(outputs[name]["value"])
        elif isinstance(outputs, dict) and not isinstance(outputs.get(name, ""), str):
            outputs[name] = altered(outputs[name])
        else:  # in words here, and in numbers among the parameters, or in the entries of a JSON file
            wrong.__dict__["arrays"] = deepcopy(wrong.arrays)
            entries = [entry for value in wrong.arrays.values() if isinstance(value, list) for entry in value]
            for run in [*wrong.params.get("runs", ()), *entries]:
                if name in run:
                    run[name] = altered(run[name])
    problems = judge(wrong, find_runner(wrong)).problems
    return [name for name in case.outputs() if not any(checks(problem, name) for problem in problems)]


def altered(value):
    """Another value: of an array the first and the last number, of nested values the last that is not whole (or, where
    all are, the last).
    """
    if isinstance(value, np.ndarray):
        value = value.copy()
        for place in {0, value.size - 1} if value.size else ():
            number = value.flat[place].item()
            # a grey level may be the next one where the manifest says so
            value.flat[place] = number ^ 128 if value.dtype == np.uint8 else altered(number)
        return value
    if isinstance(value, dict | list):
        value = deepcopy(value)
        places = leaves(value)
        floats = [(container, key) for container, key in places if isinstance(container[key], float)]
        container, key = (floats or places)[-1]
        container[key] = altered(container[key])
        return value
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value - 1 if value > 0 else value + 1
    if isinstance(value, float):
        return value + max(0.05, abs(value) / 3)
    return f"{value}x"


def leaves(value) -> list[tuple]:
    """(container, key) of everything in nested values that is neither a container nor None."""
    found = []
    for key, part in value.items() if isinstance(value, dict) else enumerate(value):
        if isinstance(part, dict | list):
            found += leaves(part)
        elif part is not None:
            found.append((value, key))
    return found
