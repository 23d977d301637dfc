"""The network in a file is found behind the words of wrappers and below prefixes; of several the key chooses."""

import copy
import re

import pytest
import torch
import torch.nn as nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from models.matching import load_backbone
from models.reading import choose_tensors, read_backbone
from models.safe_load import CheckpointError
from tests.models.test_checkpoints import refusal, saved, tiny


def wrap_parts(state: dict, word: str) -> dict:
    """Names of a network of which every block was wrapped, and its MLP once more, and all of it in DDP."""
    names = {name: re.sub(r"(blocks\.\d+\.)(mlp\.)?", rf"\1{word}.\2", name) for name in state}
    return {f"module.{name.replace('mlp.', f'mlp.{word}.')}": state[old] for old, name in names.items()}


@pytest.mark.parametrize(
    "word", ["module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module._orig_mod", "_forward_module"]
)
def test_the_words_of_wrappers_are_removed_wherever_they_stand(tmp_path, word):
    model = tiny()
    state = wrap_parts(model.state_dict(), word)
    assert f"module.blocks.1.{word}.mlp.{word}.fc1.weight" in state
    images = torch.randn(2, 3, 32, 32)
    for file in (state, {"teacher": {f"{word}.{name}": tensor for name, tensor in state.items()}}):
        load_backbone(other := tiny(), saved(tmp_path, file))
        assert torch.equal(other(images), model(images))


def test_torchs_own_wrappers_are_removed(tmp_path):
    model = tiny()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    wrapped = copy.deepcopy(model)
    wrapped.blocks[0] = checkpoint_wrapper(wrapped.blocks[0])
    for index in range(2):
        wrapped.blocks[index] = torch.compile(wrapped.blocks[index])
    averaged = torch.optim.swa_utils.AveragedModel(wrapped)
    assert any("_orig_mod" in name.split(".")[3:] for name in averaged.state_dict())
    report = load_backbone(other := tiny(), saved(tmp_path, averaged.state_dict()))
    assert report.ignored == ["n_averaged"]
    assert all(torch.equal(tensor, state[name]) for name, tensor in other.state_dict().items())


def test_two_networks_that_would_get_the_same_names_are_refused(tmp_path):
    state = tiny().state_dict()
    both = state | {f"_orig_mod.{name}": tensor for name, tensor in state.items()}
    assert "several tensors would be called cls_token" in refusal(read_backbone, saved(tmp_path, both))


def lightning(networks: dict[str, dict]) -> dict:
    """What Lightning's Trainer saves: the module's state dict, of which every attribute is a prefix."""
    state = {f"{name}.{tensor}": value for name, part in networks.items() for tensor, value in part.items()}
    file = {"epoch": 3, "global_step": 30, "pytorch-lightning_version": "2.5.0", "state_dict": state}
    return file | {"hyper_parameters": {"lr": 0.1}, "optimizer_states": [], "lr_schedulers": [], "callbacks": {}}


HEAD = {"layers.0.weight": torch.zeros(3, 12), "layers.0.bias": torch.zeros(3)}


@pytest.mark.parametrize("prefix", ["model", "net.backbone", "student.encoder.vit", "module.model._orig_mod"])
def test_a_prefix_of_the_whole_network_is_found(tmp_path, prefix):
    model = tiny()
    file = lightning({prefix: model.state_dict(), "criterion": {"center": torch.zeros(1, 3)}})
    images = torch.randn(2, 3, 32, 32)
    for content in (file, file["state_dict"]):
        report = load_backbone(other := tiny(), saved(tmp_path, content))
        assert torch.equal(other(images), model(images))
        assert any("left aside" in note and "criterion.* (1)" in note for note in report.info.notes)


def test_of_several_networks_the_key_chooses_and_without_it_all_are_listed(tmp_path):
    student, teacher = tiny(), tiny()
    parts = {"student_backbone": student.state_dict(), "student_head": HEAD}
    parts |= {"teacher_backbone": teacher.state_dict(), "teacher_head": HEAD}
    path = saved(tmp_path, lightning(parts))
    text = refusal(load_backbone, tiny(), path)
    assert "2 networks: student_backbone, teacher_backbone" in text and "\n" not in text
    assert "--checkpoint_key teacher_backbone" in text and str(path) in text
    images = torch.randn(2, 3, 32, 32)
    for key, model in (("student_backbone", student), ("teacher_backbone", teacher)):
        report = load_backbone(other := tiny(), path, key)
        assert torch.equal(other(images), model(images))
        assert (report.info.prefix, report.complete) == (f"{key}.", True)
        took, aside = report.info.notes[1], report.info.notes[0]
        assert f"begin with {key}. from key 'state_dict'" in took and "teacher_head.* (2)" in aside


def test_the_usual_key_finds_a_teacher_among_prefixes_and_a_network_at_the_root_is_preferred(tmp_path):
    student, teacher = tiny().state_dict(), tiny().state_dict()
    path = saved(tmp_path, lightning({"method.student": student, "method.teacher.backbone": teacher}))
    for key, state in (("teacher", teacher), ("student", student), ("method.teacher", teacher)):
        assert torch.equal(read_backbone(path, key)[0]["cls_token"], state["cls_token"])
    path = saved(tmp_path, student | {f"ema.{name}": tensor for name, tensor in teacher.items()})
    for key, state in (("teacher", student), ("ema", teacher)):
        found, info = read_backbone(path, key)
        assert found.keys() == state.keys() and torch.equal(found["cls_token"], state["cls_token"])
    assert "cls_token (1)" not in info.notes[0] and "left aside" in info.notes[0]


def test_networks_with_such_words_in_their_own_names_load_too(tmp_path):
    # as timm's networks with an encoder and iformer have them; DenseNet, whose names all begin with one word
    mixer = nn.ModuleDict({"encoder": nn.ModuleDict({"module": nn.Linear(2, 2), "proj": nn.Linear(2, 2)})})
    features = nn.ModuleDict({"features": nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))})
    for model in (mixer, features):
        for prefix, rest in (("", {}), ("module.backbone.", {"module.head.mlp.0.bias": torch.zeros(2)})):
            state = {f"{prefix}{name}": torch.ones_like(tensor) for name, tensor in model.state_dict().items()}
            report = load_backbone(other := copy.deepcopy(model), saved(tmp_path, {"teacher": state | rest}))
            assert report.complete and all(bool(tensor.eq(1).all()) for tensor in other.state_dict().values())


def test_the_key_is_looked_for_then_state_dict_then_model_then_the_file_itself():
    one = {"cls_token": torch.zeros(1)}
    assert choose_tensors({"teacher": one, "state_dict": one}, "teacher")[0] == "teacher"
    assert choose_tensors({"model": one, "state_dict": one}, "teacher")[0] == "state_dict"
    assert choose_tensors({"model": one, "epoch": 3}, "teacher")[0] == "model"
    assert choose_tensors(one, "teacher")[0] is None
    with pytest.raises(CheckpointError, match=r"no weights under 'techer'.*one of: student, teacher"):
        choose_tensors({"student": one, "teacher": one, "epoch": 1}, "techer")
    with pytest.raises(CheckpointError, match="no weights at all"):
        choose_tensors({"epoch": 1}, "teacher")
