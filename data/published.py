"""Published data sets whose folder alone does not tell how it is stored, and the options that say it.

EsViT's ``--dataset``, ``--zip_mode`` and ``--tsv_mode``, for every method and evaluation: ``place_from`` makes of them
and of ``--data_path`` what data/datasets.py opens. Everything else is a path, which tells for itself.
"""

import argparse
import json
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data.encoded import FileSource, IndexedSource, TsvSource, ZipSource
from data.index import Index, Strings, cached_index
from data.listing import shown, stamp_of_file, zip_images
from data.lists import FIRST, SPREAD, number_labels
from data.tsv import is_label, list_tsv, mapped, read_label_map, read_text, whole_number
from utils import UsageError, bool_flag, escape

ZIP, TSV, TSV_WITH_MAP, WEBVISION, OPENIMAGES = "zip", "tsv", "imagenet22k", "webvision1", "openimages_v4"
DATASET_OPTIONS = ("dataset", "zip_mode", "tsv_mode", "sampler")
IMAGES_IN_ZIP = (".jpg", ".jpeg", ".tiff", ".bmp", ".png")  # parity: the original reads no others
LABEL_MAP_22K = "labelmap_22k_reorder.txt"
WEBVISION_LISTS = {"train": ("train_filelist_google.txt", "train_filelist_flickr.txt"), "val": ("val_filelist.txt",)}
WEBVISION_CLASSES = 1000
OPENIMAGES_FILES = (
    "train.tsv", "train.balance_min1000.lineidx",
    "train.label.verify_20191102.tsv", "train.label.verify_20191102.6962.tag.labelmap",
)  # fmt: skip


class Published(NamedTuple):
    """A part, train or val, of the data set below ``root``, stored as ``form`` says."""

    form: str
    root: str
    part: str = "train"

    def of(self, part: str) -> "Published":
        return self._replace(part=part)

    def beside(self, root: str) -> "Published":
        """The same form elsewhere."""
        return self._replace(root=os.path.abspath(root))


def add_dataset_arguments(parser: argparse._ActionsContainer) -> None:
    """The options from which ``place_from`` tells how the images at --data_path are stored."""
    add = parser.add_argument
    add(
        "--dataset",
        default="imagenet1k",
        help="webvision1, openimages_v4: read by their own lists below --data_path; with --tsv_mode imagenet22k has a "
        "label map; any other name is as the first",
    )
    switch = {"nargs": "?", "const": True, "default": False, "type": bool_flag}
    add("--zip_mode", **switch, help="--data_path holds train.zip and train_map.txt, and val.zip and val_map.txt")
    add("--tsv_mode", **switch, help="--data_path holds train.tsv and train.lineidx, or such files in train/, and val")
    add(
        "--sampler",
        default="distributed",
        type=_sampler,
        help="the original's; chunk, made for Azure's storage, is refused",
    )


def _sampler(text: str) -> str:
    if text == "chunk":
        raise argparse.ArgumentTypeError(
            "chunk shuffles within the parts of a download from Azure, which is not supported: copy the TSV files, and "
            "pass --sampler distributed"
        )
    if text != "distributed":
        raise argparse.ArgumentTypeError(f"{text}: there is only distributed")
    return text


def place_from(args: argparse.Namespace) -> str | Published | None:
    """Where the images are and how they are stored: the path itself where that tells. Raises UsageError."""
    form = _form(args.dataset, args.zip_mode, args.tsv_mode)
    if args.data_path is not None and "://" in args.data_path:
        raise UsageError(f"--data_path {escape(args.data_path)}: nothing is read from a net, as Azure's; copy it")
    if form is None:
        return args.data_path
    said = "--zip_mode" if form == ZIP else "--tsv_mode" if args.tsv_mode else f"--dataset {escape(args.dataset)}"
    if args.data_path is None:
        raise UsageError(f"{said}: says how the images at --data_path are stored; pass that as well")
    if getattr(args, "split", "train") == "all":
        raise UsageError(f"--split all: with {said} the files named train are trained on; leave it out")
    return Published(form, os.path.abspath(args.data_path))


def _form(dataset: str, zip_mode: bool, tsv_mode: bool) -> str | None:
    if zip_mode and tsv_mode:
        raise UsageError("--zip_mode and --tsv_mode: the images are stored in one way; pass one of them")
    own = next((name for name in (WEBVISION, OPENIMAGES) if name in dataset), None)
    if own and (zip_mode or (tsv_mode and own == WEBVISION)):
        mode = "--zip_mode" if zip_mode else "--tsv_mode"
        raise UsageError(f"--dataset {escape(dataset)} {mode}: this data set has files of its own; leave {mode} out")
    if own or zip_mode:
        return own or ZIP
    return (TSV_WITH_MAP if "imagenet22k" in dataset else TSV) if tsv_mode else None


