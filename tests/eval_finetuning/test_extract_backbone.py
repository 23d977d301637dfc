"""The extracted backbone of every layout loads again and gives the same features."""

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from eval_finetuning.extract_backbone_weights_for_finetuning import main
from models.layouts.shapes import swin_arguments, vit_arguments
from models.matching import load_tensors
from models.reading import read_backbone
from models.swin import SwinTransformer
from models.vit import VisionTransformer
from tests.models.test_hugging_face import IN_FILES, hugging_face_names, vit
from tests.test_parity import GOLDEN
from utils import run_cli

NO_BACKBONE = ("checkpoint_teacher_linear", "linear_for_combine", "teacher_openclip_visual")
FILES = sorted(GOLDEN.glob("*/*.pth"))


@pytest.fixture
def extract(monkeypatch, capsys):
    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["extract.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            run_cli(main)
        return exit_.value.code, *capsys.readouterr()

    return run


def features(path: Path) -> torch.Tensor:
    state, info = read_backbone(path)
    shape = vit_arguments(state)
    model = VisionTransformer(**shape, num_heads=2) if shape else SwinTransformer(**swin_arguments(state), img_size=48)
    load_tensors(model, state, info)
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model.eval()(images)


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_layout_loads_again_with_the_same_features(extract, tmp_path, path):
    code, said, error = extract(path, tmp_path / "flat.pth", "--num_class_tokens", "keep")
    if path.stem in NO_BACKBONE:
        assert code == 2 and "no vision transformer or Swin" in error and error.count("\n") == 1
        assert not list(tmp_path.iterdir())
        return
    assert code == 0 and "wrote" in said, error
    flat = torch.load(tmp_path / "flat.pth", weights_only=True)
    assert all(isinstance(value, torch.Tensor) for value in flat.values())
    assert not [name for name in flat if name.startswith(("head", "module.", "backbone.", "masked_embed"))]
    assert torch.equal(features(tmp_path / "flat.pth"), features(path))


@pytest.mark.parametrize("name", ["checkpoint_full", "checkpoint_plain", "backbone_only"])
def test_of_udis_class_tokens_as_many_as_wished_are_kept(extract, tmp_path, name):
    source, target = GOLDEN / "udi" / f"{name}.pth", tmp_path / "flat.pth"
    code, said, error = extract("--checkpoint", source, "--output", target)
    assert code == 0 and "1 of 2 class tokens" in said, error
    one = torch.load(target, weights_only=True)
    both, _ = read_backbone(source)
    assert torch.equal(one["cls_token"], both["cls_token"][:, :1])
    assert torch.equal(one["pos_embed"], both["pos_embed"][:, [0, *range(2, both["pos_embed"].shape[1])]])
    assert extract(source, target, "--num_class_tokens", "0")[0] == 0
    none = torch.load(target, weights_only=True)
    assert none.keys() == one.keys() - {"cls_token"}
    assert torch.equal(none["pos_embed"], one["pos_embed"][:, 1:])


def test_a_student_is_extracted_by_its_key(extract, tmp_path):
    source = GOLDEN / "dino" / "checkpoint_full.pth"
    assert extract(source, tmp_path / "s.pth", "--checkpoint_key", "student")[0] == 0
    assert extract(source, tmp_path / "t.pth")[0] == 0
    student, teacher = (torch.load(tmp_path / f"{name}.pth", weights_only=True) for name in "st")
    assert student.keys() == teacher.keys() and not torch.equal(student["pos_embed"], teacher["pos_embed"])


@pytest.mark.parametrize("key", ["teacher_backbone", "student_backbone"])
def test_a_network_of_hugging_face_below_a_prefix_is_extracted_by_that_prefix(extract, tmp_path, key):
    state = hugging_face_names(vit(norm_eps=1e-12).float().state_dict(), IN_FILES)
    file = {f"{name}.{tensor}": t for name in ("student_backbone", "teacher_backbone") for tensor, t in state.items()}
    save_file({name: t.clone() + name.startswith(key) for name, t in file.items()}, tmp_path / "model.safetensors")
    code, _, error = extract(tmp_path / "model.safetensors", tmp_path / "flat.pth")
    assert code == 2 and "--checkpoint_key teacher_backbone" in error and error.count("\n") == 1
    code, said, error = extract(tmp_path / "model.safetensors", tmp_path / "flat.pth", "--checkpoint_key", key)
    assert code == 0 and "read with 1e-06" in said, error
    state_read, info = read_backbone(tmp_path / "flat.pth")
    load_tensors(ours := vit().float(), state_read, info)
    load_tensors(expected := vit().float(), *read_backbone(tmp_path / "model.safetensors", key))
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(ours(images), expected(images))
    assert torch.equal(state_read["cls_token"], state["embeddings.cls_token"] + 1)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["checkpoint output"]),
        (["a.pth"], ["checkpoint output"]),
        (["a.pth", "b.pth", "--output", "c.pth"], ["checkpoint output"]),
        (["a.pth", "--output", "c.pth"], ["checkpoint output"]),
        (["no/where.pth", "OUT/b.pth"], ["no/where.pth", "no such file"]),
        (["no/where.pth", "b.pkl"], ["b.pkl", ".pth"]),
        (["no/where.pth", "no/folder/b.pth"], ["no/folder"]),
        (["GOLD/dino/backbone_only.pth", "OUT/b.pth", "--num_class_tokens", "2"], ["--num_class_tokens"]),
        (["GOLD/dino/backbone_only.pth", "GOLD/dino/backbone_only.pth"], ["checkpoint itself"]),
    ],
    ids=lambda value: " ".join(value),
)
def test_bad_input_ends_in_one_line(extract, tmp_path, arguments, words):
    arguments = [text.replace("OUT", str(tmp_path)).replace("GOLD", str(GOLDEN)) for text in arguments]
    code, _, error = extract(*arguments)
    assert code == 2 and error.count("\n") == 1 and all(word in error for word in words), error
    assert not list(tmp_path.iterdir())
