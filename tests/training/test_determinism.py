"""--deterministic: torch is strict with our own networks, and only warns of those of libraries."""

import pytest
import torch

import main_pretrain
from tests.launch import argv
from training.options import parse_options
from utils import World


@pytest.fixture(autouse=True)
def settings():
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@pytest.mark.parametrize(
    ("options", "strict"),
    [
        ({"arch": "vit_small"}, True),
        ({"arch": "swin_tiny", "patch_size": 4}, True),
        ({"arch": "resnet50"}, False),
        ({"arch": "timm/xcit_nano_12_p16_224"}, False),
    ],
)
def test_our_networks_are_held_to_it_since_attention_has_no_order_where_torch_may_only_warn(options, strict):
    world = World(0, 1, 0, torch.device("cpu"))
    main_pretrain.prepare_device(parse_options(argv(**options)), world)
    assert torch.are_deterministic_algorithms_enabled()
    assert torch.is_deterministic_algorithms_warn_only_enabled() != strict
    main_pretrain.prepare_device(parse_options(argv(deterministic="false", **options)), world)
    assert not torch.are_deterministic_algorithms_enabled()
