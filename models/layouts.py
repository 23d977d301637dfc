"""Layouts of published checkpoints: how each is recognised, and how its names become those of our networks.

One table, ``LAYOUTS``; everything it refers to is a pure function of dict to dict. Opening files, loading networks and
saying what matched is the business of models/checkpoints.py.
"""

import argparse
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch

State = dict[str, torch.Tensor]

# ---------------------------------------------------------------------------------------------------------------------
# Names
# ---------------------------------------------------------------------------------------------------------------------

WRAPPERS = ("module.", "_orig_mod.", "backbone.", "encoder.")

# in files: heads, classifiers and decoders, whoever saved them
NOT_BACKBONE = re.compile(
    r"(\w+_)?head(_\w+)?\.|(fc|linear|classifier|lp|decoder_\w+)(\.|$)|\d+\.(module\.)?linear\.|fc_norm\."
)
# in networks: what only pretraining reads, or what follows from the architecture
NOT_NEEDED = re.compile(r"masked_embed$|.*\b(num_batches_tracked|relative_position_index|attn_mask)$")


def plain_name(name: str) -> str:
    """``name`` without the wrappers it starts with: DDP, torch.compile, multi-crop wrapper (UDI's twice), UNIC encoder.

    Only leading ones: the originals remove the words anywhere, which is the same for every published file, and riskier.
    """
    while prefix := next((prefix for prefix in WRAPPERS if name.startswith(prefix)), None):
        name = name.removeprefix(prefix)
    return name


def strip_wrappers(state: State) -> State:
    return {plain_name(name): tensor for name, tensor in state.items()}


def unchunk_blocks(state: State) -> State:
    """``blocks.<chunk>.<i>.`` -> ``blocks.<i>.``: DINOv2 and UNIC group blocks in chunks; i counts through them."""
    return {re.sub(r"^blocks\.\d+\.(\d+)\.", r"blocks.\1.", name): tensor for name, tensor in state.items()}


def rename_tokens_and_scales(state: State) -> State:
    """DINOv2's and timm's names of LayerScale, registers and mask token -> those of models/vit.py."""
    names = {"reg_token": "register_tokens", "mask_token": "masked_embed"}
    return {
        names.get(name, re.sub(r"\.ls([12])\.gamma$", r".gamma_\1", name)): tensor for name, tensor in state.items()
    }


def add_class_position(state: State) -> State:
    """A zero position for the class token where only patches have one (DeiT III, registers in timm): same network."""
    if not {"pos_embed", "cls_token"} <= state.keys():
        return state
    classes, positions = state["cls_token"].shape[1], state["pos_embed"]
    if square_side(positions.shape[1] - classes) or not square_side(positions.shape[1]):
        return state
    return state | {"pos_embed": torch.cat((positions.new_zeros(1, classes, positions.shape[2]), positions), dim=1)}


def to_timm(state: State, fold_class_position: bool | None = None) -> State:
    """Our names -> those of timm's vision transformers without classifier; heads and mask token stay behind.

    ``fold_class_position``: add the class token's position to the token itself and keep those of patches only, as timm
    holds networks with registers and DeiT III; None folds for those. Of several class tokens timm gets the first.
    """
    state = {name: tensor for name, tensor in state.items() if not (NOT_BACKBONE.match(name) or name == "masked_embed")}
    if {"cls_token", "pos_embed"} <= state.keys():
        token, position = state["cls_token"][:, :1], state["pos_embed"][:, :1]
        patches = state["pos_embed"][:, state["cls_token"].shape[1] :]
        if fold_class_position is None:
            fold_class_position = "register_tokens" in state or not position.any()
        state["cls_token"] = token + position if fold_class_position else token.clone()
        state["pos_embed"] = patches.clone() if fold_class_position else torch.cat((position, patches), dim=1)
    names = {"register_tokens": "reg_token"}
    return {names.get(name, re.sub(r"\.gamma_([12])$", r".ls\1.gamma", name)): t for name, t in state.items()}


def square_side(count: int) -> int | None:
    """The side of a square grid of ``count`` patches, None when there is none."""
    side = round(max(count, 0) ** 0.5)
    return side if side > 0 and side * side == count else None


# ---------------------------------------------------------------------------------------------------------------------
# The table
# ---------------------------------------------------------------------------------------------------------------------


