"""What a source of images is; data/datasets.py opens them, data/bundled.py is one."""

import hashlib

import numpy as np
from PIL import Image

from data.decode import Reading


class Source:
    """A list of images.

    ``name``: for people, e.g. "/imagenet/train (1281167 images, 1000 classes)". ``labels``: (images,) int64, -1 where
    unknown. ``class_names``: what the labels count. ``fingerprint`` changes when the list of images changes,
    or how they are read.
    """

    name: str
    labels: np.ndarray
    class_names: list[str]

    @property
    def fingerprint(self) -> str:
        return hashlib.blake2b(self.name.encode(errors="surrogateescape"), digest_size=16).hexdigest()

    def __len__(self) -> int:
        return len(self.labels)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name})"

    def read_as(self, reading: Reading) -> "Source":
        """The same images, files decoded as ``reading`` says; images that are in no files stay as they are."""
        return self

    def image_name(self, index: int) -> str:
        """Which image, for people; harmless to a terminal."""
        return f"image {index} of {self.name}"

    def array(self, index: int) -> np.ndarray:
        """(height, width, 3) uint8 RGB, by the fastest decoder. Raises BadImage."""
        raise NotImplementedError

    def pil(self, index: int) -> Image.Image:
        """The same image in Pillow's mode RGB, decoded by Pillow. Raises BadImage."""
        return Image.fromarray(self.array(index))


class PartOfSource(Source):
    """Some images of a ``source``, at these ``positions``; a subclass says which, and what they are called."""

    source: Source
    positions: np.ndarray

    def image_name(self, index: int) -> str:
        return self.source.image_name(self.positions[index])

    def array(self, index: int) -> np.ndarray:
        return self.source.array(self.positions[index])

    def pil(self, index: int) -> Image.Image:
        return self.source.pil(self.positions[index])