def open_published(place: Published) -> IndexedSource:
    """The images of a part. Raises UsageError, as where a file that belongs to it is missing."""
    return _OPEN[place.form](Path(place.root), place)


def _cached(root: Path, place: Published, build) -> Index:
    key = Path(place.root) / f"{place.form}:{place.part}"  # the path of a file in it may be opened as something else
    return cached_index(key, root, build)


def _needed(place: Published, *names: str) -> list[Path]:
    files = [Path(place.root, name) for name in names]
    for file in files:
        if not file.is_file():
            form = f"--{place.form}_mode" if place.form in (ZIP, TSV) else f"--dataset {place.form}"
            raise UsageError(f"--data_path {escape(place.root)}: {form} needs {escape(file.name)}, which is missing")
    return files


# ---- zip with a map -------------------------------------------------------------------------------------------------


def _open_zip(root: Path, place: Published) -> ZipSource:
    archive, map_file = _needed(place, f"{place.part}.zip", f"{place.part}_map.txt")
    return ZipSource(archive, _cached(root, place, lambda: list_mapped_zip(archive, map_file)))


def list_mapped_zip(archive: Path, map_file: Path) -> Index:
    """What is listed in a map, ARCHIVE@/path, tab, label in every line, in the order of the archive's directory.

    Entries that are empty or no image by their name are passed over. Raises UsageError for a map that names what the
    archive does not hold.
    """
    where = f"--data_path {escape(map_file)}"
    stamps = [stamp_of_file(archive)[0], stamp_of_file(map_file)[0]]
    labels = _read_map(map_file)
    images, everything, passed = zip_images(archive)
    places = {os.path.join(*image): row for image, row in images.items()}
    everything = set(everything)
    missing = [name for name in labels if name not in everything]
    if missing:
        raise UsageError(f"{where}: {len(missing)} of {len(labels)} lines name what is not in {archive.name}, such as "
                         f"{escape(missing[0])}")  # fmt: skip
    names = [name for name, row in places.items() if name in labels and row[2] and name.lower().endswith(IMAGES_IN_ZIP)]
    if not names:
        raise UsageError(f"{where}: none of its {len(labels)} lines names an image of {archive.name}; "
                         f"images end in {' '.join(IMAGES_IN_ZIP)}")  # fmt: skip
    numbers, class_names = number_labels([labels[name] for name in names])
    empty = [name for name in labels if name in places and not places[name][2]]
    notes = passed.notes(archive)
    if empty:
        notes.append(f"{escape(archive)}: {len(empty)} empty files passed over: {shown(empty)}")
    rows = np.array([places[name] for name in names], np.int64)
    watched = Strings.pack([archive.name, map_file.name])
    return Index(Strings.pack(names), numbers, class_names, watched, np.array(stamps), rows, notes=notes)


def _read_map(map_file: Path) -> dict[str, str]:
    labels = {}
    for number, line in enumerate(read_text(map_file).split("\n"), 1):
        if not line.strip():
            continue
        entry, _, label = line.rstrip("\r").partition("\t")
        name = (entry.partition("@")[2] if "@" in entry else entry).removeprefix("/")
        label = label.strip()
        if not label or not name:
            raise UsageError(f"--data_path {escape(map_file)}: line {number}, '{escape(line[:120])}': ARCHIVE@/PATH, "
                             "a tab and a label are expected")  # fmt: skip
        if labels.setdefault(name, label) != label:
            raise UsageError(f"--data_path {escape(map_file)}: line {number} gives {escape(name)} a second label")
    return labels


# ---- TSV ------------------------------------------------------------------------------------------------------------


def _open_tsv(root: Path, place: Published) -> TsvSource:
    files = [root / f"{place.part}.tsv"]
    if not files[0].is_file():
        files = sorted((root / place.part).glob("*.tsv"))
    if not files:
        raise UsageError(f"--data_path {escape(place.root)}: --tsv_mode needs {place.part}.tsv there, or *.tsv in "
                         f"{place.part}/, and there are none")  # fmt: skip
    maps = _needed(place, LABEL_MAP_22K) if place.form == TSV_WITH_MAP else []
    index = _cached(files[0].parent, place, lambda: _list_tsv(files, maps))
    return TsvSource(root / place.part if len(files) > 1 else files[0], index, files[0].parent)