class Contents(NamedTuple):
    """What a layout is recognised by."""

    file: dict  # everything at the top level
    saved: State  # the tensors in question, under the names they were saved with
    tensors: State  # the same without wrappers

    def has(self, *prefixes: str) -> bool:
        return any(name.startswith(prefixes) for name in self.tensors)

    def class_tokens(self) -> int:
        return self.tensors["cls_token"].shape[1] if "cls_token" in self.tensors else 0

    def was_wrapped_in(self, part: str) -> bool:
        return any(part in name for name in self.saved)


@dataclass(frozen=True)
class Layout:
    """One row: what it is called, whose it is, how it is recognised, how its names become ours."""

    name: str
    method: str | None  # None: several methods write it, or the file says so itself
    recognise: Callable[[Contents], bool]
    convert: tuple[Callable[[State], State], ...] = (strip_wrappers,)
    not_needed: str = r"(?!)"  # further names that are no part of a network to be evaluated

    def belongs_to_backbone(self, name: str) -> bool:
        return not (NOT_BACKBONE.match(name) or NOT_NEEDED.match(name) or re.match(self.not_needed, name))


def recorded_arguments(file: dict) -> dict:
    """Options of the training run: a dict, or the Namespace that the originals save."""
    arguments = file.get("args", {})
    arguments = vars(arguments) if isinstance(arguments, argparse.Namespace) else arguments
    return arguments if isinstance(arguments, dict) else {}


def _masks_by_attention(file: dict) -> bool:
    return "attmask" in str(recorded_arguments(file).get("pred_shape"))


RENAMED = (strip_wrappers, rename_tokens_and_scales, add_class_position)
CHUNKED = (strip_wrappers, unchunk_blocks, rename_tokens_and_scales, add_class_position)
HIERARCHIES = ("layers.0.", "stage0.0.proj.", "layer1.0.norm_embed.")  # Swin, CvT, Vision Longformer
MUGS_ONLY, UDI_ONLY = r"relation_blocks\.", r"(attn|norm1)\."  # UDI: the module that mixes views

# fmt: off
LAYOUTS = (
    # training checkpoints, told apart by what the methods keep beside their networks
    Layout("Tutelage training checkpoint", None, lambda c: "tutelage" in c.file, not_needed=f"{MUGS_ONLY}|{UDI_ONLY}"),
    Layout("Mugs training checkpoint", "mugs", lambda c: "group-sup." in c.file, not_needed=MUGS_ONLY),
    Layout("UDI training checkpoint", "udi", lambda c: "udi_loss" in c.file, not_needed=UDI_ONLY),
    Layout("UNIC training checkpoint", "unic", lambda c: "teacher_ft_stats" in c.file, CHUNKED),
    Layout("AttMask training checkpoint", "attmask", lambda c: "ibot_loss" in c.file and _masks_by_attention(c.file)),
    Layout("iBOT training checkpoint", "ibot", lambda c: "ibot_loss" in c.file),
    Layout("EsViT training checkpoint", "esvit", lambda c: "dino_loss" in c.file and (
        c.has("head_dense.", *HIERARCHIES)
        or c.was_wrapped_in("backbone.backbone.") or not c.was_wrapped_in("backbone."))),
    Layout("DINO training checkpoint", "dino", lambda c: "dino_loss" in c.file),
    # networks, told apart by their tensors
    Layout("UDI network", "udi", lambda c: c.was_wrapped_in("backbone.backbone.cls_token"), not_needed=UDI_ONLY),
    Layout("UDI backbone", "udi", lambda c: c.class_tokens() > 1),
    Layout("Mugs backbone", "mugs", lambda c: c.has("relation_blocks."), not_needed=MUGS_ONLY),
    Layout("backbone with a linear classifier (combined by iBOT or AttMask)", None,
           lambda c: {"linear.weight", "cls_token"} <= c.tensors.keys()),
    Layout("linear classifier", None, lambda c: all("linear" in name.split(".") for name in c.tensors)),
    Layout("DINOv2", "dinov2", lambda c: "mask_token" in c.tensors
           and c.has("register_tokens", "blocks.0.ls1.", "blocks.0.0.ls1."), CHUNKED),
    Layout("UNIC encoder", "unic", lambda c: c.has("blocks.0.0."), CHUNKED),
    Layout("MAE with decoder", "mae", lambda c: c.has("decoder_blocks."), RENAMED),
    Layout("fine-tuned MAE", "mae", lambda c: "model" in c.file and c.has("fc_norm."), RENAMED),
    Layout("supervised Swin", "swin", lambda c: "model" in c.file and c.has(*HIERARCHIES)),
    Layout("DeiT", "deit", lambda c: "model" in c.file and c.has("head.", "head_dist."), RENAMED),
    Layout("MAE", "mae", lambda c: "model" in c.file, RENAMED),
    Layout("CLIP", "clip", lambda c: c.has("visual.")),
    Layout("timm", None, lambda c: c.has("reg_token", "blocks.0.ls1.", "fc_norm.", "norm_pre.", "head."), RENAMED),
    Layout("iBOT backbone", "ibot", lambda c: "masked_embed" in c.tensors),
    Layout("backbone under state_dict (iBOT, AttMask)", None, lambda c: list(c.file) == ["state_dict"]),
    Layout("Swin, CvT or Vision Longformer", None, lambda c: c.has(*HIERARCHIES)),
    Layout("backbone only", None, lambda c: c.has("cls_token", "conv1.", "patch_embed."), RENAMED),
    Layout("unknown layout", None, lambda c: True, RENAMED),
)
# fmt: on


