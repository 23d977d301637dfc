"""A backbone and a head that are shown several crops of every image."""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn as nn

from models.vit import group_by_size


class MultiCropNetwork(nn.Module):
    """Backbone on all crops, head on all outputs; crops are ordered crop by crop, then image by image."""

    def __init__(self, backbone: nn.Module, head: nn.Module):
        super().__init__()
        self.backbone = backbone
        self.head = head

    def features(self, crops: Sequence[torch.Tensor], draws: np.ndarray | None = None) -> torch.Tensor:
        """Crops of (batch, 3, height, width), of any sizes -> (crops * batch, dim)."""
        if hasattr(self.backbone, "forward_crops"):
            return self.backbone.forward_crops(crops, draws)
        outputs = [self.backbone(group) for group in group_by_size(crops)]
        outputs = [output[0] if isinstance(output, tuple) else output for output in outputs]
        return torch.cat(outputs) if len(outputs) > 1 else outputs[0]

    def forward(self, crops: torch.Tensor | Sequence[torch.Tensor]) -> torch.Tensor:
        """(crops * batch, prototypes)."""
        return self.head(self.features([crops] if isinstance(crops, torch.Tensor) else crops))
