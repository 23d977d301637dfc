"""Projection heads."""

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


class DINOHead(nn.Module):
    """MLP, L2 normalisation, prototypes (DINO 2104.14294, appendix C).

    ``bottleneck`` ends before the prototypes, for losses that never need the whole matrix of logits.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        use_bn: bool = False,
        norm_last_layer: bool = True,
        nlayers: int = 3,
        hidden_dim: int = 2048,
        bottleneck_dim: int = 256,
    ):
        super().__init__()
        if nlayers <= 1:
            self.mlp = nn.Linear(in_dim, bottleneck_dim)
        else:
            layers: list[nn.Module] = []
            for width_in in [in_dim] + [hidden_dim] * (nlayers - 2):
                layers.append(nn.Linear(width_in, hidden_dim))
                if use_bn:
                    layers.append(nn.BatchNorm1d(hidden_dim))
                layers.append(nn.GELU())
            self.mlp = nn.Sequential(*layers, nn.Linear(hidden_dim, bottleneck_dim))
        for module in self.mlp.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        self.last_layer = WeightNormLinear(bottleneck_dim, out_dim, train_norm=not norm_last_layer)

    def bottleneck(self, x: torch.Tensor) -> torch.Tensor:
        """(rows, in_dim) -> unit vectors (rows, bottleneck_dim)."""
        return F.normalize(self.mlp(x), dim=-1, p=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(rows, in_dim) -> logits (rows, out_dim)."""
        return self.last_layer(self.bottleneck(x))
