"""Zero-shot classification: the class whose text embedding is nearest, in the space that images and texts share.

CLIP (2103.00020). A student of UNIC (2408.05088) has no text of its own: what its ladder makes of an image stands for a
CLIP teacher's class token, and goes through that teacher's projection. That is an interpretation of its README.
"""

import torch
import torch.nn.functional as F

LOGIT_SCALE = 100.0  # what CLIP's temperature has become in training


def unstandardised(projected: torch.Tensor, mean: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
    """A student's image (batch, dim) in the space of a teacher whose features had this mean and std (1, dim).

    parity: the smallest std is added once more, as where the teacher's features were divided by it.
    """
    return projected * (std + 1e-6) + mean


def class_logits(features: torch.Tensor, projection: torch.Tensor, texts: torch.Tensor) -> torch.Tensor:
    """(batch, classes): 100 times the cosine of images and texts.

    ``features`` before the projection (batch, dim); ``projection`` (shared dim, dim); ``texts`` (classes, shared dim).
    """
    return LOGIT_SCALE * F.normalize(features @ projection.t(), dim=1) @ F.normalize(texts, dim=1).t()
