"""Listing images: which ones a folder, a zip or a text file holds, in ImageFolder's order, with their classes."""

import os
import stat
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from data.index import Index, Strings
from utils import UsageError, log

# torchvision's ImageFolder, then what else Pillow reads
EXTENSIONS = (
    ".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp",
    ".gif", ".jfif", ".jpe", ".jp2", ".pnm", ".pbm", ".avif",
)  # fmt: skip


def list_folder(root: Path) -> Index:
    """All images below ``root``, in ImageFolder's order. Raises UsageError when there are none."""
    images, folders, others = [], [], []
    for folder, modified, files in _walk(str(root), "", ()):
        folders.append((folder, modified))
        for name in files:
            (images if _is_image(name) else others).append((folder, name))
    if not images:
        seen = sorted(os.path.join(*entry) for entry in others)[:5] or sorted(name for name, _ in folders[1:])[:5]
        holds = f"it holds {', '.join(seen)}" if seen else "it is empty"
        raise UsageError(f"--data_path {root}: no images in this folder; {holds}; images end in {' '.join(EXTENSIONS)}")
    names, labels, class_names = _with_classes(images)
    empty = {name.split(os.sep)[0] for name, _ in folders[1:]} - set(class_names)
    if class_names and empty:
        log.warning("%s: no images in %s, so no class either", root, ", ".join(sorted(empty)[:5]))
    stamps = np.array([(modified, -1) for _, modified in folders], np.int64)
    return Index(Strings.pack(names), labels, class_names, Strings.pack([name for name, _ in folders]), stamps)


def _walk(root: str, folder: str, above: tuple) -> Iterator[tuple[str, int, list[str]]]:
    """(folder relative to root, its modification time in ns, names of its files), links followed but in no circle.

    The time is read before the folder is, so that what is added meanwhile shows.
    """
    here = os.path.join(root, folder) if folder else root
    try:
        status = os.stat(here)
        files, subfolders = [], []
        with os.scandir(here) as entries:
            for entry in entries:
                (subfolders if entry.is_dir() else files).append(entry.name)
    except OSError as error:
        raise UsageError(f"--data_path {root}: {here} cannot be listed: {error.strerror}") from error
    yield folder, status.st_mtime_ns, files
    identity = (status.st_dev, status.st_ino)
    if identity not in above:
        for name in subfolders:
            yield from _walk(root, os.path.join(folder, name), (*above, identity))


def list_zip(path: Path) -> Index:
    """All images in a zip. Raises UsageError when there are none, or none that can be read in place."""
    status = _stat_file(path)
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError) as error:
        raise UsageError(f"--data_path {path}: not a zip archive, or a damaged one ({error})") from error
    places = {}
    for entry in entries:
        folder, name = os.path.split(entry.filename)
        if _is_image(name) and not entry.is_dir() and folder.split("/")[0] != "__MACOSX":
            if entry.flag_bits & 1:
                raise UsageError(f"--data_path {path}: {entry.filename} is encrypted; pack the images without password")
            if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise UsageError(f"--data_path {path}: {entry.filename} is packed by method {entry.compress_type}; "
                                 "pack the images with 'store' or 'deflate'")  # fmt: skip
            where = (entry.header_offset, entry.compress_size, entry.file_size, entry.compress_type, entry.CRC)
            places[folder, name] = where
    if not places:
        seen = sorted(entry.filename for entry in entries)[:5]
        holds = f"it holds {', '.join(seen)}" if seen else "it is empty"
        raise UsageError(f"--data_path {path}: no images in this archive; {holds}")
    images = list(places)
    names, labels, class_names = _with_classes(images, shared=_shared_folders(images))
    where = np.array([places[os.path.split(name)] for name in names], np.int64)
    return Index(Strings.pack(names), labels, class_names, Strings.pack([path.name]), status, where)


def list_file(path: Path) -> Index:
    """The paths in a text file; whether they exist shows when they are read. Raises UsageError when there are none.

    Labels that are whole numbers from 0 are taken as they are; other labels are names, numbered in sorted order.
    """
    status = _stat_file(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UsageError(f"--data_path {path}: {error.strerror}") from error
    if b"\0" in data[:4096]:
        raise UsageError(f"--data_path {path}: neither a folder, nor a zip archive, nor a text file of paths")
    lines = [line for line in data.removeprefix(b"\xef\xbb\xbf").replace(b"\r\n", b"\n").split(b"\n") if line.strip()]
    if not lines:
        raise UsageError(f"--data_path {path}: this list of images is empty")
    parts = [os.fsdecode(line).split("\t") for line in lines]
    labels, class_names = _number([part[1].strip() if len(part) > 1 else "" for part in parts])
    return Index(Strings.pack([part[0] for part in parts]), labels, class_names, Strings.pack([path.name]), status)


def _number(texts: list[str]) -> tuple[np.ndarray, list[str]]:
    """Labels as text -> (labels, class names); the empty text is unknown, -1."""
    distinct = sorted(set(texts) - {""})
    if all(text.isdecimal() and text.isascii() and len(text) < 7 for text in distinct):
        numbers = {text: int(text) for text in distinct}
        class_names = [str(number) for number in range(max(numbers.values(), default=-1) + 1)]
    else:
        numbers, class_names = {text: number for number, text in enumerate(distinct)}, distinct
    return np.array([numbers.get(text, -1) for text in texts], np.int64), class_names


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


def _shared_folders(images: list[tuple[str, str]]) -> int:
    """How many leading folders all images share, less one if an image lies in the last of them."""
    folders = [folder.split("/") if folder else [] for folder in {folder for folder, _ in images}]
    shared = 0
    while all(len(folder) > shared for folder in folders) and len({folder[shared] for folder in folders}) == 1:
        shared += 1
    return shared if all(len(folder) > shared for folder in folders) else max(0, shared - 1)


def _is_image(name: str) -> bool:
    return name.lower().endswith(EXTENSIONS)


def _stat_file(path: Path) -> np.ndarray:
    """The (1, 2) stamp of a file."""
    try:
        status = path.stat()
    except OSError as error:
        raise UsageError(f"--data_path {path}: {error.strerror}") from error
    if not stat.S_ISREG(status.st_mode):
        raise UsageError(f"--data_path {path}: neither a folder nor a file")
    return np.array([(status.st_mtime_ns, status.st_size)], np.int64)
