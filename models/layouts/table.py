"""Layouts of published checkpoints: how each is recognised, and how its names become those of our networks.

One table, ``LAYOUTS``. Opening files, loading networks and saying what matched is the business of
models/checkpoints.py.
"""

import argparse
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from models.layouts.libraries import (
    join_distillation_token,
    merge_after_stages,
    rename_hugging_face_swin,
    rename_torchvision_swin,
    rename_torchvision_vit,
)
from models.layouts.names import (
    NOT_BACKBONE,
    NOT_NEEDED,
    State,
    join_layers,
    name_gates,
    rename_hugging_face,
    rename_tokens_and_scales,
    strip_wrappers,
    unchunk_blocks,
)


class Contents(NamedTuple):
    """What a layout is recognised by."""

    file: dict  # everything at the top level
    held: State  # the network in question, without the words of wrappers
    tensors: State  # the same without what holds the network

    def has(self, *prefixes: str) -> bool:
        return any(name.startswith(prefixes) for name in self.tensors)

    def class_tokens(self) -> int:
        token = self.tensors.get("cls_token")
        return token.shape[1] if token is not None and token.ndim == 3 else 0

    def is_hugging_face(self, part: str) -> bool:
        in_files, in_memory = f"layer.0.{part}", f"layers.0.{part}"
        return "embeddings.position_embeddings" in self.tensors and self.has(in_files, in_memory)

    def was_held_in(self, part: str) -> bool:
        return any(part in name for name in self.held)


@dataclass(frozen=True)
class Layout:
    """One row: what it is called, whose it is, how it is recognised, how its names become ours."""

    name: str
    method: str | None  # None: several methods write it, or the file says so itself
    recognise: Callable[[Contents], bool]
    convert: tuple[Callable[[State], State], ...] = (strip_wrappers,)
    not_needed: str = r"(?!)"  # further names that are no part of a network to be evaluated
    class_position: bool = True  # False: class tokens may have none beside LayerScale, as DeiT III's
    norm_eps: float = 1e-6  # what its networks add to a variance, which no tensor shows

    def belongs_to_backbone(self, name: str) -> bool:
        return not (NOT_BACKBONE.match(name) or NOT_NEEDED.match(name) or re.match(self.not_needed, name))


def recorded_arguments(file: dict) -> dict:
    """Options of the training run: a dict, or the Namespace that the originals save."""
    arguments = file.get("args", {})
    arguments = vars(arguments) if isinstance(arguments, argparse.Namespace) else arguments
    return arguments if isinstance(arguments, dict) else {}


def recorded_image_size(arguments: dict) -> int | None:
    """Pixels along a side of the images of a training run with these options; None where they do not say it."""
    names = ("image_size", "global_crops_size")  # UNIC's option, and what our files say of every method; before it
    return next((arguments[name] for name in names if isinstance(arguments.get(name), int)), None)


def _masks_by_attention(file: dict) -> bool:
    return "attmask" in str(recorded_arguments(file).get("pred_shape"))


RENAMED = (strip_wrappers, rename_tokens_and_scales, name_gates)
CHUNKED = (strip_wrappers, unchunk_blocks, rename_tokens_and_scales)
HUGGING = (strip_wrappers, rename_hugging_face, join_distillation_token, join_layers)
SWINS = (strip_wrappers, merge_after_stages)
HIERARCHIES = ("layers.0.", "stage0.0.proj.", "layer1.0.norm_embed.")  # Swin, CvT, Vision Longformer
MUGS_ONLY, UDI_ONLY = r"relation_blocks\.", r"(attn|norm1)\."  # UDI: the module that mixes views

