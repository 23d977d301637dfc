"""Revisited Oxford and Paris: ``<data_path>/<dataset>/gnd_<dataset>.pkl`` and the images in ``jpg/`` beside it."""

import pickle
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data.decode import PLAIN, Reading
from data.named import NamedFiles
from utils import UsageError, escape

COUNTS = {"roxford5k": (4993, 70), "rparis6k": (6322, 70)}  # images and queries
LISTS = ("easy", "hard", "junk")
_LARGEST = 2**28  # bytes
_HARMLESS = {("numpy", "ndarray"), ("numpy", "dtype"), ("_codecs", "encode"), ("__builtin__", "bytes")} | {
    (f"numpy.{core}.multiarray", name) for core in ("core", "_core") for name in ("_reconstruct", "scalar")
}


class Revisited(NamedTuple):
    """Images and queries, and of every query the indices of images that are easy, hard or junk."""

    images: NamedFiles
    queries: NamedFiles
    lists: list[dict[str, np.ndarray]]


class _Plain(pickle.Unpickler):
    """Reads lists, words, numbers and arrays of numbers; whatever else a file names is refused unopened."""

    def find_class(self, module: str, name: str) -> object:
        if (module, name) in _HARMLESS:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")

    def persistent_load(self, pid: object) -> object:
        raise pickle.UnpicklingError("it refers to another file")


def open_revisited(data_path: str, dataset: str, reading: Reading = PLAIN) -> Revisited:
    """Raises UsageError, in one line, for what is missing or is not as published."""
    root = Path(data_path) / dataset
    path = root / f"gnd_{dataset}.pkl"
    if not path.is_file():
        raise UsageError(
            f"--data_path {escape(data_path)}: no {dataset}/{path.name} there; it and the images (in {dataset}/jpg/) "
            "are published with the revisited Oxford and Paris benchmark"
        )
    try:
        if path.stat().st_size > _LARGEST:
            raise ValueError("it is too large")
        with open(path, "rb") as file:
            content = _Plain(file, encoding="latin1").load()
        names = {name: [str(text) for text in content[name]] for name in ("imlist", "qimlist")}
        lists = [{name: _indices(query[name], len(names["imlist"])) for name in LISTS} for query in content["gnd"]]
        if len(lists) != len(names["qimlist"]):
            raise ValueError(f"{len(names['qimlist'])} queries, and lists of {len(lists)}")
        strange = [name for part in names.values() for name in part if "/" in name or "\0" in name or not name]
        if strange:
            raise ValueError(f"an image is called {strange[0]!r}")
    except Exception as error:  # a damaged file fails in any way
        why = f"no {error}" if isinstance(error, KeyError) else escape(str(error).splitlines()[0] if str(error) else "")
        raise UsageError(f"{escape(path)}: not the lists of {dataset} ({why})") from error
    images, queries = (
        NamedFiles(root, [f"jpg/{name}.jpg" for name in names[part]], what, reading)
        for part, what in (("imlist", "images"), ("qimlist", "queries"))
    )
    return Revisited(images, queries, lists)


def _indices(values: object, images: int) -> np.ndarray:
    found = np.asarray(values if len(values) else [], dtype=np.int64).ravel()
    if len(found) and not (found.min() >= 0 and found.max() < images):
        raise ValueError(f"a list names image {found.max()} of {images}")
    return found
