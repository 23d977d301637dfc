"""Numbers of a manifest that cannot be set here: the product has them fixed, and has to have the same."""

from collections.abc import Iterator

import torch
import torch.nn as nn

from training.optim import build_optimizer

EXACT = (0.0, 0.0)
NORMS = {
    "layernorm_eps": (nn.LayerNorm, "eps"),
    "norm_eps": (nn.LayerNorm, "eps"),
    "bn_eps": (nn.modules.batchnorm._BatchNorm, "eps"),
    "bn_momentum": (nn.modules.batchnorm._BatchNorm, "momentum"),
}


def constants_of_norms(p: dict, network: nn.Module) -> Iterator[tuple]:
    for name, (kind, attribute) in NORMS.items():
        found = {getattr(module, attribute) for module in network.modules() if isinstance(module, kind)}
        if name in p and found:
            yield name, sorted(found), [p[name]], EXACT


def constants_of_optimizers(p: dict) -> Iterator[tuple]:
    """``adamw: {betas, eps}``, ``lars: {momentum, eta}``, ``sgd_momentum``; nothing may be drawn (``drop_path``)."""
    for name in ("adamw", "sgd", "lars"):
        said = p.get(name) or {"momentum": p.get(f"{name}_momentum")}
        (group,) = build_optimizer(name, [{"params": [nn.Parameter(torch.zeros(1))]}]).param_groups
        for key, value in said.items():
            if value is not None:
                yield f"{name}, {key}", group[key], value, EXACT
    if "drop_path" in p:
        yield "drop_path", p["drop_path"], 0.0, EXACT
