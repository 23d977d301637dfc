"""Runners: what an image goes through before it is evaluated."""

import re
from collections.abc import Iterator

import numpy as np
import torch
from PIL import Image

from data.preprocess import eval_transform
from tests.parity import Case


def every_nth(pixels: torch.Tensor, stored: np.ndarray, said: str) -> torch.Tensor:
    """What of ``pixels`` (..., height, width) a case has stored: every n-th row and column.

    n is the number in the words ("every 14th pixel") that leaves as many as are stored, or else the first that does;
    "from pixel 3" says where to begin.
    """
    sizes, wanted = pixels.shape[-2:], stored.shape[-2:]
    begins = re.search(r"\bfrom (?:the |pixel |row )*(\d+)", said)
    start = int(begins[1]) if begins else 0
    fitting = [
        n for n in range(1, 1 + max(sizes)) if tuple(len(range(start, size, n)) for size in sizes) == tuple(wanted)
    ]
    named = [n for n in map(int, re.findall(r"(\d+)(?:st|nd|rd|th)\b", said)) if n in fitting]
    if not fitting:
        raise ValueError(f"no every n-th of {tuple(sizes)} pixels are {tuple(wanted)}")
    n = (named or fitting)[0]
    return pixels[..., start::n, start::n]


def evaluation_preprocessing(case: Case) -> Iterator[tuple]:
    transform = eval_transform(case.params["crop"], case.params["resize"])
    for name in case.names("in/seed_"):
        kind = name.removeprefix("in/seed_")
        # the manifest says how the picture grows out of its seed: ...resize((width, height), BICUBIC)
        width, height = map(int, re.search(r"\((\d+),\s*(\d+)\)", case.meaning(name)).groups())
        image = Image.fromarray(case.arrays[name]).resize((width, height), Image.Resampling.BICUBIC)
        pixels = transform(image)
        label = f"out/sub_{kind}"
        yield label, every_nth(pixels, case.arrays[label], case.meaning(label)), case.arrays[label]
        yield f"out/mean_{kind}", pixels.double().mean(dim=(1, 2)), case.arrays[f"out/mean_{kind}"]


RUNNERS = {"eval_core/eval_transform": evaluation_preprocessing}
