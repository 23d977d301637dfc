"""Tar shards: which images the archives of a folder or of a list hold, where they lie, and their labels.

Archives are named as WebDataset names them: what belongs to one image shares its name up to the first dot, and
``NAME.cls`` holds the label. Without such files the folders inside the archives are the classes, as in a folder or a
zip; ImageNet's own archives, one for a class, are folders of their name. Nothing is unpacked or extracted: an image is
read at its offset, so order, subsets and a continued run are those of any other source.
"""

import os
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np

from data.encoded import TAR_BLOCK
from data.index import Index, Strings
from data.listing import PassedOver, hidden_part, shared_folders, shown, stamp_of_file, walk
from data.lists import number_labels, read_lines
from data.splits import find_splits
from data.suffixes import is_image
from utils import UsageError, escape

COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
_ARCHIVE = re.compile(r".*\.(tar|t[gbx]z|tbz2|tzst|tar\.(gz|bz2|xz|zst|lz4|z))", re.IGNORECASE)
_NUMBER = re.compile(r"[-_.]?(\d+[-_]of[-_])?\d+$")  # at the end of a shard's name
_CLASS = re.compile(r"n\d{8}")  # a WordNet id: ImageNet has an archive for every class
LABEL_BYTES = 1000  # more is no label


class Member(NamedTuple):
    """An image: ``folder`` and ``name`` inside archive number ``shard``, and its row of ``Index.places``."""

    shard: int
    folder: str
    name: str
    offset: int
    size: int
    checksum: int

    @property
    def path(self) -> str:
        return os.path.join(self.folder, self.name)


def is_archive(name: str) -> bool:
    """Whether a file of this name is a tar, compressed or not."""
    return bool(_ARCHIVE.fullmatch(name))


def holds_archives(folder: Path) -> bool:
    """Whether there are archives right below a folder; what cannot be listed is told where it is opened."""
    try:
        return any(map(is_archive, os.listdir(folder)))
    except OSError:
        return False


def holds_shards(root: Path) -> bool:
    """Whether a folder holds archives and no image beside them: a tree of images says so at its first one."""
    found = False
    for *_, files in walk(str(root), "", (), PassedOver()):
        if any(map(is_image, files)):
            return False
        found = found or any(map(is_archive, files))
    return found


def is_shard_list(path: Path) -> bool:
    """Whether the first line of a text file names an archive."""
    if not path.is_file():
        return False  # a pipe would be waited for
    try:
        with open(path, "rb") as file:
            lines = file.read(1 << 16).removeprefix(b"\xef\xbb\xbf").splitlines()
    except OSError:
        return False
    first = next((line for line in lines if line.strip()), b"")
    return is_archive(os.fsdecode(first.split(b"\t")[0].strip()))


def list_shards(path: Path, inner: str = "") -> Index:
    """All images in the archives of a folder or list, or in one archive, or what of them is below ``inner``.

    ``inner`` is a folder inside the archives; where there are several, after their common name (``train-0000.tar``
    belongs to ``train``). Raises UsageError when there are none, or when an archive cannot be read in place.
    """
    where = f"--data_path {escape(path / inner)}"
    watched, stamps, shards, passed = _shards(path)
    root = path if os.path.isdir(path) else path.parent
    images, labels, families, opened = [], {}, {}, []
    for position in shards:
        stamps.append(stamp_of_file(root / watched[position])[0])
        families[position] = "" if is_archive(path.name) else _family(watched[position])
        family = families[position]
        if inner and family and not f"{inner}/".startswith(f"{family}/"):
            continue
        opened.append(watched[position])
        found, found_labels = _members(root / watched[position], position, where, passed)
        images += [image for image in found if not inner or _below(image, family, inner)]
        labels |= {(position, key): label for key, label in found_labels.items()}
    if not images:
        if not opened:
            raise UsageError(f"{where}: no such path, and no archive in {escape(path)} is named so before its number")
        holds = f"looked into {shown(opened)}" + "".join(f"; {note}" for note in passed.notes(path))
        raise UsageError(f"{where}: no images in these archives; {holds}")
    images, numbers, class_names = _with_labels(images, labels, families)
    return Index(
        Strings.pack([os.path.join(watched[image.shard], image.path) for image in images]),
        numbers,
        class_names,
        Strings.pack(watched),
        np.array(stamps, np.int64),
        np.array([(image.shard, image.offset, image.size, image.checksum) for image in images], np.int64),
        splits=find_splits(_inside({(families[i.shard], i.folder) for i in images}, inner)),
        notes=passed.notes(path / inner),
    )


def _shards(path: Path) -> tuple[list[str], list, list[int], PassedOver]:
    """What is watched for changes, the stamps of all that is no archive, and the positions of the archives."""
    passed = PassedOver()
    if os.path.isdir(path):
        folders, names = [], []
        for folder, modified, mark, files in walk(str(path), "", (), passed):
            folders.append((folder, modified, mark))
            names += [os.path.join(folder, name) for name in files if is_archive(name)]
        watched = [folder for folder, *_ in folders] + sorted(names)
        stamps = [np.array(stamp) for _, *stamp in folders]
    elif is_archive(path.name):
        return [path.name], [], [0], passed
    else:
        stamps, watched = [stamp_of_file(path)[0]], [path.name]
        for number, (name, label) in read_lines(path).items():
            line = f"--data_path {escape(path)}: line {number}, '{escape(name)}'"
            if not is_archive(name) or label:
                raise UsageError(f"{line}: every line of a list of archives names one .tar, and nothing behind it")
            if name in watched:
                raise UsageError(f"{line}: named twice; remove one of the lines")
            watched.append(name)
    return watched, stamps, list(range(len(stamps), len(watched))), passed


