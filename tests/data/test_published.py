import argparse
import json
import os
import zipfile

import numpy as np
import pytest

from data.datasets import BadImage, open_source, open_training, train_and_test_paths
from data.published import Published, add_dataset_arguments, place_from
from evaluation.sets import open_train_and_test
from tests.data.archives import image, write_mapped_zip, write_tsv
from tests.data.helpers import write_folder
from tests.data.test_datasets import names, pixels
from utils import Parser, UsageError


def place(*words, **more) -> str | Published | None:
    parser = Parser()
    parser.add_argument("--data_path")
    add_dataset_arguments(parser)
    return place_from(argparse.Namespace(**vars(parser.parse_args([*map(str, words)])), **more))


def refused(*words, part: str = "train", **more) -> str:
    """The one line that says why."""
    with pytest.raises(UsageError) as caught:
        open_source(place(*words, **more).of(part))
    assert "\n" not in str(caught.value)
    return str(caught.value)


IMAGES = [(f"c{seed % 3}/{seed}.png", image(seed)) for seed in range(4)]
ROWS = [(f"key{seed}", str(seed % 3), image(seed)) for seed in range(4)]


# ---- options --------------------------------------------------------------------------------------------------------


def test_the_options_say_how_a_path_is_stored_or_leave_it_a_path():
    assert place() is None and place("--data_path", "x", "--dataset", "imagenet1k", "--zip_mode", "false") == "x"
    form = place("--data_path", "/x", "--zip_mode")
    assert form == Published("zip", "/x", "train") and form.of("val").part == "val"
    assert place("--data_path", "/x", "--tsv_mode", "True", "--dataset", "imagenet22k").form == "imagenet22k"
    assert place("--data_path", "/x", "--tsv_mode", "1", "--dataset", "openimages_v4").form == "openimages_v4"
    assert place("--data_path", "/x", "--dataset", "imagenet22k") == "/x"
    for words, said in (
        (["--zip_mode", "--tsv_mode"], "--zip_mode and --tsv_mode: the images are stored in one way"),
        (["--zip_mode"], "--zip_mode: says how the images at --data_path are stored"),
        (["--dataset", "webvision1"], "--dataset webvision1: says how"),
        (["--data_path", "x", "--dataset", "webvision1", "--zip_mode"], "leave --zip_mode out"),
        (["--sampler", "chunk"], "chunk shuffles within the parts of a download from Azure"),
        (["--sampler", "random"], "random: there is only distributed"),
        (["--data_path", "https://a.blob.core.windows.net/x"], "nothing is read from a net"),
    ):
        with pytest.raises(UsageError, match=said):
            place(*words)
    with pytest.raises(UsageError, match="--split all: with --zip_mode"):
        place("--data_path", "x", "--zip_mode", split="all")


# ---- zip with a map -------------------------------------------------------------------------------------------------


def test_a_mapped_zip_is_trained_on_and_tested_with_its_other_part(tmp_path):
    write_mapped_zip(tmp_path, IMAGES, [2, 0, 1, 2])
    write_mapped_zip(tmp_path, IMAGES[:2], [2, 0], "val")
    where = place("--data_path", tmp_path, "--zip_mode")
    train, test = open_train_and_test(where, None)
    assert train.labels.tolist() == [2, 0, 1, 2] and test.labels.tolist() == [2, 0] and len(pixels(train)) == 4
    assert train.class_names == ["0", "1", "2"] and names(train)[0] == f"{tmp_path}/train.zip/c0/0.png"
    assert open_training(where, 1).labels.tolist() == [2, 0, 1]
    assert train_and_test_paths(where) == (where, where.of("val"))
    os.remove(tmp_path / "val_map.txt")
    assert "--zip_mode needs" in refused("--data_path", tmp_path, "--zip_mode", part="val")
    elsewhere = write_mapped_zip(tmp_path / "other", IMAGES[:1], [1], "val")
    assert open_train_and_test(where, None, eval_data_path=str(elsewhere))[1].labels.tolist() == [1]
    os.utime(tmp_path / "train_map.txt", ns=(5, 5))
    (tmp_path / "train_map.txt").write_text("train.zip@/c0/3.png\tx\ntrain.zip@/c1/1.png\ty\n".replace("c0/3", "c0/0"))
    assert open_training(where).labels.tolist() == [0, 1] and open_training(where).class_names == ["x", "y"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("z@/c0/0.png\t1\nz@/absent.png\t1\n", "1 of 2 lines name what is not in train.zip, such as absent.png"),
        ("z@/notes.txt\t1\n", "none of its 1 lines names an image of train.zip"),
        ("\n", "none of its 0 lines"),
        ("z@/c0/0.png\n", "line 1, 'z@/c0/0.png': ARCHIVE@/PATH, a tab and a label are expected"),
        ("z@/c0/0.png\t1\nz@/c0/0.png\t2\n", "line 2 gives c0/0.png a second label"),
        (None, "--zip_mode needs train_map.txt, which is missing"),
    ],
)
def test_a_map_that_does_not_fit_its_zip_is_refused(tmp_path, text, said):
    write_mapped_zip(tmp_path, [*IMAGES[:1], ("notes.txt", b"x")], [0, 0])
    os.remove(tmp_path / "train_map.txt")
    if text is not None:
        (tmp_path / "train_map.txt").write_text(text)
    assert said in refused("--data_path", tmp_path, "--zip_mode")


