"""Twins of the golden case of data sets in forms of their own: other files, names, orders and labels."""

import base64
import io
import json
import zipfile

import numpy as np
import pytest

from tests.data.helpers import encoded, photograph
from tests.twins import agrees, golden, rewrite


def as_bytes(data: bytes) -> np.ndarray:
    return np.frombuffer(data, np.uint8)


def rewritten(files: dict[str, bytes], outputs: dict):
    case = golden("esvit", "dataset_formats")
    inputs = {name.replace(".", "_").replace("/", "_") + "_bytes": as_bytes(data) for name, data in files.items()}
    case.entry["inputs"] = [{"key": key, "meaning": f"file {name}"} for key, name in zip(inputs, files, strict=True)]
    return rewrite(case, inputs, {name: np.array(value, np.int64) for name, value in outputs.items()})


def sums(images: list[np.ndarray]) -> list[int]:
    return [int(image.astype(np.int64).sum()) for image in images]


@pytest.mark.parametrize("packing", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_zip_in_another_order_with_other_folders_labels_and_parts(packing):
    images = [photograph(seed, 9 + seed, 14) for seed in range(6)]
    names = ["z/b.JPEG", "a/deep/c.png", "top.bmp", "z/a.tiff", "a/unlisted.png", "z/other.gif"]
    forms = ["PNG", "PNG", "BMP", "TIFF", "PNG", "GIF"]  # what a name says of its format means nothing
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", packing) as archive:
        for name, image, form in zip(names, images, forms, strict=True):
            archive.writestr(name, encoded(image, form))
        archive.writestr("z/empty.png", b"")
    lines = ["x@/a/deep/c.png\t17", "", "z/a.tiff\t4", "@z/b.JPEG\t0", "y@/top.bmp\t4", "y@/z/other.gif\t1",
             "y@z/empty.png\t2"]  # fmt: skip
    files = {"val.zip": buffer.getvalue(), "val_map.txt": "\r\n".join(lines).encode()}
    agrees(rewritten(files, {"zip_targets": [0, 17, 4, 4], "zip_sums": sums(images[:4])}))


def tsv(rows: list[tuple[str, str, bytes]], end: bytes = b"\n") -> tuple[bytes, bytes]:
    lines = [f"{key}\t{label}\t".encode() + base64.b64encode(image) + end for key, label, image in rows]
    starts = np.cumsum([0, *map(len, lines)])[:-1]
    return b"".join(lines), "".join(f"{start}\n" for start in starts).encode()


def test_several_tsv_files_with_lists_of_their_lines_and_other_line_ends():
    images = [photograph(seed, 8, 11 + seed) for seed in range(5)]
    first, first_index = tsv([(f"k{i}", str(9 - i), encoded(images[i])) for i in range(3)], b"\r\n")
    second, second_index = tsv([(f"k{i}", str(i), encoded(images[i], "JPEG", quality=95)) for i in (3, 4)])
    decoded = [np.asarray(image) for image in images[:3]]
    from data.decode import decode_pil

    decoded += [np.asarray(decode_pil(encoded(images[i], "JPEG", quality=95), "")) for i in (3, 4)]
    files = {"train/b.tsv": second, "train/b.lineidx": second_index, "train/a.tsv": first,
             "train/a.lineidx": first_index, "train/a.linelist": b"2\n0\n"}  # fmt: skip
    kept = [decoded[i] for i in (0, 2, 3, 4)]
    agrees(rewritten(files, {"tsv_targets": [9, 7, 3, 4], "tsv_sums": sums(kept)}))


def test_labels_in_json_by_a_map_and_lines_by_class():
    images = [photograph(seed, 8, 11 + seed) for seed in range(5)]
    classes = ["dog", "dog", "cat", "ant", "cat"]
    label = [json.dumps([{"class": name, "conf": 1.0}, {"class": "x" * 700}]) for name in classes]
    data, starts = tsv([(f"k{i}", label[i], encoded(images[i])) for i in range(5)])
    files = {"val.tsv": data, "val.lineidx": starts, "labelmap_22k_reorder.txt": b"cat\t6\ndog\t0\n\nant\t2\n"}
    agrees(rewritten(files, {"tsv_targets": [0, 0, 6, 2, 6], "tsv_sums": sums(images)}))
    files["val.chunks"] = json.dumps({"cat": [4, 4], "unknown": [0, 3], "dog": [0, 1]}).encode()
    agrees(rewritten(files, {"tsv_targets": [6, 0, 0], "tsv_sums": sums([images[i] for i in (4, 0, 1)])}))
