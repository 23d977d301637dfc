"""Projection heads: DINO's for vectors, iBOT's for class and patch tokens, Mugs's for contrast."""

import torch
import torch.nn as nn

from models.weight_norm import WeightNormLinear, unit_vectors


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
        return unit_vectors(self.mlp(x))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(rows, in_dim) -> logits (rows, out_dim)."""
        return self.last_layer(self.bottleneck(x))


NORMS = {"bn": nn.BatchNorm1d, "syncbn": nn.BatchNorm1d, "csyncbn": nn.BatchNorm1d, "ln": nn.LayerNorm}
ACTIVATIONS = {"gelu": nn.GELU, "relu": nn.ReLU}


class IBOTHead(nn.Module):
    """DINO's head with prototypes for class tokens (``last_layer``) and for patches (``last_layer2``).

    With ``shared_head`` both are the same layer, saved under both names. Source: iBOT (2111.07832), section 3.2.

    parity: a single norm stands after every hidden layer, so its parameters are shared, and batch statistics move
    twice in a forward pass. The three kinds of batch norm are one: iBOT converts each of them to a batch norm over all
    processes before it trains. ``bottleneck_dim`` 0 has no bottleneck: linear layers give the logits.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        patch_out_dim: int | None = None,
        shared_head: bool = True,
        norm: str | None = None,
        act: str = "gelu",
        norm_last_layer: bool = True,
        nlayers: int = 3,
        hidden_dim: int = 2048,
        bottleneck_dim: int = 256,
    ):
        super().__init__()
        layers: list[nn.Module] = []
        after = [NORMS[norm](hidden_dim)] if norm else []
        for width_in in [in_dim] + [hidden_dim] * (nlayers - 2):
            layers += [nn.Linear(width_in, hidden_dim), *after, ACTIVATIONS[act]()]
        self.mlp = nn.Sequential(*layers, nn.Linear(hidden_dim, bottleneck_dim or out_dim))
        self.has_batch_norm = any(isinstance(module, nn.BatchNorm1d) for module in after)
        patch_out_dim = out_dim if shared_head or patch_out_dim is None else patch_out_dim
        self.last_layer = self.last_layer2 = self.mlp2 = None
        if bottleneck_dim:
            self.last_layer = WeightNormLinear(bottleneck_dim, out_dim, train_norm=not norm_last_layer)
            self.last_layer2 = self.last_layer
            if not shared_head:
                self.last_layer2 = WeightNormLinear(bottleneck_dim, patch_out_dim, train_norm=not norm_last_layer)
        else:
            self.mlp2 = self.mlp[-1] if shared_head else nn.Linear(hidden_dim, patch_out_dim)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def bottleneck(self, x: torch.Tensor) -> torch.Tensor:
        """(rows, in_dim) -> unit vectors (rows, bottleneck_dim)."""
        return unit_vectors(self.mlp(x))

    def forward(self, x: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Tokens (batch, 1 + patches, in_dim) -> logits of the class token (batch, out_dim) and of the patches
        (batch, patches, patch_out_dim); vectors (rows, in_dim) -> class logits alone.
        """
        hidden = self.mlp[:-1](x.flatten(0, -2)).unflatten(0, x.shape[:-1])
        cls, patches = (hidden, None) if x.ndim == 2 else (hidden[:, 0], hidden[:, 1:])
        if self.last_layer is None:
            return self.mlp[-1](cls) if patches is None else (self.mlp[-1](cls), self.mlp2(patches))
        cls = self.last_layer(unit_vectors(self.mlp[-1](cls)))
        return cls if patches is None else (cls, self.last_layer2(unit_vectors(self.mlp[-1](patches))))


class ContrastiveHead(nn.Module):
    """Projector, and for a student a predictor behind it, both without biases (Mugs 2203.14415, section 3.1).

    The teacher's output is the unit vector of its projection. The student's is that of its prediction, which is made
    from the unit vector of its projection, or from the projection itself without ``norm_before_pred``.

    parity: the projector starts from a truncated normal of 0.02, the predictor as ``nn.Linear`` does; ``use_bn``
    concerns the projector alone.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int = 256,
        predictor: bool = False,
        use_bn: bool = False,
        norm_before_pred: bool = True,
        nlayers: int = 3,
        hidden_dim: int = 2048,
        predictor_dim: int = 4096,
    ):
        super().__init__()
        layers: list[nn.Module] = []
        for width_in in [in_dim] + [hidden_dim] * (nlayers - 2):
            layers.append(nn.Linear(width_in, hidden_dim, bias=False))
            if use_bn:
                layers.append(nn.BatchNorm1d(hidden_dim))
            layers.append(nn.GELU())
        self.projector = nn.Sequential(*layers, nn.Linear(hidden_dim, out_dim, bias=False))
        for module in self.projector.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
        self.predictor, self.norm_before_pred = None, norm_before_pred
        if predictor:
            first, second = nn.Linear(out_dim, predictor_dim, bias=False), nn.Linear(predictor_dim, out_dim, bias=False)
            self.predictor = nn.Sequential(first, nn.GELU(), second)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(rows, in_dim) -> unit vectors (rows, out_dim)."""
        x = self.projector(x)
        if self.predictor is not None:
            x = self.predictor(unit_vectors(x) if self.norm_before_pred else x)
        return unit_vectors(x)
