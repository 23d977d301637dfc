"""Vision transformers of Hugging Face: their files give the features that their library computes."""

import json
import sys

import pytest
import torch
import torch.nn as nn
from safetensors.torch import load_file, save_file
from timm.models.vision_transformer import VisionTransformer as TimmVisionTransformer

from models.checkpoints import main, network_from_file
from models.layouts.shapes import vit_arguments
from models.matching import load_tensors
from models.reading import read_backbone
from models.safe_load import CheckpointError
from models.vit import Variant, VisionTransformer
from utils import UsageError

SIZES = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 96}
SIZES |= {"image_size": 32, "patch_size": 8}


def loaded(path) -> tuple[VisionTransformer, object]:
    """The network of a file in double precision, and what was said of it."""
    state, info = read_backbone(path)
    model = VisionTransformer(**vit_arguments(state), num_heads=3, norm_eps=info.norm_eps)
    return model.double().eval(), load_tensors(model, state, info)


# ---- against the library --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def library():
    return pytest.importorskip("transformers")


def made_by(library, name: str, **options) -> nn.Module:
    """A network of the library in double precision, its weights single ones far from those it begins with."""
    family = name.removesuffix("Model").removesuffix("ForImageClassification").removesuffix("ForPreTraining")
    torch.manual_seed(0)
    model = getattr(library, name)(getattr(library, f"{family}Config")(**SIZES | options))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model.double().eval()


DECODER = {"decoder_hidden_size": 24, "decoder_num_attention_heads": 2, "decoder_num_hidden_layers": 1}
MODELS = [  # class, further options, layout, prefix of a file's names
    ("ViTModel", {}, "Hugging Face ViT", ""),
    ("ViTModel", {"layer_norm_eps": 1e-3}, "Hugging Face ViT", ""),
    ("ViTForImageClassification", {}, "Hugging Face ViT", "vit."),
    ("ViTMAEForPreTraining", {**DECODER, "decoder_intermediate_size": 24}, "Hugging Face ViT", "vit."),
    ("Dinov2Model", {}, "Hugging Face Dinov2", ""),
    ("Dinov2Model", {"use_swiglu_ffn": True}, "Hugging Face Dinov2", ""),
    ("Dinov2ForImageClassification", {}, "Hugging Face Dinov2", "dinov2."),
    ("Dinov2WithRegistersModel", {"num_register_tokens": 3}, "Hugging Face Dinov2", ""),
]


@pytest.mark.parametrize(("name", "options", "layout", "prefix"), MODELS, ids=lambda value: str(value)[:30])
def test_the_tokens_are_those_that_the_library_computes(library, tmp_path, name, options, layout, prefix):
    theirs = made_by(library, name, **options)
    theirs.save_pretrained(tmp_path)
    torch.save(theirs.state_dict(), tmp_path / "in_memory.pth")  # since version 5 other names than in files
    network = getattr(theirs, prefix.removesuffix("."), theirs)
    if "MAE" in name:
        network.config.mask_ratio, network.embeddings.config.mask_ratio = 0.0, 0.0
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        order = {"noise": torch.arange(16.0).repeat(2, 1)} if "MAE" in name else {}  # which keeps patches as they are
        expected = network(images, **order).last_hidden_state
    for file in ("model.safetensors", "in_memory.pth"):
        ours, report = loaded(tmp_path / file)
        assert (report.info.layout.name, report.info.prefix) == (layout, prefix)
        assert report.complete and report.missing == []
        with torch.no_grad():
            torch.testing.assert_close(ours.forward_features(images), expected, rtol=1e-10, atol=1e-10)
            torch.testing.assert_close(ours(images), expected[:, 0], rtol=1e-10, atol=1e-10)


def test_the_network_is_built_with_the_norms_of_the_library(library, tmp_path):
    sizes = {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 512}
    theirs = made_by(library, "ViTModel", **sizes)
    theirs.save_pretrained(tmp_path)
    network = network_from_file(tmp_path / "model.safetensors")
    assert network.label == "vit_micro/8" and network.arguments["norm_eps"] == 1e-12
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        expected = theirs(images).last_hidden_state[:, 0]
        torch.testing.assert_close(network.model.double().eval()(images), expected, rtol=1e-10, atol=1e-10)


# ---- where the library is not installed -----------------------------------------------------------------------------

IN_FILES = {"norm1": "layernorm_before", "norm2": "layernorm_after", "attn.proj": "attention.output.dense"}
IN_FILES |= {"mlp.fc1": "intermediate.dense", "mlp.fc2": "output.dense"}
DINOV2 = {"attn.proj": "attention.output.dense", "gamma_1": "layer_scale1.lambda1", "gamma_2": "layer_scale2.lambda1"}
GATED = DINOV2 | {"mlp.w12": "mlp.weights_in", "mlp.w3": "mlp.weights_out"}
APART = DINOV2 | {"mlp.w3": "mlp.down_proj"}  # in memory, since version 5
TOP = {"pos_embed": "embeddings.position_embeddings", "patch_embed.proj": "embeddings.patch_embeddings.projection"}
TOP |= {"norm": "layernorm", "cls_token": "embeddings.cls_token", "register_tokens": "embeddings.register_tokens"}


