"""Imports point one way (CONTRIBUTING.md, "One way"), wherever in a file they stand."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BENEATH = {"utils", "errors", "lock", "processes", "randomness"}
ROOMS = {  # what the files of a room may import of ours, beside their own room
    "data": BENEATH,
    "models": BENEATH,
    "simulation": BENEATH,
    "methods": {"models", "data"} | BENEATH,
    "evaluation": {"models", "data"} | BENEATH,
    "training": {"methods", "evaluation", "models", "data", "simulation"} | BENEATH,
    "eval_knn": {"evaluation", "models", "data"} | BENEATH,
    "eval_linear": {"evaluation", "models", "data"} | BENEATH,
    "eval_zero_shot": {"evaluation", "models", "data"} | BENEATH,
    "eval_segmentation": {"evaluation", "models", "data"} | BENEATH,
    "eval_detection": {"evaluation", "models", "data"} | BENEATH,
    "eval_finetuning": {"evaluation", "models", "data"} | BENEATH,
    "eval_semi_supervised": {"evaluation", "models", "data"} | BENEATH,
    "eval_transfer": {"evaluation", "models", "data"} | BENEATH,
    "eval_video": {"evaluation", "models", "data"} | BENEATH,
    "eval_retrieval": {"evaluation", "models", "data"} | BENEATH,
    "eval_copy_detection": {"evaluation", "models", "data"} | BENEATH,
    "eval_robustness": {"evaluation", "models", "data"} | BENEATH,
    "eval_clustering": {"evaluation", "models", "data"} | BENEATH,
}


def imported(path: Path) -> set[str]:
    """The first words of all modules that a file imports."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_what_lies_beneath_it(room):
    ours = {path.name for path in ROOT.iterdir() if (path / "__init__.py").exists()}
    ours |= {path.stem for path in ROOT.glob("*.py")}
    files = sorted((ROOT / room).rglob("*.py"))
    assert files
    wrong = {path.name: imported(path) & ours - ROOMS[room] - {room} for path in files}
    assert not {name: modules for name, modules in wrong.items() if modules}


def test_every_room_has_its_rule():
    rooms = {path.name for path in ROOT.iterdir() if (path / "__init__.py").exists()}
    assert rooms - {"tests"} == set(ROOMS)


def test_a_method_never_imports_another_method():
    from methods import METHODS

    files = {method.__module__.split(".")[1]: Path(ROOT / f"{method.__module__.replace('.', '/')}.py")
             for method in METHODS.values()}  # fmt: skip
    for name, path in files.items():
        modules = {node.module for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)}
        assert not {f"methods.{other}" for other in files if other != name} & modules
