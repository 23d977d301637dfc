"""The projection head of a checkpoint, read from its tensors: which prototype is an image's?

Heads of DINO, iBOT, AttMask and EsViT: linear layers (perhaps with norms) with activations between, unit vectors, and
prototypes. What a file does not hold (its activation, where no argument was recorded) is GELU, as theirs.
"""

import itertools
import re
from collections.abc import Mapping

import torch
import torch.nn.functional as F

from models.reading import Info
from utils import UsageError

ACTIVATIONS = {"gelu": F.gelu, "relu": F.relu}
_LAYER = re.compile(r"head\.mlp(?:\.(\d+))?\.(\w+)")


class Prototypes(torch.nn.Module):
    """Tokens (..., dim) -> logits (..., prototypes). Raises UsageError where ``state`` holds no such head.

    ``patches``: with the prototypes of patch tokens, where these have their own (iBOT).
    """

    def __init__(self, state: Mapping[str, torch.Tensor], info: Info, patches: bool = False):
        super().__init__()
        layers: dict[int, dict[str, torch.Tensor]] = {}
        for name, tensor in state.items():
            if match := _LAYER.fullmatch(name):
                layers.setdefault(int(match[1] or 0), {})[match[2]] = tensor.float()
        self.layers = [layers[number] for number in sorted(layers)]
        own = patches and any(name.startswith("head.last_layer2.") for name in state)
        self.last = _prototypes(state, "last_layer2" if own else "last_layer")
        linear = [layer["weight"].shape for layer in self.layers if layer.get("weight", torch.empty(0)).ndim == 2]
        widths = [*linear, *([self.last.shape] if self.last is not None else [])]
        if not linear or any(a[0] != b[1] for a, b in itertools.pairwise(widths)):
            raise UsageError(f"{info.path}: holds no projection head with prototypes; pass --assign kmeans")
        self.in_dim, self.prototypes = widths[0][1], widths[-1][0]
        self.activation = ACTIVATIONS.get(str(info.arguments.get("act_in_head", "gelu")).lower(), F.gelu)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for number, layer in enumerate(self.layers):
            layer = {name: tensor.to(x.device) for name, tensor in layer.items()}
            if layer["weight"].ndim == 2:
                x = F.linear(x, layer["weight"], layer.get("bias"))
            elif "running_mean" in layer:
                statistics = [layer[name] for name in ("running_mean", "running_var", "weight", "bias")]
                x = F.batch_norm(x.flatten(0, -2), *statistics).view_as(x)
            else:
                x = F.layer_norm(x, x.shape[-1:], layer["weight"], layer["bias"])
            following = self.layers[number + 1 : number + 2]
            if following and following[0]["weight"].ndim == 2:
                x = self.activation(x)
        return x if self.last is None else F.normalize(x, dim=-1) @ self.last.to(x.device).T


def _prototypes(state: Mapping[str, torch.Tensor], layer: str) -> torch.Tensor | None:
    """Rows (prototypes, dim) of the last layer, by any of the names that weight norms have."""
    for norms, rows in (
        ("weight_g", "weight_v"),
        ("parametrizations.weight.original0", "parametrizations.weight.original1"),
    ):
        norms, rows = (state.get(f"head.{layer}.{name}") for name in (norms, rows))
        if norms is not None and rows is not None:
            return F.normalize(rows.float(), dim=1) * norms.float().view(-1, 1)
    weight = state.get(f"head.{layer}.weight")
    return None if weight is None else weight.float()
