"""Odd but harmless-looking files through the command: an exit code, never a traceback, and never a screen full."""

import argparse
import os
import sys
import zipfile

import pytest
import torch
from safetensors.torch import save_file

from models.checkpoints import main
from models.matching import load_backbone
from models.safe_load import CheckpointError
from models.vit import VisionTransformer
from utils import UsageError

MOST = 4096  # characters of output
torch.manual_seed(0)
PLAIN = VisionTransformer(patch_size=8, img_size=32, embed_dim=128, depth=4, num_heads=4).state_dict()
QKV, FC1, PATCH = "blocks.0.attn.qkv.weight", "blocks.0.mlp.fc1.weight", "patch_embed.proj.weight"
LONG = "a" * 1_000_000


def zeros(*shape: int) -> torch.Tensor:
    return torch.zeros(shape)


def repeated(*shape: int) -> torch.Tensor:
    return torch.zeros(1).expand(shape)


def as_type(dtype: torch.dtype) -> dict:
    return {name: tensor.to(dtype) for name, tensor in PLAIN.items()}


def swin(**tensors) -> dict:
    state = {PATCH: zeros(96, 3, 4, 4), "layers.0.blocks.0.norm1.weight": zeros(96)}
    state |= {"layers.0.blocks.0.mlp.fc1.weight": zeros(384, 96)}
    return state | {"layers.0.blocks.0.attn.relative_position_bias_table": zeros(169, 3)} | tensors


WRONG_SHAPES = {
    "a class token of one dimension": {"cls_token": zeros(128)},
    "no class token": {"cls_token": zeros(1, 0, 128)},
    "a class token of two dimensions": {"cls_token": zeros(1, 128)},
    "positions of no dimension": {"pos_embed": zeros()},
    "positions of one dimension": {"pos_embed": zeros(128)},
    "no positions": {"pos_embed": zeros(1, 0, 128)},
    "qkv of no dimension": {QKV: zeros()},
    "qkv of one dimension": {QKV: zeros(384)},
    "qkv of nothing": {QKV: zeros(0, 0)},
    "patches of 0 x 0": {PATCH: zeros(128, 3, 0, 0)},
    "patches of no dimension": {PATCH: zeros()},
    "patches to nothing": {PATCH: zeros(0, 3, 8, 8), QKV: zeros(0, 0)},
    "patches in a line": {PATCH: zeros(128, 768)},
    "patches that are oblong": {PATCH: zeros(128, 3, 8, 16)},
    "patches of one colour": {PATCH: zeros(128, 1, 8, 8)},
    "patches beyond memory": {PATCH: repeated(128, 3, 50000, 50000)},
    "positions beyond memory": {"pos_embed": repeated(1, 1 + 10**8, 128)},
    "an MLP beyond memory": {FC1: repeated(10**9, 128)},
    "an empty MLP": {FC1: zeros(0, 128)},
    "an MLP of nothing": {FC1: zeros(512, 0)},
    "an MLP of no dimension": {FC1: zeros()},
    "a gate of no dimension": {"blocks.0.mlp.w12.weight": zeros(), "blocks.0.mlp.w3.weight": zeros()},
    "LayerScale of no dimension": {"blocks.0.ls1.gamma": zeros(), "blocks.0.mlp.fc2.weight": zeros()},
    "registers of one dimension": {"register_tokens": zeros(128)},
    "block x": {"blocks.x.attn.qkv.weight": zeros(3)},
    "block 999999999": {"blocks.999999999.attn.qkv.weight": zeros(384, 128)},
    "blocks up to 999": {f"blocks.{number}.norm1.weight": zeros(1) for number in range(4, 999)},
    "a block of no number": {"blocks.": zeros(3)},
    "not a number": {"norm.weight": torch.full((128,), float("nan"))},
    "infinite": {"norm.bias": torch.full((128,), float("inf"))},
}
REFUSED = {name: PLAIN | tensors for name, tensors in WRONG_SHAPES.items()} | {
    "float8": as_type(torch.float8_e4m3fn),
    "int8": as_type(torch.int8),
    "bool": as_type(torch.bool),
    "complex": as_type(torch.complex64),
    "meta": {name: tensor.to("meta") for name, tensor in PLAIN.items()},
    "sparse": PLAIN | {QKV: PLAIN[QKV].to_sparse()},
    "a Swin's table of one dimension": swin(**{"layers.0.blocks.0.attn.relative_position_bias_table": zeros(169)}),
    "a Swin's stage 999999999": swin(**{"layers.999999999.blocks.0.attn.relative_position_bias_table": zeros(169, 3)}),
    "a Swin's empty MLP": swin(**{"layers.0.blocks.0.mlp.fc1.weight": zeros(384, 0)}),
    "CLIP of no dimension": {f"visual.{name}": zeros() for name in ("class_embedding", "conv1.weight", "proj")},
    "Hugging Face's of one dimension": {
        "embeddings.cls_token": zeros(3),
        "embeddings.position_embeddings": zeros(2),
        "encoder.layer.0.layernorm_before.weight": zeros(1),
    },
    "a ResNet of no dimension": {"conv1.weight": zeros(), "layer1.0.conv1.weight": zeros(), "bn1.weight": zeros(1)},
    "a long name": PLAIN | {LONG: zeros(1)},
    "long names": PLAIN | {f"odd{number}.{LONG[:1000]}": zeros(1) for number in range(100)},
    "a long architecture": {"teacher": {"v": zeros(1), "w": zeros(2), "z": zeros(3)}, "args": {"arch": LONG}},
    "many networks": {
        f"net{number}.{name}": PLAIN[name] for number in range(99) for name in ("cls_token", "norm.bias")
    },
    "many dicts": {f"net{number}": {"w": zeros(1)} for number in range(1000)},
    "nothing": {},
    "no dict": [zeros(3)],
    "keys that are no names": {1: zeros(2)},
    "a dict too deep": {"teacher": {"model": PLAIN}},
}
READ = {
    "plain": PLAIN,
    "half": as_type(torch.float16),
    "bfloat16": as_type(torch.bfloat16),
    "double": as_type(torch.float64),
    "a long value": {"teacher": PLAIN, "note": LONG, "epoch": 3},
    "a long key": {"teacher": PLAIN, LONG: 3},
    "many keys": {"teacher": PLAIN} | {f"key{number}": number for number in range(5000)},
    "odd arguments": {"teacher": PLAIN, "args": argparse.Namespace(arch=[1, 2], image_size="x", patch_size=LONG)},
    "odd marks of ours": {"teacher": PLAIN, "tutelage": {"arch": 7, "image_size": None, "method": ["x"] * 9999}},
}


