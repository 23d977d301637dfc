"""Sources of images: class folders, nested folders, lists of paths, zip and tar archives, published data sets in forms
of their own, and the bundled photographs.

``open_source`` is the door, ``open_training`` the one for a root that may hold splits (data/splits.py). A source knows
names and labels of its images from an index that is made once and kept (data/index.py), and reads one image at a time
(data/encoded.py). Where a path does not tell how images are stored, it is a ``Published``, as options say.
"""

import functools
import os
import zipfile
from pathlib import Path

import numpy as np

from data.bundled import BundledTiles
from data.decode import BadImage, Reading
from data.encoded import FileSource, TarSource, ZipSource
from data.index import Index, cached_index
from data.listing import list_folder, list_zip, plain_splits, splits_below
from data.lists import check_listed, list_file
from data.published import Published, open_published
from data.shards import holds_archives, holds_shards, is_archive, is_shard_list, list_shards
from data.source import PartOfSource, Source
from data.splits import Splits, has_splits, split_word
from data.suffixes import EXTENSIONS
from utils import UsageError, escape, log

__all__ = ["EXTENSIONS", "BadImage", "Source", "open_source", "open_training"]


ALL = -1  # --subset -1, as AttMask writes it


class SubsetSource(PartOfSource):
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

    def read_as(self, reading: Reading) -> "SubsetSource":
        return SubsetSource(self.source.read_as(reading), self.per_class, self.start, self.fewer)


SPLITS = ("train", "all")  # --split: what of a root that holds splits is trained on


Place = str | Published  # where images are


def training_path(data_path: Place | None, split: str = "train") -> Place | None:
    """Where the training images are: ``data_path`` itself or, of a root that holds splits, the folder for training."""
    if isinstance(data_path, Published):
        return data_path.of("train")
    if data_path is None or split == "all":
        return data_path
    path = Path(os.path.abspath(data_path))
    splits, _ = _splits(path)
    name = splits.train(path)
    return data_path if name is None else str(splits.path(path, name))


def train_and_test_paths(data_path: Place, watched: bool = False, listed: bool = True) -> tuple[Place, Place]:
    """Where a root that holds splits has its training and its test images. Raises UsageError where it holds none.

    ``watched``: for a look during training, see ``Splits.test``. ``listed``: whether a folder may be listed to find
    them; one that the user did not name may be anything.
    """
    if isinstance(data_path, Published):
        return data_path.of("train"), data_path.of("val")
    path = Path(os.path.abspath(data_path))
    if os.path.isdir(path) and (plain_splits(path) or split_word(path.name) or not listed):
        splits = splits_below(path) or Splits()
    else:
        splits, _ = _splits(path)
    train, test = splits.train(path), splits.test(path, watched)
    if train is None or test is None:
        half = "val/ or test/ beside train/" if os.path.isdir(path / "train") else "train/ and val/ (or test/)"
        above = f"; pass {escape(path.parent)}" if has_splits(plain_splits(path.parent)) else ""
        raise UsageError(f"--data_path {escape(data_path)}: has no {half} with a folder per class{above}")
    return str(splits.path(path, train)), str(splits.path(path, test))


def testing_path(data_path: Place) -> Place:
    """Where the test images are: ``data_path`` itself or, of a root that holds splits, the folder for testing."""
    if isinstance(data_path, Published):
        return data_path.of("val")
    path = Path(os.path.abspath(data_path))
    splits, _ = _splits(path)
    name = splits.test(path)
    return data_path if name is None else str(splits.path(path, name))


def open_training(data_path: Place | None, subset: int | None = None, split: str = "train") -> Source:
    """The images to be trained on; of a root that holds splits a line in the log says which, and what is left alone.

    ``split``: one of SPLITS. The rest is as for ``open_source``.
    """
    if data_path is None or split == "all" or isinstance(data_path, Published):
        return open_source(data_path, subset)
    check_subset(subset)
    path = Path(os.path.abspath(data_path))
    splits, index = _splits(path)
    name = splits.train(path)
    if name is None:
        return _subset_of(_open_path(path, index), subset)
    source = _open_path(splits.path(path, name))
    log.info("training on %s/ (%s), %s left alone", escape(name), source.size, splits.left_alone(name))
    return _subset_of(source, subset)


