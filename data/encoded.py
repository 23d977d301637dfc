"""Sources whose images are encoded files, by themselves or inside archives that are never unpacked.

A source knows names, labels and places of its images from an index (data/index.py) and reads one image at a time. It is
cheap to pickle: a worker opens the index's file anew, and every process the archives.
"""

import base64
import binascii
import copy
import os
import stat
import struct
import zipfile
import zlib
from collections import OrderedDict
from pathlib import Path

import numpy as np
from PIL import Image

from data.decode import PLAIN, BadImage, Reading, decode_array, decode_pil
from data.index import Index
from data.source import Source
from utils import escape

MAX_OPEN = 128  # archives at a time and process, far below the 1024 files that systems allow


class OpenFiles:
    """Files that are read at offsets: the last used ones stay open, in every process its own.

    Processes that were forked open them anew, so that none of them depends on another's file.
    """

    def __init__(self):
        self._open, self._pid = OrderedDict(), None

    def __reduce__(self):
        return OpenFiles, ()

    def read(self, path: str, size: int, offset: int) -> bytes:
        """Up to ``size`` bytes; fewer only at the end of the file. Raises OSError."""
        if self._pid != os.getpid():
            self._open, self._pid = OrderedDict(), os.getpid()
        file = self._open.pop(path, None) or open(path, "rb")  # noqa: SIM115 (stays open)
        self._open[path] = file
        if len(self._open) > MAX_OPEN:
            self._open.popitem(last=False)[1].close()
        parts = []
        while size > 0 and (part := os.pread(file.fileno(), size, offset)):
            parts.append(part)
            size, offset = size - len(part), offset + len(part)
        return b"".join(parts)


class IndexedSource(Source):
    """Encoded images that an index lists; ``read`` fetches the bytes of one. ``inner``: the folder of an archive."""

    reading = PLAIN

    def __init__(self, path: Path, index: Index, inner: str = ""):
        self.path, self.index = path, index
        self.name = f"{escape(path / inner)} ({self.size})"

    @property
    def size(self) -> str:
        classes = f", {len(self.index.class_names)} classes" if self.index.class_names else ""
        return f"{len(self.index)} images{classes}"

    @property
    def labels(self) -> np.ndarray:
        return self.index.labels

    @property
    def class_names(self) -> list[str]:
        return self.index.class_names

    @property
    def fingerprint(self) -> str:
        return self.index.fingerprint + self.reading.mark

    def read_as(self, reading: Reading) -> "IndexedSource":
        source = copy.copy(self)
        source.reading = reading
        source.name += ", turned by EXIF" * reading.exif
        return source

    def read(self, index: int) -> bytes:
        """The encoded image. Raises BadImage."""
        raise NotImplementedError

    def array(self, index: int) -> np.ndarray:
        return decode_array(self.read(index), self.image_name(index), self.reading)

    def pil(self, index: int) -> Image.Image:
        return decode_pil(self.read(index), self.image_name(index), self.reading)


class FileSource(IndexedSource):
    """Files whose names are relative to ``root`` (or absolute)."""

    def __init__(self, path: Path, index: Index, root: Path, inner: str = ""):
        super().__init__(path, index, inner)
        self.root = str(root)

    def image_name(self, index: int) -> str:
        return escape(self._file(index))

    def _file(self, index: int) -> str:
        return os.path.join(self.root, self.index.names[index])

    def read(self, index: int) -> bytes:
        try:
            return read_regular(self._file(index), self.reading.max_bytes)
        except FileNotFoundError as error:
            kept = f"; it is in {self.index.age}; --refresh_index lists anew" * bool(self.index.age)
            raise BadImage(self.image_name(index), f"{error.strerror}{kept}") from error
        except MemoryError as error:
            raise BadImage(self.image_name(index), "it does not fit into memory") from error
        except (OSError, ValueError) as error:  # ValueError: a NUL in a listed name
            raise BadImage(self.image_name(index), getattr(error, "strerror", None) or str(error)) from error


def read_regular(path: str | os.PathLike, most: int) -> bytes:
    """The contents of a file, if it is one: a pipe or a device is not waited for. Raises OSError and ValueError."""
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("a pipe, socket or device, not a file")
        if status.st_size > most:
            raise ValueError(
                f"{status.st_size} bytes on disk, more than any image that is accepted (--max_image_pixels)"
            )
        return file.read()


