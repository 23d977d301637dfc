"""Files as the libraries write them: what becomes of each, and that its features are those the library computes."""

import json
import sys
from collections.abc import Callable

import pytest
import timm
import torch
import torch.nn as nn
import torchvision
from timm.models.vision_transformer import VisionTransformer as TimmVisionTransformer

from models.checkpoints import main, network_from_file
from models.safe_load import CheckpointError
from models.vit import VisionTransformer
from utils import UsageError

NO_CLASS = {"class_token": False, "global_pool": "avg"}
MICRO = {"patch_size": 8, "img_size": 32, "embed_dim": 128, "depth": 4, "num_heads": 4}


def unlike_at_the_start(model: nn.Module) -> nn.Module:
    """The same network in evaluation mode, with weights, statistics and scales that differ everywhere."""
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        scale = name.endswith("weight") and parameter.ndim == 1
        nn.init.normal_(parameter, 1.0 if scale else 0.0, 0.1 if parameter.ndim == 1 else parameter[0].numel() ** -0.5)
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            buffer.uniform_(-0.1, 0.1)
        elif name.endswith("running_var"):
            buffer.uniform_(0.2, 0.4)
    return model.eval()


def error(network, expected: Callable, side: int | tuple[int, int] = 32) -> float:
    """Relative, of the features of two random images."""
    height, width = (side, side) if isinstance(side, int) else side
    images = torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ours, theirs = network.model.eval()(images), expected(images)
    assert ours.shape == theirs.shape
    return float((ours - theirs).norm() / theirs.norm())


def read(tmp_path, content, **options):
    torch.save(content, tmp_path / "file.pth")
    return network_from_file(tmp_path / "file.pth", **options)


def timm_vit(**options) -> nn.Module:
    return unlike_at_the_start(TimmVisionTransformer(**MICRO | {"num_classes": 0} | options))


def prefixed(prefix: str, state: dict) -> dict:
    return {prefix + name: tensor for name, tensor in state.items()}


# ---- what stands in front of the names ------------------------------------------------------------------------------

PREFIXES = ("model.", "net.", "vit.", "visual.", "encoder_q.", "base_encoder.", "module.base_encoder.", "ema.")
PREFIXES += ("ema_model.", "student_backbone.", "teacher_backbone.", "_fsdp_wrapped_module.", "module._orig_mod.")
PREFIXES += ("_fsdp_wrapped_module._fpw_module.", "module.")


def test_a_network_below_any_usual_prefix_is_read(tmp_path):
    model = unlike_at_the_start(VisionTransformer(**MICRO))
    for prefix in PREFIXES:
        state = prefixed(prefix, model.state_dict()) | {"n_averaged": torch.tensor(3)}
        for content in (state, {"state_dict": state, "epoch": 3}):
            assert error(read(tmp_path, content), model) == 0, prefix


def test_of_mocos_two_networks_the_one_its_authors_evaluate_is_read(tmp_path):
    model = unlike_at_the_start(VisionTransformer(**MICRO))
    other = VisionTransformer(**MICRO).state_dict()
    state = prefixed("module.base_encoder.", model.state_dict()) | prefixed("module.momentum_encoder.", other)
    state |= {"module.base_encoder.head.0.weight": torch.zeros(3, 128), "module.predictor.0.weight": torch.zeros(3, 3)}
    network = read(tmp_path, {"state_dict": state, "arch": "vit_micro"})
    assert error(network, model) == 0 and any("begin with base_encoder." in note for note in network.report.info.notes)
    assert error(network_from_file(tmp_path / "file.pth", "momentum_encoder"), model) > 0.1


def test_averages_beside_the_weights_are_named_with_the_option_that_takes_them(tmp_path):
    model, average = (unlike_at_the_start(VisionTransformer(**MICRO)), VisionTransformer(**MICRO).eval())
    for key, other in (("model", "model_ema"), ("state_dict", "state_dict_ema")):
        network = read(tmp_path, {key: model.state_dict(), other: average.state_dict(), "epoch": 3})
        assert error(network, model) == 0
        assert any(f"took key '{key}'" in n and f"--checkpoint_key {other}" in n for n in network.report.info.notes)
        assert error(network_from_file(tmp_path / "file.pth", other), average) == 0


def test_a_key_that_was_given_and_is_not_there_is_refused_with_those_that_are(tmp_path):
    state = VisionTransformer(**MICRO).state_dict()
    torch.save({"state_dict": state, "state_dict_ema": state, "epoch": 3}, tmp_path / "file.pth")
    with pytest.raises(CheckpointError, match="no key 'state_dict_emma'; it has state_dict, state_dict_ema"):
        network_from_file(tmp_path / "file.pth", "state_dict_emma")
    torch.save(state, tmp_path / "file.pth")
    with pytest.raises(CheckpointError, match="no key 'student'; its weights stand at its top level"):
        network_from_file(tmp_path / "file.pth", "student")
    assert network_from_file(tmp_path / "file.pth").report.complete


