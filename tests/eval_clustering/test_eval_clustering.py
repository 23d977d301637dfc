"""Clusters as a script: prototypes of heads that train, and k-means that finds what is apart."""

from pathlib import Path

import pytest
import torch

from eval_clustering.eval_clustering import main
from evaluation.kmeans import kmeans
from evaluation.prototypes import Prototypes
from methods.heads import DINOHead, IBOTHead
from models import build_backbone
from models.reading import read_backbone
from tests.scripts import Scripts, save
from tests.sources import Stripes


@pytest.fixture
def scripts(monkeypatch, capsys, tmp_path):
    return Scripts(monkeypatch, capsys, tmp_path / "out")


def checkpoint(path: Path, head: torch.nn.Module) -> Path:
    torch.manual_seed(4)
    model = build_backbone("vit_micro", 8, img_size=32)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape))
    state = {f"backbone.{n}": t for n, t in model.state_dict().items()}
    torch.save({"teacher": state | {f"head.{n}": t for n, t in head.state_dict().items()}}, path)
    return path


SIZES = {"hidden_dim": 24, "bottleneck_dim": 12}
HEADS = {
    "dino": lambda: DINOHead(128, 9, **SIZES),
    "dino with batch norm": lambda: DINOHead(128, 9, use_bn=True, **SIZES),
    "one layer": lambda: DINOHead(128, 9, nlayers=1, **SIZES),
    "ibot": lambda: IBOTHead(128, 7, **SIZES),
    "ibot with norms": lambda: IBOTHead(128, 7, norm="ln", **SIZES),
    "ibot without bottleneck": lambda: IBOTHead(128, 7, hidden_dim=24, bottleneck_dim=0),
}


@pytest.mark.parametrize("kind", HEADS)
def test_prototypes_are_those_of_the_head_that_was_trained(tmp_path, kind):
    head = HEADS[kind]().eval()
    for module in head.modules():
        if isinstance(module, torch.nn.BatchNorm1d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    path = checkpoint(tmp_path / "x.pth", head)
    rows = torch.randn(5, 128)
    found = Prototypes(*read_backbone(path))(rows)
    with torch.no_grad():
        expected = head(rows)
    torch.testing.assert_close(found, expected)


def test_kmeans_finds_groups_that_are_apart_and_fills_what_is_empty():
    centres = torch.randn(5, 8) * 10
    rows = (centres[:, None] + torch.randn(5, 20, 8) * 0.1).flatten(0, 1)
    found = kmeans(rows, 5)
    assert len({tuple(part.tolist()) for part in found.assigned.view(5, 20)}) == 5 and found.inertia < 0.2
    assert all(len(part.unique()) == 1 for part in found.assigned.view(5, 20))
    assert torch.equal(kmeans(rows, 5).assigned, found.assigned)
    same = torch.ones(6, 3)
    assert kmeans(same, 3).inertia == 0
    assert kmeans(rows, len(rows), starts=1).inertia < 1e-4


def test_clusters_are_compared_with_classes(scripts, tmp_path):
    source = Stripes(4, 6)
    for index, label in enumerate(source.labels):
        save(source.pil(index), tmp_path / "data" / "val" / f"c{label}" / f"{index:02}.png")
    common = ["--data_path", tmp_path / "data", "--device", "cpu", "--num_workers", 0, "--output_dir", tmp_path / "out"]
    common += ["--crop_size", 32, "--pretrained_weights", checkpoint(tmp_path / "x.pth", HEADS["ibot"]())]
    said = scripts.run(main, *common)
    found = scripts.result("eval_clustering")
    assert found["assigned_by"] == "the best of 7 prototypes" and found["images"] == 24 and "NMI" in said
    low, high = found["ACC_interval"]
    assert low < found["ACC"] < high and f"95 %: {low:.2f} to {high:.2f}" in said
    scripts.run(main, *common, "--assign", "kmeans")
    means = scripts.result("eval_clustering")
    assert means["clusters"] == means["classes"] == 4 and means["ACC"] > 40 and means["ARI"] > 10
    scripts.run(main, *common, "--assign", "kmeans", "--clusters", 9)
    assert scripts.result("eval_clustering")["clusters"] == 9
    assert "--clusters 99" in scripts.refused(main, *common, "--assign", "kmeans", "--clusters", 99)
    assert "--starts 0" in scripts.refused(main, *common, "--starts", 0)
    bare = [*common[:-1], tmp_path / "bare.pth"]
    torch.save(build_backbone("vit_micro", 8, img_size=32).state_dict(), tmp_path / "bare.pth")
    assert "holds no projection head" in scripts.refused(main, *bare, "--assign", "prototypes")
    assert "k-means of features" in scripts.run(main, *bare)
    (tmp_path / "data" / "val" / "c0" / "00.png").write_bytes(b"no image")
    assert "1 of its 24 test images cannot be read" in scripts.refused(main, *common)
    scripts.run(main, *common, "--skip_unreadable")
    assert scripts.result("eval_clustering")["images"] == 23
