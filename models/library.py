"""Backbones that a well-kept library brings: every timm model that pools to a vector.

Their stochastic depth and dropout draw from torch's global generator; the training loop reseeds it at every step.
"""

import torch
import torch.nn as nn

from utils import UsageError, nearest


def build(arch: str, drop_path_rate: float, valid: list[str]) -> nn.Module:
    """``timm/<name>``; ``valid``: the names to choose the nearest from."""
    if not arch.startswith("timm/"):
        raise UsageError(f"--arch {arch}: unknown architecture{nearest(arch, valid)} (or timm/<name> for a timm model)")
    return timm_backbone(arch.removeprefix("timm/"), drop_path_rate)


def timm_backbone(name: str, drop_path_rate: float, pretrained: bool = False) -> nn.Module:
    """``timm.create_model(name)`` without classifier, prepared for crops of several sizes.

    ``pretrained``: with weights, which timm fetches from the network unless it has them.
    """
    import timm

    if not timm.is_model(name):
        raise UsageError(
            f"--arch timm/{name}: timm {timm.__version__} has no such model{nearest(name, timm.list_models())}"
        )
    last_error: Exception | None = None
    for sizes in ({"dynamic_img_size": True}, {"strict_img_size": False}, {}):
        for drop in ({"drop_path_rate": drop_path_rate}, {}) if drop_path_rate else ({},):
            try:
                model = timm.create_model(name, pretrained=pretrained, num_classes=0, **sizes, **drop)
            except TypeError as error:  # this family has no such argument
                last_error = error
                continue
            except Exception as error:
                if not pretrained:
                    raise
                reason = str(error).splitlines()[0] if str(error) else type(error).__name__
                raise UsageError(f"timm/{name}: its weights cannot be fetched: {reason}") from error
            model.embed_dim = _pooled_width(name, model)
            return model
    raise UsageError(f"--arch timm/{name}: timm cannot build it: {last_error}")


def _pooled_width(name: str, model: nn.Module) -> int:
    size = model.pretrained_cfg.get("input_size", (3, 224, 224)) if hasattr(model, "pretrained_cfg") else (3, 224, 224)
    training = model.training
    with torch.no_grad():
        features = model.eval()(torch.zeros(1, *size))
    model.train(training)
    if not isinstance(features, torch.Tensor) or features.ndim != 2:
        raise UsageError(f"--arch timm/{name}: its output is not one vector per image, so it cannot be a student")
    return features.shape[1]
