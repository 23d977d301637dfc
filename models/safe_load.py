"""Opening files of strangers: nothing in them is executed, and what cannot be trusted is refused in one line."""

import argparse
import pickle
import re
import stat
import zipfile
from importlib import import_module
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open

from utils import UsageError, nearest, shortened

TORCH, SAFETENSORS = "torch", "safetensors"
LFS_POINTER = b"version https://git-lfs"
ARRAYS = (".npz", ".npy")
SHARD = "one process's shard of a network that FSDP divided; save it whole (FULL_STATE_DICT, full_state_dict=True)"
SUFFIXES = (".pth", ".pt", ".bin", ".ckpt", ".tar", ".safetensors")


class CheckpointError(UsageError):
    """A file that cannot be read, or whose weights do not fit the network they are meant for."""


def _harmless_types() -> list:
    """What published training checkpoints hold besides tensors: a Namespace, NumPy numbers and arrays. Nothing else."""
    multiarray = import_module("numpy._core.multiarray")
    functions = [
        (getattr(multiarray, name), f"{module}.multiarray.{name}")
        for name in ("scalar", "_reconstruct")
        for module in ("numpy.core", "numpy._core")  # NumPy 1 and 2 write different module names
    ]
    numbers = {type(np.dtype(code)) for code in "?bBhHiIlLqQefd"}
    return [argparse.Namespace, np.ndarray, np.dtype, *functions, *numbers]


def load_file(path: str | Path, mapped: bool = False) -> dict:
    """The dict that ``torch.save`` or safetensors wrote, tensors on the CPU. Nothing in the file is executed.

    ``mapped``: read tensors when they are used, where the format allows it. For what is copied at once only: a run that
    keeps such tensors while it replaces its own checkpoints loses them on some file systems.
    Raises CheckpointError, in one line, for whatever is not such a file.
    """
    return _dict_in(path, _content(Path(path), mapped))


def _dict_in(path: str | Path, content: object) -> dict:
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: holds a {type(content).__name__}, not a dict; save the network's state_dict()")
    return content


def load_arrays(path: str | Path) -> dict:
    """``load_file`` for what is no network: NumPy's .npz and .npy as well, and single tensors, whose name is "".

    Arrays become tensors. Raises CheckpointError.
    """
    path = Path(path)
    if path.suffix in ARRAYS:
        return _load_numpy(path)
    content = _content(path, mapped=False)
    if isinstance(content, np.ndarray):
        return {"": torch.from_numpy(content)}
    return {"": content} if isinstance(content, torch.Tensor) else _dict_in(path, content)


def _load_numpy(path: Path) -> dict[str, torch.Tensor]:
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file; check the path")
    try:
        content = np.load(path, allow_pickle=False)
        arrays = {"": content} if isinstance(content, np.ndarray) else {name: content[name] for name in content.files}
        return {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}
    except Exception as error:  # as below
        raise CheckpointError(f"{path}: no arrays of NumPy: {_why_refused(error)}") from error


def _content(path: Path, mapped: bool) -> object:
    if _kind_of(path) == SAFETENSORS:
        return _load_safetensors(path, mapped)
    try:
        if is_archive := zipfile.is_zipfile(path):
            _compare_checksums(path)
        with torch.serialization.safe_globals(_harmless_types()):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped and is_archive)
    except Exception as error:  # a damaged or hostile file can fail in every way its bytes allow
        raise CheckpointError(f"{path}: {_why_refused(error)}") from error


def _load_safetensors(path: Path, mapped: bool) -> dict:
    """The tensors of a safetensors file by name. The format has no checksums: its lengths are what is compared."""
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, no dict
    except Exception as error:  # as above
        raise CheckpointError(f"{path}: {_why_refused(error)}") from error
    return tensors if mapped else {name: tensor.clone() for name, tensor in tensors.items()}


def _checkpoints_in(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.glob("*") if file.suffix in SUFFIXES)