# ---- plain vision transformers --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({}, {}),
        ({"depth": 3}, {}),
        ({"depth": 1, "mlp_ratio": 3.0}, {}),
        ({"num_heads": 8}, {"num_heads": 8}),
        ({"embed_dim": 24, "num_heads": 3}, {"num_heads": 3}),
        ({"act_layer": "quick_gelu"}, {"act": "quick_gelu"}),
        ({"qkv_bias": False}, {}),
        ({"init_values": 0.1}, {}),
        ({"reg_tokens": 4, "no_embed_class": True}, {}),
        ({"no_embed_class": True}, {"grid": (4, 4)}),
        ({"global_pool": "avg"}, {}),
        (NO_CLASS, {}),
        (NO_CLASS | {"fc_norm": False, "init_values": 0.1}, {}),
        (NO_CLASS | {"reg_tokens": 4}, {}),
        ({"num_classes": 5}, {}),
    ],
)
def test_a_plain_vision_transformer_of_timm_is_read(tmp_path, options, told):
    theirs = timm_vit(**options)
    network = read(tmp_path, theirs.state_dict(), **told)
    pooled = lambda images: theirs.forward_head(theirs.forward_features(images), pre_logits=True)  # noqa: E731
    assert error(network, pooled) < 1e-5
    assumed = network.report.assumed
    assert ("heads of attention" in assumed, "GELU" in assumed) == ("num_heads" not in told, "act" not in told)


def test_what_no_tensor_shows_is_said_and_read_from_a_configuration_or_from_options(tmp_path, monkeypatch, capsys):
    theirs, other = timm_vit(num_heads=8), timm_vit(num_heads=8, act_layer="quick_gelu")
    network = read(tmp_path, theirs.state_dict())
    assert error(network, theirs) > 0.01 and "4 heads of attention (--num_heads)" in network.report.assumed
    assert error(read(tmp_path, {"model": theirs.state_dict(), "args": {"num_heads": 8}}), theirs) < 1e-5
    path = tmp_path / "file.pth"
    for options, words in (
        (["--num_heads", "8"], "GELU (--act)"),
        (["--act", "quick_gelu"], "the class token as output"),
    ):
        monkeypatch.setattr(sys, "argv", ["checkpoints", str(path), *options])
        assert main() == 0 and words in capsys.readouterr().out
    config = {
        "architecture": "vit_micro_quickgelu",
        "model_args": {"num_heads": 8, "img_size": 32},
        "global_pool": "token",
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    network = read(tmp_path, other.state_dict())
    assert error(network, other) < 1e-5 and network.report.assumed == ""
    with pytest.raises(UsageError, match="--num_heads 7: does not divide the width 128"):
        network_from_file(path, num_heads=7)


def test_a_width_without_a_name_asks_for_the_number_of_heads(tmp_path):
    with pytest.raises(CheckpointError, match="has its width 24: pass its --num_heads"):
        read(tmp_path, timm_vit(embed_dim=24, num_heads=3).state_dict())


def test_where_timm_loads_the_file_the_advice_says_timm(tmp_path):
    names = ("deit_tiny_distilled_patch16_224", "beit_base_patch16_224", "xcit_nano_12_p16_224")
    for name in (*names, "vit_base_patch16_siglip_224"):
        with torch.device("meta"):
            names = timm.create_model(name, num_classes=0).state_dict()
        state = {key: torch.zeros(tensor.shape) for key, tensor in names.items() if ".1" not in key}
        with pytest.raises(CheckpointError, match="--arch timm/"):
            read(tmp_path, state)
        with pytest.raises(CheckpointError) as caught:  # what was given is not asked for
            network_from_file(tmp_path / "file.pth", arch="vit_tiny", patch_size=16)
        assert "pass its --arch" not in str(caught.value)


# ---- positions on other grids than squares ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "columns", "options"),
    [
        (4, 6, {}),  # 25 positions: a square
        (3, 5, {"reg_tokens": 4}),  # registers with positions
        (2, 8, {"no_embed_class": True}),  # 16 positions: a square
        (5, 3, NO_CLASS),
        (2, 8, {}),  # 17 positions: a square and one more
    ],
)
def test_a_grid_that_is_no_square_is_read_where_it_is_told_or_recorded(tmp_path, rows, columns, options):
    size = (8 * rows, 8 * columns)
    theirs = timm_vit(img_size=size, **options)
    wanted = {"img_size": size}
    for content, told in (
        (theirs.state_dict(), {"grid": (rows, columns)}),
        ({"state_dict": theirs.state_dict(), "args": wanted}, {}),
        ({"state_dict": theirs.state_dict(), "args": {"img_size": None, "input_size": (3, *size)}}, {}),
    ):
        network = read(tmp_path, content, **told)
        assert error(network, theirs, size) < 1e-5 and "--grid" not in network.report.assumed
    torch.save(network.model.state_dict(), tmp_path / "ours.pth")  # which says its grid itself
    assert error(network_from_file(tmp_path / "ours.pth"), theirs, size) < 1e-5
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "vit_x", "model_args": wanted}))
    torch.save(theirs.state_dict(), tmp_path / "file.pth")
    if options.get("global_pool") != "avg":
        assert error(network_from_file(tmp_path / "file.pth"), theirs, size) < 1e-5


