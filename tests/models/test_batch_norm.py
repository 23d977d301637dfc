import pytest
import torch.nn as nn

from models import build_backbone
from models.batch_norm import batch_norm_of_the_batch


@pytest.mark.parametrize(
    ("module", "name"),
    [
        (lambda: nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)), "1"),
        (lambda: nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)).eval(), None),
        (lambda: nn.Sequential(nn.BatchNorm2d(2, track_running_stats=False)).eval(), "0"),
        (lambda: nn.Sequential(nn.LayerNorm(2), nn.GroupNorm(1, 2), nn.InstanceNorm2d(2)), None),
        (lambda: build_backbone("resnet18"), "bn1"),
        (lambda: build_backbone("timm/xcit_nano_12_p16_224"), "patch_embed.proj.0.1"),
        (lambda: build_backbone("vit_micro", 16), None),
    ],
)
def test_a_batch_norm_is_found_where_it_takes_its_statistics_from_the_batch(module, name):
    assert batch_norm_of_the_batch(module()) == name
