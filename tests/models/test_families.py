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
    RESNET,
    backbone_names,
    build_backbone,
    families_that,
    family_of,
    unread_options,
)
from models.layouts.shapes import arch_of
from training.options import parse_options
from utils import UsageError

ROOT = Path(__file__).resolve().parent.parent.parent
SMALLEST = {"vit": "vit_micro", "swin": "swin_tiny", "cvt": "cvt_tiny", "vil": "vil_2262", "resnet": "resnet18"}
EACH = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)


def test_every_name_has_one_family():
    for family in FAMILIES:
        assert all(
            name.startswith(f"{family.name}_" * (family is not RESNET)) and family_of(name) is family
            for name in family.networks
        )
    assert all(family_of(alias) is family_of(name) for alias, name in ALIASES.items())
    assert all(family_of(name) is LIBRARY for name in ("timm/vit_small_patch16_224", "vit_smal"))
    assert {*ALIASES, *(name for family in FAMILIES for name in family.networks), "resnet50"} <= {*backbone_names()}


@EACH
def test_options_left_out_are_those_of_the_constructor(family):
    arch = SMALLEST[family.name]
    torch.manual_seed(0)
    left_out = build_backbone(arch)
    torch.manual_seed(0)
    passed = build_backbone(arch, **family.options)
    if "patch_size" in family.options:
        assert left_out.patch_size == passed.patch_size == family.options["patch_size"]
    assert all(torch.equal(a, b) for a, b in zip(left_out.parameters(), passed.parameters(), strict=True))


@EACH
def test_a_token_covers_the_pixels_of_the_table_and_a_mask_hides_whole_tokens(family):
    torch.manual_seed(0)
    if family.pixels_per_token is None:
        assert not family.hides_patches and not hasattr(build_backbone(SMALLEST[family.name]), "forward_features")
        return
    masking = {"masked_im_modeling": True} if family.hides_patches else {}
    model = build_backbone(SMALLEST[family.name], **masking).eval()
    unit, images = family.pixels_per_token(family.options), torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        tokens = model.forward_features(images)
        assert tokens.shape[1] == model.num_prefix_tokens + (64 // unit) ** 2
        if not family.hides_patches:
            return
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
    shown = family.shapes(state)
    rebuilt = build_backbone(SMALLEST[family.name], **family.arguments(shown))
    assert arch_of(state) == SMALLEST[family.name] and family.shapes(rebuilt.state_dict()) == shown
    assert {*family.options, *family.from_file} <= {*shown}
    assert LIBRARY.shapes(state) is None


def test_a_network_is_told_the_options_that_it_reads():
    argv = ["--window_size", "14"]
    assert backbone_arguments(parse_options(["--arch", "vit_small", *argv])) == {"patch_size": 16}
    assert backbone_arguments(parse_options(["--arch", "deit_small", "--patch_size", "8"])) == {"patch_size": 8}
    swin = parse_options(["--arch", "swin_tiny", "--patch_size", "4", *argv])
    assert backbone_arguments(swin) == {"patch_size": 4, "window_size": 14}
    assert backbone_arguments(parse_options(["--arch", "resnet50", *argv])) == {}
    assert backbone_arguments(parse_options(["--arch", "cvt_tiny", *argv])) == {"rel_pos_embed": False}
    vil = parse_options(["--arch", "vil_2262", "--vil_mode", "1", *argv])
    assert backbone_arguments(vil) == {"vil_arch": None, "vil_mode": 1}
    everything = {"patch_size", "window_size", "rel_pos_embed", "vil_arch", "vil_mode"}
    assert unread_options("vit_small") == everything - {"patch_size"}
    assert unread_options("swin_tiny") == everything - {"patch_size", "window_size"}
    assert unread_options("resnet50") == everything


def test_patches_and_sizes_that_do_not_fit_are_refused_in_one_line():
    vit, swin, *_ = FAMILIES
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


def test_sizes_and_options_of_cvt_and_vision_longformer_that_do_not_fit_are_refused():
    cvt, vil = family_of("cvt_tiny"), family_of("vil_2262")
    cvt.check_size("--size", 3, cvt.options)
    cvt.check_size("--size", 221, {"rel_pos_embed": True})
    for size, arguments, least in (
        (2, cvt.options, "a CvT takes images from 3"),
        (96, {"rel_pos_embed": True}, "195 "),
    ):
        with pytest.raises(UsageError, match=f"--size {size}: a CvT .*takes images from .* pixels on") as error:
            cvt.check_size("--size", size, arguments)
        assert least in str(error.value)
    vil.check_size("--size", 36, vil.options)
    with pytest.raises(UsageError, match="--size 28: a ViL takes images from 32 pixels on"):
        vil.check_size("--size", 28, vil.options)
    with pytest.raises(UsageError, match="does not divide --size 66; nearest 64 or 68"):
        vil.check_size("--size", 66, vil.options)
    for mode, text, message in (
        (2, None, r"--vil_mode 2: 0 \(all chunks around\), 1 \(one of them\) or -1 \(none\)"),
        (0, "l1,x3", "--vil_arch l1,x3: 'x3' is no field of a stage"),
        (0, "l1,d96", "stage 1 has absolute positions"),
        (0, "l1,d96,a0,r1", "stage 1 has r1"),
        (0, "l2,d96,a0", "stage 1 is called l2"),
        (0, "l1,d96,h7,a0", "7 heads do not divide a width of 96"),
        (0, "l1,d96,n0,a0", "stage 1 has none of what h, d, n, p and f count"),
    ):
        with pytest.raises(UsageError, match=message):
            build_backbone("vil_2262", vil_arch=text, vil_mode=mode)


def test_messages_name_the_families_that_will_do():
    assert families_that(lambda family: family.class_attention) == "vit_*"
    assert families_that(lambda family: family.hides_patches) == "vit_* or swin_*"


def test_no_other_room_asks_for_a_family_by_the_name_of_its_networks():
    """A further family would have to be found there."""
    asked = re.compile(r"""startswith\(["'](vit|swin|deit)|isinstance\([^)]*\b(VisionTransformer|SwinTransformer)\b""")
    rooms = [path for part in ("methods", "training", "data") for path in (ROOT / part).glob("*.py")]
    assert [path.name for path in rooms if asked.search(path.read_text())] == []
