import gzip
import io
import os
import pickle
import tarfile

import numpy as np
import pytest

from data.datasets import BadImage, open_source, open_training, train_and_test_paths
from data.decode import Reading
from data.encoded import MAX_OPEN, OpenFiles
from tests.data.archives import image, write_shards, write_tar
from tests.data.helpers import write_folder
from tests.data.test_datasets import CLASS_FOLDERS, error, names, pixels


def test_shards_of_class_folders_have_the_images_order_and_labels_of_the_folder(tmp_path):
    folder = open_source(str(write_folder(tmp_path / "train", CLASS_FOLDERS)))
    files = [(f"./{name}", (tmp_path / "train" / name).read_bytes()) for name in CLASS_FOLDERS]
    shards = open_source(str(write_shards(tmp_path / "shards", files, 3)))
    assert shards.labels.tolist() == folder.labels.tolist() and shards.class_names == folder.class_names
    assert all(np.array_equal(a, b) for a, b in zip(pixels(shards), pixels(folder), strict=True))
    assert [name.split(".tar/")[1] for name in names(shards)] == [
        os.path.relpath(n, tmp_path / "train") for n in names(folder)
    ]
    assert shards.name == f"{tmp_path}/shards (10 images, 5 classes)" and shards.index.file is not None
    copies = pickle.loads(pickle.dumps(shards)), shards.read_as(Reading(max_pixels=100))
    assert np.array_equal(copies[0].array(3), shards.array(3)) and len(pickle.dumps(shards)) < 2000
    with pytest.raises(BadImage, match="--max_image_pixels 100"):
        copies[1].array(0)


def test_webdataset_labels_stand_beside_their_images_and_keep_the_archives_order(tmp_path):
    entries = [("9.png", image(0)), ("9.cls", b"4\n"), ("9.json", b"{}"), ("d/2.left.jpg", image(1, "JPEG"))]
    write_tar(tmp_path / "b-1.tar", [*entries, ("d/2.cls", b"1"), ("7.png", image(2))])
    write_tar(tmp_path / "b-0.tar", [("x.cls", b"0"), ("x.PNG", image(3)), ("a.b.png", image(4)), ("a.b.cls", b"2")])
    source = open_source(str(tmp_path))
    assert [os.path.relpath(name, tmp_path) for name in names(source)] == [
        "b-0.tar/x.PNG", "b-0.tar/a.b.png", "b-1.tar/9.png", "b-1.tar/d/2.left.jpg", "b-1.tar/7.png"]  # fmt: skip
    assert source.labels.tolist() == [0, 2, 4, 1, -1] and source.class_names == list("01234")
    write_tar(tmp_path / "words.tar", [("1.png", image()), ("1.cls", b"dog"), ("2.png", image()), ("2.cls", b"cat")])
    source = open_source(str(tmp_path / "words.tar"))
    assert source.labels.tolist() == [1, 0] and source.class_names == ["cat", "dog"]


def test_a_list_of_shards_and_flat_archives_without_labels(tmp_path):
    write_shards(tmp_path / "far", [(f"{i}.png", image(i)) for i in range(4)])
    (tmp_path / "list.txt").write_text(f"far/train-0001.tar\n\n{tmp_path}/far/train-0000.tar\n")
    source = open_source(str(tmp_path / "list.txt"))
    assert source.labels.tolist() == [-1] * 4 and source.class_names == []
    assert [os.path.basename(name) for name in names(source)] == ["1.png", "3.png", "0.png", "2.png"]
    assert len(pixels(source)) == 4


def test_imagenets_archives_are_the_classes_of_what_they_hold(tmp_path):
    for seed, name in enumerate(["n01440764", "n01443537"]):
        write_tar(tmp_path / f"{name}.tar", [(f"{name}_{i}.JPEG", image(seed, "JPEG")) for i in (2, 1)])
    source = open_source(str(tmp_path))
    assert source.class_names == ["n01440764", "n01443537"] and source.labels.tolist() == [0, 0, 1, 1]
    assert source.image_name(0).endswith("n01440764.tar/n01440764_1.JPEG")


def test_splits_are_told_by_folders_by_the_names_of_shards_and_within_archives(tmp_path):
    images = [(f"c{i % 2}/{i}.png", image(i)) for i in range(6)]
    write_shards(tmp_path / "roots" / "train", images[:4])
    write_shards(tmp_path / "roots" / "val", images[4:])
    write_shards(tmp_path / "flat", images[:4], 2, "set-train")
    write_shards(tmp_path / "flat", images[4:], 1, "set-val")
    write_tar(tmp_path / "one.tar", [(f"data/{'train' if i < 4 else 'val'}/{n}", d) for i, (n, d) in enumerate(images)])
    for root in ("roots", "flat", "one.tar"):
        train, test = (open_source(path) for path in train_and_test_paths(str(tmp_path / root)))
        assert (len(train), len(test)) == (4, 2) and train.class_names == test.class_names == ["c0", "c1"], root
        assert (
            len(open_training(str(tmp_path / root))) == 4 and len(open_training(str(tmp_path / root), split="all")) == 6
        )
    assert "there/none: no such path, and no archive in" in error(str(tmp_path / "flat" / "there" / "none"))
    assert "set-val/c7: no images in these archives; looked into set-val-0000.tar" in error(
        str(tmp_path / "flat" / "set-val" / "c7")
    )


