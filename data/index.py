"""The list of a data set's images: made once, kept on disk, memory-mapped by every process that needs it.

Listing a million files takes minutes on a network drive; opening the index takes milliseconds and no memory, since its
arrays stay in the file. An index belongs to one absolute path and is used while every folder it saw (or the list file,
or the zip) has the modification time it had. It lives in ``$XDG_CACHE_HOME/tutelage`` or ``~/.cache/tutelage``; where
nothing can be written there, everything works without it.

File layout: magic, length of the header, header (JSON), then the arrays, each at a multiple of 64 bytes.
"""

import hashlib
import json
import mmap
import os
import struct
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from data.splits import Splits
from data.suffixes import HAS_HEIF
from utils import barrier, escape, log, save_atomically

MAGIC = b"tutelage index 3" + b" heif" * HAS_HEIF  # which other suffixes make another list
ALIGNMENT = 64
LOOKED_INTO, ENTRIES = 32, 20_000  # folders of an index that are read again at every start, and what they may hold
LOOKED_FOR = 256  # files of an index that are looked for at every start
MISSING = -1  # the modification time of what was not there


class Strings:
    """Many short strings in two arrays: all bytes, and (strings + 1,) offsets."""

    def __init__(self, blob: np.ndarray, offsets: np.ndarray):
        self.blob, self.offsets = blob, offsets

    @classmethod
    def pack(cls, strings: list[str]) -> "Strings":
        encoded = [os.fsencode(string) for string in strings]
        offsets = np.zeros(len(encoded) + 1, np.int64)
        np.cumsum([len(string) for string in encoded], out=offsets[1:])
        return cls(np.frombuffer(b"".join(encoded), np.uint8), offsets)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> str:
        return os.fsdecode(self.blob[self.offsets[index] : self.offsets[index + 1]].tobytes())


class Index:
    """Names and labels of images, in order, and what tells whether the list still holds.

    ``names``: Strings relative to the data set's root. ``labels``: (images,) int64, -1 where unknown.
    ``places``: (images, columns) int64, where the images lie in an archive; (0, 0) for files.
    ``stamps``: what was looked at, relative to the root, with (stamps, 2) modification time in ns and size in bytes;
    a size of -1 is not compared, one below it marks a folder's entries (``entries_mark``); a time of MISSING holds as
    long as there is nothing.
    ``splits``: whether the data set holds some. ``notes``: lines for the user, to be said whenever the index is used.
    """

    def __init__(
        self,
        names: Strings,
        labels: np.ndarray,
        class_names: list[str],
        stamp_names: Strings,
        stamps: np.ndarray,
        places: np.ndarray | None = None,
        fingerprint: str | None = None,
        splits: Splits | None = None,
        notes: Sequence[str] = (),
    ):
        self.names, self.labels, self.class_names = names, labels, class_names
        self.stamp_names, self.stamps = stamp_names, stamps
        self.places = np.zeros((0, 0), np.int64) if places is None else places
        self.fingerprint = fingerprint or _fingerprint(names)
        self.splits, self.notes = splits or Splits(), list(notes)
        self.file: Path | None = None

    def __len__(self) -> int:
        return len(self.names)

    def __reduce__(self):
        """Another process gets the file's name, and all arrays only where there is no file."""
        if self.file is not None:
            return _reopen, (self.file, self.fingerprint)
        parts = (self.names, self.labels, self.class_names, self.stamp_names, self.stamps, self.places)
        return Index, (*parts, self.fingerprint)

    def holds(self, root: Path) -> bool:
        """Whether nothing that was looked at has changed since."""
        for position, (modified, size) in enumerate(self.stamps.tolist()):
            try:
                now = os.stat(root / self.stamp_names[position])
            except OSError:
                if modified != MISSING:
                    return False
                continue
            if now.st_mtime_ns != modified or (size >= 0 and now.st_size != size):
                return False
        return self._names_hold(root)

    def _names_hold(self, root: Path) -> bool:
        """Whether some folders have the entries they had, and some files are there.

        On network and object file systems, and after a restored backup, names change while times do not.
        """
        folders = np.flatnonzero(self.stamps[:, 1] < -1)
        for position in _spread(folders, LOOKED_INTO):
            mark = int(self.stamps[position, 1])
            if count_of(mark) <= ENTRIES and entries_mark(os.listdir(root / self.stamp_names[position])) != mark:
                return False
        if not len(folders) or len(self.places):  # a list is taken literally, archives have a stamp each
            return True
        files = _spread(np.arange(len(self)), LOOKED_FOR)
        return all(os.path.lexists(os.path.join(root, self.names[position])) for position in files)

    @property
    def age(self) -> str:
        """Which file keeps this list and for how long, for messages that stem from it; "" where none does."""
        if self.file is None:
            return ""
        try:
            seconds = max(0.0, time.time() - self.file.stat().st_mtime)
        except OSError:
            return f"the list kept in {escape(self.file)}"
        unit, length = next((u, n) for u, n in (("days", 86400), ("hours", 3600), ("minutes", 60), ("seconds", 1))
                            if seconds >= 2 * n or n == 1)  # fmt: skip
        return f"the list kept in {escape(self.file)}, made {seconds / length:.0f} {unit} ago"

    # ---- on disk ----------------------------------------------------------------------------------------------------

    def save(self, file: Path) -> None:
        """Write to ``file``, atomically. Raises OSError."""
        arrays = {
            "names": self.names.blob,
            "name_offsets": self.names.offsets,
            "labels": self.labels,
            "places": self.places,
            "stamp_names": self.stamp_names.blob,
            "stamp_offsets": self.stamp_names.offsets,
            "stamps": self.stamps,
        }
        layout, position = {}, 0
        for name, array in arrays.items():
            layout[name] = (array.dtype.str, array.shape, position)
            position += _aligned(array.nbytes)
        header = {
            "class_names": self.class_names,
            "fingerprint": self.fingerprint,
            "splits": asdict(self.splits),
            "notes": self.notes,
            "arrays": layout,
        }
        head = json.dumps(header).encode()
        head = MAGIC + struct.pack("<Q", len(head)) + head

        def write(temporary: Path) -> None:
            with open(temporary, "wb") as out:
                out.write(head.ljust(_aligned(len(head)), b"\0"))
                for array in arrays.values():
                    out.write(array.tobytes().ljust(_aligned(array.nbytes), b"\0"))

        save_atomically(file, write)

    @classmethod
    def load(cls, file: Path) -> "Index":
        """Open an index without reading it. Raises OSError, or ValueError when it is damaged or of another version."""
        with open(file, "rb") as opened:
            mapped = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
        start = len(MAGIC) + 8
        if mapped[: len(MAGIC)] != MAGIC:
            raise ValueError("not an index of this version")
        end = start + struct.unpack("<Q", mapped[len(MAGIC) : start])[0]
        header = json.loads(mapped[start:end])

        def array(name: str) -> np.ndarray:
            dtype, shape, position = header["arrays"][name]
            count = int(np.prod(shape))
            return np.frombuffer(mapped, dtype, count, _aligned(end) + position).reshape(shape)

        index = cls(
            names=Strings(array("names"), array("name_offsets")),
            labels=array("labels"),
            class_names=header["class_names"],
            stamp_names=Strings(array("stamp_names"), array("stamp_offsets")),
            stamps=array("stamps"),
            places=array("places"),
            fingerprint=header["fingerprint"],
            splits=Splits(**header["splits"]),
            notes=header["notes"],
        )
        index.file = file
        return index


