"""Published data sets in forms of their own: which images, in which order, with which labels and pixels."""

import argparse
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import numpy as np

from data.datasets import Source, open_source
from data.published import add_dataset_arguments, place_from
from tests.parity.case import Case
from utils import Parser


def dataset_formats(case: Case) -> Iterator[tuple]:
    """Raw files as inputs, the file's name in what is said of each; outputs ``<form>_targets`` and ``<form>_sums``."""
    with tempfile.TemporaryDirectory() as folder, mock.patch.dict(os.environ, XDG_CACHE_HOME=f"{folder}/cache"):
        names = [_write(Path(folder), entry["meaning"], case.arrays[entry["key"]]) for entry in case.entry["inputs"]]
        for form in sorted({name.partition("_")[0] for name in case.outputs()}):
            source = _open(Path(folder), form, names)
            sums = [source.array(index).sum(dtype=np.int64) for index in range(len(source))]
            found = {"targets": source.labels, "sums": np.array(sums)}
            for name in case.outputs():
                start, _, what = name.partition("_")
                if start == form:
                    yield name, found[what], case.arrays[name]


def _write(folder: Path, meaning: str, data: np.ndarray) -> str:
    name = meaning.removeprefix("file ")
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(data.tobytes())
    return name


def _open(folder: Path, form: str, names: list[str]) -> Source:
    """The part that the files of this form are named after, as a command line would open it."""
    parser = Parser()
    parser.add_argument("--data_path")
    add_dataset_arguments(parser)
    mapped = any(name.startswith("labelmap_22k") for name in names)
    args: argparse.Namespace = parser.parse_args(
        ["--data_path", str(folder), f"--{form}_mode", "true", *["--dataset", "imagenet22k"] * mapped]
    )
    part = next(name for name in names if name.endswith(f".{form}")).split(".")[0].split("/")[0]
    return open_source(place_from(args).of(part))


RUNNERS = {"*/dataset_formats": dataset_formats}
