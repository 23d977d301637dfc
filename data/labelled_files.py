"""The official files of labelled data sets: from a folder and a split to names, labels and classes.

A reader is a function (root, split, seed) -> Listing, with names relative to the root and labels from 0. Where a file
is missing, its error says which.
"""

import io
import json
import pickle
import random
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data.listing import EXTENSIONS
from data.matlab import read_matlab
from utils import UsageError, escape


class Listing(NamedTuple):
    names: list[str]
    labels: list[int]
    class_names: list[str]


def lines_of(path: Path) -> list[str]:
    """Lines without what surrounds them, empty ones left out. Raises UsageError."""
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{escape(path)}: {getattr(error, 'strerror', None) or 'not a text file'}") from error
    return [line.strip() for line in text.splitlines() if line.strip()]


def json_of(path: Path) -> object:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UsageError(f"{escape(path)}: {getattr(error, 'strerror', None) or f'not JSON ({error})'}") from error


def variables(path: Path, *names: str) -> list:
    found = read_matlab(path)
    missing = [name for name in names if name not in found]
    if missing:
        raise UsageError(f"{escape(path)}: has no variable {missing[0]}; take the official file")
    return [found[name] for name in names]


def numbered(names: Iterable[str]) -> dict[str, int]:
    return {name: number for number, name in enumerate(names)}


def label_of(name: str, numbers: dict[str, int], path: Path) -> int:
    if name not in numbers:
        raise UsageError(f"{escape(path)}: class {escape(name)} is not in the list of classes")
    return numbers[name]


def flowers(root: Path, split: str, seed: int = 0) -> Listing:
    """Training is trnid followed by valid; image i is the i-th of the sorted names in jpg/."""
    (labels,) = variables(root / "imagelabels.mat", "labels")
    parts = variables(root / "setid.mat", *{"trainval": ("trnid", "valid"), "test": ("tstid",)}[split])
    files = sorted(path.name for path in _folder(root / "jpg") if path.suffix.lower() == ".jpg")
    labels, chosen = labels.ravel().astype(int) - 1, np.concatenate([part.ravel() for part in parts]).astype(int) - 1
    if len(files) != len(labels) or chosen.max(initial=0) >= len(labels):
        raise UsageError(f"{escape(root / 'jpg')}: {len(files)} images, imagelabels.mat has {len(labels)}")
    class_names = [f"class {number + 1}" for number in range(labels.max() + 1)]
    return Listing([f"jpg/{files[i]}" for i in chosen], labels[chosen].tolist(), class_names)


def cars(root: Path, split: str, seed: int = 0) -> Listing:
    """Labels count from 0. parity: DeiT's descendants take a column of the bounding boxes for the class."""
    annotations, class_names = variables(root / "cars_annos.mat", "annotations", "class_names")
    try:
        rows = [(a["relative_im_path"], int(a["class"].item()) - 1, int(a["test"].item())) for a in annotations]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UsageError(
            f"{escape(root / 'cars_annos.mat')}: annotations without class and test ({error!r})"
        ) from error
    rows = [row for row in rows if row[2] == (split == "test")]
    return Listing([row[0] for row in rows], [row[1] for row in rows], list(class_names))


def aircraft(root: Path, split: str, seed: int = 0) -> Listing:
    data = root / "data" if (root / "data").is_dir() else root
    classes = lines_of(data / "variants.txt")
    numbers, path = numbered(classes), data / f"images_variant_{split}.txt"
    rows = [(line[:7], line[7:].strip()) for line in lines_of(path)]
    folder = f"{'data/' if data != root else ''}images"
    return Listing([f"{folder}/{name}.jpg" for name, _ in rows], [label_of(c, numbers, path) for _, c in rows], classes)


def dtd(root: Path, split: str, seed: int = 0) -> Listing:
    """Split 1 of ten: train1 and val1, or test1."""
    lists = {"trainval": ("train1.txt", "val1.txt"), "test": ("test1.txt",)}[split]
    names = [line for name in lists for line in lines_of(root / "labels" / name)]
    classes = sorted(path.name for path in _folder(root / "images") if path.is_dir())
    numbers = numbered(classes)
    labels = [label_of(name.split("/")[0], numbers, root / "labels" / lists[0]) for name in names]
    return Listing([f"images/{name}" for name in names], labels, classes)


EUROSAT_TEST = 810  # of every class


def eurosat(root: Path, split: str, seed: int) -> Listing:
    """Undivided as it is published: of every class's shuffled files the first 810 are for testing.

    The original's shuffle has no seed; here it is t-ReX's.
    """
    draws, names, labels = random.Random(seed), [], []
    classes = sorted(path.name for path in _folder(root) if path.is_dir())
    for number, class_name in enumerate(classes):
        files = sorted(path.name for path in _folder(root / class_name) if path.suffix.lower() in EXTENSIONS)
        draws.shuffle(files)
        chosen = files[:EUROSAT_TEST] if split == "test" else files[EUROSAT_TEST:]
        names += [f"{class_name}/{name}" for name in chosen]
        labels += [number] * len(chosen)
    return Listing(names, labels, classes)


