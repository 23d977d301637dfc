"""Names that torchvision, timm and Hugging Face give to networks that are built here -> ours. Pure functions."""

import re
from collections.abc import Sequence

import torch

from models.layouts.names import State, renamed

TORCHVISION_VIT = (
    (r"^class_token$", "cls_token"),
    (r"^conv_proj\.", "patch_embed.proj."),
    (r"^pos_embedding$", "pos_embed"),
    (r"^layers\.encoder_layer_(\d+)\.", r"blocks.\1."),
    (r"\.ln_([12])\.", r".norm\1."),
    (r"\.self_attention\.in_proj_", ".attn.qkv."),
    (r"\.self_attention\.out_proj\.", ".attn.proj."),
    (r"\.mlp\.(0|linear_1)\.", ".mlp.fc1."),
    (r"\.mlp\.(3|linear_2)\.", ".mlp.fc2."),
    (r"^ln\.", "norm."),
    (r"^heads\.", "head."),
)
TORCHVISION_SWIN = (
    (r"^features\.0\.0\.", "patch_embed.proj."),
    (r"^features\.0\.2\.", "patch_embed.norm."),
    *((rf"^features\.{2 * stage + 1}\.", f"layers.{stage}.blocks.") for stage in range(4)),
    *((rf"^features\.{2 * stage + 2}\.", f"layers.{stage}.downsample.") for stage in range(3)),
    (r"\.mlp\.0\.", ".mlp.fc1."),
    (r"\.mlp\.3\.", ".mlp.fc2."),
)
HUGGING_FACE_SWIN = (
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^embeddings\.norm\.", "patch_embed.norm."),
    (r"^embeddings\.mask_token$", "masked_embed"),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.attention\.(self\.)?query\.|\.attention\.q_proj\.", ".attn.q."),
    (r"\.attention\.(self\.)?key\.|\.attention\.k_proj\.", ".attn.k."),
    (r"\.attention\.(self\.)?value\.|\.attention\.v_proj\.", ".attn.v."),
    (r"\.attention\.output\.dense\.|\.attention\.o_proj\.", ".attn.proj."),
    (
        r"\.attention\.(self\.|relative_position_bias\.)?relative_position_(?=bias_table|index)",
        ".attn.relative_position_",
    ),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),
    (r"^layernorm\.", "norm."),
)


def _by(pairs: Sequence[tuple[str, str]], state: State) -> State:
    def rename(name: str) -> str:
        for pattern, ours in pairs:
            name = re.sub(pattern, ours, name)
        return name

    return renamed(state, rename)


def rename_torchvision_vit(state: State) -> State:
    return _by(TORCHVISION_VIT, state)


def rename_torchvision_swin(state: State) -> State:
    return _by(TORCHVISION_SWIN, state)


def rename_hugging_face_swin(state: State) -> State:
    return _by(HUGGING_FACE_SWIN, state)


def merge_after_stages(state: State) -> State:
    """timm's Swins merge patches at the beginning of a stage, those of the authors at the end of the one before."""
    if "layers.0.blocks.0.norm1.weight" not in state or "layers.0.downsample.reduction.weight" in state:
        return state

    def rename(name: str) -> str:
        return re.sub(r"^layers\.([1-9])\.downsample\.", lambda match: f"layers.{int(match[1]) - 1}.downsample.", name)

    return renamed(state, rename)


def join_distillation_token(state: State) -> State:
    """DeiT's second token is one more class token: it has a position, and is read by heads of its own."""
    names = {"cls_token", "embeddings.distillation_token"}
    if not names <= state.keys() or any(state[name].ndim != 3 for name in names):
        return state
    rest = {name: tensor for name, tensor in state.items() if name != "embeddings.distillation_token"}
    return rest | {"cls_token": torch.cat((state["cls_token"], state["embeddings.distillation_token"]), dim=1)}


RESNETS = {  # (blocks of every stage, whether they have a third convolution, width, groups of the second) -> name
    ((2, 2, 2, 2), False, 64, 1): "resnet18",
    ((3, 4, 6, 3), False, 64, 1): "resnet34",
    ((3, 4, 6, 3), True, 64, 1): "resnet50",
    ((3, 4, 23, 3), True, 64, 1): "resnet101",
    ((3, 8, 36, 3), True, 64, 1): "resnet152",
    ((3, 4, 6, 3), True, 128, 1): "wide_resnet50_2",
    ((3, 4, 23, 3), True, 128, 1): "wide_resnet101_2",
    ((3, 4, 6, 3), True, 128, 32): "resnext50_32x4d",
    ((3, 4, 23, 3), True, 256, 32): "resnext101_32x8d",
    ((3, 4, 23, 3), True, 256, 64): "resnext101_64x4d",
}


def resnet_of(state: State) -> str | None:
    """The name that torchvision and timm give to a residual network of these shapes; None for any other network."""
    stem, first, second = (state.get(f"{name}.weight") for name in ("conv1", "layer1.0.conv1", "layer1.0.conv2"))
    if stem is None or first is None or second is None or not stem.ndim == first.ndim == second.ndim == 4:
        return None
    if tuple(stem.shape) != (64, 3, 7, 7) or not second.shape[1]:
        return None
    blocks = {match[0] for name in state if (match := re.match(r"layer[1-4]\.\d+\.", name))}
    depths = tuple(sum(block.startswith(f"layer{stage}.") for block in blocks) for stage in (1, 2, 3, 4))
    groups = second.shape[0] // second.shape[1]
    return RESNETS.get((depths, "layer1.0.conv3.weight" in state, first.shape[0], groups))
