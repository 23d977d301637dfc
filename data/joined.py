"""Several sources, one after the other, as one: read in a single pass."""

import hashlib
from collections.abc import Sequence

import numpy as np
from PIL import Image

from data.decode import Reading
from data.source import Source
from utils import UsageError


class Joined(Source):
    """The images of ``parts`` in their order, all with the same classes. Raises UsageError where these differ."""

    def __init__(self, parts: Sequence[Source], name: str):
        self.parts, self.class_names = list(parts), parts[0].class_names
        for part in parts:
            if list(part.class_names) != list(self.class_names):
                raise UsageError(f"{part.name}: other classes than those of {parts[0].name}")
        self.labels = np.concatenate([part.labels for part in parts])
        self.ends = np.cumsum([len(part) for part in parts])
        self.name = f"{name} ({len(self.labels)} images in {len(parts)} folders)"

    @property
    def fingerprint(self) -> str:
        together = "".join(part.fingerprint for part in self.parts)
        return hashlib.blake2b(together.encode(), digest_size=16).hexdigest()

    def read_as(self, reading: Reading) -> "Joined":
        return Joined([part.read_as(reading) for part in self.parts], self.name.rpartition(" (")[0])

    def part_of(self, index: int) -> int:
        return int(np.searchsorted(self.ends, index, side="right"))

    def _place(self, index: int) -> tuple[Source, int]:
        part = self.part_of(index)
        return self.parts[part], index - (int(self.ends[part - 1]) if part else 0)

    def image_name(self, index: int) -> str:
        part, inside = self._place(index)
        return part.image_name(inside)

    def array(self, index: int) -> np.ndarray:
        part, inside = self._place(index)
        return part.array(inside)

    def pil(self, index: int) -> Image.Image:
        part, inside = self._place(index)
        return part.pil(inside)
