"""Archives of images for the tests: tar shards, zips with a map, TSV files with a line index."""

import base64
import io
import tarfile
import zipfile
from pathlib import Path

from tests.data.helpers import encoded, photograph


def image(seed: int = 0, form: str = "PNG") -> bytes:
    return encoded(photograph(seed, 24, 32), form)


def write_tar(path: Path, entries: list[tuple[str, bytes]], form: int = tarfile.PAX_FORMAT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=form) as archive:
        for name, data in entries:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def write_shards(folder: Path, images: list[tuple[str, bytes]], count: int = 2, name: str = "train") -> Path:
    """The images dealt out among ``count`` archives, as one would hand out cards."""
    for shard in range(count):
        write_tar(folder / f"{name}-{shard:04}.tar", images[shard::count])
    return folder


def write_mapped_zip(folder: Path, images: list[tuple[str, bytes]], labels: list, part: str = "train") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(folder / f"{part}.zip", "w") as archive:
        for name, data in images:
            archive.writestr(name, data)
    lines = [f"{part}.zip@/{name}\t{label}\n" for (name, _), label in zip(images, labels, strict=True)]
    (folder / f"{part}_map.txt").write_text("".join(lines))
    return folder


def write_tsv(file: Path, rows: list[tuple[str, str, bytes]]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    starts = []
    with open(file, "wb") as out:
        for key, label, data in rows:
            starts.append(out.tell())
            out.write(f"{key}\t{label}\t".encode() + base64.b64encode(data) + b"\n")
    file.with_suffix(".lineidx").write_text("".join(f"{start}\n" for start in starts))
    return file
