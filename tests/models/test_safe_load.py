"""Files of strangers: nothing in them runs, and what is not a checkpoint is refused in one line that names it."""

import argparse
import os
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn
from safetensors.torch import save, save_file

from models.safe_load import CheckpointError, load_file


def saved(tmp_path: Path, content, name: str = "file.pth") -> Path:
    torch.save(content, tmp_path / name)
    return tmp_path / name


def refusal(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        load_file(path)
    return str(caught.value)


class Payload:
    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_hostile_pickle_is_refused_and_does_not_run(tmp_path):
    marker = tmp_path / "it_ran"
    torch.save({"teacher": Payload(marker)}, tmp_path / "zip.pth")
    torch.save({"teacher": Payload(marker)}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    (tmp_path / "bare.pth").write_bytes(pickle.dumps(Payload(marker)))
    for name in ("zip.pth", "old.pth", "bare.pth"):
        text = refusal(tmp_path / name)
        assert "refused" in text and ("system" in text or name == "bare.pth") and name in text and "\n" not in text
    assert not marker.exists()
    pickle.loads((tmp_path / "bare.pth").read_bytes())
    assert marker.exists()  # the payload is real


def test_whole_pickled_networks_are_refused_with_the_class_they_ask_for(tmp_path):
    text = refusal(saved(tmp_path, {"model": nn.Linear(2, 2)}))
    assert "torch.nn.modules.linear.Linear" in text and "state_dict" in text


def tiny_weight(path: Path) -> bytes:
    """The bytes of one tensor in a file."""
    return torch.load(path)["teacher"]["weight"].numpy().tobytes()


def broken_files(folder: Path) -> dict[str, str]:
    """name -> a word the message must hold."""
    whole = saved(folder, {"teacher": nn.Linear(8, 8).state_dict()}, "whole.pth").read_bytes()
    torch.save({"w": torch.randn(100)}, folder / "old.pth", _use_new_zipfile_serialization=False)
    (folder / "truncated.pth").write_bytes(whole[: len(whole) // 2])
    (folder / "truncated_old.pth").write_bytes((folder / "old.pth").read_bytes()[:300])
    (folder / "empty.pth").write_bytes(b"")
    (folder / "photo.pth").write_bytes(b"\xff\xd8\xff\xe0" + bytes(100))
    (folder / "page.pth").write_bytes(b"\n<!DOCTYPE html><html>404</html>")
    (folder / "noise.pth").write_bytes(bytes(range(1, 90)))
    save_file({"w": torch.randn(100)}, folder / "whole.safetensors")
    header, rest = (data := (folder / "whole.safetensors").read_bytes())[:8], data[8:]
    (folder / "short.safetensors").write_bytes(data[:-5])
    (folder / "half_a_header.safetensors").write_bytes(data[:20])
    (folder / "long.safetensors").write_bytes(data + bytes(3))
    (folder / "no_json.safetensors").write_bytes(header + rest.replace(b'"dtype"', b'\xff\xfftype"'))
    (folder / "other_type.safetensors").write_bytes(header + rest.replace(b'"F32"', b'"X32"'))
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {}}')
    np.savez(folder / "arrays.npz", a=np.zeros(3))
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), folder / "program.pth")
    saved(folder, [torch.zeros(2)], "list.pth")
    (folder / "runs").mkdir()
    saved(folder / "runs", {}, "checkpoint.pth")
    value = tiny_weight(folder / "whole.pth")
    (folder / "damaged.pth").write_bytes(whole.replace(value, value[:-1] + bytes([value[-1] ^ 1])))
    return {
        "truncated.pth": "truncated",
        "truncated_old.pth": "",
        "empty.pth": "empty",
        "photo.pth": "JPEG",
        "page.pth": "HTML",
        "noise.pth": "unknown data",
        "short.safetensors": "damaged",
        "half_a_header.safetensors": "damaged",
        "long.safetensors": "damaged",
        "no_json.safetensors": "damaged",
        "other_type.safetensors": "damaged",
        "whole.safetensor": "did you mean whole.safetensors",
        "model.safetensors.index.json": "a JSON file",
        "arrays.npz": "zip archive",
        "program.pth": "TorchScript",
        "list.pth": "list",
        "runs": "checkpoint.pth",
        "damaged.pth": "CRC",
        "hole.pth": "did you mean whole.pth",
        "nowhere/file.pth": "no such file",
    }


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_whatever_is_not_a_checkpoint_is_refused_in_one_line_with_its_path(tmp_path):
    for name, word in broken_files(tmp_path).items():
        text = refusal(tmp_path / name)
        assert str(tmp_path / name) in text and word in text and "\n" not in text, (name, text)


def test_numbers_and_arrays_that_either_numpy_wrote_load(tmp_path):
    content = {
        "args": argparse.Namespace(lr=np.float64(0.5), schedule=np.arange(3.0), seed=np.int64(2), flag=np.bool_(1))
    }
    path = saved(tmp_path, content)
    with zipfile.ZipFile(path) as archive, zipfile.ZipFile(tmp_path / "numpy1.pth", "w") as other:
        for name in archive.namelist():
            data = archive.read(name)
            other.writestr(name, data.replace(b"numpy._core", b"numpy.core") if name.endswith("data.pkl") else data)
    for file in (path, tmp_path / "numpy1.pth"):
        args = load_file(file)["args"]
        assert (args.lr, args.seed, args.flag, args.schedule.tolist()) == (0.5, 2, True, [0, 1, 2])


@pytest.mark.parametrize("mapped", [False, True])
def test_safetensors_files_of_any_type_load_whatever_they_are_called(tmp_path, mapped):
    tensors = {str(dtype): torch.randn(3, 5).to(dtype) for dtype in (torch.float64, torch.float16, torch.bfloat16)}
    for size in (128, 75 * 256 + 80):  # the length of a header can begin like a pickle (0x80) or a zip (PK)
        content = save(tensors | {"a": torch.arange(3)}, metadata={"format": "pt"})
        length = int.from_bytes(content[:8], "little")
        padded = max(size, length + (size - length) % 256)
        (tmp_path / "file.pth").write_bytes(
            padded.to_bytes(8, "little") + content[8 : 8 + length].ljust(padded) + content[8 + length :]
        )
        loaded = load_file(tmp_path / "file.pth", mapped)
        assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())
        assert loaded["a"].tolist() == [0, 1, 2] and len(loaded) == 4


def test_what_is_not_mapped_of_a_safetensors_file_outlives_it(tmp_path):
    save_file({"w": torch.ones(2000)}, tmp_path / "file.safetensors")
    loaded = load_file(tmp_path / "file.safetensors")
    with open(tmp_path / "file.safetensors", "r+b") as file:
        file.write(bytes(8000))
    assert bool(loaded["w"].eq(1).all())
