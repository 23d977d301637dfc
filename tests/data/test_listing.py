import errno
import os
import zipfile
from pathlib import Path

import pytest

from data.datasets import BadImage, open_source
from tests.data.helpers import encoded, photograph, write_folder, write_image
from utils import UsageError

JUNK = [
    ".ipynb_checkpoints/a-checkpoint.png",
    "@eaDir/a.png/SYNOPHOTO_THUMB_M.jpg",
    "__MACOSX/cat/._1.png",
    ".git/objects/1.png",
    "$RECYCLE.BIN/1.png",
    "cat/._1.png",
    "dog/Thumbs.db/1.png",
]


def names(source) -> list[str]:
    return [os.path.relpath(source.image_name(i), source.path) for i in range(len(source))]


def said(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records]


def zipped(root: Path) -> Path:
    path = root.with_suffix(".zip")
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(root.rglob("*")):
            archive.write(file, file.relative_to(root))
    return path


def test_hidden_and_system_names_are_passed_over_and_counted_in_folders_as_in_zips(tmp_path, caplog):
    root = write_folder(tmp_path / "clean", ["cat/1.png", "dog/1.png"])
    clean = open_source(str(root))
    root = write_folder(tmp_path / "set", ["cat/1.png", "dog/1.png", *JUNK])
    (root / "cat" / ".DS_Store").touch()  # no image would have been seen in it: not worth a word
    archive = zipped(root)
    for path in (root, archive, root):  # the last time from the index
        source = open_source(str(path))
        assert (names(source), source.class_names) == (["cat/1.png", "dog/1.png"], ["cat", "dog"])
        assert source.fingerprint == clean.fingerprint
    passed = (
        "7 hidden or system files and folders passed over: $RECYCLE.BIN, .git, .ipynb_checkpoints, @eaDir, __MACOSX"
    )
    assert said(caplog) == [f"{root}: {passed}", f"{archive}: {passed}"]


def test_only_names_below_the_root_are_hidden(tmp_path, caplog):
    root = write_folder(tmp_path / ".cache" / "lost+found", ["cat/1.png", "./dog/1.png"])
    assert open_source(str(root)).class_names == ["cat", "dog"] and not said(caplog)
    with zipfile.ZipFile(tmp_path / "z.zip", "w") as archive:  # as some programs pack
        for name in ("./train/cat/1.png", "./train/dog/1.png"):
            archive.writestr(name, encoded(photograph(0, 24, 32)))
    assert open_source(str(tmp_path / "z.zip")).class_names == ["cat", "dog"]


def test_a_set_of_hidden_folders_only_says_so(tmp_path):
    root = write_folder(tmp_path / "set", [".hidden/1.png"])
    with pytest.raises(UsageError, match=r"no images in this folder; .*1 hidden or system .* passed over: \.hidden"):
        open_source(str(root))
    with pytest.raises(UsageError, match=r"no images in this archive; it holds \.hidden"):
        open_source(str(zipped(root)))


def test_links_are_followed(tmp_path):
    root = write_folder(tmp_path / "train", ["a/1.png"])
    write_image(tmp_path / "elsewhere" / "2.png")
    (root / "a" / "linked").symlink_to(tmp_path / "elsewhere")
    (root / "b").symlink_to(tmp_path / "elsewhere")
    assert names(open_source(str(root))) == ["a/1.png", "a/linked/2.png", "b/2.png"]


def test_what_leads_nowhere_is_passed_over_and_named_once(tmp_path, caplog):
    root = write_folder(tmp_path / "train", ["a/1.png", "b/1.png"])
    (root / "a" / "loop.jpg").symlink_to("loop.jpg")
    (root / "a" / "gone.jpg").symlink_to(tmp_path / "gone.jpg")
    (root / "missing").symlink_to(tmp_path / "missing")
    (root / "b" / "circle").symlink_to(root / "b")
    (root / "b" / "up").symlink_to(root)
    os.mkfifo(root / "b" / "pipe.png")
    for _ in range(2):
        assert names(open_source(str(root))) == ["a/1.png", "b/1.png"]
    (line,) = said(caplog)
    assert line.startswith(f"{root}: 6 links that lead nowhere or in a circle, or what is no file, passed over: ")
    assert line.endswith(": a/gone.jpg, a/loop.jpg, b/circle, b/pipe.png, b/up")


def test_a_link_in_a_zip_is_no_image(tmp_path, caplog):
    path = tmp_path / "z.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("1.png", encoded(photograph(0, 24, 32)))
        link = zipfile.ZipInfo("2.png")
        link.external_attr = 0o120777 << 16
        archive.writestr(link, "1.png")
    assert names(open_source(str(path))) == ["1.png"] and ": 1 links" in caplog.text


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO])
def test_a_folder_that_cannot_be_read_is_named(tmp_path, monkeypatch, number):
    root = write_folder(tmp_path / "train", ["a/1.png", "b/private/1.png"])
    scandir = os.scandir

    def locked(path):
        if str(path).endswith("private"):
            raise OSError(number, os.strerror(number), str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", locked)
    with pytest.raises(UsageError) as caught:
        open_source(str(root))
    message = f"--data_path {root}: {root / 'b/private'} cannot be listed: {os.strerror(number)}; make it readable"
    assert message in str(caught.value)


def test_folders_without_images_are_no_classes_and_are_named_at_every_start(tmp_path, caplog):
    root = write_folder(tmp_path / "train", ["b/1.png", "c/1.png"])
    (root / "empty").mkdir()
    assert open_source(str(root)).class_names == ["b", "c"]
    assert said(caplog) == [f"{root}: no images in empty, so no class either"]
    assert open_source(str(root)).index.notes == said(caplog)


@pytest.mark.parametrize("pack", [False, True])
def test_names_reach_the_log_on_one_line_and_without_terminal_codes(tmp_path, caplog, pack):
    root = tmp_path / "train"
    for name in ("a\nb/1\x1b[31m.png", "a\nb/.hid\rden/1.png"):
        write_image(root / name)
    (root / "a\nb/2.png").write_bytes(b"no image")
    path = zipped(root) if pack else root
    source = open_source(str(path))
    assert source.array(0).shape == (24, 32, 3)
    with pytest.raises(BadImage) as caught:
        source.array(1)
    shown = [source.image_name(0), str(caught.value), *said(caplog)]
    assert shown[0] == f"{path}/a\\nb/1\\x1b[31m.png" and ".hid\\rden" in shown[2]
    assert all(text.isprintable() for text in shown)


def test_bytes_that_are_no_text_can_be_shown(tmp_path):
    write_image(tmp_path / "train" / "1.png")
    os.rename(tmp_path / "train/1.png", os.fsencode(tmp_path / "train") + b"/\xff.png")
    assert open_source(str(tmp_path / "train")).image_name(0).encode() == os.fsencode(tmp_path) + b"/train/\\xff.png"