def told(monkeypatch, capsys, path, *options: object) -> tuple[int, str]:
    """Exit code of the command and all that it says; anything but a UsageError comes through."""
    monkeypatch.setattr(sys, "argv", ["checkpoints", str(path), *map(str, options)])
    try:
        code, error = main(), ""
    except UsageError as refusal:
        code, error = refusal.exit_code, f"error: {refusal}\n"
        assert isinstance(refusal, CheckpointError) and error.count("\n") == 1
    return code, capsys.readouterr().out + error


@pytest.mark.parametrize(("files", "expected"), [(REFUSED, 2), (READ, 0)], ids=["refused", "read"])
def test_every_odd_file_ends_with_its_exit_code_and_few_words(monkeypatch, capsys, tmp_path, files, expected):
    found = {}
    for name, content in files.items():
        torch.save(content, tmp_path / "odd.pth")
        code, text = told(monkeypatch, capsys, tmp_path / "odd.pth")
        found[name] = code, len(text) <= MOST and "odd.pth" in text
    assert found == dict.fromkeys(files, (expected, True))


def test_weights_that_are_no_finite_numbers_are_not_loaded_either(tmp_path):
    for name, words in (("int8", "int8"), ("not a number", "128 of its 128 values are NaN"), ("infinite", "norm.bias")):
        torch.save(REFUSED[name], tmp_path / "odd.pth")
        model = VisionTransformer(patch_size=8, img_size=32, embed_dim=128, depth=4, num_heads=4)
        before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
        with pytest.raises(CheckpointError, match=words):
            load_backbone(model, tmp_path / "odd.pth")
        assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


def test_safetensors_of_types_that_nothing_computes_in_are_refused(monkeypatch, capsys, tmp_path):
    save_file(as_type(torch.float8_e4m3fn), tmp_path / "odd.safetensors")
    code, text = told(monkeypatch, capsys, tmp_path / "odd.safetensors")
    assert code == 2 and "float8_e4m3fn" in text


def test_what_is_no_file_of_weights_is_refused_by_its_kind_before_it_is_read(monkeypatch, capsys, tmp_path):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345678\n"
    for name in ("pointer.pth", "pointer.safetensors"):
        (tmp_path / name).write_text(pointer)
        assert "Git LFS" in told(monkeypatch, capsys, tmp_path / name)[1]
    os.mkfifo(tmp_path / "pipe.pth")  # opening it would wait for a writer for ever
    (tmp_path / "endless.pth").symlink_to("/dev/zero")
    for name in ("pipe.pth", "endless.pth"):
        code, text = told(monkeypatch, capsys, tmp_path / name)
        assert code == 2 and "not a file" in text


@pytest.mark.parametrize("claimed", [0, 12 * 10**9])
def test_contents_that_unfold_are_refused_by_their_size(monkeypatch, capsys, tmp_path, claimed):
    """Deflated zeros; and a directory that claims 12 GB, which would be unfolded to find out."""
    torch.save(PLAIN, tmp_path / "plain.pth")
    path = tmp_path / "bomb.pth"
    with zipfile.ZipFile(tmp_path / "plain.pth") as plain, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed:
        for entry in plain.infolist():
            packed.writestr(entry.filename, plain.read(entry))
        entry.file_size = claimed or entry.file_size
        if claimed:
            packed.infolist()[-1].file_size = 4 * 10**9
    code, text = told(monkeypatch, capsys, path)
    assert code == 2 and "refused" in text and "never packs" in text
