"""What checkpoints hold of a method, under whatever names, and what another run takes of it."""

import numpy as np
import pytest
import torch
import torch.nn as nn

from methods.dino import DINO
from methods.heads import DINOHead, IBOTHead
from methods.multicrop import MultiCropNetwork
from methods.parts import Renamed, adopt_parts
from models.vit import VisionTransformer
from utils import UsageError


def to_file(state: dict) -> dict:
    return {f"backbone.{name}": value for name, value in state.items()}


def from_file(state: dict) -> dict:
    return {name.removeprefix("backbone."): value for name, value in state.items()}


def test_a_renamed_module_has_the_files_names_there_and_its_own_here():
    module, other = nn.Linear(2, 3), nn.Linear(2, 3)
    part = Renamed(module, to_file, from_file)
    assert list(part.state_dict()) == ["backbone.weight", "backbone.bias"]
    assert [id(parameter) for parameter in part.parameters()] == [id(parameter) for parameter in module.parameters()]
    part.load_state_dict(to_file(other.state_dict()))
    assert torch.equal(module.weight, other.weight)
    with pytest.raises(RuntimeError):
        part.load_state_dict({"backbone.weight": torch.zeros(2, 3)})


# ---- beginning from another run -------------------------------------------------------------------------------------


def make_dino(img_size: int = 32, prototypes: int = 8, seed: int = 0, **vit) -> DINO:
    torch.manual_seed(seed)
    networks = [
        MultiCropNetwork(
            VisionTransformer(patch_size=8, embed_dim=12, depth=2, num_heads=2, img_size=img_size, **vit),
            DINOHead(12, prototypes, hidden_dim=16, bottleneck_dim=6),
        )
        for _ in range(2)
    ]
    return DINO(*networks, np.full(3, 0.04)).double()


def state_of(method: DINO) -> dict[str, dict]:
    return {key: part.state_dict() for key, part in method.checkpoint_parts().items()}


@pytest.mark.parametrize(("before", "after"), [(32, 48), (48, 32), (32, 224)])
def test_at_a_new_size_of_images_the_first_features_are_those_of_the_other_network_at_that_size(before, after):
    other, method = make_dino(before), make_dino(after, seed=1)
    assert method.adopt(state_of(other)) == []
    images = torch.randn(2, 3, after, after, dtype=torch.float64)
    for ours, theirs in ((method.student, other.student), (method.teacher, other.teacher)):
        torch.testing.assert_close(ours.backbone(images), theirs.backbone(images), rtol=1e-12, atol=1e-12)


def test_positions_of_the_same_size_are_taken_bit_for_bit():
    other, method = make_dino(), make_dino(seed=1)
    method.adopt(state_of(other))
    assert torch.equal(method.student.backbone.pos_embed, other.student.backbone.pos_embed)


def test_what_does_not_fit_a_head_or_a_loss_is_named_and_stays_as_it_was_built():
    other, method = make_dino(prototypes=9), make_dino(seed=1)
    built = {key: {name: value.clone() for name, value in part.items()} for key, part in state_of(method).items()}
    other.centres.center.fill_(3)
    names = [f"head.last_layer.weight_{part}" for part in "gv"]
    expected = [f"{key}.{name}" for key in ("student", "teacher") for name in names] + ["dino_loss.center"]
    assert method.adopt(state_of(other)) == expected
    after = state_of(method)
    for key in ("student", "teacher"):
        for name, value in after[key].items():
            assert torch.equal(value, (built if name in names else state_of(other))[key][name]), name
    assert torch.equal(after["dino_loss"]["center"], built["dino_loss"]["center"])


def test_parts_that_the_other_run_does_not_bring_begin_fresh():
    other, method = make_dino(), make_dino(seed=1)
    assert method.adopt({"student": state_of(other)["student"]}) == ["teacher", "dino_loss"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"num_class_tokens": 2},
            r"2 class tokens.*, here .*\(cls_token: \(1, 2, 12\) there, \(1, 1, 12\) here\)",
        ),
        ({"init_values": 0.1}, r"LayerScale.*\(blocks.0.gamma_1: \(12,\) there, none here\)"),
        ({"qkv_bias": False}, r"\(blocks.0.attn.qkv.bias: none there, \(36,\) here\)"),
    ],
)
def test_another_backbone_is_refused_before_anything_is_loaded(options, message):
    method = make_dino(seed=1)
    before = {name: value.clone() for name, value in method.state_dict().items()}
    state = state_of(make_dino()) | {"teacher": state_of(make_dino(**options))["teacher"]}
    with pytest.raises(UsageError, match=f"its teacher is a .*{message}"):
        method.adopt(state)
    assert all(torch.equal(value, before[name]) for name, value in method.state_dict().items())


def test_mask_tokens_are_no_part_of_the_architecture():
    method, other = make_dino(masked_im_modeling=True), make_dino(seed=1)
    assert method.adopt(state_of(other)) == ["student.backbone.masked_embed", "teacher.backbone.masked_embed"]
    assert make_dino().adopt(state_of(method)) == []


@pytest.mark.parametrize(("theirs", "fresh"), [(True, 0), (False, 2)])
def test_prototypes_that_are_shared_here_take_none_of_several_that_differ(theirs, fresh):
    # the norms are ones in all of them
    ours, other = ({"head": IBOTHead(4, 6, hidden_dim=4, bottleneck_dim=3, shared_head=s)} for s in (True, theirs))
    backbone = nn.Linear(1, 1)
    state = {"head": other["head"].state_dict(), "backbone": backbone.state_dict()}
    assert len(adopt_parts({**ours, "backbone": backbone}, state, backbone)) == fresh


class Queue:
    """Keeps a state without being a module."""

    def __init__(self, rows: int):
        self.rows = torch.zeros(rows)

    def state_dict(self) -> dict:
        return {"rows": self.rows}

    def load_state_dict(self, state: dict) -> None:
        if state["rows"].shape != self.rows.shape:
            raise ValueError("of another length")
        self.rows = state["rows"].clone()


def test_a_part_that_is_no_module_is_taken_whole_or_not_at_all_and_renamed_ones_by_the_files_names():
    backbone, other = nn.Linear(2, 3), nn.Linear(2, 3)
    parts = {"network": Renamed(backbone, to_file, from_file), "short": Queue(2), "long": Queue(4)}
    state = {"network": to_file(other.state_dict()), "short": {"rows": torch.ones(2)}, "long": {"rows": torch.ones(3)}}
    assert adopt_parts(parts, state, backbone) == ["long"]
    assert torch.equal(backbone.weight, other.weight)
    assert parts["short"].rows.tolist() == [1, 1] and parts["long"].rows.tolist() == [0, 0, 0, 0]
    with pytest.raises(UsageError, match=r"its network is a .*\(weight: \(3, 2\) there, \(3, 4\) here\)"):
        adopt_parts({"network": Renamed(wide := nn.Linear(4, 3), to_file, from_file)}, state, wide)
