"""MATLAB's files of version 5, as far as data sets use them: numbers, text, cells and structures; nothing is executed.

Layout: 128 bytes of header, then elements of a type, a size and data padded to eight bytes; a small element has type,
size and up to four bytes of data in eight. A matrix (type 14) is made of elements: flags, dimensions, name, data.
"""

import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from utils import UsageError, escape

HEADER, MATRIX, COMPRESSED = 128, 14, 15
NUMBERS = {
    1: "i1",
    2: "u1",
    3: "i2",
    4: "u2",
    5: "i4",
    6: "u4",
    7: "f4",
    9: "f8",
    12: "i8",
    13: "u8",
    16: "u1",
    17: "u2",
}
CELL, STRUCTURE, TEXT = 1, 2, 4


def read_matlab(path: Path) -> dict[str, np.ndarray | list | str]:
    """Variables by name: arrays, text as str, cells as lists, structures as lists of dicts. Raises UsageError."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UsageError(f"{escape(path)}: {error.strerror}") from error
    if data[126:128] != b"IM" or len(data) < HEADER:
        raise UsageError(f"{escape(path)}: not a MATLAB file of version 5 (little-endian); take the official one")
    try:
        found = dict(_variables(data[HEADER:]))
    except (struct.error, zlib.error, ValueError, KeyError, IndexError, StopIteration, UnicodeDecodeError) as error:
        raise UsageError(f"{escape(path)}: damaged ({type(error).__name__}: {error}); take it anew") from error
    return {name: value for name, value in found.items() if name}


def _variables(data: bytes) -> Iterator[tuple[str, object]]:
    for kind, content in _elements(data):
        if kind == COMPRESSED:
            yield from _variables(zlib.decompress(content))
        elif kind == MATRIX:
            yield _matrix(content)


def _elements(data: bytes) -> Iterator[tuple[int, bytes]]:
    position = 0
    while position + 8 <= len(data):
        kind, size = struct.unpack_from("<II", data, position)
        if kind >> 16:  # a small element
            kind, size, start = kind & 0xFFFF, kind >> 16, position + 4
            position += 8
        else:
            start = position + 8
            position = start + size + (-size % 8 if kind != COMPRESSED else 0)
        if start + size > len(data):
            raise ValueError(f"an element of {size} bytes goes beyond its end")
        yield kind, data[start : start + size]


def _matrix(content: bytes) -> tuple[str, object]:
    parts = _elements(content)
    (_, flags), (_, sizes), (_, name) = next(parts), next(parts), next(parts)
    shape, kind = tuple(np.frombuffer(sizes, "<i4")), flags[0]
    if kind == CELL:
        value: object = [_matrix(part)[1] for _, part in parts]
    elif kind == STRUCTURE:
        length = int(np.frombuffer(next(parts)[1], "<i4")[0])
        names = next(parts)[1]
        fields = [names[i : i + length].split(b"\0")[0].decode() for i in range(0, len(names), length)]
        values = [_matrix(part)[1] for _, part in parts]
        value = [
            dict(zip(fields, values[i : i + len(fields)], strict=True)) for i in range(0, len(values), len(fields))
        ]
    else:
        number, raw = next(parts, (2, b""))
        array = np.frombuffer(raw, "<" + NUMBERS[number])
        value = "".join(map(chr, array)) if kind == TEXT else array.reshape(shape, order="F")
    return name.decode(), value
