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
    """Class tokens (batch, dim) -> logits (batch, prototypes). Raises UsageError where ``state`` holds no such head."""

    def __init__(self, state: Mapping[str, torch.Tensor], info: Info):
        super().__init__()
        layers: dict[int, dict[str, torch.Tensor]] = {}
        for name, tensor in state.items():
            if match := _LAYER.fullmatch(name):
                layers.setdefault(int(match[1] or 0), {})[match[2]] = tensor.float()
        self.layers = [layers[number] for number in sorted(layers)]
        self.last = _prototypes(state)
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
                x = F.batch_norm(x, layer["running_mean"], layer["running_var"], layer["weight"], layer["bias"])
            else:
                x = F.layer_norm(x, x.shape[-1:], layer["weight"], layer["bias"])
            following = self.layers[number + 1 : number + 2]
            if following and following[0]["weight"].ndim == 2:
                x = self.activation(x)
        return x if self.last is None else F.normalize(x, dim=-1) @ self.last.to(x.device).T


def _prototypes(state: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
    """Rows (prototypes, dim) of the last layer, by any of the names that weight norms have."""
    for norms, rows in (
        ("head.last_layer.weight_g", "head.last_layer.weight_v"),
        ("head.last_layer.parametrizations.weight.original0", "head.last_layer.parametrizations.weight.original1"),
    ):
        if norms in state and rows in state:
            return F.normalize(state[rows].float(), dim=1) * state[norms].float().view(-1, 1)
    weight = state.get("head.last_layer.weight")
    return None if weight is None else weight.float()
