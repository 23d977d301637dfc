import os
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torchvision.datasets import ImageFolder

from data.datasets import BadImage, SubsetSource, open_source
from data.decode import Reading
from tests.data.helpers import encoded, photograph, write_folder, write_image, write_list
from utils import UsageError

CLASS_FOLDERS = [
    "n02/b.JPEG",
    "n02/a.png",
    "n02/a-b/1.png",  # sorts before a/2.png as a string, after it as a path
    "n02/a/2.png",
    "n02/Z.webp",
    "n01/10.jpg",
    "n01/9.jpg",
    "n01-x/1.ppm",
    "N03/deep/deeper/1.tif",
    "n04/1.bmp",
]


def names(source) -> list[str]:
    return [source.image_name(i) for i in range(len(source))]


def pixels(source) -> list[np.ndarray]:
    images = [source.array(i) for i in range(len(source))]
    assert all(np.array_equal(image, source.pil(i)) for i, image in enumerate(images))
    return images


def error(*args, **kwargs) -> str:
    with pytest.raises(UsageError) as caught:
        open_source(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- folders --------------------------------------------------------------------------------------------------------


def test_class_folders_have_the_order_and_labels_of_imagefolder(tmp_path):
    root = write_folder(tmp_path / "train", CLASS_FOLDERS)
    (root / "n01" / "notes.txt").write_text("no image")
    source, reference = open_source(str(root)), ImageFolder(root)
    assert list(zip(names(source), source.labels.tolist(), strict=True)) == reference.samples
    assert source.class_names == reference.classes
    assert source.name == f"{root} (10 images, 5 classes)"
    assert all(np.array_equal(source.array(i), image) for i, (image, _) in enumerate(reference))


def test_a_folder_with_images_of_its_own_has_no_classes(tmp_path):
    root = write_folder(tmp_path / "photos", ["2020/a.png", "b.png", "2019/summer/c.png"])
    source = open_source(str(root))
    assert names(source) == [str(root / name) for name in ("b.png", "2019/summer/c.png", "2020/a.png")]
    assert source.labels.tolist() == [-1, -1, -1] and source.class_names == []
    assert source.name == f"{root} (3 images)"


def test_names_that_are_not_unicode_can_be_read(tmp_path):
    write_image(tmp_path / "train" / "a" / "1.png")
    os.rename(tmp_path / "train/a/1.png", os.fsencode(tmp_path / "train/a") + b"/\xff.png")
    assert open_source(str(tmp_path / "train")).array(0).shape == (24, 32, 3)


def test_a_folder_without_images_names_what_it_holds(tmp_path):
    for name in "hcbgadf":
        (tmp_path / f"{name}.txt").write_text("")
    message = error(str(tmp_path))
    assert str(tmp_path) in message and "a.txt, b.txt, c.txt, d.txt, f.txt;" in message and "g.txt" not in message
    (tmp_path / "empty").mkdir()
    assert "it is empty" in error(str(tmp_path / "empty"))


def test_a_missing_path_says_which_part_is_missing(tmp_path):
    assert f"--data_path {tmp_path / 'x'}: no such path; pass a folder" in error(str(tmp_path / "x"))
    assert f"{tmp_path / 'x'} does not exist" in error(str(tmp_path / "x/y/z"))


# ---- zip ------------------------------------------------------------------------------------------------------------


def make_zip(path: Path, names: list[str], prefix: bytes = b"", **options) -> dict[str, np.ndarray]:
    images = {name: photograph(seed, 24, 32) for seed, name in enumerate(names)}
    path.write_bytes(prefix)
    with zipfile.ZipFile(path, "a", **options) as archive:
        for name, image in images.items():
            archive.writestr(name, encoded(image))
    return images


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize("prefix", [b"", b"#!/bin/sh\n"])
def test_images_are_read_from_a_zip_with_classes_from_its_folders(tmp_path, method, prefix):
    path = tmp_path / "data.zip"
    images = make_zip(path, ["train/dog/b.png", "train/dog/a.png", "train/cat/1.png"], prefix, compression=method)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("train/readme.txt", "x")
        archive.writestr("__MACOSX/train/dog/._b.png", "x")
        archive.mkdir("train/empty.png")
    source = open_source(str(path))
    inner = ["train/cat/1.png", "train/dog/a.png", "train/dog/b.png"]
    assert names(source) == [f"{path}/{name}" for name in inner]
    assert (source.labels.tolist(), source.class_names) == ([0, 1, 1], ["cat", "dog"])
    assert all(np.array_equal(image, images[name]) for image, name in zip(pixels(source), inner, strict=True))
    assert sorted(os.listdir(tmp_path)) == ["cache", "data.zip"]  # nothing was unpacked
    assert np.array_equal(pickle.loads(pickle.dumps(source)).array(1), source.array(1))


@pytest.mark.parametrize(
    ("inner", "labels"),
    [
        (["a.png", "b.png"], [-1, -1]),
        (["a/1.png", "b/2.png"], [0, 1]),
        (["a/1.png", "a/2.png"], [0, 0]),
        (["x/1.png", "x/a/2.png"], [0, 0]),
        (["x/y/a/1.png", "x/y/b/c/2.png"], [0, 1]),
    ],
)
def test_a_zip_has_the_classes_below_the_folders_that_all_its_images_share(tmp_path, inner, labels):
    make_zip(tmp_path / "z.zip", inner)
    assert open_source(str(tmp_path / "z.zip")).labels.tolist() == labels


def test_a_zip_opened_before_a_fork_is_opened_anew_after_it(tmp_path):
    make_zip(tmp_path / "z.zip", [f"{i}.png" for i in range(4)])
    source = open_source(str(tmp_path / "z.zip"))
    expected = pixels(source)
    opened = source._files._open[str(tmp_path / "z.zip")]
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        same = all(np.array_equal(a, b) for a, b in zip(pixels(source), expected, strict=True))
        os.write(writer, b"1" if same and source._files._open[str(tmp_path / "z.zip")] is not opened else b"0")
        os._exit(0)
    os.waitpid(child, 0)
    assert os.read(reader, 1) == b"1"
    assert source._files._open[str(tmp_path / "z.zip")] is opened


def test_a_damaged_zip_entry_is_a_bad_image(tmp_path):
    path = tmp_path / "z.zip"
    make_zip(path, ["a.png", "b.png"])
    source = open_source(str(path))
    data = bytearray(path.read_bytes())
    data[60] ^= 255
    path.write_bytes(data)
    with pytest.raises(BadImage, match="damaged"):
        source.array(0)
    path.write_bytes(data[:100])
    with pytest.raises(BadImage):
        source.array(1)


def test_what_is_no_zip_or_cannot_be_read_in_place_is_refused(tmp_path):
    (tmp_path / "text.zip").write_text("not a zip")
    assert "not a zip archive" in error(str(tmp_path / "text.zip"))
    make_zip(tmp_path / "lzma.zip", ["a.png"], compression=zipfile.ZIP_LZMA)
    assert "method 14" in error(str(tmp_path / "lzma.zip"))
    with zipfile.ZipFile(tmp_path / "empty.zip", "w") as archive:
        archive.writestr("a.txt", "")
    assert "no images in this archive; it holds a.txt" in error(str(tmp_path / "empty.zip"))


# ---- subsets and the bundled set ------------------------------------------------------------------------------------


def test_a_subset_takes_the_first_images_of_every_class_in_order_of_appearance(tmp_path):
    write_list(tmp_path, [f"{i}.png\t{c}" for i, c in enumerate("cacbabccab")])
    source = open_source(str(tmp_path / "list.txt"), subset=2)
    assert [Path(name).name for name in names(source)] == ["0.png", "2.png", "1.png", "4.png", "3.png", "5.png"]
    assert source.labels.tolist() == [2, 2, 0, 0, 1, 1]
    assert source.class_names == ["a", "b", "c"]
    copy = pickle.loads(pickle.dumps(source))
    assert names(copy) == names(source) and copy.fingerprint == source.fingerprint
    assert source.fingerprint != open_source(str(tmp_path / "list.txt"), subset=1).fingerprint
    assert len(pickle.dumps(source)) < 1000


def test_a_subset_may_begin_at_a_later_image(tmp_path):
    write_list(tmp_path, [f"{i}.png\t{c}" for i, c in enumerate("cacbabccab")])
    first, later = (open_source(str(tmp_path / "list.txt"), subset=1, start=start) for start in (0, 2))
    assert [Path(name).name for name in names(later)] == ["6.png", "8.png", "9.png"]
    assert first.fingerprint != later.fingerprint and "1 per class from image 2 on (3 images)" in later.name
    assert names(pickle.loads(pickle.dumps(later))) == names(later)
    short = SubsetSource(later.source, 5, start=3, fewer=True)
    assert [Path(name).name for name in names(short)] == ["7.png"]


def test_a_subset_reads_its_own_images(tmp_path):
    root = write_folder(tmp_path / "train", ["a/1.png", "a/2.png", "b/1.png", "b/2.png"])
    whole, part = open_source(str(root)), open_source(str(root), subset=1)
    assert np.array_equal(part.array(1), whole.array(2)) and np.array_equal(part.pil(1), whole.pil(2))
    assert "1 per class (2 images)" in part.name


def turned_photograph(path: Path) -> None:
    """24 x 32 pixels, to be turned by a quarter."""
    exif = Image.Exif()
    exif[0x0112] = 6
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encoded(photograph(1, 24, 32), path.suffix[1:].upper(), exif=exif))


