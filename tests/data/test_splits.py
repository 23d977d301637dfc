"""Folders, zips and lists of the same images are understood alike."""

import os
import zipfile
from pathlib import Path

import pytest

from data.datasets import open_source, open_training, train_and_test_paths
from data.splits import find_splits, split_names
from tests.data.helpers import write_folder
from utils import UsageError

KINDS = ["folder", "zip", "list"]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    caplog.set_level("INFO")


def root_of(kind: str, folder: Path, names: list[str]) -> str:
    """What to pass as --data_path."""
    write_folder(folder, names)
    if kind == "zip":
        with zipfile.ZipFile(folder.with_suffix(".zip"), "w") as archive:
            for name in names:
                archive.write(folder / name, name)
    if kind == "list":
        lines = [f"{folder.name}/{name}\t{name.split('/')[-2]}" for name in names]
        folder.with_suffix(".list").write_text("\n".join(lines))
    return {"folder": str(folder), "zip": f"{folder}.zip", "list": f"{folder}.list"}[kind]


def ends(source) -> list[str]:
    """The last three parts of every image's name."""
    return ["/".join(source.image_name(i).split("/")[-3:]) for i in range(len(source))]


TWO = ["train/cat/1.png", "train/dog/1.png", "val/cat/2.png", "val/dog/2.png"]


def below(folder: str, names: list[str]) -> list[str]:
    return [f"{folder}/{name}" if folder else name for name in names]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("folder", ["", "data", "data/images"])
def test_a_root_with_splits_is_trained_on_one_and_says_what_is_left_alone(tmp_path, caplog, kind, folder):
    root = root_of(kind, tmp_path / "set", below(folder, TWO))
    source = open_training(root)
    assert ends(source) == ["train/cat/1.png", "train/dog/1.png"]
    assert (source.labels.tolist(), source.class_names) == ([0, 1], ["cat", "dog"])
    assert source.array(0).shape == (24, 32, 3)
    assert caplog.messages == ["training on train/ (2 images, 2 classes), val/ left alone"]
    train, test = (open_source(path) for path in train_and_test_paths(root))
    assert (ends(train), ends(test)) == (ends(source), ["val/cat/2.png", "val/dog/2.png"])
    assert train.fingerprint == source.fingerprint != test.fingerprint
    everything = open_training(root, split="all")
    assert sorted(ends(everything)) == sorted(TWO)


def test_a_folder_of_splits_is_the_same_set_as_its_folder_for_training(tmp_path):
    root = root_of("folder", tmp_path / "set", TWO)
    assert open_training(root).fingerprint == open_source(f"{root}/train").fingerprint
    (tmp_path / "empty" / "val").mkdir(parents=True)
    write_folder(tmp_path / "empty", ["train/cat/1.png"])
    assert ends(open_training(str(tmp_path / "empty"))) == ["train/cat/1.png"]


@pytest.mark.parametrize(
    ("folders", "trained", "tests"),
    [
        (["train", "val"], ["train"], ["val"]),
        (["Training", "Testing"], ["Training"], ["Testing"]),
        (["TRAIN", "validation", "test"], ["TRAIN"], ["test", "validation"]),
        (["train", "valid", "unlabeled"], ["train"], ["valid"]),
        (["seg_train", "seg_test", "seg_pred"], ["seg_train"], ["seg_test"]),
        (["train2017", "val2017"], ["train2017"], ["val2017"]),
        (["train", "bus", "car"], [], []),  # a class, as in PASCAL VOC
        (["test", "val"], [], []),
        (["train station", "test tube"], [], []),
        (["trains", "tests", "constraint"], [], []),
        (["train", "training", "test"], ["train", "training"], ["test"]),
    ],
)
def test_splits_are_names_that_differ_in_one_word(folders, trained, tests):
    assert split_names(folders) == (trained, tests)


@pytest.mark.parametrize("kind", KINDS)
def test_a_lone_folder_for_training_is_a_class_among_others(tmp_path, caplog, kind):
    root = root_of(kind, tmp_path / "set", ["bus/1.png", "train/1.png", "tram/1.png"])
    assert open_training(root).class_names == ["bus", "train", "tram"] and not caplog.messages
    with pytest.raises(UsageError, match=r"has no .*test"):
        train_and_test_paths(root)


