"""Listing images: which ones a folder or a zip holds, in ImageFolder's order, with their classes.

Hidden and system names are passed over in both; only names below the root count, which may be hidden itself. What else
is passed over are links that lead nowhere or in a circle, and what is no file. The index keeps a note of it.
"""

import errno
import os
import stat
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import numpy as np

from data.index import MISSING, Index, Strings, entries_mark
from data.splits import WORDS, Splits, find_splits, has_splits, split_names
from data.suffixes import EXTENSIONS, HEIF, is_image
from utils import UsageError, escape

# What systems put beside a user's images without a leading dot, in lower case
SYSTEM_NAMES = (
    "@eadir", "@recycle", "@tmp", "#recycle", "#snapshot", "__macosx", "thumbs.db", "ehthumbs.db", "desktop.ini",
    "$recycle.bin", "system volume information", "lost+found",
)  # fmt: skip

SHOWN = 5  # names in a note
ENOUGH = 1000  # entries of a folder that tell whether it holds folders or a million images
WATCHED = 100  # links to nowhere that are looked at again at every start: where a drive was missing, any of them tells


def is_hidden(name: str) -> bool:
    """Whether a file or folder of this name is no data, whoever put it there."""
    return (name.startswith(".") and name not in (".", "..")) or name.lower() in SYSTEM_NAMES


@dataclass
class PassedOver:
    """What was found and is not listed, relative to the root; ``nowhere``: links whose target may yet appear."""

    hidden: list[str] = field(default_factory=list)
    nowhere: list[str] = field(default_factory=list)
    unusable: list[str] = field(default_factory=list)
    others: list[str] = field(default_factory=list)

    def notes(self, root: Path) -> list[str]:
        """A line for every kind, with the number and the first names."""
        kinds = (
            (self.hidden, "hidden or system files and folders"),
            (self.nowhere + self.unusable, "links that lead nowhere or in a circle, or what is no file,"),
        )
        return [
            f"{escape(root)}: {len(names)} {what} passed over: {shown(names)}" for names, what in kinds if len(names)
        ]


def other_kinds(names: Iterable[str], images: int) -> list[str]:
    """A line about files that are no images, by their suffixes; a warning with the remedy where they are more."""
    counts = Counter(os.path.splitext(name)[1].lower() or "no suffix" for name in names)
    if not counts:
        return []
    largest = sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:SHOWN]
    kinds = ", ".join(f"{escape(suffix)} ({count})" for suffix, count in largest)
    line = f"{counts.total()} files that are no images passed over: {kinds}" + ", ..." * (len(counts) > SHOWN)
    if counts.total() <= images:
        return [line]
    remedy = "convert what should be images"
    if any(suffix in HEIF for suffix in counts):
        remedy += ", or install pillow-heif, with which .heic and .heif are read"
    return [f"warning: {line}, more than the {images} images; {remedy}"]


def shown(names: list[str]) -> str:
    """The first names in order, harmless to a terminal."""
    return ", ".join(escape(name) for name in sorted(names)[:SHOWN])


def list_folder(root: Path) -> Index:
    """All images below ``root``, in ImageFolder's order. Raises UsageError when there are none."""
    images, folders, others, passed = [], [], [], PassedOver()
    for folder, modified, mark, files in walk(str(root), "", (), passed):
        folders.append((folder, modified, mark))
        for name in files:
            (images if is_image(name) else others).append((folder, name))
    notes = passed.notes(root)
    if not images:
        seen = [os.path.join(*entry) for entry in others] or [name for name, *_ in folders[1:]]
        holds = "; ".join([f"it holds {shown(seen)}"] * bool(seen) + notes) or "it is empty"
        raise UsageError(
            f"--data_path {escape(root)}: no images in this folder; {holds}; images end in {' '.join(EXTENSIONS)}"
        )
    names, labels, class_names = _with_classes(images)
    notes += [f"{escape(root)}: {line}" for line in other_kinds([name for _, name in others], len(images))]
    empty = {name.split(os.sep)[0] for name, *_ in folders[1:]} - set(class_names)
    if class_names and empty:
        notes.append(f"{escape(root)}: no images in {shown(list(empty))}, so no class either")
    absent = [(name, MISSING, -1) for name in passed.nowhere[:WATCHED]]
    stamps = np.array([(modified, mark) for _, modified, mark in folders + absent], np.int64)
    return Index(
        Strings.pack(names),
        labels,
        class_names,
        Strings.pack([name for name, *_ in folders + absent]),
        stamps,
        splits=find_splits({folder for folder, _ in images}),
        notes=notes,
    )


