"""Sources of images: class folders, nested folders, lists of paths, zip archives, and the bundled photographs.

``open_source`` is the door. A source knows names and labels of its images from an index that is made once and kept
(data/index.py), and reads one image at a time. Sources are cheap to pickle: a worker opens the index's file anew.
"""

import os
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

from data.bundled import BundledTiles
from data.decode import BadImage, decode_array, decode_pil
from data.index import Index, cached_index
from data.listing import EXTENSIONS, list_file, list_folder, list_zip
from data.source import Source
from utils import UsageError

__all__ = ["EXTENSIONS", "BadImage", "Source", "open_source"]


class IndexedSource(Source):
    """Encoded images that an index lists; ``read`` fetches the bytes of one."""

    def __init__(self, path: Path, index: Index):
        self.path, self.index = path, index
        classes = f", {len(index.class_names)} classes" if index.class_names else ""
        self.name = f"{path} ({len(index)} images{classes})"

    @property
    def labels(self) -> np.ndarray:
        return self.index.labels

    @property
    def class_names(self) -> list[str]:
        return self.index.class_names

    @property
    def fingerprint(self) -> str:
        return self.index.fingerprint

    def read(self, index: int) -> bytes:
        """The encoded image. Raises BadImage."""
        raise NotImplementedError

    def array(self, index: int) -> np.ndarray:
        return decode_array(self.read(index), self.image_name(index))

    def pil(self, index: int) -> Image.Image:
        return decode_pil(self.read(index), self.image_name(index))


class FileSource(IndexedSource):
    """Files whose names are relative to ``root`` (or absolute)."""

    def __init__(self, path: Path, index: Index, root: Path):
        super().__init__(path, index)
        self.root = str(root)

    def image_name(self, index: int) -> str:
        return os.path.join(self.root, self.index.names[index])

    def read(self, index: int) -> bytes:
        name = self.image_name(index)
        try:
            with open(name, "rb") as file:
                return file.read()
        except (OSError, ValueError) as error:  # ValueError: a NUL in a listed name
            raise BadImage(name, getattr(error, "strerror", None) or str(error)) from error


class ZipSource(IndexedSource):
    """Images inside a zip, which is never unpacked: the index knows where each one lies.

    The archive is opened once in every process. Processes that were forked after that open it anew, so that none of
    them depends on another's file.
    """

    def __init__(self, path: Path, index: Index):
        super().__init__(path, index)
        self._archive, self._pid = None, None

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_archive": None, "_pid": None}

    def image_name(self, index: int) -> str:
        return f"{self.path}/{self.index.names[index]}"

    def read(self, index: int) -> bytes:
        offset, packed_size, size, method, checksum = self.index.places[index].tolist()
        try:
            if self._pid != os.getpid():
                self._archive, self._pid = open(self.path, "rb"), os.getpid()  # noqa: SIM115 (stays open)
            header = os.pread(self._archive.fileno(), _LOCAL_HEADER.size, offset)
            signature, name_size, extra_size = _LOCAL_HEADER.unpack(header)
            if signature != b"PK\3\4":
                raise ValueError("the archive has changed or is damaged here")
            start = offset + _LOCAL_HEADER.size + name_size + extra_size
            data = os.pread(self._archive.fileno(), packed_size, start)
            if method == zipfile.ZIP_DEFLATED:
                data = zlib.decompress(data, wbits=-15, bufsize=max(1, size))
            if len(data) != size or zlib.crc32(data) != checksum:
                raise ValueError("its checksum is wrong: the archive is damaged here")
        except (OSError, ValueError, struct.error, zlib.error) as error:
            raise BadImage(self.image_name(index), " ".join(str(error).split())) from error
        return data


_LOCAL_HEADER = struct.Struct("<4s22xHH")


ALL = -1  # --subset -1, as AttMask writes it


