"""Official layouts, in miniature: names, labels and splits of every set, and what is said when something is missing."""

import json
import pickle
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest

from data import labelled_files
from data.labelled import SETS, open_labelled
from data.labelled_files import inaturalist
from data.matlab import read_matlab
from utils import UsageError


def touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def write(path: Path, *lines: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")


# ---- MATLAB's files, written as it writes them ----------------------------------------------------------------------


def element(kind: int, data: bytes) -> bytes:
    return struct.pack("<II", kind, len(data)) + data + bytes(-len(data) % 8)


def matrix(kind: int, shape: tuple, body: bytes, name: str = "") -> bytes:
    head = element(6, struct.pack("<II", kind, 0)) + element(5, struct.pack(f"<{len(shape)}i", *shape))
    return element(14, head + element(1, name.encode()) + body)


def number(value, name: str = "") -> bytes:
    array = np.atleast_2d(np.asarray(value, "<f8"))
    return matrix(6, array.shape, element(9, array.tobytes(order="F")), name)


def text(value: str) -> bytes:
    return matrix(4, (1, len(value)), element(4, value.encode("utf-16-le")))


def cells(values: list[str], name: str) -> bytes:
    return matrix(1, (1, len(values)), b"".join(map(text, values)), name)


def structures(rows: list[dict], name: str) -> bytes:
    fields = list(rows[0])
    small = struct.pack("<HHi", 5, 4, 16)  # the length of a field's name, as a small element
    body = small + element(1, b"".join(field.encode().ljust(16, b"\0") for field in fields))
    body += b"".join(text(v) if isinstance(v, str) else number(v) for row in rows for v in row.values())
    return matrix(2, (1, len(rows)), body, name)


def matlab(path: Path, *variables: bytes, compressed: bool = False) -> None:
    if compressed:
        packed = [zlib.compress(variable) for variable in variables]
        variables = tuple(struct.pack("<II", 15, len(data)) + data for data in packed)
    path.write_bytes(b"MATLAB 5.0 MAT-file".ljust(124) + b"\0\1IM" + b"".join(variables))


@pytest.mark.parametrize("compressed", [False, True])
def test_numbers_text_cells_and_structures_are_read(tmp_path, compressed):
    rows = [{"file": "a.jpg", "class": 3}, {"file": "b.jpg", "class": 1}]
    parts = (number([[1, 2, 3], [4, 5, 6]], "table"), cells(["Audi", "VW"], "names"), structures(rows, "rows"))
    matlab(tmp_path / "x.mat", *parts, compressed=compressed)
    found = read_matlab(tmp_path / "x.mat")
    assert found["table"].tolist() == [[1, 2, 3], [4, 5, 6]] and found["names"] == ["Audi", "VW"]
    assert [(row["file"], row["class"].item()) for row in found["rows"]] == [("a.jpg", 3), ("b.jpg", 1)]


def test_a_damaged_file_is_refused_in_a_line(tmp_path):
    matlab(tmp_path / "x.mat", number([1.0], "a"))
    data = (tmp_path / "x.mat").read_bytes()
    for content, words in ((data[:150], "damaged"), (b"something else", "not a MATLAB file"), (b"", "not a MATLAB")):
        (tmp_path / "y.mat").write_bytes(content)
        with pytest.raises(UsageError, match=words):
            read_matlab(tmp_path / "y.mat")


# ---- the sets -------------------------------------------------------------------------------------------------------


def make_flowers(root: Path) -> None:
    touch(root, *(f"jpg/image_{i:05}.jpg" for i in (1, 2, 3, 4)))
    matlab(root / "imagelabels.mat", number([2, 1, 2, 3], "labels"), compressed=True)
    matlab(root / "setid.mat", number([3], "trnid"), number([1], "valid"), number([4, 2], "tstid"))


def make_cars(root: Path) -> None:
    names = ["car_ims/000001.jpg", "car_ims/000002.jpg", "car_ims/000003.jpg"]
    touch(root, *names)
    columns = zip(names, (2, 1, 2), (0, 0, 1), strict=True)
    rows = [{"relative_im_path": n, "bbox_x1": 9, "class": c, "test": t} for n, c, t in columns]
    matlab(root / "cars_annos.mat", structures(rows, "annotations"), cells(["Audi", "VW"], "class_names"))


def make_aircraft(root: Path) -> None:
    touch(root, *(f"data/images/{i:07}.jpg" for i in (1, 2, 3)))
    write(root / "data/variants.txt", "707-320", "A300 B4")
    write(root / "data/images_variant_trainval.txt", "0000002 A300 B4", "0000001 707-320")
    write(root / "data/images_variant_test.txt", "0000003 A300 B4")


def make_dtd(root: Path) -> None:
    names = ["banded/a.jpg", "zigzag/b.jpg", "banded/c.jpg"]
    touch(root, *(f"images/{name}" for name in names))
    for part, name in zip(("train1", "val1", "test1"), names, strict=True):
        write(root / "labels" / f"{part}.txt", name)


def make_pets(root: Path) -> None:
    touch(root, *(f"images/{name}.jpg" for name in ("Abyssinian_1", "beagle_2", "beagle_3")))
    write(root / "annotations/trainval.txt", "#Image CLASS-ID", "beagle_2 2 2 1", "Abyssinian_1 1 1 1")
    write(root / "annotations/test.txt", "beagle_3 2 2 1")


def make_food(root: Path) -> None:
    touch(root, *(f"images/{name}.jpg" for name in ("apple_pie/1", "waffles/2", "waffles/3")))
    write(root / "meta/classes.txt", "apple_pie", "waffles")
    write(root / "meta/train.txt", "waffles/2", "apple_pie/1")
    write(root / "meta/test.txt", "waffles/3")


def make_sun(root: Path) -> None:
    touch(root, "a/abbey/1.jpg", "a/apartment/outdoor/2.jpg", "a/apartment/outdoor/3.jpg")
    write(root / "Partitions/ClassName.txt", "/a/abbey", "/a/apartment/outdoor")
    write(root / "Partitions/Training_01.txt", "/a/apartment/outdoor/2.jpg", "/a/abbey/1.jpg")
    write(root / "Partitions/Testing_01.txt", "/a/apartment/outdoor/3.jpg")


def make_inat(root: Path, year: int = 2018) -> None:
    for part, ids in {"train": (5, 6), "val": (7,)}.items():
        files = [{"id": i, "file_name": f"{part}_val{year}/x/{i}.jpg"} for i in ids]
        touch(root, *(image["file_name"] for image in files))
        notes = [{"image_id": i, "category_id": {5: 1, 6: 0, 7: 1}[i]} for i in reversed(ids)]
        (root / f"{part}{year}.json").write_text(json.dumps({"images": files, "annotations": notes}))
    categories = [{"id": 0, "name": "owl", "genus": "Bubo"}, {"id": 1, "name": "oak", "genus": "Quercus"}]
    (root / "categories.json").write_text(json.dumps(categories))


def make_cog(root: Path) -> None:
    touch(root, "n01/a.JPEG", "n01/b.JPEG", "n02/c.JPEG", "n02/d.JPEG")
    files = {"n01": {"train": ["a.JPEG"], "test": ["b.JPEG"]}, "n02": {"train": ["c.JPEG"], "test": ["d.JPEG"]}}
    (root / "cog_levels.pkl").write_bytes(pickle.dumps({"L1": ["n02", "n01"], "L2": []}))
    (root / "cog_split.pkl").write_bytes(pickle.dumps(files))


@pytest.mark.parametrize(
    ("name", "make", "labels", "classes"),
    [
        ("flowers", make_flowers, ([1, 1], [2, 0]), 3),
        ("cars196", make_cars, ([1, 0], [1]), 2),
        ("aircraft", make_aircraft, ([1, 0], [1]), 2),
        ("dtd", make_dtd, ([0, 1], [0]), 2),
        ("pets", make_pets, ([1, 0], [1]), 2),
        ("food101", make_food, ([1, 0], [1]), 2),
        ("sun397", make_sun, ([1, 0], [1]), 2),
        ("inat2018", make_inat, ([1, 0], [1]), 2),
        ("cog_l1", make_cog, ([0, 1], [0, 1]), 2),
    ],
)
def test_official_files_give_names_labels_and_splits(tmp_path, name, make, labels, classes):
    make(tmp_path)
    seen = set()
    for split, expected in zip(("trainval", "test"), labels, strict=True):
        source = open_labelled(name, tmp_path, split, official=False)
        assert source.labels.tolist() == expected
        assert len(source.class_names) in (classes, SETS[name].classes, max(expected) + 1)
        files = {source.image_name(i) for i in range(len(source))}
        assert len(files) == len(expected) and all(Path(file).is_file() for file in files) and not files & seen
        seen |= files
        with pytest.raises(UsageError, match=f"{name}, {split}: {len(expected)} images instead of the official"):
            open_labelled(name, tmp_path, split)


def test_eurosat_is_divided_by_a_seed(tmp_path, monkeypatch):
    monkeypatch.setattr(labelled_files, "EUROSAT_TEST", 2)
    touch(tmp_path, *(f"{name}/{i}.jpg" for name in ("Forest", "River") for i in range(5)))
    parts = {split: open_labelled("eurosat", tmp_path, split, official=False) for split in ("trainval", "test")}
    names = {split: {s.image_name(i) for i in range(len(s))} for split, s in parts.items()}
    assert parts["test"].labels.tolist() == [0, 0, 1, 1] and len(parts["trainval"]) == 6
    assert len(names["test"] | names["trainval"]) == 10
    others = [open_labelled("eurosat", tmp_path, "test", seed, official=False) for seed in range(4)]
    assert len({tuple(s.image_name(i) for i in range(4)) for s in others}) > 1


def test_categories_are_numbered_as_they_first_appear_in_training(tmp_path):
    make_inat(tmp_path)
    listing = inaturalist(2018, "genus")(tmp_path, "test", 0)
    assert (listing.labels, listing.class_names) == ([1], ["Bubo", "Quercus"])  # image 6, an owl, is annotated first
    with pytest.raises(UsageError, match=r"categories\.json: no order of every category"):
        inaturalist(2018, "order")(tmp_path, "test", 0)


def test_what_is_wrong_with_official_files_is_said_in_a_line(tmp_path):
    for name in ("flowers", "cars196", "aircraft", "pets", "food101", "sun397", "inat2019", "cog_l1"):
        with pytest.raises(UsageError, match=r"No such file|files are called") as error:
            open_labelled(name, tmp_path, "trainval")
        assert SETS[name].home in str(error.value) and "\n" not in str(error.value)
    make_food(tmp_path / "food")
    write(tmp_path / "food/meta/train.txt", "pizza/7")
    with pytest.raises(UsageError, match=r"meta/train\.txt: class pizza is not in the list of classes"):
        open_labelled("food101", tmp_path / "food", "trainval")
    write(tmp_path / "food/meta/train.txt", "waffles/7")
    with pytest.raises(UsageError, match=r"waffles/7\.jpg: listed in food101 trainval, and not there"):
        open_labelled("food101", tmp_path / "food", "trainval")
    make_cog(tmp_path / "cog")
    (tmp_path / "cog/cog_levels.pkl").write_bytes(pickle.dumps(Path("x")))
    with pytest.raises(UsageError, match="which is not plain data; refused"):
        open_labelled("cog_l1", tmp_path / "cog", "trainval")