def walk(root: str, folder: str, above: tuple, passed: PassedOver) -> Iterator[tuple[str, int, int, list[str]]]:
    """(folder relative to root, its modification time in ns, the mark of all its entries, names of its files).

    Links are followed, but in no circle.

    The time is read before the folder is, so that what is added meanwhile shows.
    """
    here = os.path.join(root, folder) if folder else root
    try:
        status = os.stat(here)
        identity = (status.st_dev, status.st_ino)
        if identity in above:
            passed.unusable.append(folder)
            return
        files, subfolders, everything = [], [], []
        with os.scandir(here) as entries:
            for entry in entries:
                everything.append(entry.name)
                if is_hidden(entry.name):
                    if is_image(entry.name) or entry.is_dir(follow_symlinks=False):
                        passed.hidden.append(os.path.join(folder, entry.name))
                    continue
                kind = _kind(entry, root)
                if kind == "folder":
                    subfolders.append(entry.name)
                elif kind == "file":
                    files.append(entry.name)
                elif kind == "nowhere" or is_image(entry.name):
                    getattr(passed, kind).append(os.path.join(folder, entry.name))
    except OSError as error:
        raise _cannot_be_read(root, here, error) from error
    yield folder, status.st_mtime_ns, entries_mark(everything), files
    for name in subfolders:
        yield from walk(root, os.path.join(folder, name), (*above, identity), passed)


def _kind(entry: os.DirEntry, root: str) -> str:
    """file, folder, nowhere (a link without target) or unusable (such as a pipe, which would be read for ever)."""
    try:
        if entry.is_dir():
            return "folder"
        if entry.is_file():
            return "file"
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG):
            raise _cannot_be_read(root, entry.path, error) from error
        return "nowhere"
    return "nowhere" if entry.is_symlink() and not os.path.exists(entry.path) else "unusable"


def _cannot_be_read(root: str, path: str, error: OSError) -> UsageError:
    return UsageError(
        f"--data_path {escape(root)}: {escape(path)} cannot be listed: {error.strerror}; "
        "make it readable, or move it out of the images"
    )


def plain_splits(root: Path) -> list[str]:
    """The folders in ``root`` that bear one of the plain words: told without listing it."""
    words = [form for word in WORDS for form in (word, word.title(), word.upper())]
    return [word for word in words if os.path.isdir(root / word)]


def splits_below(root: Path) -> Splits | None:
    """The splits in ``root`` itself, where plain words name them: told without listing what they hold."""
    if not has_splits(plain_splits(root)):
        return None
    names = _subfolders(root, root)
    trains, tests = split_names(names)
    others = [name for name in names if name not in (*trains, *tests)]
    folders = dict.fromkeys(names, True)
    for name in (trains if others else []) + (tests if len(tests) > 1 else []):
        folders[name] = bool(_subfolders(root, root / name, ENOUGH))
    if not all(folders[name] for name in trains):  # where the others might be classes, only those with images count
        for name in others:
            if not any(any(map(is_image, files)) for *_, files in walk(str(root), name, (), PassedOver())):
                del folders[name]
    return Splits(folders=folders)


def _subfolders(root: Path, folder: Path, among: int | None = None) -> list[str]:
    """Names of the folders in ``folder``; ``among``: within the first so many entries."""
    try:
        with os.scandir(folder) as entries:
            some = [entry for entry in islice(entries, among) if not is_hidden(entry.name)]
            return sorted(entry.name for entry in some if _kind(entry, str(root)) == "folder")
    except OSError as error:
        raise _cannot_be_read(str(root), str(folder), error) from error


def list_zip(path: Path, inner: str = "") -> Index:
    """All images in a zip or in its folder ``inner``.

    Raises UsageError when there are none, or when one cannot be read in place.
    """
    status = stamp_of_file(path)
    places, seen, passed = zip_images(path, inner)
    if not places:
        holds = f"it holds {shown(seen)}" if seen else "it is empty"
        where = f"--data_path {escape(path / inner)}"
        raise UsageError(f"{where}: no images in this {'folder of the ' * bool(inner)}archive; {holds}")
    images = list(places)
    names, labels, class_names = _with_classes(images, shared=shared_folders(images))
    rows = np.array([places[os.path.split(name)] for name in names], np.int64)
    start = f"{inner}/" if inner else ""
    return Index(
        Strings.pack(names),
        labels,
        class_names,
        Strings.pack([path.name]),
        status,
        rows,
        splits=find_splits({folder[len(start) :] for folder, _ in images}),
        notes=passed.notes(path / inner)
        + [f"{escape(path / inner)}: {line}" for line in other_kinds(passed.others, len(places))],
    )


