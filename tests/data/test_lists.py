import os
from pathlib import Path

import pytest

from data.datasets import open_source
from tests.data.helpers import write_folder, write_image, write_list
from utils import UsageError


def names(source) -> list[str]:
    return [source.image_name(i) for i in range(len(source))]


def error(path: Path, content: bytes | str) -> str:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UsageError) as caught:
        open_source(str(path))
    assert str(caught.value).isprintable() and str(caught.value).startswith(f"--data_path {path}: ")
    return str(caught.value).removeprefix(f"--data_path {path}: ")


def test_a_list_holds_relative_and_absolute_paths(tmp_path):
    write_folder(tmp_path, ["sub/one.png", "two words.png", "elsewhere/3.png"])
    text = f"sub/one.png\r\n\ntwo words.png\n{tmp_path / 'elsewhere/3.png'}"
    (tmp_path / "list.txt").write_bytes(b"\xef\xbb\xbf" + text.encode())
    source = open_source(str(tmp_path / "list.txt"))
    assert names(source) == [str(tmp_path / name) for name in ("sub/one.png", "two words.png", "elsewhere/3.png")]
    assert source.labels.tolist() == [-1, -1, -1]
    assert all(source.array(i).shape == (24, 32, 3) for i in range(3))


@pytest.mark.parametrize(
    ("labels", "numbers", "class_names"),
    [
        (["3", "0", "3"], [3, 0, 3], ["0", "1", "2", "3"]),
        (["dog", "cat", "dog"], [1, 0, 1], ["cat", "dog"]),
        (["dog", None, "7"], [1, -1, 0], ["7", "dog"]),
        (["-1", "2", "2"], [0, 1, 1], ["-1", "2"]),
        (["dog ", "dog", " dog\t"], [0, 0, 0], ["dog"]),
    ],
)
def test_a_list_may_have_labels(tmp_path, labels, numbers, class_names):
    lines = [f"{i}.png" + ("" if label is None else f"\t{label}") for i, label in enumerate(labels)]
    source = open_source(str(write_list(tmp_path, lines, "list.tsv")))
    assert (source.labels.tolist(), source.class_names) == (numbers, class_names)


def test_a_list_is_taken_literally(tmp_path):
    source = open_source(str(write_list(tmp_path, [".hidden/._1.png", "no extension"])))
    assert names(source) == [str(tmp_path / ".hidden/._1.png"), str(tmp_path / "no extension")]


def test_a_list_that_changed_is_read_again(tmp_path):
    assert len(open_source(str(write_list(tmp_path, ["a.png"])))) == 1
    assert len(open_source(str(write_list(tmp_path, ["a.png", "b.png"])))) == 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"\n \n", "is empty"),
        (b"ELF\0\1\2", "neither a folder"),
        ("a.png\tcat\nb.png\tdog\n".encode("utf-16"), "this list is in UTF-16; save it as UTF-8"),
        (b"a.png\tcat\rb.png\tdog\r", r"its lines end as on old Macs, in \r; save it with ends of \n"),
    ],
)
def test_what_is_no_list_is_refused(tmp_path, content, message):
    assert message in error(tmp_path / "list", content)


TAB = "a tab is expected between path and label"


@pytest.mark.parametrize(
    ("third", "read", "message"),
    [
        ("a.png cat", "a.png cat", f"{TAB}, and there is a space"),
        ("a.png, cat", "a.png, cat", f"{TAB}, and there is a comma"),
        ("a.png;1", "a.png;1", f"{TAB}, and there is a semicolon"),
        ('"a.png"\tcat', '"a.png"', f"the path is in quotes; write it without, and {TAB}"),
        ("a.png\t'cat'", "'cat'", f"the label is in quotes; {TAB}, and no quotes"),
        ("a.png ", "a.png ", f"blanks before or after the path; remove them; {TAB}"),
        (" a.png\tcat", " a.png", f"blanks before or after the path; remove them; {TAB}"),
        ("a.png\tcat\t3", r"a.png\tcat\t3", f"3 columns; {TAB}, and no more"),
        ("a.png\t\tcat", r"a.png\t\tcat", f"3 columns; {TAB}, and no more"),
        ("\tcat", r"\tcat", f"no path before the tab; {TAB}"),
        ("cat\ta.png", "cat", "the path comes first, then a tab and the label"),
        ("sub\\b.png\tdog", "sub\\b.png", "backslashes between folders; write / instead"),
        ("sub", "sub", "a folder; one image a line is expected"),
        ("~/a.png\tcat", "~/a.png", "~ is not expanded here; write the whole path"),
        (
            "a.png\rb.png",
            r"a.png\rb.png",
            r"a line end of old Macs, \r, inside the line; save the list with ends of \n",
        ),
    ],
)
def test_a_line_that_can_be_read_in_two_ways_is_refused_with_its_number(tmp_path, third, read, message):
    write_folder(tmp_path, ["a.png", "sub/b.png"])
    refused = error(tmp_path / "list.txt", f"a.png\tcat\n\n{third}\nsub/b.png\tdog\n")
    assert refused == f"line 3, '{read}': {message}"


@pytest.mark.parametrize("header", ["path\tlabel", "filename,class", "image"])
def test_a_header_is_named(tmp_path, header):
    write_folder(tmp_path, ["a.png"])
    refused = error(tmp_path / "list.txt", f"{header}\na.png\t1\n")
    assert refused.startswith(f"line 1, '{header.split(chr(9))[0]}': no image, but what looks like a header; remove")


def test_paths_relative_to_the_working_folder_are_named(tmp_path, monkeypatch):
    write_folder(tmp_path, ["images/a.png"])
    (tmp_path / "lists").mkdir()
    monkeypatch.chdir(tmp_path)
    refused = error(tmp_path / "lists" / "list.txt", "images/a.png\tcat\n")
    assert refused == (
        "line 1, 'images/a.png': this file exists relative to the working folder, and paths are relative to the "
        f"list's folder, {tmp_path / 'lists'}; write them so, or absolute"
    )


def test_a_few_missing_files_are_named_and_too_many_refused(tmp_path, caplog):
    path = write_list(tmp_path, [f"{i}.png" for i in range(6)])
    (tmp_path / "2.png").unlink()
    assert len(open_source(str(path))) == 6
    assert f"1 of the 6 files looked for are missing; line 3: {tmp_path / '2.png'} does not exist" in caplog.text
    for number in (0, 1, 5):  # gone after the list was kept, as where a drive is missing
        (tmp_path / f"{number}.png").unlink()
    with pytest.raises(UsageError, match=r"line 1, '0\.png': .*0\.png does not exist, 4 of the 6 files looked for are"):
        open_source(str(path))


def test_a_long_list_costs_a_few_looks(tmp_path, monkeypatch):
    write_image(tmp_path / "a.png")
    lines = ["a.png\tcat"] * 20_000
    looked, isfile = [], os.path.isfile
    monkeypatch.setattr(os.path, "isfile", lambda path: looked.append(path) or isfile(path))
    (tmp_path / "list.txt").write_text("\n".join(lines))
    open_source(str(tmp_path / "list.txt"))
    assert len(looked) < 100
    looked.clear()
    lines[-1] = "a.png cat"
    refused = error(tmp_path / "list.txt", "\n".join(lines))
    assert refused.startswith("line 20000, 'a.png cat': a tab is expected") and len(looked) < 100