def test_hidden_names_links_and_earlier_entries_of_a_name_are_passed_over(tmp_path, caplog):
    path, buffer = tmp_path / "a.tar", image(1)
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as archive:
        for name, data in (("c/a.png", image(0)), ("c/._a.png", b"x"), ("__MACOSX/b.png", b"x"), ("c/a.png", buffer),
                           ("c/" + "long" * 40 + ".png", image(2))):  # fmt: skip
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
        link = tarfile.TarInfo("c/link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    source = open_source(str(path))
    assert len(source) == 2 and source.read(0) == buffer and source.image_name(1).endswith("long.png")
    assert "2 hidden or system" in caplog.text and "a.tar/__MACOSX" in caplog.text and "a.tar/c/link.png" in caplog.text


def test_an_image_that_is_no_image_and_an_archive_that_changed_are_bad_images(tmp_path):
    path = write_tar(tmp_path / "a.tar", [("1.png", image(0)), ("2.png", b"no image"), ("3.png", b"")])
    source = open_source(str(path))
    with pytest.raises(BadImage, match=r"a.tar/2.png: not an image"):
        source.array(1)
    with pytest.raises(BadImage, match="the file is empty"):
        source.array(2)
    data = path.read_bytes()
    path.write_bytes(bytes(512) + data)
    with pytest.raises(BadImage, match="the archive has changed or is damaged here"):
        open_source(str(write_tar(tmp_path / "b.tar", [("1.png", image(0))]))) and source.array(1)
    path.write_bytes(data[:600])
    with pytest.raises(BadImage, match="has changed"):
        source.array(0)
    os.remove(path)
    source = pickle.loads(pickle.dumps(source))
    with pytest.raises(BadImage, match="No such file"):
        source.array(0)


def test_an_index_of_shards_is_made_anew_when_one_changes_or_comes_or_goes(tmp_path):
    write_shards(tmp_path / "s", [(f"{i}.png", image(i)) for i in range(2)])
    assert len(open_source(str(tmp_path / "s"))) == 2
    write_tar(tmp_path / "s" / "train-0001.tar", [("a.png", image()), ("b.png", image())])
    assert len(open_source(str(tmp_path / "s"))) == 3
    write_tar(tmp_path / "s" / "new.tar", [("a.png", image())])
    assert len(open_source(str(tmp_path / "s"))) == 4
    os.remove(tmp_path / "s" / "train-0000.tar")
    assert len(open_source(str(tmp_path / "s"))) == 3


def test_archives_that_cannot_be_read_in_place_are_refused_by_name(tmp_path):
    good = write_tar(tmp_path / "good.tar", [("1.png", image(0)), ("2.png", image(1))]).read_bytes()
    end = good.rindex(image(1)) + len(image(1))
    packed = tmp_path / "packed" / "x.tar"
    packed.parent.mkdir()
    packed.write_bytes(gzip.compress(good))
    assert "packed/x.tar is compressed (gzip)" in error(str(packed.parent))
    packed.rename(packed.with_name("x.tar.gz"))
    assert "x.tar.gz is compressed (gzip)" in error(str(packed.parent))
    packed.with_name("x.tar.gz").write_bytes(good)
    assert "x.tar.gz is named as a compressed archive" in error(str(packed.parent))
    for data, reason in (
        (good[:700], "cut short|unexpected end of data"),
        (good[: end - end % 512 + 512], "cut short: the mark at its end is missing"),
        (good.replace(b"2.png" + bytes(95), b"2.png" + b"x" * 95), "no entry begins at byte"),
        (good + good, "two archives cannot be joined by cat"),
        (b"text", "is damaged, or no tar archive"),
        (b"", "is damaged, or no tar archive"),
        (bytes(10240), "no images in these archives"),
        (
            write_tar(tmp_path / "n.tar", [("a.txt", b"x")]).read_bytes(),
            "no images in these archives; looked into b.tar",
        ),
    ):
        (tmp_path / "b.tar").write_bytes(data)
        message = error(str(tmp_path / "b.tar"))
        assert "b.tar" in message and any(part in message for part in reason.split("|")), (reason, message)
    (tmp_path / "list.txt").write_text("good.tar\ngood.tar\n")
    assert "line 2, 'good.tar': named twice" in error(str(tmp_path / "list.txt"))
    (tmp_path / "list.txt").write_text("good.tar\nimage.png\n")
    assert "line 2, 'image.png': every line of a list of archives names one .tar" in error(str(tmp_path / "list.txt"))
    (tmp_path / "list.txt").write_text("absent.tar\n")
    assert "absent.tar: No such file" in error(str(tmp_path / "list.txt"))


def test_images_beside_archives_are_a_folder_of_images(tmp_path):
    write_folder(tmp_path, ["a/1.png"])
    write_tar(tmp_path / "old.tar", [("2.png", image())])
    assert len(open_source(str(tmp_path))) == 1


def test_few_archives_are_open_at_a_time_and_none_is_shared_with_a_forked_process(tmp_path):
    files, paths = OpenFiles(), [tmp_path / f"{i}" for i in range(MAX_OPEN + 5)]
    for i, path in enumerate(paths):
        path.write_text(f"{i:03}...")
    assert [files.read(str(path), 3, 0) for path in paths] == [b"%03d" % i for i in range(len(paths))]
    assert len(files._open) == MAX_OPEN and files.read(str(paths[0]), 3, 0) == b"000"
    before = files._open[str(paths[0])]
    reader, writer = os.pipe()
    if os.fork() == 0:
        same = files.read(str(paths[0]), 9, 2) == b"0..." and files._open[str(paths[0])] is not before
        os.write(writer, b"1" if same else b"0")
        os._exit(0)
    assert os.read(reader, 1) == b"1" and files._open[str(paths[0])] is before
