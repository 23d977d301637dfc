"""The test during training: it never keeps a run from starting, unless the user named what cannot be used."""

import argparse
import shutil

import pytest
import torch

from data.decode import MAX_IMAGE_PIXELS
from evaluation.features import extract_features
from evaluation.knn import knn_classify
from models import build_backbone
from tests.launch import make_images
from tests.sources import Stripes
from training import online_knn
from training.online_knn import OnlineKNN
from utils import UsageError, World

ALONE = World(0, 1, 0, torch.device("cpu"))


def online(data_path=None, knn_data=None, backbone=None, **options) -> OnlineKNN:
    args = {
        "data_path": data_path and str(data_path),
        "knn_data": knn_data and str(knn_data),
        "split": "train",
        "subset": None,
        "arch": "vit_micro",
        "knn_every": 1,
        "epochs": 10,
        "knn_per_class": 100,
        "nb_knn": [10, 20],
        "n_last_blocks": 1,
        "avgpool_patchtokens": "0",
        "class_token": "cls",
        "knn_temperature": 0.07,
        "use_cuda": True,
        "batch_size_per_gpu": 8,
        "num_workers": 0,
        "exif": False,
        "max_image_pixels": MAX_IMAGE_PIXELS,
        "dataset": "imagenet1k",
        "zip_mode": False,
        "tsv_mode": False,
    }
    backbone = backbone or build_backbone("vit_micro", 8, img_size=32)
    return OnlineKNN(argparse.Namespace(**{**args, **options}), ALONE, backbone, crop=32)


def labelled(root, train=9, val=4):
    """A root with train/ (at first five and four images of two classes) and val/."""
    make_images(root / "train", count=train, classes=2)
    make_images(root / "val", count=val, classes=2)
    return root


def test_a_class_with_fewer_images_gives_all_it_has(tmp_path):
    labelled(tmp_path)
    test = online(tmp_path / "train")
    assert test.sets[0].labels.tolist() == test.labels[0].tolist() == [0] * 5 + [1] * 4
    limited = online(tmp_path / "train", knn_per_class=3)
    assert limited.labels[0].tolist() == [0] * 3 + [1] * 3
    everything = online(tmp_path / "train", knn_per_class=-1)
    assert len(everything.sets[0]) == 9 and everything.sets[0].name.startswith(str(tmp_path / "train"))
    assert all("turned by EXIF" in source.name for source in online(tmp_path / "train", exif=True).sets)
    accuracy = test()
    assert set(accuracy) == {"10", "20"} and all(0 <= value <= 100 for value in accuracy["10"].values())
    assert list(accuracy["10"]) == ["top1", "top5", "neighbours"] and accuracy["10"]["neighbours"] == 9


def test_a_subset_of_the_training_images_is_all_the_bank_knows(tmp_path):
    labelled(tmp_path / "own")
    labelled(tmp_path / "other")
    for path in (tmp_path / "own", tmp_path / "own" / "train"):
        assert online(path, subset=2, knn_per_class=-1).labels[0].tolist() == [0] * 2 + [1] * 2
        assert online(path, subset=2, knn_per_class=1).labels[0].tolist() == [0, 1]
        assert len(online(path, tmp_path / "other", subset=2, knn_per_class=-1).sets[0]) == 9
        assert len(online(path, tmp_path / "own", subset=2, knn_per_class=-1).sets[0]) == 4
    assert len(online(subset=1, knn_per_class=-1).sets[0]) == len(online(knn_per_class=1).sets[0])  # bundled


def test_it_is_due_in_the_first_epoch_at_intervals_and_in_the_last(tmp_path):
    labelled(tmp_path)
    test = online(tmp_path, knn_every=20, epochs=100)
    assert [epoch for epoch in range(100) if test.due(epoch)] == [0, 20, 40, 60, 80, 99]
    assert not online(tmp_path, knn_every=0).due(0)


def test_features_votes_and_neighbours_are_as_asked(tmp_path, monkeypatch):
    labelled(tmp_path)
    seen = []
    monkeypatch.setattr(online_knn, "knn_classify", lambda *args, world: seen.append(args) or {1: (50.0, 50.0)})
    backbone = build_backbone("vit_micro", 8, img_size=32).double()  # --precision fp64
    options = {"n_last_blocks": 2, "knn_temperature": None, "teacher_temp": 0.05, "nb_knn": [1]}
    assert online(tmp_path, backbone=backbone, **options)() == {"1": {"top1": 50.0}}
    bank, _, queries, _, ks, temperature = seen[0]
    assert (bank.shape, queries.shape) == ((9, 2 * backbone.embed_dim), (4, 2 * backbone.embed_dim))
    assert (ks, temperature) == ([1], 0.05)
    depth = len(backbone.blocks)
    assert online(tmp_path, n_last_blocks=depth + 1).feature.n_last_blocks == depth
    with pytest.raises(UsageError, match="resnet18: only its pooled output can be taken"):
        online(tmp_path, arch="resnet18", backbone=build_backbone("resnet18"), n_last_blocks=2)


