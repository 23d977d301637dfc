"""The test during training: it never keeps a run from starting, unless the user named what cannot be used."""

import argparse

import pytest
import torch

from models import build_backbone
from tests.launch import make_images
from training.online_knn import OnlineKNN
from utils import UsageError, World

ALONE = World(0, 1, 0, torch.device("cpu"))


def online(data_path=None, knn_data=None, **options) -> OnlineKNN:
    defaults = {"knn_every": 1, "knn_per_class": 100, "global_crops_size": 32, "batch_size_per_gpu": 8}
    paths = {"data_path": data_path and str(data_path), "knn_data": knn_data and str(knn_data)}
    return OnlineKNN(argparse.Namespace(**{**defaults, **paths, "num_workers": 0, **options}), ALONE)


def test_a_class_with_fewer_images_gives_all_it_has(tmp_path):
    make_images(tmp_path / "train", count=9, classes=2)  # five and four
    make_images(tmp_path / "val", count=4, classes=2)
    test = online(tmp_path / "train")
    assert test.sets[0].labels.tolist() == test.labels[0].tolist() == [0] * 5 + [1] * 4
    limited = online(tmp_path / "train", knn_per_class=3)
    assert limited.labels[0].tolist() == [0] * 3 + [1] * 3
    accuracy = test(build_backbone("vit_micro", 8, img_size=32))
    assert set(accuracy) == {"knn10_top1", "knn20_top1"} and 0 <= accuracy["knn10_top1"] <= 100


def test_data_without_classes_or_without_a_test_set_trains_without_it(tmp_path):
    make_images(tmp_path / "train", count=4, classes=2)
    assert "has no val/" in online(tmp_path / "train").reason
    for part in ("train", "val"):
        folder = make_images(tmp_path / "flat" / part, count=4, classes=1) / "class0"
        for file in folder.iterdir():
            file.rename(folder.parent / file.name)
    test = online(tmp_path / "flat" / "train")
    assert "images without a class" in test.reason and test(torch.nn.Identity()) == {}
    assert online(tmp_path / "train", knn_every=0).reason == "off (--knn_every 0)"


def test_a_folder_that_was_named_and_cannot_be_used_is_refused(tmp_path):
    make_images(tmp_path / "train", count=4, classes=2)
    with pytest.raises(UsageError, match=r"--knn_data .*has no val/"):
        online(tmp_path / "train", tmp_path)