# fmt: off
LAYOUTS = (
    # training checkpoints, told apart by what the methods keep beside their networks
    Layout("Tutelage training checkpoint", None, lambda c: "tutelage" in c.file, CHUNKED, f"{MUGS_ONLY}|{UDI_ONLY}"),
    Layout("Mugs training checkpoint", "mugs", lambda c: "group-sup." in c.file, not_needed=MUGS_ONLY),
    Layout("UDI training checkpoint", "udi", lambda c: "udi_loss" in c.file, not_needed=UDI_ONLY),
    Layout("UNIC training checkpoint", "unic", lambda c: "teacher_ft_stats" in c.file, CHUNKED),
    Layout("AttMask training checkpoint", "attmask", lambda c: "ibot_loss" in c.file and _masks_by_attention(c.file)),
    Layout("iBOT training checkpoint", "ibot", lambda c: "ibot_loss" in c.file),
    Layout("EsViT training checkpoint", "esvit", lambda c: "dino_loss" in c.file and (
        c.has("head_dense.", *HIERARCHIES)
        or c.was_held_in("backbone.backbone.") or not c.was_held_in("backbone."))),
    Layout("DINO training checkpoint", "dino", lambda c: "dino_loss" in c.file),
    # networks, told apart by their tensors
    Layout("Hugging Face ViT", None, lambda c: c.is_hugging_face("layernorm_before."), HUGGING, r"pooler\.|decoder\.",
           norm_eps=1e-12),
    Layout("Hugging Face Dinov2", "dinov2", lambda c: c.is_hugging_face("layer_scale1."), HUGGING),
    Layout("Hugging Face Swin", "swin", lambda c: c.has("embeddings.norm.") and c.has("layers.0.blocks.0.attention."),
           (strip_wrappers, rename_hugging_face_swin, join_layers)),
    Layout("torchvision ViT", None, lambda c: c.has("class_token") and c.has("layers.encoder_layer_0."),
           (strip_wrappers, rename_torchvision_vit)),
    Layout("torchvision Swin", "swin", lambda c: c.has("features.1.0.attn.relative_position_bias_table"),
           (strip_wrappers, rename_torchvision_swin)),
    Layout("UDI network", "udi", lambda c: c.was_held_in("backbone.backbone.cls_token"), not_needed=UDI_ONLY),
    Layout("UDI backbone", "udi", lambda c: c.class_tokens() > 1),
    Layout("Mugs backbone", "mugs", lambda c: c.has("relation_blocks."), not_needed=MUGS_ONLY),
    Layout("backbone with a linear classifier (combined by iBOT or AttMask)", None,
           lambda c: {"linear.weight", "cls_token"} <= c.tensors.keys()),
    Layout("linear classifier", None, lambda c: all("linear" in name.split(".") for name in c.tensors)),
    Layout("DINOv2", "dinov2", lambda c: "mask_token" in c.tensors
           and c.has("register_tokens", "blocks.0.ls1.", "blocks.0.0.ls1."), CHUNKED),
    Layout("UNIC encoder", "unic", lambda c: c.has("blocks.0.0.") and c.has("cls_token"), CHUNKED),
    Layout("MAE with decoder", "mae", lambda c: c.has("decoder_blocks."), RENAMED),
    Layout("fine-tuned MAE", "mae", lambda c: "model" in c.file and c.has("fc_norm."), RENAMED),
    Layout("supervised Swin", "swin", lambda c: "model" in c.file and c.has(*HIERARCHIES), SWINS),
    Layout("DeiT", "deit", lambda c: "model" in c.file and c.has("head.", "head_dist."), RENAMED,
           class_position=False),
    Layout("MAE", "mae", lambda c: "model" in c.file, RENAMED),
    Layout("CLIP", "clip", lambda c: c.has("visual."), norm_eps=1e-5),  # its names: models/layouts/clip.py
    Layout("timm Swin", "swin", lambda c: c.has("layers.3.downsample.") and c.has("layers.0.blocks.0."), SWINS),
    Layout("timm", None, lambda c: c.has("reg_token", "blocks.0.ls1.", "fc_norm.", "norm_pre.", "head."), RENAMED),
    Layout("iBOT backbone", "ibot", lambda c: "masked_embed" in c.tensors),
    Layout("backbone under state_dict (iBOT, AttMask)", None, lambda c: list(c.file) == ["state_dict"]),
    Layout("Swin, CvT or Vision Longformer", None, lambda c: c.has(*HIERARCHIES), SWINS),
    Layout("backbone only", None, lambda c: c.has("cls_token", "conv1.", "patch_embed."), RENAMED),
    Layout("unknown layout", None, lambda c: True, RENAMED),
)
# fmt: on


def recognise(file: dict, tensors: State) -> Layout:
    """The first row that fits ``file``, of which ``tensors``, unwrapped, are the network in question."""
    contents = Contents(file, tensors, strip_wrappers(tensors))
    return next(layout for layout in LAYOUTS if layout.recognise(contents))