def open_source(data_path: Place | None, subset: int | None = None, split: str = "train", start: int = 0) -> Source:
    """The images at ``data_path``; None is the bundled set, of which ``split`` names the part (paths are one part).

    A folder is read as torchvision's ImageFolder reads it: the first folder below it is the class. When an image lies
    in the folder itself, the folder has no classes. A zip likewise, after the folders that all its images share; tar
    archives too, one, or a folder or list of them (data/shards.py). Any other file lists paths, one per line, absolute
    or relative to the list, optionally followed by a tab and a label. A path may go on inside: images.zip/data/train,
    list.txt/imagenet/train for what is listed below /imagenet/train, or shards/train for archives named train-0000.tar.
    ``subset``: that many images of every class from image ``start`` on; None or -1 is all. With several processes, all
    of them have to call this.

    Raises UsageError.
    """
    check_subset(subset)
    if data_path is None:
        source = BundledTiles(split=split)
    elif isinstance(data_path, Published):
        source = open_published(data_path)
        _say(source.index.notes)
    else:
        source = _open_path(Path(os.path.abspath(data_path)))
    return _subset_of(source, subset, start)


def check_subset(subset: int | None) -> None:
    """Raise UsageError for a number of images per class that means nothing."""
    if subset is not None and subset < 1 and subset != ALL:
        raise UsageError(f"--subset {subset}: it counts images per class, so it has to be at least 1 ({ALL}: all)")


def _subset_of(source: Source, subset: int | None, start: int = 0) -> Source:
    return source if subset in (None, ALL) else SubsetSource(source, subset, start)


def _splits(path: Path) -> tuple[Splits, Index | None]:
    """What of ``path`` is for training and for testing, and the index of all of it where one had to be opened."""
    if os.path.isdir(path) and (splits := splits_below(path)):
        return splits, None
    index = _index(path)
    return index.splits, index


def _open_path(path: Path, index: Index | None = None) -> Source:
    index = _index(path) if index is None else index
    place, inner = _place(path)
    notes, folder = index.notes, os.path.isdir(place)
    if len(index.places) and not folder and _is_zip(place):
        source = ZipSource(place, index, inner)
    elif len(index.places):
        source = TarSource(place, index, place if folder else place.parent, inner)
    elif folder:
        source = FileSource(path, index, root=path)
    else:
        source = FileSource(place, index, place.parent, inner)
        notes = notes + check_listed(place, index)
    _say(notes)
    return source


def _say(notes: list[str]) -> None:
    for note in notes:
        _say_once(note)


def _index(path: Path) -> Index:
    place, inner = _place(path)
    if os.path.isdir(place):
        return cached_index(path, place, lambda: _list_folder(place, inner))
    if is_archive(place.name) or (not _is_zip(place) and is_shard_list(place)):
        build = list_shards
    else:
        build = list_zip if _is_zip(place) else list_file
    return cached_index(path, place.parent, lambda: build(place, inner))


def _list_folder(folder: Path, inner: str) -> Index:
    if inner:
        return list_shards(folder, inner)
    try:
        return list_folder(folder)
    except UsageError:
        if holds_shards(folder):
            return list_shards(folder)
        raise


def _place(path: Path) -> tuple[Path, str]:
    """A folder or a file, and what of ``path`` is inside that file or its archives. Raises UsageError."""
    if os.path.exists(path):
        return path, ""
    there = next(parent for parent in path.parents if os.path.exists(parent))
    if os.path.isfile(there) or holds_archives(there):
        return there, path.relative_to(there).as_posix()
    missing = next(parent for parent in (path, *path.parents) if parent.parent == there)
    what = "no such path" if missing == path else f"{escape(missing)} does not exist"
    raise UsageError(
        f"--data_path {escape(path)}: {what}; pass a folder, a .txt list, a .zip of images, or .tar archives of them"
    )


def _is_zip(file: Path) -> bool:
    return file.suffix.lower() == ".zip" or zipfile.is_zipfile(file)


@functools.cache
def _say_once(note: str) -> None:
    """A training opens its images once to learn from them and once more for the k-NN."""
    log.warning(note)


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
        few = escape(source.class_names[classes[counts.argmin()]])
        needed = f"{start + per_class} are needed" + f" to begin at {start}" * (start > 0)
        raise UsageError(f"--subset {per_class}: class {few} of {source.name} has only {counts.min()} images, {needed}")
