import numpy as np
import pytest

from data.published import Published, place_from
from eval_knn import eval_knn
from eval_linear import eval_linear
from evaluation import finetune_options
from evaluation.sets import common_labels, open_train_and_test
from tests.launch import make_images
from tests.sources import Stripes
from utils import UsageError


def test_classes_are_matched_by_name_and_not_by_number():
    train, test = Stripes(4, 2), Stripes(2, 2)
    test.class_names = ["class3", "class1"]
    assert [labels.tolist() for labels in common_labels(train, test)] == [train.labels.tolist(), [3, 1, 3, 1]]
    test.class_names = ["class3", "dog"]
    with pytest.raises(UsageError, match=r"1 classes are not in .*such as dog"):
        common_labels(train, test)
    test.labels = np.array([-1, 0, 1, 0])
    with pytest.raises(UsageError, match="without a class"):
        common_labels(train, test)


def test_train_and_test_images_are_found_in_a_root_or_named(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for part, count in (("train", 4), ("val", 6), ("test", 8)):
        make_images(tmp_path / "set" / part, count, 2)
    root = str(tmp_path / "set")
    with pytest.raises(UsageError, match=rf"could each be the test images; .*--eval_data_path {root}/test"):
        open_train_and_test(root, None)
    for named, count in ((f"{root}/test", 8), (f"{root}/val", 6)):
        assert [len(source) for source in open_train_and_test(root, None, eval_data_path=named)] == [4, count]
        assert [len(source) for source in open_train_and_test(f"{root}/train", 1, eval_data_path=named)] == [2, count]
    with pytest.raises(UsageError, match=r"pass that as well"):
        open_train_and_test(None, None, eval_data_path=root)
    with pytest.raises(UsageError, match=rf"has no train/ and val/ \(or test/\) with a folder per class; pass {root}$"):
        open_train_and_test(f"{root}/val", None)


def test_every_evaluation_reads_the_options_of_how_images_are_stored(tmp_path):
    words = ["--data_path", str(tmp_path), "--dataset", "imagenet1k", "--sampler", "distributed", "--tsv_mode", "False"]
    for parser in (eval_knn.get_args_parser(), eval_linear.get_args_parser(), finetune_options.get_args_parser()):
        place = place_from(parser.parse_args([*words, "--zip_mode", "True"]))
        assert place == Published("zip", str(tmp_path))
        assert place_from(parser.parse_args([*words, "--zip_mode", "false"])) == str(tmp_path)
