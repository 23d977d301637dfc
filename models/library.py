"""Backbones that well-kept libraries bring: torchvision's ResNets and every timm model that pools to a vector.

Their stochastic depth and dropout draw from torch's global generator; the training loop reseeds it at every step.
"""

import torch
import torch.nn as nn

from utils import UsageError, nearest


def build(arch: str, drop_path_rate: float, valid: list[str]) -> nn.Module:
    """``timm/<name>``, or one of torchvision's; ``valid``: the names to choose the nearest from."""
    if arch.startswith("timm/"):
        return timm_backbone(arch.removeprefix("timm/"), drop_path_rate)
    return torchvision_backbone(arch, valid)


def torchvision_names() -> list[str]:
    from torchvision import models

    return [name for name in models.list_models(module=models) if name.startswith(("resnet", "resnext", "wide_resnet"))]


def torchvision_backbone(arch: str, valid: list[str]) -> nn.Module:
    """A torchvision ResNet whose classifier is replaced by the identity, as DINO does it."""
    if arch not in torchvision_names():
        raise UsageError(f"--arch {arch}: unknown architecture{nearest(arch, valid)} (or timm/<name> for a timm model)")
    from torchvision import models

    model = models.get_model(arch, weights=None)
    model.embed_dim = model.fc.in_features
    model.fc = nn.Identity()
    return model


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
