"""The plain formulation of label propagation and ours give the same labels."""

import runpy
import sys
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "bench_video.py"


def test_both_sides_carry_the_same_labels(monkeypatch, capsys):
    words = ["--frames", "5", "--rows", "9", "--columns", "30", "--dim", "16"]
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *words])
    runpy.run_path(str(SCRIPT))["main"]()  # fails where they differ
    assert "5 frames of 9 x 30 tokens" in capsys.readouterr().out
