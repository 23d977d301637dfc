"""Pictures of what a network looks at."""

import numpy as np
import torch

from data.preprocess import to_pixels
from evaluation.attention import attention_maps, attention_sheet, class_token_names
from evaluation.features import evaluating


def attention_pictures(backbone: torch.nn.Module, images: torch.Tensor) -> np.ndarray | None:
    """Every image beside its class tokens' attention, a row for each; None for a network without such attention."""
    if not hasattr(backbone, "get_last_selfattention"):
        return None
    with evaluating(backbone), torch.no_grad():
        tokens = [(name, attention_maps(backbone, images, n)) for n, name in enumerate(class_token_names(backbone))]
    pictures = enumerate(to_pixels(images))
    return np.concatenate([attention_sheet(p, maps[n], token=name) for n, p in pictures for name, maps in tokens])