class PackedSource(IndexedSource):
    """Images inside other files, which the index knows the places in. ``root``: what their names are relative to."""

    def __init__(self, path: Path, index: Index, root: Path, inner: str = ""):
        super().__init__(path, index, inner)
        self.root, self._files = str(root), OpenFiles()

    def image_name(self, index: int) -> str:
        return escape(os.path.join(self.root, self.index.names[index]))

    def read(self, index: int) -> bytes:
        try:
            return self._read(self.index.places[index].tolist())
        except MemoryError as error:
            raise BadImage(self.image_name(index), "it does not fit into memory") from error
        except (OSError, ValueError, OverflowError, struct.error, zlib.error) as error:
            raise BadImage(self.image_name(index), " ".join(str(error).split())) from error

    def _read(self, place: list[int]) -> bytes:
        """The encoded image at a row of ``index.places``. Raises OSError, or ValueError for what is no image there."""
        raise NotImplementedError

    def _accept(self, size: int) -> None:
        if size > self.reading.max_bytes:
            raise ValueError(f"{size} bytes, more than any image that is accepted (--max_image_pixels)")

    def _archive(self, position: int) -> str:
        """Where an archive lies: the index calls it by its position among what it watches."""
        return os.path.join(self.root, self.index.stamp_names[position])


class ZipSource(PackedSource):
    """Images inside a zip: header's offset, packed size, size, method and checksum of each are known."""

    def __init__(self, path: Path, index: Index, inner: str = ""):
        super().__init__(path, index, path, inner)

    def _read(self, place: list[int]) -> bytes:
        offset, packed_size, size, method, checksum = place
        self._accept(max(packed_size, size))
        header = self._files.read(self.root, _LOCAL_HEADER.size, offset)
        signature, name_size, extra_size = _LOCAL_HEADER.unpack(header)
        if signature != b"PK\3\4":
            raise ValueError("the archive has changed or is damaged here")
        data = self._files.read(self.root, packed_size, offset + _LOCAL_HEADER.size + name_size + extra_size)
        if method == zipfile.ZIP_DEFLATED:
            data = zlib.decompress(data, wbits=-15, bufsize=max(1, size))
        if len(data) != size or zlib.crc32(data) != checksum:
            raise ValueError("its checksum is wrong: the archive is damaged here")
        return data


_LOCAL_HEADER = struct.Struct("<4s22xHH")


class TarSource(PackedSource):
    """Images inside tar archives: archive, offset, size, and the checksum in the header before each are known.

    A tar has no checksum of its data, but where another archive took a file's place that of the header tells.
    """

    def _read(self, place: list[int]) -> bytes:
        archive, offset, size, checksum = place
        self._accept(size)
        data = self._files.read(self._archive(archive), TAR_BLOCK + size, offset - TAR_BLOCK)
        if len(data) != TAR_BLOCK + size or _octal(data[148:156]) != checksum:
            raise ValueError("the archive has changed or is damaged here")
        return data[TAR_BLOCK:]


TAR_BLOCK = 512


def _octal(field: bytes) -> int:
    return int(field.split(b"\0")[0].strip() or b"0", 8)


class TsvSource(PackedSource):
    """Images inside tab-separated files: file, offset of the column in base64, and the most bytes it has.

    The column ends with its line, which is sooner found when it is read than when millions are listed.
    """

    def _read(self, place: list[int]) -> bytes:
        file, offset, size = place
        size = min(size, 2 * self.reading.max_bytes)  # base64 is a third longer; the rest may be other lines
        column = read_line(self._files, self._archive(file), offset, size).partition(b"\t")[0]
        try:
            return base64.b64decode(column.strip(), validate=True)
        except binascii.Error as error:
            raise ValueError(f"its column is not in base64: {error}") from error


_PART = 1 << 20  # bytes


def read_line(files: OpenFiles, path: str, offset: int, size: int) -> bytes:
    """From ``offset`` up to the end of the line, of which at most ``size`` bytes are left. Raises OSError."""
    parts = []
    while size > 0 and (part := files.read(path, min(size, _PART), offset)):
        line, end, _ = part.partition(b"\n")
        parts.append(line)
        if end:
            break
        size, offset = size - len(part), offset + len(part)
    return b"".join(parts)