@pytest.mark.parametrize("kind", KINDS)
def test_what_could_be_splits_or_classes_is_refused_with_what_settles_it(tmp_path, kind):
    root = root_of(kind, tmp_path / "set", ["x/test/1.png", "x/train/1.png", "x/bus/1.png", "x/tram/1.png"])
    with pytest.raises(UsageError) as caught:
        open_training(root)
    message = str(caught.value)
    assert "train/ and test/ could be splits or, like bus/, tram/, classes; pass --data_path " in message
    settled = message.split("pass --data_path ")[1].split(", or to train on everything --split all")[0]
    assert ends(open_training(settled)) == ["x/train/1.png"]
    assert len(open_training(root, split="all")) == 4


def test_the_same_is_asked_of_a_folder_with_plain_words(tmp_path):
    root = tmp_path / "set"
    write_folder(root, ["train/1.png", "test/1.png", "bus/1.png"])
    with pytest.raises(UsageError, match=r"could be splits or, like bus/, classes"):
        open_training(str(root))
    (root / "bus" / "1.png").rename(root / "bus" / "1.xml")  # annotations are no class
    assert ends(open_training(str(root))) == ["set/train/1.png"]


@pytest.mark.parametrize("kind", KINDS)
def test_two_that_could_be_trained_on_are_refused(tmp_path, kind):
    root = root_of(kind, tmp_path / "set", ["train/a/1.png", "training/a/1.png", "test/a/1.png"])
    with pytest.raises(
        UsageError, match=r"train/, training/ could each be the training images; pass --data_path .*/train"
    ):
        open_training(root)


@pytest.mark.parametrize("kind", KINDS)
def test_splits_below_every_folder_are_refused(tmp_path, kind):
    root = root_of(kind, tmp_path / "set", ["x/a/train/1.png", "x/a/val/1.png", "x/b/train/1.png", "x/b/val/1.png"])
    with pytest.raises(
        UsageError, match=r"x/a/ holds a training and a test set of its own; pass --data_path .*x/a, or"
    ):
        open_training(root)
    assert len(open_training(root, split="all")) == 4


@pytest.mark.parametrize("kind", KINDS)
def test_of_several_test_sets_the_one_with_classes_is_taken_or_the_user_is_asked(tmp_path, kind):
    names = [*TWO, "test/3.png"]  # as ImageNet's, without labels
    root = root_of(kind, tmp_path / "set", names)
    train, test = (open_source(path) for path in train_and_test_paths(root))
    assert (ends(train), ends(test)) == (names[:2], names[2:4])
    root = root_of(kind, tmp_path / "other", [*TWO, "test/cat/3.png"])
    assert ends(open_training(root)) == names[:2]  # to train on, train/ is not in question
    with pytest.raises(UsageError, match=r"test/, val/ could each be the test images; pass .*--eval_data_path .*/test"):
        train_and_test_paths(root)
    _, watched = train_and_test_paths(root, watched=True)
    assert ends(open_source(watched)) == names[2:4]


@pytest.mark.parametrize("kind", ["zip", "list"])
def test_a_path_may_go_on_inside_a_file(tmp_path, kind):
    root = root_of(kind, tmp_path / "set", below("data", TWO))
    inside = root if kind == "zip" else f"{root}{tmp_path}/set"
    assert ends(open_source(f"{inside}/data/val")) == ["val/cat/2.png", "val/dog/2.png"]
    assert ends(open_training(f"{inside}/data")) == ["train/cat/1.png", "train/dog/1.png"]
    assert open_source(f"{inside}/data/val").name == f"{inside}/data/val (2 images, 2 classes)"
    with pytest.raises(UsageError, match=r"no images in this folder of the archive|no line names an image below"):
        open_source(f"{inside}/data/trian")


def test_a_listed_set_is_understood_by_where_its_files_are(tmp_path):
    assert find_splits(["data/train", "data/val/cat", "data"]).folders == {"train": False, "val": True}
    write_folder(tmp_path / "set", TWO)
    (tmp_path / "lists").mkdir()
    lines = ["../set/train/cat/1.png", str(tmp_path / "set/val/cat/2.png"), "../set/./val/dog/2.png"]
    (tmp_path / "lists" / "list.txt").write_text("\n".join(lines))
    source = open_training(str(tmp_path / "lists" / "list.txt"))
    assert [os.path.normpath(name) for name in map(source.image_name, range(len(source)))] == [
        str(tmp_path / "set/train/cat/1.png")
    ]
