"""Images by the names of their files, in the order given: data sets that tell by lists what belongs together."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from data.decode import PLAIN, BadImage, Reading, decode_array, decode_pil
from data.encoded import read_regular
from data.source import Source
from utils import UsageError, escape


class NamedFiles(Source):
    """``files``, relative to ``root``; without classes. Raises UsageError for the first that is not there."""

    def __init__(self, root: Path, files: Sequence[str], what: str, reading: Reading = PLAIN):
        self.root, self.files, self.what, self.reading = Path(root), list(files), what, reading
        self.labels, self.class_names = np.full(len(self.files), -1), []
        self.name = f"{escape(root)} ({len(self.files)} {what})"
        missing = [file for file in self.files if not (self.root / file).is_file()]
        if missing:
            raise UsageError(
                f"{escape(root)}: {len(missing)} of {len(self.files)} {what} are not there, such as "
                f"{escape(missing[0])}"
            )

    @property
    def fingerprint(self) -> str:
        names = "\n".join([str(self.root), *self.files]).encode(errors="surrogateescape")
        return hashlib.blake2b(names, digest_size=16).hexdigest() + self.reading.mark

    def read_as(self, reading: Reading) -> "NamedFiles":
        return NamedFiles(self.root, self.files, self.what, reading)

    def image_name(self, index: int) -> str:
        return escape(self.root / self.files[index])

    def _bytes(self, index: int) -> bytes:
        try:
            return read_regular(self.root / self.files[index], self.reading.max_bytes)
        except (OSError, ValueError, MemoryError) as error:
            raise BadImage(self.image_name(index), getattr(error, "strerror", None) or str(error)) from error

    def array(self, index: int) -> np.ndarray:
        return decode_array(self._bytes(index), self.image_name(index), self.reading)

    def pil(self, index: int) -> Image.Image:
        return decode_pil(self._bytes(index), self.image_name(index), self.reading)