def _list_tsv(files: list[Path], maps: list[Path]) -> Index:
    if not maps:
        return list_tsv(files, whole_number, None)
    numbers, names = read_label_map(maps[0])
    return _watching(list_tsv(files, mapped(numbers, maps[0]), names, list(numbers)), files[0].parent, maps)


def _watching(index: Index, root: Path, files: list[Path]) -> Index:
    """The same index, that holds as long as these files do, too."""
    watched = [index.stamp_names[position] for position in range(len(index.stamps))]
    index.stamp_names = Strings.pack(watched + [os.path.relpath(file, root) for file in files])
    index.stamps = np.concatenate([index.stamps, *map(stamp_of_file, files)])
    return index


def _open_openimages(root: Path, place: Published) -> TsvSource:
    if place.part != "train":
        raise UsageError(f"--data_path {escape(place.root)}: --dataset {OPENIMAGES} has training images only")
    tsv, lineidx, labels, names = _needed(place, *OPENIMAGES_FILES)
    index = _cached(root, place, lambda: _list_openimages(tsv, lineidx, labels, names))
    return TsvSource(tsv, index, root)


def _list_openimages(tsv: Path, lineidx: Path, labels: Path, names: Path) -> Index:
    """Images by the balanced line index, which repeats those of rare classes. Images bear several labels, so only one
    that bears a single one has a class.
    """
    classes = [line.strip() for line in read_text(names).splitlines() if line.strip()]
    found = _read_tags(labels, {name: number for number, name in enumerate(classes)})

    def label_of(key: str, _: str) -> int:
        if key not in found:
            raise ValueError(f"no line of {labels.name} says what it shows")
        return found[key]

    index = list_tsv([tsv], label_of, classes, lineidx=lineidx)
    return _watching(index, tsv.parent, [labels, names])


def _read_tags(file: Path, numbers: dict[str, int]) -> dict[str, int]:
    """Key -> its class, or -1 where it has several or none that counts (those with a minus are verified absent)."""
    found = {}
    for number, line in enumerate(read_text(file).splitlines(), 1):
        key, _, text = line.strip().partition("\t")
        text = text.split("\t")[0]
        try:
            tags = [tag["class"] for tag in json.loads(text)] if text.startswith("[") else text.split(";")
            known = {numbers[tag] for tag in tags if not tag.startswith("-") and tag in numbers}
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            raise UsageError(f"--data_path {escape(file)}: line {number}: the label is not the JSON "
                             '[{"class": NAME}, ...]') from None  # fmt: skip
        found[key] = known.pop() if len(known) == 1 else -1
    return found


# ---- WebVision ------------------------------------------------------------------------------------------------------


def _open_webvision(root: Path, place: Published) -> FileSource:
    lists = _needed(place, *(f"info/{name}" for name in WEBVISION_LISTS[place.part]))
    return FileSource(root, _cached(root, place, lambda: list_webvision(root, lists)), root)


def list_webvision(root: Path, lists: list[Path]) -> Index:
    """The images that several lists name, path, space, class in every line, relative to ``root``. Raises UsageError."""
    names, numbers = [], []
    for file in lists:
        below = "val_images_256" if file.name.startswith("val") and (root / "val_images_256").is_dir() else ""
        for position, line in enumerate(read_text(file).splitlines(), 1):
            if not line.strip():
                continue
            name, _, number = line.strip().rpartition(" ")
            if not name or not is_label(number):
                raise UsageError(f"--data_path {escape(file)}: line {position}, '{escape(line[:120])}': a path, a "
                                 "space and the number of a class are expected")  # fmt: skip
            if int(number) < WEBVISION_CLASSES:
                names.append(os.path.join(below, name.strip()))
                numbers.append(int(number))
    some = sorted({*range(min(FIRST, len(names))), *np.linspace(0, len(names) - 1, SPREAD).astype(int).tolist()})
    missing = [names[i] for i in some if names and not os.path.isfile(root / names[i])]
    if not names or 2 * len(missing) > len(some):
        found = f"{escape(os.path.join(root, missing[0]))} does not exist" if names else "they name no image"
        raise UsageError(f"--data_path {escape(lists[0])}: {found}; its paths are relative to {escape(root)}")
    class_names = [str(number) for number in range(max(numbers) + 1)]
    watched = Strings.pack([os.path.relpath(file, root) for file in lists])
    stamps = np.concatenate([*map(stamp_of_file, lists)])
    return Index(Strings.pack(names), np.array(numbers, np.int64), class_names, watched, stamps)


_OPEN = {
    ZIP: _open_zip,
    TSV: _open_tsv,
    TSV_WITH_MAP: _open_tsv,
    WEBVISION: _open_webvision,
    OPENIMAGES: _open_openimages,
}
