"""Backbones. ``build_backbone`` is the door: every other room asks it for a network by name."""

import torch.nn as nn

from models import library, vit

VITS = {name: getattr(vit, name) for name in ("vit_micro", "vit_tiny", "vit_small", "vit_base", "vit_large")}
ALIASES = {"deit_tiny": "vit_tiny", "deit_small": "vit_small"}


def backbone_names() -> list[str]:
    """Names that ``build_backbone`` takes, besides ``timm/<name>``."""
    return [*VITS, *ALIASES, *library.torchvision_names()]


def is_vision_transformer(arch: str) -> bool:
    """Whether the name stands for a transformer of ours, so that ``patch_size`` means something."""
    return ALIASES.get(arch, arch) in VITS


def build_backbone(arch: str, patch_size: int = 16, drop_path_rate: float = 0.0, **kwargs) -> nn.Module:
    """A network without classifier: images (batch, 3, height, width) -> features (batch, ``embed_dim``).

    ``arch``: a vision transformer of ours, a torchvision classifier, or ``timm/<name>``. ``patch_size`` and further
    arguments concern our transformers only. Raises UsageError for an unknown name.
    """
    arch = ALIASES.get(arch, arch)
    if arch in VITS:
        return VITS[arch](patch_size=patch_size, drop_path_rate=drop_path_rate, **kwargs)
    if arch.startswith("timm/"):
        return library.timm_backbone(arch.removeprefix("timm/"), drop_path_rate)
    return library.torchvision_backbone(arch, backbone_names())
