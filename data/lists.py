"""Lists: text files with the path of an image in every line, and after a tab its label, if it has one.

A list is taken literally, hidden files included, and refused where a line can be read in two ways: guessing wrongly
costs a run. What a line looks like is judged in all lines, whether its file exists in a few (``check_listed``).
"""

import os
import re
from pathlib import Path

import numpy as np

from data.index import Index, Strings
from data.listing import SHOWN, stamp_of_file
from data.splits import find_splits
from data.suffixes import EXTENSIONS, is_image
from utils import UsageError, escape

FIRST, SPREAD = 10, 50  # lines whose files are looked for: at the beginning, and between there and the end
EXPECTED = "a tab is expected between path and label"
_IMAGE_THEN_MORE = re.compile(rf"(.+?(?:{'|'.join(map(re.escape, EXTENSIONS))}))( *[ ,;|] *)(\S.*)", re.IGNORECASE)
_SEPARATORS = {",": "a comma", ";": "a semicolon", "|": "a bar", "": "a space"}


def list_file(path: Path, inner: str = "") -> Index:
    """The paths in a text file, or those below the folder ``inner`` of the file system. Raises UsageError.

    Labels that are whole numbers from 0 are taken as they are; other labels are names, numbered in sorted order.
    """
    stamp = stamp_of_file(path)
    lines = read_lines(path)
    for number, (_, label) in lines.items():
        if len(label) > 1 and label[0] == label[-1] and label[0] in "\"'":
            _refuse(path, number, label, f"the label is in quotes; {EXPECTED}, and no quotes")
    folders = {os.path.dirname(name) for name, _ in lines.values()}
    places = {folder: os.path.normpath(os.path.join(path.parent, folder)) for folder in folders}
    top = os.path.join(os.sep, inner)
    if inner:
        places = {folder: place for folder, place in places.items() if Path(place).is_relative_to(top)}
        lines = {number: line for number, line in lines.items() if os.path.dirname(line[0]) in places}
    if not lines:
        what = f"no line names an image below {escape(top)}" if inner else "this list of images is empty"
        raise UsageError(f"--data_path {escape(path)}: {what}")
    labels, class_names = number_labels([label for _, label in lines.values()])
    return Index(
        Strings.pack([name for name, _ in lines.values()]),
        labels,
        class_names,
        Strings.pack([path.name]),
        stamp,
        splits=find_splits(place[len(top) :] for place in places.values()),
    )


def read_lines(path: Path) -> dict[int, tuple[str, str]]:
    """Number of the line, from 1 -> path and label ("" where there is none). Raises UsageError for what is no list."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UsageError(f"--data_path {escape(path)}: {error.strerror}") from error
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise UsageError(f"--data_path {escape(path)}: this list is in UTF-16; save it as UTF-8")
    if b"\0" in data[:4096]:
        raise UsageError(f"--data_path {escape(path)}: neither a folder, nor a zip archive, nor a text file of paths")
    if b"\r" in data and b"\n" not in data:
        raise UsageError(f"--data_path {escape(path)}: its lines end as on old Macs, in \\r; save it with ends of \\n")
    lines = {}
    text = data.removeprefix(b"\xef\xbb\xbf").replace(b"\r\n", b"\n")
    for number, line in enumerate(text.split(b"\n"), 1):
        if line.strip():
            name, *rest = os.fsdecode(line).split("\t")
            label = rest[0].strip() if rest else ""
            if not name.strip():
                _refuse(path, number, os.fsdecode(line), f"no path before the tab; {EXPECTED}")
            if any(part.strip() for part in rest[1:]):
                _refuse(path, number, os.fsdecode(line), f"{len(rest) + 1} columns; {EXPECTED}, and no more")
            lines[number] = name, label
    return lines


def check_listed(path: Path, index: Index) -> list[str]:
    """Look for some of the listed files: the first ones, and some up to the end. Returns notes for the user.

    Raises UsageError where a line that names no file shows why, and where most of those looked at name none.
    """
    some = sorted({*range(min(FIRST, len(index))), *np.linspace(0, len(index) - 1, SPREAD).astype(int).tolist()})
    missing = [index.names[position] for position in some if not _is_file(path, index.names[position])]
    if not missing:
        return []
    numbers = {name: number for number, (name, _) in reversed(read_lines(path).items())}
    labels = dict(read_lines(path).values())
    for name in missing[:SHOWN]:
        reason = _reason(path, name, labels[name], header=numbers[name] == min(numbers.values()))
        if reason:
            _refuse(path, numbers[name], name, reason)
    name = missing[0]
    place = escape(os.path.join(path.parent, name))
    found = f"{len(missing)} of the {len(some)} files looked for are missing"
    if 2 * len(missing) > len(some):
        expected = f"paths are expected absolute or relative to the list, and {EXPECTED}"
        _refuse(path, numbers[name], name, f"{place} does not exist, {found}; {expected}")
    return [f"{escape(path)}: {found}; line {numbers[name]}: {place} does not exist"]


def _is_file(path: Path, name: str) -> bool:
    try:
        return os.path.isfile(os.path.join(path.parent, name))
    except ValueError:  # a NUL far from the beginning
        return False


def _reason(path: Path, name: str, label: str, header: bool) -> str:
    """Why a line names no file, where that can be told."""
    match = _IMAGE_THEN_MORE.fullmatch(name)
    if match and not label and not is_image(match[3]):
        separator = _SEPARATORS[match[2].strip()]
        return f"{EXPECTED}, and there is {separator}"
    if name.strip()[0] in "\"'":
        return f"the path is in quotes; write it without, and {EXPECTED}"
    if name != name.strip():
        return f"blanks before or after the path; remove them; {EXPECTED}"
    if os.path.isdir(os.path.join(path.parent, name)):
        return "a folder; one image a line is expected"
    if "\r" in name:
        return "a line end of old Macs, \\r, inside the line; save the list with ends of \\n"
    if name.startswith("~"):
        return "~ is not expanded here; write the whole path"
    if not os.path.isabs(name) and os.path.isfile(name):
        return (
            "this file exists relative to the working folder, and paths are relative to the list's folder, "
            f"{escape(path.parent)}; write them so, or absolute"
        )
    if "\\" in name and _is_file(path, name.replace("\\", "/")):
        return "backslashes between folders; write / instead"
    if label and _is_file(path, label):
        return "the path comes first, then a tab and the label"
    if header and not is_image(name):
        return f"no image, but what looks like a header; remove this line; {EXPECTED}"
    return ""


def _refuse(path: Path, number: int, read: str, reason: str) -> None:
    read = read if len(read) <= 120 else read[:117] + "..."
    raise UsageError(f"--data_path {escape(path)}: line {number}, '{escape(read)}': {reason}")


def number_labels(texts: list[str]) -> tuple[np.ndarray, list[str]]:
    """Labels as text -> (labels, class names); the empty text is unknown, -1."""
    distinct = sorted(set(texts) - {""})
    if all(text.isdecimal() and text.isascii() and len(text) < 7 for text in distinct):
        numbers = {text: int(text) for text in distinct}
        class_names = [str(number) for number in range(max(numbers.values(), default=-1) + 1)]
    else:
        numbers, class_names = {text: number for number, text in enumerate(distinct)}, distinct
    return np.array([numbers.get(text, -1) for text in texts], np.int64), class_names
