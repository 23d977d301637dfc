"""Files as EsViT writes them, of each of its networks: what they are, and the network that is built of them."""

import argparse

import pytest
import torch

from evaluation.features import OUTPUT, Feature
from methods.heads import DINOHead
from models import FAMILIES, build_backbone, cvt, family_of
from models.checkpoints import network_from_file
from models.layouts.shapes import describe
from models.layouts.stages import CVT_OF_SHAPE
from models.reading import read_backbone
from models.safe_load import CheckpointError

SMALL_VIL = (
    "l1,h1,d8,n2,s1,g1,p4,f3,a0_l2,h2,d8,n2,s1,g1,p2,f3,a0_l3,h2,d8,n6,s0,g1,p2,f7,a0_l4,h3,d12,n2,s0,g0,p2,f7,a0"
)
NETWORKS = {  # how it is built, what stands in front of its names, and of all names of its teacher, what it is called
    "vit_micro": ({"patch_size": 8, "img_size": 64}, "", "", "vit_micro (width 128"),
    "cvt_tiny": (
        {"rel_pos_embed": True},
        "",
        "module.",
        "cvt_tiny (widths 4+4+4+4, 1+1+1+1 blocks), relative bias",
    ),
    "vil_2262": ({"vil_arch": SMALL_VIL, "img_size": 64}, "", "", f"vil_2262 ({SMALL_VIL}), built for 64 px"),
    "resnet18": ({}, "backbone.backbone.", "module.", "resnet18 of 136"),
}


def written(path, model, arch, front, teacher_front, **arguments):
    """As the original saves a run of the region task."""
    heads = {f"{key}.{name}": t for key in ("head", "head_dense") for name, t in DINOHead(8, 4).state_dict().items()}
    state = {f"{front}{name}": tensor for name, tensor in model.state_dict().items()} | heads
    file = {
        "student": {f"module.{name}": torch.zeros_like(tensor) for name, tensor in state.items()},
        "teacher": {f"{teacher_front}{name}": tensor for name, tensor in state.items()},
        "dino_loss": {"center": torch.zeros(1, 4), "center_grid": torch.zeros(1, 4)},
        "epoch": 3,
        "args": argparse.Namespace(arch=arch, patch_size=16, **arguments),
    }
    torch.save(file, path)
    return path


@pytest.mark.parametrize("name", NETWORKS)
def test_a_published_file_becomes_its_network_without_a_word_about_it(name, tmp_path, monkeypatch):
    monkeypatch.setattr(cvt, "TINY", tuple(stage._replace(dim=4, num_heads=1, depth=1) for stage in cvt.TINY))
    monkeypatch.setitem(CVT_OF_SHAPE, ((4,) * 4, (1,) * 4), "cvt_tiny")
    arguments, front, teacher_front, words = NETWORKS[name]
    arch, side = name, 224 if name == "cvt_tiny" else 64
    model = build_backbone(arch, **arguments).eval()
    path = written(tmp_path / "checkpoint.pth", model, arch, front, teacher_front)
    state, info = read_backbone(path)
    assert info.layout.name == "EsViT training checkpoint" and words in describe(state)
    network = network_from_file(path)
    assert network.arch == arch and network.report.complete and len(network.report.ignored) == 16
    found = dict(network.arguments)
    assert {key: found[key] for key in arguments} == arguments
    images = torch.randn(1, 3, side, side)
    feature = OUTPUT if arch == "resnet18" else Feature(4)
    with torch.no_grad():
        torch.testing.assert_close(feature(network.model.eval(), images), feature(model, images), rtol=0, atol=0)
    told = [family for family in FAMILIES if family.shapes(state)]
    assert told == [family_of(arch)]


def test_a_file_that_does_not_say_what_it_is_is_told_by_its_tensors(tmp_path):
    for name in ("resnet18", "vil_2262"):
        arguments, front, teacher_front, _ = NETWORKS[name]
        path = written(
            tmp_path / "file.pth", build_backbone(name, **arguments), "a name of its own", front, teacher_front
        )
        assert network_from_file(path).arch == name


def test_a_longformer_of_other_depths_is_built_as_its_file_says(tmp_path):
    text = SMALL_VIL.replace("n6", "n1")
    model = build_backbone("vil_2262", vil_arch=text, vil_mode=-1, img_size=64).eval()
    path = written(tmp_path / "file.pth", model, "vil_2262", "", "", vil_mode=-1)
    network, images = network_from_file(path), torch.randn(1, 3, 64, 64)
    assert network.arguments == {"vil_arch": text, "vil_mode": -1, "img_size": 64}
    with torch.no_grad():
        assert torch.equal(network.model.eval()(images), model(images))
    path = written(tmp_path / "other.pth", model, "somebody's", "", "")
    with pytest.raises(
        CheckpointError, match=r"holds a Vision Longformer \(l1,h1,d8.* nothing here has that shape: pass"
    ):
        network_from_file(path)
    assert network_from_file(path, arch="vil_14121").model.depth == 7


def test_a_file_of_another_network_is_refused_with_what_to_pass(tmp_path):
    vil = build_backbone("vil_2262", vil_arch=SMALL_VIL, img_size=64)
    path = written(tmp_path / "file.pth", vil, "vil_2262", "", "")
    with pytest.raises(CheckpointError, match=r"The file holds a vil_2262 .*: pass --arch vil_2262"):
        network_from_file(path, arch="resnet18")