def test_a_grid_that_nothing_tells_is_refused_or_said_to_be_assumed(tmp_path, monkeypatch, capsys):
    for options in (
        {"img_size": (32, 48)},
        {"no_embed_class": True},
        {"img_size": (24, 40)},
        NO_CLASS | {"img_size": (24, 40)},
    ):
        with pytest.raises(CheckpointError, match=r"positions are of a grid that nothing tells.*pass --grid ROWS COL"):
            read(tmp_path, timm_vit(**options).state_dict())
    with pytest.raises(CheckpointError, match=r"--grid 4 5: it holds 15 positions, .* leave -5 for 0 class tokens"):
        network_from_file(tmp_path / "file.pth", grid=(4, 5))
    network = read(tmp_path, timm_vit(img_size=(16, 64)).state_dict())
    assert "positions 4 x 4 (--grid)" in network.report.assumed
    usual = timm_vit(img_size=224, patch_size=32, no_embed_class=True)  # as DeiT III's
    network = read(tmp_path, usual.state_dict())
    assert error(network, usual, 224) < 1e-5 and "positions 7 x 7 (--grid)" in network.report.assumed
    torch.save(timm_vit(img_size=(32, 48)).state_dict(), tmp_path / "file.pth")
    for options, code, words in (
        (["--grid", "4", "6"], 0, "4 x 6 positions (32 x 48 px)"),
        ([], 2, "--grid ROWS COLUMNS"),
        (["--arch", "vit_micro", "--patch_size", "8"], 1, "--grid ROWS COLUMNS"),
    ):
        monkeypatch.setattr(sys, "argv", ["checkpoints", str(tmp_path / "file.pth"), *options])
        assert main() == code and words in capsys.readouterr().out


# ---- other networks -------------------------------------------------------------------------------------------------


def test_torchvisions_vision_transformer_is_read(tmp_path):
    theirs = torchvision.models.VisionTransformer(32, 8, 4, 4, 128, 512, num_classes=5)
    state = unlike_at_the_start(theirs).state_dict()
    theirs.heads = nn.Identity()
    assert error(read(tmp_path, state), theirs) < 1e-5


def networks_of_libraries() -> dict[str, tuple[Callable, str, float]]:
    def swin() -> nn.Module:
        return timm.create_model("swin_tiny_patch4_window7_224", num_classes=0)

    return {
        "timm's Swin": (swin, "head.fc", 1e-3),  # norms with 1e-5 there, 1e-6 here
        "torchvision's Swin": (torchvision.models.swin_t, "head", 1e-3),
        "torchvision's ResNet-18": (torchvision.models.resnet18, "fc", 1e-5),
        "torchvision's ResNet-50": (torchvision.models.resnet50, "fc", 1e-5),
        "timm's ResNet-50": (lambda: timm.create_model("resnet50", num_classes=0), "fc", 1e-5),
    }


@pytest.mark.parametrize("name", networks_of_libraries())
def test_hierarchies_of_libraries_are_read_without_their_architecture(tmp_path, name):
    make, head, tolerance = networks_of_libraries()[name]
    theirs = unlike_at_the_start(make())
    state = theirs.state_dict()
    theirs.set_submodule(head, nn.Identity())
    assert error(read(tmp_path, state), theirs, 64 if "ResNet" in name else 224) < tolerance


def test_hugging_faces_deit_and_swin_are_read(tmp_path):
    library = pytest.importorskip("transformers")
    sizes = {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 512}
    config = library.DeiTConfig(**sizes, image_size=32, patch_size=8)
    deit = unlike_at_the_start(library.DeiTModel(config))
    swin = unlike_at_the_start(library.SwinModel(library.SwinConfig()))
    for model, expected, side, tolerance in (
        (deit, lambda images: deit(images).last_hidden_state[:, :2], 32, 1e-5),
        (swin, lambda images: swin(images).pooler_output, 224, 1e-3),
    ):
        model.save_pretrained(tmp_path)
        torch.save(model.state_dict(), tmp_path / "in_memory.pth")
        for file in ("model.safetensors", "in_memory.pth"):
            assert error(network_from_file(tmp_path / file), expected, side) < tolerance


def test_shards_of_fsdp_are_named(tmp_path):
    from torch.distributed._shard.sharded_tensor.api import ShardedTensor

    with pytest.raises(CheckpointError, match=r"one process's shard .*FULL_STATE_DICT"):
        read(tmp_path, {"cls_token": ShardedTensor})  # as FSDP's SHARDED_STATE_DICT and LOCAL_STATE_DICT name it
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / ".metadata").touch()
    with pytest.raises(CheckpointError, match="format_utils dcp_to_torch"):
        network_from_file(tmp_path / "shards")
    with pytest.raises(CheckpointError, match="FULL_STATE_DICT"):
        read(
            tmp_path, prefixed("_fsdp_wrapped_module.", {"flat_param": torch.zeros(9), "a.flat_param": torch.zeros(9)})
        )