def _members(file: Path, position: int, where: str, passed: PassedOver) -> tuple[list[Member], dict[str, str]]:
    """The images of an archive, and the labels of its .cls files by what they are named after. Of two entries with one
    name the later counts, as when an archive is unpacked. Raises UsageError.
    """
    images, labels, hidden = {}, {}, set()
    try:
        with open(file, "rb") as opened:
            _refuse_compressed(file, opened.read(8), where)
            for entry, end in _entries(opened):
                name = str(PurePosixPath(entry.name)).lstrip("/")
                outermost = hidden_part(name, "")
                if outermost is not None:
                    if is_image(name) or outermost != name:
                        hidden.add(outermost)
                elif not entry.isreg() or entry.issparse():
                    if is_image(name):
                        passed.unusable.append(f"{file.name}/{name}")
                elif entry.offset_data + entry.size > end:
                    raise ValueError(f"cut short within {escape(name)}")
                elif is_image(name):
                    folder, short = os.path.split(name)
                    images[name] = Member(position, folder, short, entry.offset_data, entry.size, entry.chksum)
                elif name.endswith(".cls"):
                    label = os.pread(opened.fileno(), min(entry.size, LABEL_BYTES), entry.offset_data)
                    labels[name.removesuffix(".cls")] = os.fsdecode(label).strip()
    except (tarfile.TarError, OSError, ValueError, OverflowError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise UsageError(f"{where}: {escape(file)} is damaged, or no tar archive: {reason}; make it anew") from error
    passed.hidden += [f"{file.name}/{name}" for name in hidden]
    return list(images.values()), labels


def _refuse_compressed(file: Path, start: bytes, where: str) -> None:
    for magic, packer in COMPRESSED.items():
        if start.startswith(magic):
            raise UsageError(f"{where}: {escape(file)} is compressed ({packer}), so nothing in it can be read in "
                             "place; unpack it to a plain .tar")  # fmt: skip
    if not file.name.lower().endswith(".tar"):
        raise UsageError(f"{where}: {escape(file)} is named as a compressed archive; a plain .tar is needed")


def _entries(opened) -> Iterator[tuple[tarfile.TarInfo, int]]:
    """The entries of an archive and the size of its file. Raises ValueError where its end is not that of an archive,
    of which Python says nothing.
    """
    size = opened.seek(0, os.SEEK_END)
    opened.seek(0)
    with tarfile.TarFile(fileobj=opened, mode="r") as archive:
        while (entry := archive.next()) is not None:
            archive.members.clear()  # a million of them would be kept
            yield entry, size
        end = archive.offset
    tail = os.pread(opened.fileno(), 1 << 20, end)
    if len(tail) < TAR_BLOCK:
        raise ValueError("cut short: the mark at its end is missing")
    if any(tail[:TAR_BLOCK]):
        raise ValueError(f"no entry begins at byte {end}, where one should")
    if any(tail):
        raise ValueError(f"something stands behind its end at byte {end}; two archives cannot be joined by cat")


def _family(name: str) -> str:
    """What shards that belong together share: the name without number; a class's archive is alone."""
    stem = os.path.splitext(os.path.basename(name))[0]
    return stem if _CLASS.fullmatch(stem) else _NUMBER.sub("", stem)


def _below(image: Member, family: str, inner: str) -> bool:
    return f"{os.path.join(family, image.folder)}/".startswith(f"{inner}/")


def _inside(folders: set[tuple[str, str]], inner: str) -> list[str]:
    return [os.path.join(family, folder)[len(inner) :] for family, folder in sorted(folders)]


def _with_labels(
    images: list[Member], labels: dict[tuple[int, str], str], families: dict[int, str]
) -> tuple[list[Member], np.ndarray, list[str]]:
    """Images in order, labels, class names: by .cls as archived, else by folder in ImageFolder's order."""
    if labels:
        texts = []
        for image in images:
            start = os.path.join(image.folder, image.name.split(".")[0])
            key = start if (image.shard, start) in labels else os.path.splitext(image.path)[0]
            texts.append(labels.get((image.shard, key), ""))
        return images, *number_labels(texts)
    classes = {shard: family for shard, family in families.items() if _CLASS.fullmatch(family)}
    folders = [os.path.join(classes.get(image.shard, ""), image.folder) for image in images]
    shared = shared_folders([(folder, "") for folder in folders])
    parts = [folder.split("/", shared + 1)[shared : shared + 1] for folder in folders]
    if any(part in ([], [""]) for part in parts):
        return images, np.full(len(images), -1, np.int64), []
    order = sorted(range(len(images)), key=lambda i: (parts[i], folders[i], images[i].name, images[i].shard))
    class_names = sorted({part[0] for part in parts})
    number = {name: position for position, name in enumerate(class_names)}
    return [images[i] for i in order], np.array([number[parts[i][0]] for i in order], np.int64), class_names