def test_hidden_names_and_empty_files_of_a_mapped_zip_are_passed_over(tmp_path, caplog):
    write_mapped_zip(tmp_path, [*IMAGES[:1], ("__MACOSX/a.png", b"x"), ("empty.png", b"")], [0, 0, 0])
    assert len(open_source(place("--data_path", tmp_path, "--zip_mode"))) == 1
    assert "1 hidden" in caplog.text and "1 empty files passed over: empty.png" in caplog.text
    (tmp_path / "train.zip").write_bytes(b"no zip")
    assert "not a zip archive" in refused("--data_path", tmp_path, "--zip_mode")


# ---- TSV ------------------------------------------------------------------------------------------------------------


def test_tsv_files_are_read_by_their_line_index(tmp_path):
    write_tsv(tmp_path / "train" / "a.tsv", ROWS[:3])
    write_tsv(tmp_path / "train" / "b.tsv", ROWS[3:])
    write_tsv(tmp_path / "val.tsv", ROWS[:2])
    train, test = open_train_and_test(place("--data_path", tmp_path, "--tsv_mode"), None)
    assert train.labels.tolist() == [0, 1, 2, 0] and test.labels.tolist() == [0, 1] and len(pixels(train)) == 4
    assert train.name == f"{tmp_path}/train (4 images, 3 classes)" and names(train)[3] == f"{tmp_path}/train/b.tsv/key3"
    (tmp_path / "train" / "a.linelist").write_text("1\n")
    assert open_source(place("--data_path", tmp_path, "--tsv_mode")).labels.tolist() == [1, 0]


def test_a_line_whose_image_is_broken_is_a_bad_image(tmp_path):
    write_tsv(tmp_path / "train.tsv", [("a", "0", b"no image"), ("b", "1", b"x" * 3), ROWS[0]])
    data = (tmp_path / "train.tsv").read_bytes().replace(b"eHh4", b"e*h4")
    (tmp_path / "train.tsv").write_bytes(data)
    source = open_source(place("--data_path", tmp_path, "--tsv_mode"))
    for index, reason in ((0, "not an image in a known format"), (1, "its column is not in base64")):
        with pytest.raises(BadImage, match=rf"train.tsv/{'ab'[index]}: {reason}"):
            source.array(index)
    (tmp_path / "train.tsv").write_bytes(data[:50])
    with pytest.raises(BadImage):
        source.array(2)


def starts(*numbers) -> str:
    return "".join(f"{number}\n" for number in numbers)


def test_a_tsv_without_its_own_line_index_or_labels_is_refused(tmp_path):
    words = ["--data_path", tmp_path, "--tsv_mode"]
    assert "--tsv_mode needs train.tsv there, or *.tsv in train/" in refused(*words)
    file = write_tsv(tmp_path / "train.tsv", ROWS)
    lineidx, size = file.with_suffix(".lineidx"), file.stat().st_size
    good = [int(line) for line in lineidx.read_text().split()]
    for text, said in (
        (starts(*good[:-1]), "3 lines, and more behind them from byte"),
        (starts(*good, size), f"a line begins at byte {size} of {size}"),
        (starts(good[0], good[1] + 5, *good[2:]), "no line begins at byte"),
        (starts(*good[1:]), "do not rise from 0"),
        (starts(0, good[2], good[1], good[3]), "do not rise from 0"),
        ("0\nx\n", "'x' is no whole number"),
        ("99999999999999999999\n", "no whole number"),
        ("", "it is empty"),
    ):
        lineidx.write_text(text)
        message = refused(*words)
        assert said in message and "train.lineidx" in message
    os.remove(lineidx)
    assert "train.lineidx, which says where its lines begin, is missing" in refused(*words)
    write_tsv(tmp_path / "train.tsv", [("k", "dog", image())])
    assert "line 1, 'k': the label 'dog' is no whole number" in refused(*words)
    file.write_bytes(b"key\t0\n")
    assert "line 1 of train.lineidx: 2 column(s)" in refused(*words)
    write_tsv(tmp_path / "train.tsv", ROWS)
    file.with_suffix(".linelist").write_text("7\n")
    assert "line 7 of 4, which are counted from 0" in refused(*words)


