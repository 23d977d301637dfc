"""What benchmarks/gpu.sh does on a card, as far as it goes without one: it refuses, and every command in it parses."""

import importlib
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from eval_knn import eval_knn
from training.options import parse_options

ROOT = Path(__file__).resolve().parent.parent.parent
SCRIPT = ROOT / "benchmarks" / "gpu.sh"


def run(*words: str, python: str = sys.executable) -> subprocess.CompletedProcess:
    env = {"PATH": "/usr/bin:/bin", "PYTHON": python}
    return subprocess.run(["sh", str(SCRIPT), *words], capture_output=True, text=True, env=env, cwd="/")


def commands() -> list[list[str]]:
    return [shlex.split(line) for line in run("--list").stdout.splitlines()]


def parse_with(module: str, name: str):
    return lambda words: getattr(importlib.import_module(module), name)().parse_args(words)


PARSERS = {
    "benchmarks/bench_step.py": parse_with("bench_step", "get_bench_parser"),
    "benchmarks/bench_data.py": parse_with("bench_data", "make_parser"),
    "benchmarks/bench_knn.py": parse_with("bench_knn", "get_bench_parser"),
    "main_pretrain.py": parse_options,
    "eval_knn/eval_knn.py": lambda words: eval_knn.get_args_parser().parse_args(words),
}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, which this would keep busy for ten minutes")
def test_without_a_card_it_ends_in_one_line_and_leaves_nothing(tmp_path):
    done = run(str(tmp_path / "out"))
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(r"error: .* finds no torch or no GPU here; .*\n", done.stderr)
    assert not (tmp_path / "out").exists()


def test_what_the_commands_print_becomes_a_section_and_one_that_fails_does_not_end_it(tmp_path):
    """With an interpreter that pretends: there is a card, and the k-NN benchmark is broken."""
    python, out = tmp_path / "python", tmp_path / "out"
    python.write_text(
        '#!/bin/sh\ncase "$1" in -c) exit 0;; -) cat >/dev/null; echo "## On a card";; '
        "*knn.py) echo broken; exit 3;; *) echo it ran;; esac\n"
    )
    python.chmod(0o755)
    done = run(str(out), python=str(python))
    assert done.returncode == 1 and f"FAILED with exit code 3: {out}/all.log" in done.stdout
    section = (out / "gpu.md").read_text()
    assert section.startswith("## On a card\n\n### Tests\n\n`python -m pytest")
    assert section.count("### ") == section.count(" s\n") == len(commands())
    assert section.count("it ran") == len(commands()) - 2 and section.count("**Failed** with exit code 3.") == 2


def test_every_command_of_it_parses_and_names_what_is_there(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.chdir(ROOT)
    seen = set()
    for python, script, *words in commands():
        assert python == "python"
        if script == "-m":
            assert words[0] == "pytest" and (ROOT / words[-1]).is_dir()
            continue
        args = PARSERS[script](words)
        assert (ROOT / script).is_file()
        assert getattr(args, "device", "cuda") == "cuda"
        seen.add(script)
    assert seen == PARSERS.keys()


def test_it_measures_a_step_of_every_method(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    bench = importlib.import_module("bench_step")
    measured = {words[words.index("--method") + 1] for words in commands() if "benchmarks/bench_step.py" in words}
    assert measured == set(bench.SETTINGS)


def test_it_is_written_in_what_every_shell_reads():
    text = SCRIPT.read_text()
    assert subprocess.run(["sh", "-n", str(SCRIPT)], capture_output=True).returncode == 0
    compile(re.search(r"<<'END'.*?\n(.*?)\nEND\n", text, re.DOTALL)[1], "what it says of the card", "exec")
    assert not re.search(r"\[\[|\bfunction\b|\blocal\b|<\(|\bnvidia-smi -[^-]|persistence|reset", text)