def recognise(file: dict, tensors: State) -> Layout:
    """The first row of the table that fits ``file``, of which ``tensors`` are the network in question."""
    contents = Contents(file, tensors, strip_wrappers(tensors))
    return next(layout for layout in LAYOUTS if layout.recognise(contents))


# ---------------------------------------------------------------------------------------------------------------------
# Which network the tensors are
# ---------------------------------------------------------------------------------------------------------------------

NAME_OF_SHAPE = {  # (width, blocks); a test compares it with models/vit.py
    (128, 4): "vit_micro",
    (192, 12): "vit_tiny",
    (384, 12): "vit_small",
    (768, 12): "vit_base",
    (1024, 24): "vit_large",
}


def vit_arguments(state: State) -> dict | None:
    """Arguments of ``VisionTransformer``, all but ``num_heads``, which no shape shows; None for other networks."""
    try:
        patch, classes, positions = state["patch_embed.proj.weight"], state["cls_token"], state["pos_embed"]
        hidden, qkv = state["blocks.0.mlp.fc1.weight"], state["blocks.0.attn.qkv.weight"]
    except KeyError:
        return None
    side = square_side(positions.shape[1] - classes.shape[1])
    if side is None or qkv.shape[0] != 3 * patch.shape[0]:
        return None
    return {
        "embed_dim": patch.shape[0],
        "depth": 1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks.")),
        "patch_size": patch.shape[-1],
        "img_size": side * patch.shape[-1],
        "mlp_ratio": hidden.shape[0] / hidden.shape[1],
        "qkv_bias": "blocks.0.attn.qkv.bias" in state,
        "init_values": 1e-5 if "blocks.0.gamma_1" in state else 0.0,
        "num_class_tokens": classes.shape[1],
        "num_registers": state["register_tokens"].shape[1] if "register_tokens" in state else 0,
        "use_mean_pooling": "fc_norm.weight" in state and "norm.weight" not in state,
    }


SWIN_OF_SHAPE = {  # (width of the first stage, blocks of every stage); a test compares it with models/swin.py
    (96, (2, 2, 6, 2)): "swin_tiny",
    (96, (2, 2, 18, 2)): "swin_small",
    (128, (2, 2, 18, 2)): "swin_base",
    (192, (2, 2, 18, 2)): "swin_large",
}


