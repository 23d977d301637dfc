"""Label-free signs of life, measured on the device (training/health.py says what they mean)."""

import math

import torch


def effective_rank(features: torch.Tensor) -> torch.Tensor:
    """Participation ratio (sum of eigenvalues)^2 / sum of squares of the covariance of (samples, dim) features.

    Between 1 (all samples on one line) and min(samples - 1, dim); needs two matrix products and no decomposition.
    """
    centred = features.float() - features.float().mean(dim=0)
    gram = centred @ centred.t() if centred.shape[0] < centred.shape[1] else centred.t() @ centred
    return gram.trace().square() / gram.square().sum().clamp_min(1e-30)


def clustering_health(
    probs: torch.Tensor, loss: torch.Tensor, centre: torch.Tensor, used: torch.Tensor, features: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Measures of a method that distils a distribution over prototypes; tensors stay on the device.

    Shapes     probs (views, batch, prototypes) of the teacher; centre (1, prototypes); used (prototypes,) bool, the
               prototypes that were some image's first choice since the epoch began; features (rows, dim) of the teacher
    Returns    teacher_entropy and teacher_kl in nats, the same relative to ln(prototypes), centre_norm,
               prototypes_used (share), effective_rank, loss_over_ln_k
    """
    ln_k = math.log(probs.shape[-1])
    entropy = torch.special.entr(probs).sum(dim=-1).mean()
    return {
        "teacher_entropy": entropy,
        "teacher_kl": loss - entropy,
        "entropy_over_ln_k": entropy / ln_k,
        "loss_over_ln_k": loss / ln_k,
        "centre_norm": centre.norm(),
        "prototypes_used": used.float().mean(),
        "effective_rank": effective_rank(features),
    }