def _kind_of(path: Path) -> str:
    """TORCH or SAFETENSORS, by its first bytes. Raises CheckpointError for whatever is neither."""
    if path.is_dir():
        inside = _checkpoints_in(path)
        if not inside and (path / ".metadata").is_file():
            raise CheckpointError(
                f"{path}: a network in shards of torch.distributed.checkpoint; join them with python -m "
                f"torch.distributed.checkpoint.format_utils dcp_to_torch {path} FILE.pth"
            )
        hint = f"pass a file in it: {', '.join(inside[:5])}" if inside else f"it holds no {' or '.join(SUFFIXES)} file"
        raise CheckpointError(f"{path}: a directory, not a checkpoint; {hint}")
    if not path.exists():
        beside = _checkpoints_in(path.parent)
        raise CheckpointError(f"{path}: no such file{nearest(path.name, beside) or '; check the path'}")
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # reading a pipe or a device may never end
            raise CheckpointError(f"{path}: a pipe, socket or device, not a file; pass the file itself")
        size = status.st_size
        with open(path, "rb") as file:
            start = file.read(len(LFS_POINTER))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}; check its permissions") from error
    if size == 0:
        raise CheckpointError(f"{path}: empty (0 bytes): the copy or download failed; fetch it again")
    if start == LFS_POINTER:
        raise CheckpointError(
            f"{path}: a pointer of Git LFS, three lines of text in place of the file; fetch it with 'git lfs pull'"
        )
    if _is_safetensors(start):
        return SAFETENSORS
    if start.startswith(b"PK"):
        _check_is_torch_archive(path, size)
    elif not start.startswith(b"\x80"):  # torch.save before 1.6 wrote bare pickles
        raise CheckpointError(f"{path}: {_foreign_kind(start)}, not a checkpoint; pass a .pth or .safetensors file")
    return TORCH


def _is_safetensors(start: bytes) -> bool:
    """Eight bytes of length, of which the highest are 0 in any real header, then JSON."""
    return start[6:9] == b"\0\0{"


def _check_is_torch_archive(path: Path, size: int) -> None:
    if not zipfile.is_zipfile(path):
        raise CheckpointError(f"{path}: truncated: the end is missing after {size} bytes; copy or save it again")
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        names = {entry.filename.rsplit("/", 1)[-1] for entry in entries}
    if "constants.pkl" in names:
        raise CheckpointError(f"{path}: a TorchScript program, not weights; save its state_dict() with torch.save")
    if "data.pkl" not in names:
        raise CheckpointError(f"{path}: a zip archive, but none that torch.save wrote; pass a .pth file")
    # torch.save packs nothing, so that what a file unfolds to is no larger than the file
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries) or sum(e.file_size for e in entries) > size:
        total = sum(entry.file_size for entry in entries) / 1e6
        raise CheckpointError(
            f"{path}: refused: {total:.0f} MB of contents in a file of {size / 1e6:.0f} MB, which torch.save never "
            "packs; load and save it again with torch.save if you trust it"
        )


def _compare_checksums(path: Path) -> None:
    """Raise BadZipFile for a damaged entry; ``torch.load`` compares nothing and would return wrong values."""
    with zipfile.ZipFile(path) as archive:
        for entry in archive.infolist():
            if entry.CRC:  # 0: saved without checksums, as torch can be told to
                with archive.open(entry) as part:
                    while part.read(2**22):
                        pass


def _foreign_kind(start: bytes) -> str:
    kinds = {b"\xff\xd8": "a JPEG image", b"\x89PNG": "a PNG image", b"\x1f\x8b": "gzip data", b"<": "an HTML page"}
    kinds[b"{"] = "a JSON file"
    for magic, kind in kinds.items():
        if start.lstrip().startswith(magic):
            return kind
    return f"unknown data (it starts with {start[:4].hex(' ')})"


def _why_refused(error: Exception) -> str:
    """One line for what ``torch.load`` or safetensors raised."""
    text = str(error).strip()
    if isinstance(error, MemoryError):
        return "it does not fit into memory"
    if isinstance(error, EOFError) or "Ran out of input" in text:
        return "truncated: the file ends too early; copy or save it again"
    if isinstance(error, pickle.UnpicklingError):
        if "torch.distributed" in text:
            return f"refused: {SHARD}"
        wanted = re.search(r"GLOBAL ([\w.]+)", text)
        what = f"{wanted.group(1)}, which weights do not need and which" if wanted else "more than tensors, which"
        return f"refused: it asks for {what} could run code; ask for the plain state_dict()"
    return f"damaged: {shortened(text.splitlines()[0], 300) if text else type(error).__name__}; copy or save it again"
