"""Images with a class for every pixel, in the layout of ADE20K's scene parsing benchmark (ADEChallengeData2016).

images/training/*.jpg        annotations/training/*.png       0: no class, k: class k - 1
images/validation/*.jpg      annotations/validation/*.png
"""

import copy
import hashlib
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from data.decode import PLAIN, BadImage, Reading, decode_array, decode_pil
from data.encoded import read_regular
from data.segmentation import IGNORED, classes_of
from data.source import Source
from data.suffixes import is_image
from utils import UsageError, escape

CLASSES = 150
OFFICIAL = {"training": 20_210, "validation": 2_000}  # images
NAME = "ADEChallengeData2016"
WHERE = f"it is {NAME}.zip of http://sceneparsing.csail.mit.edu, unpacked"


class LabelledPixels(Source):
    """The images of one split; ``array`` returns an image together with the class of its pixels.

    Raises UsageError when the layout is another one, and unless ``incomplete`` when images are missing.
    """

    def __init__(self, root: str | Path, split: str, classes: int = CLASSES, incomplete: bool = False):
        root = Path(root)
        self.root = root / NAME if (root / NAME).is_dir() else root
        self.split, self.classes, self.reading = split, classes, PLAIN
        folder = self.root / "images" / split
        if not folder.is_dir():
            raise UsageError(f"--data_path {escape(root)}: there is no images/{split}; {WHERE}")
        names = sorted(file.name for file in folder.iterdir() if is_image(file.name))
        if not names:
            raise UsageError(f"--data_path {escape(root)}: no image in images/{split}; {WHERE}")
        self.names = np.array([name.encode(errors="surrogateescape") for name in names])
        absent = [name for name in names if not self._map(name).is_file()]
        if absent:
            example = escape(self._map(absent[0]).relative_to(self.root))
            raise UsageError(f"--data_path {escape(root)}: {len(absent)} images have no map of classes, as {example}")
        self.name = f"{escape(folder)} ({len(names)} images)"
        self.labels, self.class_names = np.full(len(names), -1), [str(number) for number in range(classes)]
        if not incomplete and classes == CLASSES and len(names) != OFFICIAL[split]:
            raise UsageError(f"{self.name}: ADE20K has {OFFICIAL[split]}; pass --incomplete to go on with these")

    @property
    def fingerprint(self) -> str:
        digest = hashlib.blake2b(digest_size=16)
        for name in map(self._name, range(len(self))):
            sizes = [path.stat().st_size for path in (self._image(name), self._map(name))]
            digest.update(f"{name} {sizes}\n".encode(errors="surrogateescape"))
        return f"{digest.hexdigest()}-{self.classes}{self.reading.mark}"

    def read_as(self, reading: Reading) -> "LabelledPixels":
        source = copy.copy(self)
        source.reading = reading
        return source

    def image_name(self, index: int) -> str:
        return escape(self._image(self._name(index)))

    def array(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """(height, width, 3) uint8, and (height, width) uint8 classes, IGNORED where there is none."""
        path = self._image(self._name(index))
        image = decode_array(self._read(path), escape(path), self.reading)
        return image, self.class_map(index, image.shape[:2])

    def pil(self, index: int) -> Image.Image:
        path = self._image(self._name(index))
        return decode_pil(self._read(path), escape(path), self.reading)

    def class_map(self, index: int, size: Sequence[int] | None = None) -> np.ndarray:
        """(height, width) uint8 classes. Raises BadImage, also where the height and width are not ``size``."""
        path = self._map(self._name(index))
        data, shown = self._read(path), escape(path)
        decode_pil(data, shown, self.reading)  # says what is wrong with a file
        raw = np.asarray(Image.open(io.BytesIO(data)))
        if raw.ndim != 2 or raw.dtype != np.uint8:
            raise BadImage(shown, "not a map of classes: one channel of 8 bits")
        if size is not None and raw.shape != tuple(size):
            raise BadImage(shown, f"{raw.shape[1]} x {raw.shape[0]} pixels, its image has {size[1]} x {size[0]}")
        labels = classes_of(raw)
        highest = labels.max(initial=0, where=labels != IGNORED)
        if highest >= self.classes:
            raise BadImage(shown, f"class {highest + 1} of {self.classes} (--num_classes)")
        return labels

    def _name(self, index: int) -> str:
        return self.names[index].decode(errors="surrogateescape")

    def _image(self, name: str) -> Path:
        return self.root / "images" / self.split / name

    def _map(self, name: str) -> Path:
        return (self.root / "annotations" / self.split / name).with_suffix(".png")

    def _read(self, path: Path) -> bytes:
        try:
            return read_regular(path, self.reading.max_bytes)
        except (OSError, ValueError, MemoryError) as error:
            raise BadImage(escape(path), getattr(error, "strerror", None) or str(error)) from error


class Splits:
    """Training and test images of a data set, and the number of its classes."""

    def __init__(self, root: str | Path, classes: int, incomplete: bool, reading: Reading):
        self.train, self.test = (
            LabelledPixels(root, split, classes, incomplete).read_as(reading) for split in OFFICIAL
        )
        self.classes = classes

    @property
    def data(self) -> str:
        """For results: which images these are."""
        return f"{self.train.name}; {self.test.name}"
