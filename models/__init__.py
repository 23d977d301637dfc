"""Backbones. ``build_backbone`` is the door: every other room asks it for a network by name."""

import torch.nn as nn

from models import library, swin, vit
from utils import UsageError

VITS = {name: getattr(vit, name) for name in ("vit_micro", "vit_tiny", "vit_small", "vit_base", "vit_large")}
SWINS = {name: getattr(swin, name) for name in swin.DEFAULT_DROP_PATH}
ALIASES = {"deit_tiny": "vit_tiny", "deit_small": "vit_small"}


def backbone_names() -> list[str]:
    """Names that ``build_backbone`` takes, besides ``timm/<name>``."""
    return [*VITS, *SWINS, *ALIASES, *library.torchvision_names()]


def is_vision_transformer(arch: str) -> bool:
    """Whether the name stands for a plain transformer of ours, of which every patch size exists."""
    return ALIASES.get(arch, arch) in VITS


def is_swin(arch: str) -> bool:
    """Whether the name stands for a Swin transformer of ours, so that ``window_size`` means something."""
    return arch in SWINS


def mask_unit(arch: str, patch_size: int) -> int | None:
    """Pixels per cell of a mask: a patch, of a Swin a token of its last stage; None for networks without masks."""
    if is_swin(arch):
        return swin.MASK_UNIT
    return patch_size if is_vision_transformer(arch) else None


def check_swin_patch(patch_size: int) -> None:
    """Raises UsageError for patches that no Swin has: masks and merging count on those of 4 pixels."""
    wanted = swin.PATCH_SIZE
    if patch_size != wanted:
        raise UsageError(f"--patch_size {patch_size}: Swin's patches are {wanted} pixels; pass --patch_size {wanted}")


def build_backbone(arch: str, patch_size: int | None = None, drop_path_rate: float = 0.0, **kwargs) -> nn.Module:
    """A network without classifier: images (batch, 3, height, width) -> features (batch, ``embed_dim``).

    ``arch``: a vision transformer or Swin of ours, a torchvision classifier, or ``timm/<name>``. ``patch_size`` (left
    out: 16, of a Swin 4) and further arguments concern our transformers only. Raises UsageError for an unknown name.
    """
    arch = ALIASES.get(arch, arch)
    if arch in VITS:
        return VITS[arch](patch_size=patch_size or 16, drop_path_rate=drop_path_rate, **kwargs)
    if arch in SWINS:
        check_swin_patch(patch_size or swin.PATCH_SIZE)
        return SWINS[arch](drop_path_rate=drop_path_rate, **kwargs)
    if arch.startswith("timm/"):
        return library.timm_backbone(arch.removeprefix("timm/"), drop_path_rate)
    return library.torchvision_backbone(arch, backbone_names())
