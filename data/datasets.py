"""Sources of images: class folders, nested folders, lists of paths, zip archives, and the bundled photographs.

``open_source`` is the door. A source knows names and labels of its images from an index that is made once and kept
(data/index.py), and reads one image at a time. Sources are cheap to pickle: a worker opens the index's file anew.
"""

import hashlib
import os
import stat
import struct
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from data.decode import BadImage, decode_array, decode_pil
from data.index import Index, Strings, cached_index
from utils import UsageError, log

# torchvision's ImageFolder, then what else Pillow reads
EXTENSIONS = (
    ".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp",
    ".gif", ".jfif", ".jpe", ".jp2", ".pnm", ".pbm", ".avif",
)  # fmt: skip

__all__ = ["BadImage", "Source", "open_source"]


class Source:
    """A list of images.

    ``name``: for people, e.g. "/imagenet/train (1281167 images, 1000 classes)". ``labels``: (images,) int64, -1 where
    unknown. ``class_names``: what the labels count. ``fingerprint`` changes when the list of images changes.
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

    def image_name(self, index: int) -> str:
        return f"image {index} of {self.name}"

    def array(self, index: int) -> np.ndarray:
        """(height, width, 3) uint8 RGB, by the fastest decoder. Raises BadImage."""
        raise NotImplementedError

    def pil(self, index: int) -> Image.Image:
        """The same image in Pillow's mode RGB, decoded by Pillow. Raises BadImage."""
        return Image.fromarray(self.array(index))


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


class SubsetSource(Source):
    """The first ``per_class`` images of every class: classes in order of first appearance, class after class.

    Nothing is drawn, so every use of the same number sees the same images (AttMask, section on subsets).
    """

    def __init__(self, source: Source, per_class: int):
        self.source, self.per_class = source, per_class
        self.class_names = source.class_names
        self.positions = _first_per_class(source, per_class)
        self.labels = np.asarray(source.labels)[self.positions]
        self.name = f"{source.name}, of which {per_class} per class ({len(self)} images)"

    def __reduce__(self):
        return SubsetSource, (self.source, self.per_class)  # the positions are sooner found again than sent

    @property
    def fingerprint(self) -> str:
        return f"{self.source.fingerprint}-{self.per_class}"

    def image_name(self, index: int) -> str:
        return self.source.image_name(self.positions[index])

    def array(self, index: int) -> np.ndarray:
        return self.source.array(self.positions[index])

    def pil(self, index: int) -> Image.Image:
        return self.source.pil(self.positions[index])


def open_source(data_path: str | None, subset: int | None = None, split: str = "train") -> Source:
    """The images at ``data_path``; None is the bundled set, of which ``split`` names the part (paths are one part).

    A folder is read as torchvision's ImageFolder reads it: the first folder below it is the class. When an image lies
    in the folder itself, the folder has no classes. A zip likewise, after the folders that all its images share.
    Any other file lists paths, one per line, absolute or relative to the list, optionally followed by a tab and a
    label. ``subset``: that many images of every class. With several processes, all of them have to call this.

    Raises UsageError.
    """
    if subset is not None and subset < 1:
        raise UsageError(f"--subset {subset}: it counts images per class, so it has to be at least 1")
    source = _open_bundled(split) if data_path is None else _open_path(Path(os.path.abspath(data_path)))
    return source if subset is None else SubsetSource(source, subset)


def _open_bundled(split: str) -> Source:
    from data.bundled import BundledTiles  # it needs Source from here

    return BundledTiles(split=split)


def _open_path(path: Path) -> Source:
    if not path.exists():
        missing = next(parent for parent in (path, *path.parents) if parent.parent.exists())
        raise UsageError(f"--data_path {path}: {'no such path' if missing == path else f'{missing} does not exist'}")
    if path.is_dir():
        return FileSource(path, cached_index(path, path, lambda: list_folder(path)), root=path)
    if path.suffix.lower() == ".zip" or zipfile.is_zipfile(path):
        return ZipSource(path, cached_index(path, path.parent, lambda: list_zip(path)))
    return FileSource(path, cached_index(path, path.parent, lambda: list_file(path)), root=path.parent)


# ---------------------------------------------------------------------------------------------------------------------
# Making an index
# ---------------------------------------------------------------------------------------------------------------------


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


def _first_per_class(source: Source, per_class: int) -> np.ndarray:
    labels = np.asarray(source.labels)
    if (labels < 0).any():
        raise UsageError(f"--subset {per_class} takes images of every class, but {source.name} has some without label")
    classes, first, counts = np.unique(labels, return_index=True, return_counts=True)
    if counts.min() < per_class:
        few = classes[counts.argmin()]
        raise UsageError(
            f"--subset {per_class}: class {source.class_names[few]} of {source.name} has only {counts.min()} images"
        )
    by_class = np.argsort(labels, kind="stable")  # class after class, each in the source's order
    starts = np.cumsum(counts) - counts
    return np.concatenate([by_class[starts[c] : starts[c] + per_class] for c in np.argsort(first)])