def hugging_face_names(state: dict, parts: dict) -> dict:
    """Our names -> those of files of Hugging Face."""
    renamed = {}
    for name, tensor in state.items():
        stem, dot, tail = name.rpartition(".") if name.endswith((".weight", ".bias")) else (name, "", "")
        if stem.startswith("blocks."):
            _, number, part = stem.split(".", 2)
            block = f"encoder.layer.{number}."
            if part == "attn.qkv":
                for word, third in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                    renamed[f"{block}attention.attention.{word}.{tail}"] = third.clone()
            elif part == "mlp.w12" and part not in parts:
                for word, half in zip(("gate_proj", "up_proj"), tensor.chunk(2), strict=True):
                    renamed[f"{block}mlp.{word}.{tail}"] = half.clone()
            else:
                renamed[f"{block}{parts.get(part, part)}{dot}{tail}"] = tensor
        else:
            renamed[f"{TOP[stem]}{dot}{tail}"] = tensor
    return renamed


def vit(**options) -> VisionTransformer:
    torch.manual_seed(0)
    model = VisionTransformer(embed_dim=24, depth=2, num_heads=3, patch_size=8, img_size=32, **options)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model.double().eval()


@pytest.mark.parametrize("prefix", ["", "vit.", "model.backbone.", "module._orig_mod."])
@pytest.mark.parametrize(
    ("options", "parts", "layout"),
    [
        ({"norm_eps": 1e-12}, IN_FILES, "Hugging Face ViT"),
        ({"init_values": 1.0}, DINOV2, "Hugging Face Dinov2"),
        ({"init_values": 1.0, "num_registers": 2}, DINOV2, "Hugging Face Dinov2"),
        ({"init_values": 1.0, "variant": Variant(mlp="swiglu")}, GATED, "Hugging Face Dinov2"),
        ({"init_values": 1.0, "variant": Variant(mlp="swiglu")}, APART, "Hugging Face Dinov2"),
    ],
)
def test_their_names_become_ours_below_any_prefix(tmp_path, prefix, options, parts, layout):
    model = vit(**options)
    file = {prefix + name: tensor for name, tensor in hugging_face_names(model.state_dict(), parts).items()}
    file["classifier.weight"] = torch.zeros(5, 24)
    save_file(file, tmp_path / "model.safetensors")
    ours, report = loaded(tmp_path / "model.safetensors")
    assert report.info.layout.name == layout and report.complete
    assert any("at its own size only" in note for note in report.info.notes)
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    assert torch.equal(ours(images), model(images))


def test_what_a_configuration_beside_the_file_says_is_kept(tmp_path):
    def write(**config) -> None:
        (tmp_path / "config.json").write_text(json.dumps(config))

    state = VisionTransformer(embed_dim=128, depth=4, num_heads=4, patch_size=8, img_size=32).state_dict()
    path = tmp_path / "model.safetensors"
    save_file(hugging_face_names(state, IN_FILES), path)
    assert network_from_file(path).arguments["norm_eps"] == 1e-12
    write(layer_norm_eps=1e-6, num_attention_heads=4, hidden_act="gelu")
    assert "norm_eps" not in network_from_file(path).arguments
    for config, words in (
        ({"num_attention_heads": 7}, "--num_heads 7: does not divide the width 128"),
        ({"hidden_act": "relu"}, "hidden_act is 'relu'"),
        ({"layer_norm_eps": "much"}, r"config\.json: cannot be read"),
    ):
        write(**config)
        with pytest.raises(UsageError, match=words):
            network_from_file(path)
    write(num_attention_heads=8, hidden_act="quick_gelu")
    network = network_from_file(path)
    assert network.arguments["num_heads"] == 8 and network.arguments["variant"] == Variant(mlp="quick_gelu")
    (tmp_path / "config.json").write_text("[1")
    with pytest.raises(CheckpointError, match=r"config\.json: cannot be read"):
        network_from_file(path)


def test_they_become_timm_files_with_the_same_features(tmp_path, monkeypatch):
    model = vit(norm_eps=1e-12, init_values=1.0)
    save_file(hugging_face_names(model.state_dict(), DINOV2), tmp_path / "model.safetensors")
    arguments = ["checkpoints", str(tmp_path / "model.safetensors"), "--to", str(tmp_path / "timm.safetensors")]
    monkeypatch.setattr(sys, "argv", arguments)
    assert main() == 0
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 0}
    theirs = TimmVisionTransformer(**sizes, init_values=1.0).double().eval()
    theirs.load_state_dict(load_file(tmp_path / "timm.safetensors"), strict=True)
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    torch.testing.assert_close(theirs(images), model(images), rtol=1e-4, atol=1e-5)


def test_blocks_without_all_three_of_query_key_and_value_are_refused(tmp_path):
    state = hugging_face_names(vit().state_dict(), IN_FILES)
    del state["encoder.layer.1.attention.attention.key.bias"]
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"missing +blocks\.1\.attn\.qkv\.bias"):
        loaded(tmp_path / "model.safetensors")
    assert "encoder.layer.1.attention.attention.key.bias" not in load_file(tmp_path / "model.safetensors")