@pytest.mark.parametrize("name", ["1.jpeg", "1.png"])
def test_every_source_reads_as_it_is_told_wherever_it_is_sent(tmp_path, name):
    """Crop boxes are drawn on what ``array`` gives, so on the size that it has been turned to."""
    root = tmp_path / "train"
    turned_photograph(root / "a" / name)
    (tmp_path / "list.txt").write_text(f"train/a/{name}\tx\n")
    with zipfile.ZipFile(tmp_path / "z.zip", "w") as archive:
        archive.write(root / "a" / name, f"a/{name}")
    turned = np.asarray(Image.open(root / "a" / name).transpose(Image.Transpose.ROTATE_270))
    for path in (root, tmp_path / "list.txt", tmp_path / "z.zip"):
        for subset in (None, 1):
            plain = open_source(str(path), subset)
            source = plain.read_as(Reading(exif=True))
            for copy in (source, pickle.loads(pickle.dumps(source))):
                assert (copy.array(0).shape, plain.array(0).shape) == ((32, 24, 3), (24, 32, 3))
                assert np.abs(pixels(copy)[0].astype(int) - turned).max() <= 1
            assert "turned by EXIF" in source.name and source.fingerprint != plain.fingerprint
            small = plain.read_as(Reading(max_pixels=767))
            assert small.fingerprint != plain.fingerprint and small.name == plain.name
            with pytest.raises(BadImage, match="768 pixels, more than --max_image_pixels 767"):
                pickle.loads(pickle.dumps(small)).array(0)
            assert plain.read_as(Reading()).fingerprint == plain.fingerprint


def test_what_is_in_no_files_is_read_in_one_way():
    source = open_source(None, subset=1)
    assert source.read_as(Reading(exif=True, max_pixels=1)).fingerprint == source.fingerprint


def test_a_subset_that_cannot_be_taken_says_why(tmp_path):
    write_list(tmp_path, ["0.png\ta", "1.png\ta", "2.png\tb"])
    assert "class b" in error(str(tmp_path / "list.txt"), subset=2)
    assert "class b" in error(str(tmp_path / "list.txt"), subset=1, start=1)
    for wrong in (0, -2):
        assert "at least 1 (-1: all)" in error(str(tmp_path / "list.txt"), subset=wrong)
    assert len(open_source(str(tmp_path / "list.txt"), subset=-1)) == 3
    write_list(tmp_path, ["0.png", "1.png"])
    assert "some without label" in error(str(tmp_path / "list.txt"), subset=1)


def test_without_a_path_the_bundled_tiles_are_opened():
    train, test = open_source(None), open_source(None, split="val")
    assert train.fingerprint != test.fingerprint
    assert train.class_names == test.class_names
    assert isinstance(test.pil(0), Image.Image) and test.pil(0).mode == "RGB"
    assert len(open_source(None, subset=1)) == len(train.class_names)
