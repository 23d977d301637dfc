"""Run evaluations as a user does, inside this process; tiny networks and images for them."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from models import build_backbone
from utils import run_cli


class Scripts:
    """Results go to ``out``; ``said`` and ``error`` are what the last run printed."""

    def __init__(self, monkeypatch, capsys, out: Path):
        self.monkeypatch, self.capsys, self.out = monkeypatch, capsys, out
        self.said = self.error = ""

    def run(self, main: Callable, *arguments: object, code: int = 0) -> str:
        """Run ``main`` with a command line; what it printed. Fails where it ends with another exit code."""
        self.monkeypatch.setattr(sys, "argv", [main.__module__, *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            run_cli(main)
        self.said, self.error = self.capsys.readouterr()
        assert exit_.value.code == code, self.said + self.error
        return self.said

    def refused(self, main: Callable, *arguments: object) -> str:
        """The one line in which ``main`` ends."""
        self.run(main, *arguments, code=2)
        assert self.error.count("\n") == 1, self.error
        return self.error

    def result(self, name: str) -> dict:
        return json.loads((self.out / f"{name}.json").read_text().splitlines()[-1])["numbers"]


def micro(path: Path, seed: int = 3, arch: str = "vit_micro", **arguments) -> Path:
    """A checkpoint of a small network with random weights."""
    torch.manual_seed(seed)
    arguments = arguments or {"patch_size": 8, "img_size": 32}
    model = build_backbone(arch, **arguments)
    torch.save({"teacher": {f"backbone.{n}": t for n, t in model.state_dict().items()}}, path)
    return path


def photograph(number: int, size: tuple[int, int] = (48, 40)) -> Image.Image:
    """A picture with some structure, (width, height); the same number always gives the same one."""
    coarse = np.random.default_rng(number).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)


def save(image: Image.Image, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, quality=95)
    return path