def test_labels_by_a_map_are_refused_where_map_or_label_are_wrong(tmp_path):
    words = ["--data_path", tmp_path, "--tsv_mode", "--dataset", "imagenet22k"]
    names_of = tmp_path / "labelmap_22k_reorder.txt"
    write_tsv(tmp_path / "train.tsv", [("k", json.dumps([{"class": "dog"}]), image()), ("l", "dog", image())])
    assert "--dataset imagenet22k needs labelmap_22k_reorder.txt, which is missing" in refused(*words)
    for text, said in (
        ("dog\t1\n", "line 2, 'l': the label 'dog' is not the JSON"),
        ("cat\t1\n", "line 1, 'k': class 'dog' is not in the label map labelmap_22k_reorder.txt"),
        ("dog 1\n", "line 1, 'dog 1': a class, a tab and its number are expected"),
        ("\n", "this label map is empty"),
    ):
        names_of.write_text(text)
        assert said in refused(*words)
    write_tsv(tmp_path / "train.tsv", [("k", json.dumps([{"class": "dog"}]), image())])
    names_of.write_text("dog\t1\n")
    source = open_source(place(*words))
    assert source.labels.tolist() == [1] and source.class_names == ["0", "dog"]
    names_of.write_text("cat\t1\ndog\t0\n")
    assert open_source(place(*words)).labels.tolist() == [0]
    (tmp_path / "train.chunks").write_text("[]")
    assert "not the JSON {class: [first line, last line]}" in refused(*words)
    (tmp_path / "train.chunks").write_text('{"dog": [0, 4]}')
    assert "dog has lines 0 to 4 of 1" in refused(*words)


# ---- WebVision and OpenImages ---------------------------------------------------------------------------------------


def test_webvisions_lists_are_read_google_first_up_to_a_thousand_classes(tmp_path):
    write_folder(tmp_path, ["google/q1/a.png", "flickr/q2/b.png", "val_images_256/v.png"])
    (tmp_path / "info").mkdir()
    words = ["--data_path", tmp_path, "--dataset", "webvision1"]
    (tmp_path / "info" / "train_filelist_flickr.txt").write_text("flickr/q2/b.png 3\nflickr/q9/b.png 1000\n")
    assert "needs train_filelist_google.txt, which is missing" in refused(*words)
    (tmp_path / "info" / "train_filelist_google.txt").write_text("google/q1/a.png 7\n")
    (tmp_path / "info" / "val_filelist.txt").write_text("v.png 3\n")
    train, test = open_train_and_test(place(*words), None)
    assert [os.path.relpath(n, tmp_path) for n in names(train)] == ["google/q1/a.png", "flickr/q2/b.png"]
    assert (
        train.labels.tolist() == [7, 3]
        and len(pixels(train)) == 2
        and test.labels.tolist() == [3]
        and len(pixels(test)) == 1
    )
    (tmp_path / "info" / "train_filelist_google.txt").write_text("x/a.png 7\nx/b.png 7\n")
    assert "x/a.png does not exist; its paths are relative to" in refused(*words)
    (tmp_path / "info" / "train_filelist_google.txt").write_text("a.png\n")
    assert "line 1, 'a.png': a path, a space and the number" in refused(*words)


def test_openimages_is_read_by_its_balanced_index_and_only_single_labels_count(tmp_path):
    file = write_tsv(tmp_path / "train.tsv", [(key, "[]", image(seed)) for seed, key in enumerate("abc")])
    rows = [int(line) for line in file.with_suffix(".lineidx").read_text().split()]
    (tmp_path / "train.balance_min1000.lineidx").write_text(starts(rows[2], rows[0], rows[2], rows[1]))
    labels = tmp_path / "train.label.verify_20191102.tsv"
    labels.write_text('a\t[{"class": "/m/1"}, {"class": "-/m/2"}]\nb\t/m/1;/m/2\nc\t/m/2;/m/unknown\n')
    words = ["--data_path", tmp_path, "--dataset", "openimages_v4"]
    assert "tag.labelmap, which is missing" in refused(*words)
    (tmp_path / "train.label.verify_20191102.6962.tag.labelmap").write_text("/m/1\n/m/2\n")
    source = open_source(place(*words))
    expected = [image(seed) for seed in (2, 0, 2, 1)]
    assert source.labels.tolist() == [1, 0, 1, -1] and [source.read(i) for i in range(4)] == expected
    assert "training images only" in refused(*words, part="val")
    labels.write_text("a\t[1]\n")
    assert "line 1: the label is not the JSON" in refused(*words)
    labels.write_text("a\t/m/1\n")
    assert "line 1, 'c': no line of train.label.verify_20191102.tsv says what it shows" in refused(*words)


def test_an_archive_that_is_replaced_while_it_is_read_gives_bad_images(tmp_path):
    write_mapped_zip(tmp_path, IMAGES, range(4))
    source = open_source(place("--data_path", tmp_path, "--zip_mode"))
    with zipfile.ZipFile(tmp_path / "train.zip", "w") as archive:
        archive.writestr("other.png", np.random.default_rng(0).bytes(20000))
    with pytest.raises(BadImage):
        source.array(2)