def swin_arguments(state: State) -> dict | None:
    """Arguments of ``SwinTransformer``, all but ``img_size``; None for other networks.

    The window is the largest of all stages: in the last ones it is as small as the map was when the network was built.
    """
    table = re.compile(r"layers\.(\d+)\.blocks\.(\d+)\.attn\.relative_position_bias_table")
    tables = {tuple(map(int, m.groups())): tensor for name, tensor in state.items() if (m := table.fullmatch(name))}
    try:
        patch, hidden = state["patch_embed.proj.weight"], state["layers.0.blocks.0.mlp.fc1.weight"]
        heads = tuple(tables[stage, 0].shape[1] for stage in range(1 + max(stage for stage, _ in tables)))
    except (KeyError, ValueError):
        return None
    return {
        "embed_dim": patch.shape[0],
        "depths": tuple(sum(stage == s for s, _ in tables) for stage in range(len(heads))),
        "num_heads": heads,
        "patch_size": patch.shape[-1],
        "mlp_ratio": hidden.shape[0] / hidden.shape[1],
        "window_size": max(round(tensor.shape[0] ** 0.5 + 1) // 2 for tensor in tables.values()),
    }


def arch_of(state: State) -> str | None:
    """The name of the architecture among ours, from the shapes; None for any other."""
    if shape := vit_arguments(state):
        return NAME_OF_SHAPE.get((shape["embed_dim"], shape["depth"]))
    shape = swin_arguments(state)
    return SWIN_OF_SHAPE.get((shape["embed_dim"], shape["depths"])) if shape else None


def describe(state: State) -> str:
    """What network the tensors are, in words."""
    shape = vit_arguments(state)
    if shape:
        name = arch_of(state) or "vision transformer"
        side = shape["img_size"] // shape["patch_size"]
        extras = [f"{shape['num_class_tokens']} class tokens"] * (shape["num_class_tokens"] > 1)
        extras += [f"{shape['num_registers']} registers"] * (shape["num_registers"] > 0)
        extras += ["LayerScale"] * (shape["init_values"] > 0)
        extras += ["mean pooling"] * shape["use_mean_pooling"]
        return ", ".join(
            [
                f"{name} (width {shape['embed_dim']}, {shape['depth']} blocks)",
                f"patch {shape['patch_size']}",
                f"{side} x {side} positions ({shape['img_size']} px)",
                *extras,
            ]
        )
    if shape := swin_arguments(state):
        blocks = "+".join(map(str, shape["depths"]))
        return (
            f"{arch_of(state) or 'Swin transformer'} (width {shape['embed_dim']}, {blocks} blocks), "
            f"patch {shape['patch_size']}, window {shape['window_size']}"
        )
    kinds = {
        "layers.0.": "transformer of several stages",
        "stage0.0.proj.": "CvT",
        "layer1.0.norm_embed.": "Vision Longformer",
        "layer1.0.conv1.": "ResNet",
        "visual.": "CLIP",
        "module.linear.": "linear classifier",
        "linear.": "linear classifier",
    }
    kind = next((kind for prefix, kind in kinds.items() if any(n.startswith(prefix) for n in state)), "unknown network")
    return f"{kind} of {len(state)} tensors"


def advice(target: State, state: State) -> str:
    """What to pass instead, from the shapes on both sides."""
    ours, theirs = vit_arguments(dict(target)), vit_arguments(state)
    if theirs and theirs["use_mean_pooling"] and not (ours and ours["use_mean_pooling"]):
        return "The file pools patch tokens (fc_norm instead of norm), which this network does not do"
    swins = swin_arguments(dict(target)), swin_arguments(state)
    if all(swins):
        name = arch_of(state)
        tips = [f"--arch {name}" if name else "its own --arch"] if name is None or name != arch_of(target) else []
        if swins[0]["window_size"] != swins[1]["window_size"]:
            tips.append(f"--window_size {swins[1]['window_size']}")
        return f"The file holds a {describe(state)}" + (f": pass {', '.join(tips)}" if tips else "")
    if ours is None or theirs is None:
        return f"The file holds a {describe(state)}: pass --arch {arch_of(state) or 'that it was trained with'}"
    tips = []
    if any(ours[key] != theirs[key] for key in ("embed_dim", "depth", "mlp_ratio")):
        name = NAME_OF_SHAPE.get((theirs["embed_dim"], theirs["depth"]))
        tips.append(f"--arch {name}" if name else "its own --arch (none of ours has this width and depth)")
    if ours["patch_size"] != theirs["patch_size"]:
        tips.append(f"--patch_size {theirs['patch_size']}")
    if ours["img_size"] // ours["patch_size"] != theirs["img_size"] // theirs["patch_size"]:
        tips.append(f"img_size={theirs['img_size']} to build_backbone (the evaluations do so by themselves)")
    for key in ("num_class_tokens", "num_registers", "init_values"):
        if ours[key] != theirs[key]:
            tips.append(f"{key}={theirs[key]:g} to build_backbone")
    return f"The file holds a {describe(state)}" + (f": pass {', '.join(tips)}" if tips else "")