class SubsetSource(Source):
    """``per_class`` images of every class from its image ``start`` on, class after class.

    Nothing is drawn, so every use of the same numbers sees the same images (AttMask, section on subsets). A class that
    has not so many is refused with a UsageError; with ``fewer`` all it has are taken.
    """

    def __init__(self, source: Source, per_class: int, start: int = 0, fewer: bool = False):
        self.source, self.per_class, self.start, self.fewer = source, per_class, start, fewer
        self.class_names = source.class_names
        _check_classes(source, per_class, start, fewer)
        self.positions = images_per_class(source.labels, per_class, start)
        self.labels = np.asarray(source.labels)[self.positions]
        which = f"{per_class} per class" + f" from image {start} on" * (start > 0)
        self.name = f"{source.name}, of which {'at most ' * fewer}{which} ({len(self)} images)"

    def __reduce__(self):  # the positions are sooner found again than sent
        return SubsetSource, (self.source, self.per_class, self.start, self.fewer)

    @property
    def fingerprint(self) -> str:
        return f"{self.source.fingerprint}-{self.per_class}" + f"@{self.start}" * (self.start > 0)

    def image_name(self, index: int) -> str:
        return self.source.image_name(self.positions[index])

    def array(self, index: int) -> np.ndarray:
        return self.source.array(self.positions[index])

    def pil(self, index: int) -> Image.Image:
        return self.source.pil(self.positions[index])


def training_path(data_path: str | None) -> str | None:
    """Where the training images are: ``data_path`` itself, or its train/ where it holds both train/ and val/."""
    if data_path is not None and all((Path(data_path) / part).is_dir() for part in ("train", "val")):
        return str(Path(data_path) / "train")
    return data_path


def open_source(data_path: str | None, subset: int | None = None, split: str = "train", start: int = 0) -> Source:
    """The images at ``data_path``; None is the bundled set, of which ``split`` names the part (paths are one part).

    A folder is read as torchvision's ImageFolder reads it: the first folder below it is the class. When an image lies
    in the folder itself, the folder has no classes. A zip likewise, after the folders that all its images share.
    Any other file lists paths, one per line, absolute or relative to the list, optionally followed by a tab and a
    label. ``subset``: that many images of every class from image ``start`` on; None or -1 is all. With several
    processes, all of them have to call this.

    Raises UsageError.
    """
    check_subset(subset)
    source = BundledTiles(split=split) if data_path is None else _open_path(Path(os.path.abspath(data_path)))
    return source if subset in (None, ALL) else SubsetSource(source, subset, start)


def check_subset(subset: int | None) -> None:
    """Raise UsageError for a number of images per class that means nothing."""
    if subset is not None and subset < 1 and subset != ALL:
        raise UsageError(f"--subset {subset}: it counts images per class, so it has to be at least 1 ({ALL}: all)")


def _open_path(path: Path) -> Source:
    if not path.exists():
        missing = next(parent for parent in (path, *path.parents) if parent.parent.exists())
        what = "no such path" if missing == path else f"{missing} does not exist"
        raise UsageError(f"--data_path {path}: {what}; pass a folder, a .txt list or a .zip of images")
    if path.is_dir():
        return FileSource(path, cached_index(path, path, lambda: list_folder(path)), root=path)
    if path.suffix.lower() == ".zip" or zipfile.is_zipfile(path):
        return ZipSource(path, cached_index(path, path.parent, lambda: list_zip(path)))
    return FileSource(path, cached_index(path, path.parent, lambda: list_file(path)), root=path.parent)


def images_per_class(labels: np.ndarray, count: int, start: int = 0) -> np.ndarray:
    """Positions of the images [start, start + count) of every class, as far as it has them.

    Classes in order of first appearance, class after class, each in the order of the images.
    """
    _, first, counts = np.unique(labels, return_index=True, return_counts=True)
    by_class = np.argsort(labels, kind="stable")
    begins = np.cumsum(counts) - counts
    starts, ends = begins + np.minimum(counts, start), begins + np.minimum(counts, start + count)
    return np.concatenate([by_class[starts[c] : ends[c]] for c in np.argsort(first)])


def _check_classes(source: Source, per_class: int, start: int, fewer: bool) -> None:
    labels = np.asarray(source.labels)
    if (labels < 0).any():
        raise UsageError(f"--subset {per_class} takes images of every class, but {source.name} has some without label")
    classes, counts = np.unique(labels, return_counts=True)
    if counts.min() < start + per_class and not fewer:
        few = source.class_names[classes[counts.argmin()]]
        needed = f"{start + per_class} are needed" + f" to begin at {start}" * (start > 0)
        raise UsageError(f"--subset {per_class}: class {few} of {source.name} has only {counts.min()} images, {needed}")
