import pytest
import torch

from models import build_backbone
from utils import UsageError


@pytest.mark.parametrize(
    ("arch", "dim"),
    [
        ("resnet18", 512),
        ("timm/vit_tiny_patch16_224", 192),
        ("timm/xcit_nano_12_p16_224", 128),
        ("timm/resnet10t", 512),
    ],
)
def test_library_backbones_pool_crops_of_both_sizes_to_vectors(arch, dim):
    backbone = build_backbone(arch, drop_path_rate=0.1).eval()
    assert backbone.embed_dim == dim
    with torch.no_grad():
        for size in (224, 96):
            assert backbone(torch.randn(2, 3, size, size)).shape == (2, dim)


def test_swin_takes_local_crops_too():
    backbone = build_backbone("timm/swin_tiny_patch4_window7_224").eval()
    with torch.no_grad():
        assert backbone(torch.randn(1, 3, 96, 96)).shape == (1, 768)


@pytest.mark.parametrize(
    ("arch", "hint"), [("vit_smal", "vit_small"), ("resnet51", "resnet50"), ("timm/vit_tiny_patch16_225", "224")]
)
def test_an_unknown_architecture_is_answered_with_the_nearest_name(arch, hint):
    with pytest.raises(UsageError, match=hint):
        build_backbone(arch)
