"""TSV files of images: key, label and the image in base64 in every line, and beside them where each line begins.

``NAME.lineidx`` holds the byte offset of every line of ``NAME.tsv``; ``NAME.linelist``, if it is there, the numbers of
the lines to keep; ``NAME.chunks``, if it is there and labels have a map, the first and last line of every class as
JSON. The label is a whole number, or with a map the JSON ``[{"class": name}, ...]``, of which the first entry counts.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np

from data.encoded import OpenFiles, read_line
from data.index import MISSING, Index, Strings
from data.listing import stamp_of_file
from utils import UsageError, escape

HEAD = 512  # bytes of a line that mostly hold its key and label
MAX_DIGITS = 6  # of a label

Labels = Callable[[str, str], int]  # key and label as text -> number; raises ValueError


def list_tsv(
    files: list[Path], labels: Labels, class_names: list[str] | None, chosen: list[str] | None = None,
    lineidx: Path | None = None,
) -> Index:  # fmt: skip
    """The lines of all ``files``, one after the other, with places for TsvSource. Raises UsageError.

    ``class_names``: None are those of the numbers up to the largest. ``chosen``: the classes of the map, without which
    ``.chunks`` means nothing. ``lineidx``: where the lines of the only file begin, in any order and repeated; None
    is the file beside each.
    """
    reader = OpenFiles()
    names, numbers, places, watched, stamps = [], [], [], [], []
    for file in files:
        position = len(watched)
        beside = [file.with_suffix(suffix) for suffix in (".lineidx", ".linelist", ".chunks")]
        beside[0] = lineidx or beside[0]
        watched += [entry.name for entry in (file, *beside)]
        stamps += [_stamp(file), _stamp(beside[0], file), *map(_stamp_if_there, beside[1:])]
        starts, size = _integers(beside[0]), int(stamps[position][1])
        _check_starts(file, beside[0], starts, size, reader, ordered=lineidx is None)
        following = np.append(np.unique(starts), size)
        ends = following[np.searchsorted(following, starts, side="right")]
        for row in _rows(file, len(starts), chosen):
            start, end = int(starts[row]), int(ends[row])
            where = f"--data_path {escape(file)}: line {row + 1}"
            key, label, offset = _columns(reader, file, start, end, f"{where} of {beside[0].name}")
            try:
                numbers.append(labels(key, label))
            except ValueError as error:
                raise UsageError(f"{where}, '{escape(key)}': {escape(str(error))}") from error
            names.append(f"{file.name}/{key}")
            places.append((position, offset, end - offset))
    if not names:
        raise UsageError(f"--data_path {escape(files[0])}: no images in {len(files)} TSV file(s)")
    if class_names is None:
        class_names = [str(number) for number in range(max(numbers) + 1)]
    arrays = np.array(numbers, np.int64), np.array(stamps, np.int64), np.array(places, np.int64)
    return Index(Strings.pack(names), arrays[0], class_names, Strings.pack(watched), arrays[1], arrays[2])


def whole_number(key: str, label: str) -> int:
    """The label without a map. Raises ValueError."""
    if not is_label(label):
        raise ValueError(f"the label '{label[:80]}' is no whole number from 0, of at most {MAX_DIGITS} digits")
    return int(label)


def is_label(text: str) -> bool:
    """Whether this is the number of a class."""
    return text.isascii() and text.isdecimal() and len(text) <= MAX_DIGITS


def mapped(numbers: dict[str, int], map_file: Path) -> Labels:
    """Labels in JSON by a map; what raises ValueError is no JSON, or names a class that the map lacks."""

    def label_of(key: str, label: str) -> int:
        try:
            name = json.loads(label)[0]["class"]
        except (ValueError, LookupError, TypeError, RecursionError):
            raise ValueError(f"the label '{label[:80]}' is not the JSON [{{\"class\": NAME}}, ...]") from None
        if not isinstance(name, str) or name not in numbers:
            raise ValueError(f"class '{str(name)[:80]}' is not in the label map {map_file.name}")
        return numbers[name]

    return label_of


def read_label_map(file: Path) -> tuple[dict[str, int], list[str]]:
    """Lines of name, tab, number -> number of every name, and the names by number. Raises UsageError."""
    numbers = {}
    for position, line in enumerate(read_text(file).splitlines(), 1):
        if not line.strip():
            continue
        name, _, number = line.strip().partition("\t")
        if not is_label(number):
            raise UsageError(
                f"--data_path {escape(file)}: line {position}, '{escape(line[:80])}': a class, a tab and its number "
                "are expected"
            )
        numbers[name] = int(number)
    if not numbers:
        raise UsageError(f"--data_path {escape(file)}: this label map is empty")
    names = [str(number) for number in range(max(numbers.values()) + 1)]
    for name, number in numbers.items():
        names[number] = name
    return numbers, names


def read_text(file: Path) -> str:
    """A small file beside the images. Raises UsageError."""
    try:
        return os.fsdecode(file.read_bytes()).removeprefix("\ufeff")
    except OSError as error:
        raise UsageError(f"--data_path {escape(file)}: {error.strerror}") from error


def _stamp(file: Path, of: Path | None = None) -> np.ndarray:
    if of is not None and not file.exists():
        raise UsageError(f"--data_path {escape(of)}: {escape(file.name)}, which says where its lines begin, is missing")
    return stamp_of_file(file)[0]


def _stamp_if_there(file: Path) -> np.ndarray:
    return stamp_of_file(file)[0] if file.exists() else np.array((MISSING, -1))


def _integers(file: Path) -> np.ndarray:
    """A whole number in every line. Raises UsageError."""
    lines = read_text(file).split()
    try:
        if not all(line.isascii() and line.isdecimal() for line in lines):
            raise ValueError
        return np.array(lines, np.int64) if lines else np.zeros(0, np.int64)
    except (ValueError, OverflowError):
        wrong = next((line for line in lines if not (line.isascii() and line.isdecimal())), "")
        raise UsageError(f"--data_path {escape(file)}: '{escape(wrong[:80])}' is no whole number") from None


def _check_starts(file: Path, lineidx: Path, starts: np.ndarray, size: int, reader: OpenFiles, ordered: bool) -> None:
    """Refuse a line index that is not this file's: out of order, beyond its end, or short of lines."""
    where, remedy = f"--data_path {escape(lineidx)}", f"it is not of this {file.name}; make it anew"
    if not len(starts):
        raise UsageError(f"{where}: it is empty; {remedy}")
    if (starts >= size).any() or (starts < 0).any():
        raise UsageError(f"{where}: a line begins at byte {starts.max()} of {size}; {remedy}")
    if not ordered:
        return
    if starts[0] != 0 or (np.diff(starts) <= 0).any():
        raise UsageError(f"{where}: its numbers do not rise from 0; {remedy}")
    last = int(starts[-1])
    end = last + len(read_line(reader, str(file), last, size - last)) + 1
    if end < size:
        raise UsageError(f"{where}: {len(starts)} lines, and more behind them from byte {end} on; {remedy}")