def zip_images(path: Path, inner: str = "") -> tuple[dict[tuple[str, str], tuple], list[str], PassedOver]:
    """(folder, name) of every image -> its place for ZipSource, in the order of the archive's directory; the names of
    all entries; and what was passed over. Raises UsageError for what cannot be read in place.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError) as error:
        raise UsageError(f"--data_path {escape(path)}: not a zip archive, or a damaged one ({error})") from error
    where = f"--data_path {escape(path / inner)}"
    places, hidden, passed = {}, set(), PassedOver()
    start = f"{inner}/" if inner else ""
    for entry in entries:
        folder, name = os.path.split(entry.filename)
        if not entry.filename.startswith(start):
            continue
        outermost = hidden_part(entry.filename, start)
        if outermost is not None:
            if is_image(name) or outermost != entry.filename:
                hidden.add(outermost)
        elif is_image(name) and not entry.is_dir():
            if stat.S_ISLNK(entry.external_attr >> 16):
                passed.unusable.append(entry.filename)
                continue
            if entry.flag_bits & 1:
                raise UsageError(f"{where}: {escape(entry.filename)} is encrypted; "
                                 "pack the images without password")  # fmt: skip
            if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise UsageError(f"{where}: {escape(entry.filename)} is packed by method "
                                 f"{entry.compress_type}; pack the images with 'store' or 'deflate'")  # fmt: skip
            place = (entry.header_offset, entry.compress_size, entry.file_size, entry.compress_type, entry.CRC)
            places[folder, name] = place
        elif not entry.is_dir():
            passed.others.append(name)
    passed.hidden = list(hidden)
    return places, [entry.filename for entry in entries], passed


def hidden_part(name: str, start: str) -> str | None:
    """The outermost file or folder of ``name`` in an archive that is hidden; ``start`` of it does not count."""
    parts = name[len(start) :].split("/")
    first = next((position for position, part in enumerate(parts) if is_hidden(part)), None)
    return None if first is None else start + "/".join(parts[: first + 1])


def _with_classes(images: list[tuple[str, str]], shared: int = 0) -> tuple[list[str], np.ndarray, list[str]]:
    """(folder, name) pairs -> names in order, labels, class names.

    parity: classes are sorted by name; inside one, folders are sorted as strings, then names (torchvision's
    ImageFolder). The class is the folder's part after the first ``shared`` ones; if any image has none there are none.
    """
    keyed = sorted((tuple(folder.split("/", shared + 1)[shared : shared + 1]), folder, name) for folder, name in images)
    names = [os.path.join(folder, name) for _, folder, name in keyed]
    if any(key in ((), ("",)) for key in {key for key, _, _ in keyed}):
        return names, np.full(len(names), -1, np.int64), []
    class_names = sorted({key[0] for key, _, _ in keyed})
    number = {name: position for position, name in enumerate(class_names)}
    return names, np.array([number[key[0]] for key, _, _ in keyed], np.int64), class_names


def shared_folders(images: list[tuple[str, str]]) -> int:
    """How many leading folders all images share, less one if an image lies in the last of them."""
    folders = [folder.split("/") if folder else [] for folder in {folder for folder, _ in images}]
    shared = 0
    while all(len(folder) > shared for folder in folders) and len({folder[shared] for folder in folders}) == 1:
        shared += 1
    return shared if all(len(folder) > shared for folder in folders) else max(0, shared - 1)


def stamp_of_file(path: Path) -> np.ndarray:
    """The (1, 2) stamp of a file."""
    try:
        status = path.stat()
    except OSError as error:
        raise UsageError(f"--data_path {escape(path)}: {error.strerror}") from error
    if not stat.S_ISREG(status.st_mode):
        raise UsageError(f"--data_path {escape(path)}: neither a folder nor a file")
    return np.array([(status.st_mtime_ns, status.st_size)], np.int64)
