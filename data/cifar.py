"""CIFAR-10 and CIFAR-100 in their binary version: records of labels and 32 x 32 pixels, memory-mapped.

The version for Python is pickled, and pickles of strangers are not opened here.
"""

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np

from data.source import Source
from utils import UsageError, escape

SIDE = 32
FILES = {  # classes -> split -> files
    10: {"trainval": [f"data_batch_{number}.bin" for number in range(1, 6)], "test": ["test_batch.bin"]},
    100: {"trainval": ["train.bin"], "test": ["test.bin"]},
}
NAMES = {10: "batches.meta.txt", 100: "fine_label_names.txt"}


class CifarSource(Source):
    """The images of some files, each (3, 32, 32) uint8 behind its labels, of which the last counts."""

    def __init__(self, paths: list[Path], classes: int, class_names: list[str]):
        self.paths, self.classes, self.class_names = paths, classes, class_names
        self.records = [self._open(path) for path in paths]
        self.starts = np.cumsum([0, *map(len, self.records)])
        self.labels = np.concatenate([records[:, self._before - 1] for records in self.records]).astype(np.int64)
        if self.labels.max(initial=0) >= classes:
            raise UsageError(f"{escape(paths[0])}: a label of {self.labels.max()}, for {classes} classes; another set")
        self.name = f"{escape(paths[0].parent)} ({len(self)} images, {classes} classes)"

    @property
    def _before(self) -> int:
        """Bytes before the pixels: CIFAR-100 has a coarse label as well."""
        return 1 if self.classes == 10 else 2

    def _open(self, path: Path) -> np.ndarray:
        size = self._before + 3 * SIDE**2
        try:
            data = np.memmap(path, np.uint8, "r")
        except (OSError, ValueError) as error:
            raise UsageError(f"{escape(path)}: {getattr(error, 'strerror', None) or error}") from error
        if len(data) % size:
            raise UsageError(f"{escape(path)}: {len(data)} bytes are no whole records of {size}; take it anew")
        return data.reshape(-1, size)

    def __reduce__(self):
        return CifarSource, (self.paths, self.classes, self.class_names)

    @property
    def fingerprint(self) -> str:
        digest = hashlib.blake2b(digest_size=16)
        for records in self.records:
            digest.update(records.tobytes())
        return digest.hexdigest()

    def image_name(self, index: int) -> str:
        file = int(np.searchsorted(self.starts, index, side="right")) - 1
        return f"{escape(self.paths[file])} image {index - self.starts[file]}"

    def array(self, index: int) -> np.ndarray:
        file = int(np.searchsorted(self.starts, index, side="right")) - 1
        pixels = self.records[file][index - self.starts[file], self._before :]
        return np.ascontiguousarray(pixels.reshape(3, SIDE, SIDE).transpose(1, 2, 0))


def cifar(classes: int) -> Callable[[Path, str, int], CifarSource]:
    def read(root: Path, split: str, seed: int = 0) -> CifarSource:
        try:
            names = [line.strip() for line in (root / NAMES[classes]).read_text().splitlines() if line.strip()]
        except OSError:
            names = []
        names = names if len(names) == classes else [f"class {number}" for number in range(classes)]
        return CifarSource([root / name for name in FILES[classes][split]], classes, names)

    return read