def test_data_without_classes_or_without_a_test_set_trains_without_it(tmp_path):
    make_images(tmp_path / "train", count=4, classes=2)
    assert "has no val/ or test/ beside train/" in online(tmp_path / "train").reason
    for part in ("train", "val"):
        folder = make_images(tmp_path / "flat" / part, count=4, classes=1) / "class0"
        for file in folder.iterdir():
            file.rename(folder.parent / file.name)
    test = online(tmp_path / "flat" / "train")
    assert "images without a class" in test.reason and not test.due(0)
    assert online(tmp_path / "train", knn_every=0).reason == "off (--knn_every 0)"


@pytest.fixture
def broken(monkeypatch):
    """The test on stripes of which some cannot be read."""

    def make(train: tuple[int, ...] = (), test: tuple[int, ...] = (), **options) -> OnlineKNN:
        stripes = {"train": Stripes(4, 6, bad=train), "test": Stripes(4, 2, 1, bad=test)}
        monkeypatch.setattr(online_knn, "open_source", lambda _, split="train": stripes[split])
        return online(knn_per_class=-1, **options)

    return make


def test_images_that_cannot_be_read_are_left_out_named_once_and_counted(broken, caplog):
    caplog.set_level("INFO", "tutelage")
    test = broken(train=(3, 20), test=(5,), nb_knn=[3])
    first, again = test(), test()
    assert first == again and test.unreadable == {"train": 2, "test": 1}
    assert [caplog.text.count(f"stripes/{index}.png: cut off") for index in (3, 20, 5)] == [1, 1, 1]
    assert caplog.text.count("(unreadable: 2 training images, 1 test image)") == 2
    features = [
        extract_features(test.backbone, source, test.transform, world=ALONE, device=ALONE.device, num_workers=0)[0]
        for source in (Stripes(4, 6), Stripes(4, 2, 1))
    ]
    known, asked = [i for i in range(24) if i not in (3, 20)], [i for i in range(8) if i != 5]
    labels = [torch.from_numpy(stripes.labels.copy()) for stripes in (Stripes(4, 6), Stripes(4, 2))]
    wanted = knn_classify(features[0][known], labels[0][known], features[1][asked], labels[1][asked], [3])
    assert list(first["3"].values()) == pytest.approx(list(wanted[3]))
    whole = broken(nb_knn=[3])
    assert whole() and whole.unreadable == {}


def test_where_nothing_can_be_read_it_is_off_and_training_goes_on(broken, caplog):
    for bad in ({"train": tuple(range(24))}, {"test": tuple(range(8))}):
        test = broken(**bad)
        assert test.due(0) and test() == {} and not test.due(1) and test.unreadable == {}
        assert "none of its images can be read" in test.reason and test.reason in caplog.text


def test_more_neighbours_than_there_are_is_said_once_in_a_run(broken, caplog):
    caplog.set_level("INFO", "tutelage")
    test = broken(nb_knn=[5, 200])
    assert test() == test() and test()["200"]["neighbours"] == 24
    assert caplog.text.count("online k-NN: k = 200: all 24 images of the bank vote") == 1
    assert "(24 neighbours: all there are)" in caplog.text


def test_a_folder_that_was_named_and_cannot_be_used_is_refused(tmp_path):
    make_images(tmp_path / "train", count=4, classes=2)
    with pytest.raises(UsageError, match=r"--knn_data .*has no val/"):
        online(tmp_path / "train", tmp_path)


def test_it_watches_validation_images_of_folders_and_archives(tmp_path):
    root = labelled(tmp_path / "set")
    make_images(root / "test", count=6, classes=2)
    archive = shutil.make_archive(tmp_path / "set", "zip", root)
    for data_path, val in ((root, root / "val"), (archive, f"{archive}/val"), (f"{archive}/train", f"{archive}/val")):
        bank, queries = online(data_path, subset=2).sets
        assert queries.name.startswith(f"{val} (4 images") and len(bank) == 4
