"""Runners: what an image goes through before it is evaluated."""

import re
from collections.abc import Iterator

from PIL import Image

from data.preprocess import eval_transform
from tests.parity import Case


def evaluation_preprocessing(case: Case) -> Iterator[tuple]:
    transform = eval_transform(case.params["crop"], case.params["resize"])
    for name in case.names("in/seed_"):
        kind = name.removeprefix("in/seed_")
        # the manifest says how the picture grows out of its seed: ...resize((width, height), BICUBIC)
        width, height = map(int, re.search(r"\((\d+),\s*(\d+)\)", case.entry["inputs"][name]["meaning"]).groups())
        image = Image.fromarray(case.arrays[name]).resize((width, height), Image.Resampling.BICUBIC)
        pixels = transform(image)
        expected = case.arrays[f"out/sub_{kind}"]
        said = re.search(r"every (\d+)", case.entry["outputs"].get(f"out/sub_{kind}", {}).get("meaning", ""))
        step = int(said[1]) if said else -(-pixels.shape[-1] // expected.shape[-1])
        yield f"out/sub_{kind}", pixels[:, ::step, ::step], expected
        yield f"out/mean_{kind}", pixels.double().mean(dim=(1, 2)), case.arrays[f"out/mean_{kind}"]


RUNNERS = {"eval_core/eval_transform": evaluation_preprocessing}
