"""What the table of families says of a network is what the network does."""

import re
from pathlib import Path

import pytest
import torch

from methods.base import backbone_arguments
from models import (
    ALIASES,
    FAMILIES,
    LIBRARY,
    backbone_names,
    build_backbone,
    families_that,
    family_of,
    unread_options,
)
from training.options import parse_options
from utils import UsageError

ROOT = Path(__file__).resolve().parent.parent.parent
SMALLEST = {"vit": "vit_micro", "swin": "swin_tiny"}
EACH = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)


def test_every_name_has_one_family():
    for family in FAMILIES:
        assert all(name.startswith(f"{family.name}_") and family_of(name) is family for name in family.networks)
    assert all(family_of(alias) is family_of(name) for alias, name in ALIASES.items())
    assert all(family_of(name) is LIBRARY for name in ("resnet50", "timm/vit_small_patch16_224", "vit_smal"))
    assert {*ALIASES, *(name for family in FAMILIES for name in family.networks), "resnet50"} <= {*backbone_names()}


@EACH
def test_options_left_out_are_those_of_the_constructor(family):
    arch = SMALLEST[family.name]
    torch.manual_seed(0)
    left_out = build_backbone(arch)
    torch.manual_seed(0)
    passed = build_backbone(arch, **family.options)
    assert left_out.patch_size == passed.patch_size == family.options["patch_size"]
    assert all(torch.equal(a, b) for a, b in zip(left_out.parameters(), passed.parameters(), strict=True))


@EACH
def test_a_token_covers_the_pixels_of_the_table_and_a_mask_hides_whole_tokens(family):
    torch.manual_seed(0)
    model = build_backbone(SMALLEST[family.name], masked_im_modeling=family.hides_patches).eval()
    unit, images = family.pixels_per_token(family.options), torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        tokens = model.forward_features(images)
        assert tokens.shape[1] == model.num_prefix_tokens + (64 // unit) ** 2
        masks = torch.zeros(1, 64 // unit, 64 // unit, dtype=torch.bool)
        masks[0, 0, 0] = True
        torch.nn.init.ones_(model.masked_embed)
        assert not torch.equal(model.forward_features(images, masks), tokens)


@EACH
def test_class_attention_is_said_of_networks_that_have_it(family):
    model = build_backbone(SMALLEST[family.name])
    assert hasattr(model, "get_last_selfattention") == hasattr(model, "num_class_tokens") == family.class_attention


@EACH
def test_the_shapes_of_a_file_are_those_of_its_own_family_alone(family):
    model = build_backbone(SMALLEST[family.name])
    state = model.state_dict()
    assert [other for other in FAMILIES if other.shapes(state)] == [family]
    assert family.arguments(family.shapes(state)) == family.options
    assert {*family.options, *family.from_file} <= {*family.shapes(state)}
    assert LIBRARY.shapes(state) is None


def test_a_network_is_told_the_options_that_it_reads():
    argv = ["--window_size", "14"]
    assert backbone_arguments(parse_options(["--arch", "vit_small", *argv])) == {"patch_size": 16}
    assert backbone_arguments(parse_options(["--arch", "deit_small", "--patch_size", "8"])) == {"patch_size": 8}
    swin = parse_options(["--arch", "swin_tiny", "--patch_size", "4", *argv])
    assert backbone_arguments(swin) == {"patch_size": 4, "window_size": 14}
    assert backbone_arguments(parse_options(["--arch", "resnet50", *argv])) == {}
    assert unread_options("vit_small") == {"window_size"} and unread_options("swin_tiny") == set()
    assert unread_options("resnet50") == {"patch_size", "window_size"}


def test_patches_and_sizes_that_do_not_fit_are_refused_in_one_line():
    vit, swin = FAMILIES
    with pytest.raises(UsageError, match=r"--patch_size 15 does not divide 224 pixels, .*; these do: 8, 14, 16, 32$"):
        build_backbone("vit_micro", 15)
    with pytest.raises(UsageError, match="--patch_size 0 does not divide 224"):
        build_backbone("vit_micro", 0)
    assert build_backbone("vit_micro", 15, img_size=225).patch_size == 15
    with pytest.raises(UsageError, match="--patch_size 8: Swin's patches are 4 pixels"):
        build_backbone("swin_tiny", 8)
    for family in (vit, swin):
        family.check_size("--size", 64, family.options)
        with pytest.raises(UsageError, match=r"does not divide --size 66; nearest 64 or"):
            family.check_size("--size", 66, family.options)
        with pytest.raises(UsageError, match="--size 2 is smaller than one patch of"):
            family.check_size("--size", 2, family.options)
    LIBRARY.check_size("--size", 66, {})
    LIBRARY.check_patch({})


def test_messages_name_the_families_that_will_do():
    assert families_that(lambda family: family.class_attention) == "vit_*"
    assert families_that(lambda family: family.hides_patches) == "vit_* or swin_*"


def test_no_other_room_asks_for_a_family_by_the_name_of_its_networks():
    """A further family would have to be found there."""
    asked = re.compile(r"""startswith\(["'](vit|swin|deit)|isinstance\([^)]*\b(VisionTransformer|SwinTransformer)\b""")
    rooms = [path for part in ("methods", "training", "data") for path in (ROOT / part).glob("*.py")]
    assert [path.name for path in rooms if asked.search(path.read_text())] == []
