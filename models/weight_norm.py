"""Prototypes: a linear layer whose rows have a norm of their own."""

import torch
import torch.nn as nn
import torch.nn.functional as F


class WeightNormLinear(nn.Module):
    """Linear layer without bias whose rows are ``weight_g * weight_v / |weight_v|``: one prototype per row.

    parity: the names are those of torch's old ``weight_norm``; every published checkpoint has them.
    """

    def __init__(self, in_features: int, out_features: int, train_norm: bool):
        super().__init__()
        self.weight_g = nn.Parameter(torch.ones(out_features, 1), requires_grad=train_norm)
        self.weight_v = nn.Parameter(torch.empty(out_features, in_features))
        bound = in_features**-0.5
        nn.init.uniform_(self.weight_v, -bound, bound)  # the default of nn.Linear, as in the original

    def weight(self) -> torch.Tensor:
        """(out_features, in_features)."""
        return torch._weight_norm(self.weight_v, self.weight_g, 0)  # fused forward and backward

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight())


def unit_vectors(x: torch.Tensor) -> torch.Tensor:
    """Rows (rows, dim) divided by their norms, in float32 or better: half precision rounds a norm to eight bits."""
    return F.normalize(x if x.dtype == torch.float64 else x.float(), dim=-1)