def pets(root: Path, split: str, seed: int = 0) -> Listing:
    path = root / "annotations" / f"{split}.txt"
    rows = [line.split() for line in lines_of(path) if not line.startswith("#")]
    try:
        labels = [int(row[1]) - 1 for row in rows]
    except (IndexError, ValueError) as error:
        raise UsageError(f"{escape(path)}: expected a name and the number of its class in every line") from error
    by_label = {label: row[0].rpartition("_")[0] for row, label in zip(rows, labels, strict=True)}
    classes = [by_label.get(label, f"class {label + 1}") for label in range(max(labels, default=-1) + 1)]
    return Listing([f"images/{row[0]}.jpg" for row in rows], labels, classes)


def food(root: Path, split: str, seed: int = 0) -> Listing:
    path = root / "meta" / {"trainval": "train.txt", "test": "test.txt"}[split]
    names = lines_of(path)
    classes = sorted(lines_of(root / "meta" / "classes.txt"))
    numbers = numbered(classes)
    labels = [label_of(name.split("/")[0], numbers, path) for name in names]
    return Listing([f"images/{name}.jpg" for name in names], labels, classes)


def sun(root: Path, split: str, seed: int = 0) -> Listing:
    """Partition 01; lists and class names lie in Partitions/ or beside the images."""
    folder = root / "Partitions" if (root / "Partitions").is_dir() else root
    path = folder / {"trainval": "Training_01.txt", "test": "Testing_01.txt"}[split]
    names, classes = lines_of(path), lines_of(folder / "ClassName.txt")
    numbers = numbered(classes)
    labels = [label_of(name.rpartition("/")[0], numbers, path) for name in names]
    return Listing([name.lstrip("/") for name in names], labels, classes)


def inaturalist(year: int, category: str | None = None) -> Callable[[Path, str, int], Listing]:
    """By ``category_id``, as t-ReX; or by a level of categories.json (``name``, ``genus``, ...), whose values are
    numbered as they first appear in the training annotations, as DeiT's descendants do.
    """

    def read(root: Path, split: str, seed: int = 0) -> Listing:
        path = root / f"{'train' if split == 'trainval' else 'val'}{year}.json"
        names, ids = _annotated(path)
        if category is None:
            _, known = _annotated(root / f"train{year}.json") if split == "test" else (names, ids)
            return Listing(names, ids, [f"category {number}" for number in range(max([*known, *ids]) + 1)])
        levels = json_of(root / "categories.json")
        try:
            by_id = {entry.get("id", position): str(entry[category]) for position, entry in enumerate(levels)}
            classes = list(dict.fromkeys(by_id[i] for i in _annotated(root / f"train{year}.json", in_order=True)[1]))
            numbers = numbered(classes)
            labels = [label_of(by_id[i], numbers, path) for i in ids]
        except (KeyError, TypeError, AttributeError) as error:
            raise UsageError(
                f"{escape(root / 'categories.json')}: no {category} of every category ({error!r})"
            ) from error
        return Listing(names, labels, classes)

    return read


def _annotated(path: Path, in_order: bool = False) -> tuple[list[str], list[int]]:
    """Names and category ids of the images, in the order of the images, or of the annotations."""
    content = json_of(path)
    try:
        files = {image["id"]: image["file_name"] for image in content["images"]}
        of_image = {entry["image_id"]: int(entry["category_id"]) for entry in content["annotations"]}
        order = of_image if in_order else files
        return [files[i] for i in order], [of_image[i] for i in order]
    except (KeyError, TypeError, ValueError) as error:
        raise UsageError(f"{escape(path)}: images and annotations do not fit ({error!r})") from error


class _PlainUnpickler(pickle.Unpickler):
    """Containers, text and numbers; anything that names a class or a function is refused before it exists."""

    def find_class(self, module: str, name: str) -> None:
        raise UsageError(f"holds {module}.{name}, which is not plain data")


def plain_pickle(path: Path) -> object:
    try:
        return _PlainUnpickler(io.BytesIO(path.read_bytes())).load()
    except UsageError as error:
        raise UsageError(f"{escape(path)}: {error}; refused") from error
    except Exception as error:
        reason = getattr(error, "strerror", None) or f"not a pickle of plain data ({type(error).__name__})"
        raise UsageError(f"{escape(path)}: {reason}") from error


def cog(level: int) -> Callable[[Path, str, int], Listing]:
    """ImageNet-CoG (2012.05649): concepts of a level, sorted by name, and the files of each, of two dictionaries."""

    def read(root: Path, split: str, seed: int = 0) -> Listing:
        levels, files = (plain_pickle(_only(root, pattern)) for pattern in ("*level*.pkl", "*split*.pkl"))
        part = {"trainval": "train", "test": "test"}[split]
        try:
            concepts = levels[f"L{level}"] if f"L{level}" in levels else levels[f"l{level}"]
            classes = sorted(concepts)
            names = [[f"{c}/{Path(name).name}" for name in files[c][part]] for c in classes]
        except (KeyError, TypeError) as error:
            raise UsageError(f"{escape(root)}: the split files do not say level {level} ({error!r})") from error
        labels = [number for number, found in enumerate(names) for _ in found]
        return Listing([name for found in names for name in found], labels, classes)

    return read


def _only(root: Path, pattern: str) -> Path:
    found = sorted(root.glob(pattern))
    if len(found) != 1:
        raise UsageError(f"{escape(root)}: {len(found)} files are called {pattern}, one of ImageNet-CoG's is needed")
    return found[0]


def _folder(path: Path) -> list[Path]:
    try:
        return list(path.iterdir())
    except OSError as error:
        raise UsageError(f"{escape(path)}: {error.strerror}") from error