def entries_mark(names: Sequence[str]) -> int:
    """The number of a folder's entries and a checksum of their names, in whatever order, as one number below -1."""
    total = sum(zlib.crc32(os.fsencode(name)) for name in names) & 0xFFFFFFFF
    return -2 - (len(names) << 32 | total)


def count_of(mark: int) -> int:
    """How many entries a mark stands for."""
    return (-2 - mark) >> 32


def _spread(positions: np.ndarray, count: int) -> list[int]:
    """At most ``count`` of the positions, from the first to the last; the same in every process."""
    if len(positions) <= count:
        return positions.tolist()
    return positions[np.linspace(0, len(positions) - 1, count).astype(int)].tolist()


def refresh_indices(wanted: bool) -> None:
    """Whether every list is made anew, once in this process (--refresh_index)."""
    global _made_anew
    _made_anew = set() if wanted else None


_made_anew: set[Path] | None = None


def cached_index(path: Path, root: Path, build: Callable[[], Index]) -> Index:
    """The index of ``path`` (absolute), with names and stamps relative to ``root``; built if there is no valid one.

    One process per node lists while the others wait, so every process of a run has to come here.
    """
    first = int(os.environ.get("LOCAL_RANK", 0)) == 0
    if not first:
        barrier()
    try:
        wanted = _made_anew is not None and path not in _made_anew and first
        index = None if wanted else _load_valid(path, root)
        if index is None:
            index = _build_and_save(path, build)
        else:
            log.info("%s: images as in %s (--refresh_index lists them anew)", escape(path), index.age)
        if _made_anew is not None:
            _made_anew.add(path)
        return index
    finally:
        if first:
            barrier()


def index_file(path: Path) -> Path:
    """Where the index of ``path`` is kept. Raises RuntimeError when this user has no home."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tutelage"
    return folder / f"{hashlib.sha256(os.fsencode(path)).hexdigest()[:24]}.index"


def _load_valid(path: Path, root: Path) -> Index | None:
    try:
        index = Index.load(index_file(path))
    except (OSError, RuntimeError, ValueError, KeyError, TypeError, struct.error):
        return None  # missing or damaged: it will be replaced
    try:
        return index if index.holds(root) else None
    except OSError:  # a folder that can be looked at but not be read any more
        return None


def _build_and_save(path: Path, build: Callable[[], Index]) -> Index:
    index = build()
    try:
        file = index_file(path)
        file.parent.mkdir(parents=True, exist_ok=True)
        index.save(file)
        return Index.load(file)
    except (OSError, RuntimeError) as error:
        log.warning("the list of images cannot be kept (%s); %s will be listed again at every start", error, path)
        return index


def _reopen(file: Path, fingerprint: str) -> Index:
    index = Index.load(file)
    if index.fingerprint != fingerprint:
        raise ValueError(f"{file} was replaced while it was in use: the data set has changed; start again")
    return index


def _fingerprint(names: Strings) -> str:
    digest = hashlib.blake2b(len(names).to_bytes(8, "little"), digest_size=16)
    digest.update(np.ascontiguousarray(names.offsets))
    digest.update(np.ascontiguousarray(names.blob))
    return digest.hexdigest()


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
