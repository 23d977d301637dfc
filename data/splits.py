"""Roots that hold splits: which of the folders below one is trained on, and which is the test set.

One rule for folders, archives and lists. After the folders that all images share, a folder for training and one for
validation or testing beside it are splits if their names differ in that word alone: train/ and val/, Training/ and
Testing/, seg_train/ and seg_test/. One of them without the other is a class (trains are photographed, too).
"""

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path

from utils import UsageError, escape

TRAIN_WORDS, VAL_WORDS, TEST_WORDS = ("train", "training"), ("val", "valid", "validation"), ("test", "testing")
WORDS = (*TRAIN_WORDS, *VAL_WORDS, *TEST_WORDS)
_WORD_IN_NAME = re.compile(rf"((?:.*[^a-z])?)({'|'.join(sorted(WORDS, key=len, reverse=True))})((?:[^a-z].*)?)")


@dataclass(frozen=True)
class Splits:
    """The folders below the shared ones, and what tells whether they are splits.

    ``prefix``: the shared folders, "" or "data/images". ``folders``: name -> whether it holds folders of its own.
    ``nested``: one of them that holds splits itself, as in cat/train, cat/val, dog/train, dog/val.
    """

    prefix: str = ""
    folders: dict[str, bool] = field(default_factory=dict)
    nested: str = ""

    def path(self, root: Path, name: str) -> Path:
        return root / self.prefix / name

    def train(self, root: Path) -> str | None:
        """The folder to be trained on; None where there are no splits. Raises UsageError when it could be several."""
        everything = f"--data_path {escape(root)}"
        if self.nested:
            inside = escape(os.path.join(self.prefix, self.nested))
            raise UsageError(
                f"{everything}: {inside}/ holds a training and a test set of its own; pass "
                f"--data_path {escape(root / inside)}, or to train on everything --split all"
            )
        trains, tests = split_names(self.folders)
        if not trains:
            return None
        advice = f"pass --data_path {escape(self.path(root, trains[0]))}, or to train on everything --split all"
        if len(trains) > 1:
            raise UsageError(f"{everything}: {_listed(trains)} could each be the training images; {advice}")
        others = sorted(set(self.folders) - {trains[0], *tests})
        if others and not self.folders[trains[0]]:
            raise UsageError(
                f"{everything}: {trains[0]}/ and {_listed(tests)} could be splits or, like {_listed(others)}, "
                f"classes; {advice}"
            )
        return trains[0]

    def test(self, root: Path, watched: bool = False) -> str | None:
        """The folder of the test images, of several the only one with classes; None where there are no splits.

        ``watched``: for a look during training, when validation images are preferred, so that test images stay unseen.
        Raises UsageError when it could be several.
        """
        tests = split_names(self.folders)[1]
        classes = [name for name in tests if self.folders[name]] or tests
        if watched and len(classes) > 1:
            classes = [name for name in classes if split_word(name)[1] in VAL_WORDS] or classes
        if len(classes) > 1:
            raise UsageError(
                f"--data_path {escape(root)}: {_listed(classes)} could each be the test images; "
                f"pass one of them, --eval_data_path {escape(self.path(root, classes[0]))}"
            )
        return classes[0] if classes else None

    def left_alone(self, name: str) -> str:
        return _listed(sorted(set(self.folders) - {name}))


def find_splits(folders: Iterable[str]) -> Splits:
    """The splits among ``folders`` that hold images, "data/train/cat" each."""
    parts = [[part for part in folder.split("/") if part not in ("", ".")] for folder in folders]
    shared = sum(1 for _ in takewhile(lambda level: len(set(level)) == 1, zip(*parts, strict=False)))
    inner: dict[str, set[str]] = {}
    for folder in parts:
        if len(folder) > shared:
            inner.setdefault(folder[shared], set()).update(folder[shared + 1 : shared + 2])
    if not has_splits(inner):
        nested = next((name for name, below in sorted(inner.items()) if has_splits(below)), "")
        return Splits("/".join(parts[0][:shared]), nested=nested)
    return Splits("/".join(parts[0][:shared]), {name: bool(below) for name, below in sorted(inner.items())})


def split_word(name: str) -> tuple[str, str] | None:
    """("seg_*", "train") of seg_train; None for a name without such a word."""
    match = _WORD_IN_NAME.fullmatch(name.lower())
    return match and (f"{match[1]}*{match[3]}", match[2])


def split_names(names: Iterable[str]) -> tuple[list[str], list[str]]:
    """Those for training and those for validation or testing that differ in that word alone; both or none."""
    found: dict[str, tuple[list[str], list[str]]] = {}
    for name in sorted(names):
        word = split_word(name)
        if word is not None:
            found.setdefault(word[0], ([], []))[word[1] not in TRAIN_WORDS].append(name)
    pairs = [pair for pair in found.values() if all(pair)]
    return sorted(name for pair in pairs for name in pair[0]), sorted(name for pair in pairs for name in pair[1])


def has_splits(names: Iterable[str]) -> bool:
    return split_names(names) != ([], [])


def _listed(names: list[str]) -> str:
    shown = [f"{escape(name)}/" for name in names[:5]]
    return ", ".join(shown) + f" and {len(names) - 5} more" * (len(names) > 5)