def _rows(file: Path, lines: int, chosen: list[str] | None) -> list[int]:
    """The numbers of the lines that are images, in order. Raises UsageError."""
    linelist, chunks = file.with_suffix(".linelist"), file.with_suffix(".chunks")
    rows = sorted(_integers(linelist).tolist()) if linelist.exists() else list(range(lines))
    if rows and rows[-1] >= lines:
        raise UsageError(f"--data_path {escape(linelist)}: line {rows[-1]} of {lines}, which are counted from 0")
    if chosen is None or not chunks.exists():
        return rows
    try:
        spans = {name: (int(first), int(last)) for name, (first, last) in json.loads(read_text(chunks)).items()}
    except (ValueError, TypeError, AttributeError, RecursionError):
        raise UsageError(f"--data_path {escape(chunks)}: not the JSON {{class: [first line, last line]}}") from None
    kept, wanted = set(rows), set(chosen)
    for name, (first, last) in spans.items():
        if not 0 <= first <= last < lines:
            raise UsageError(f"--data_path {escape(chunks)}: {escape(name)} has lines {first} to {last} of {lines}")
    return [row for name, (first, last) in spans.items() if name in wanted
            for row in range(first, last + 1) if row in kept]  # fmt: skip


def _columns(reader: OpenFiles, file: Path, start: int, end: int, where: str) -> tuple[str, str, int]:
    """Key and label of a line as text, and where its third column begins. Raises UsageError."""
    before = min(1, start)
    head = reader.read(str(file), min(HEAD, end - start) + before, start - before)
    if before and head[:1] != b"\n":
        raise UsageError(f"{where}: no line begins at byte {start} of {file.name}; make the line index anew")
    head = head[before:]
    if head.count(b"\t") < 2:
        head = read_line(reader, str(file), start, end - start)
    columns = head.split(b"\n")[0].split(b"\t", 2)
    if len(columns) < 3:
        raise UsageError(f"{where}: {len(columns)} column(s) at byte {start} of {file.name}; key, label and image are "
                         "expected")  # fmt: skip
    key, label = (os.fsdecode(column).strip() for column in columns[:2])
    return key, label, start + len(columns[0]) + len(columns[1]) + 2
