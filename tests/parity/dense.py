"""Runners: what detectors and segmenters see of a vision transformer."""

import math
import re
from collections.abc import Iterator

import torch
import torch.nn as nn

from models.dense import DenseBackbone, decayed_group, lay_out
from models.layouts.names import State
from models.vit import VisionTransformer
from tests.parity import Case
from tests.parity.tolerance import EXACT, Tolerance


def built(case: Case, state: State, grid: tuple[int, int], blocks: list[int], norm: bool) -> DenseBackbone:
    """The adapter around a network with these positions, class tokens or none, filled with ``state``."""
    p, (dim, _, patch, _) = case.params, state["patch_embed.proj.weight"].shape
    state = {"norm.weight": torch.ones(dim), "norm.bias": torch.zeros(dim)} | state
    shape = {"patch_size": patch, "embed_dim": dim, "img_size": patch, "depth": p["depth"]}
    heads, classes = p.get("num_heads", p.get("heads")), state["cls_token"].shape[1] if "cls_token" in state else 0
    network = VisionTransformer(**shape, num_heads=heads, num_class_tokens=classes, norm_eps=p.get("ln_eps", 1e-6))
    network.pos_embed = nn.Parameter(state["pos_embed"])
    network.grid = grid
    model = DenseBackbone(network, blocks, norm).to(case.dtype).eval()
    fpn = re.compile(r"fpn\d\.")
    model.load_state_dict({n if fpn.match(n) else f"network.{n}": tensor for n, tensor in state.items()})
    return model


@torch.no_grad()
def mugs(case: Case) -> Iterator[tuple]:
    p = case.params
    prefix = "sd.det."
    state = {name.removeprefix(prefix): case.tensor(name) for name in case.names(prefix)}
    grid = tuple(side // p["patch_size"] for side in p["img_size"])
    for norm in (True, False):
        model = built(case, state, grid, p["out_indices"], norm)
        for name in case.names("in.x"):
            label, images = f"out.{name.removeprefix('in.')}.norm{int(norm)}", case.tensor(name)
            computed = {"map": model.network.patch_maps(images, p["out_indices"], norm), "pyr": model(images)}
            for output in case.names(f"{label}."):
                kind, level = re.fullmatch(r"(map|pyr)(\d)", output.removeprefix(f"{label}.")).groups()
                yield output, computed[kind][int(level)], case.arrays[output]
    network = model.network
    for learnt in case.names("in.pos_ckpt"):
        positions = case.tensor(learnt)
        side = math.isqrt(positions.shape[1] - network.num_class_tokens)
        network.pos_embed, network.grid = nn.Parameter(positions), (side, side)
        lay_out(network, *grid)
        yield "out.pos_resized", network.pos_embed, case.arrays["out.pos_resized"]
    decay = p.get("layer_decay", {"table": []})
    for row in decay["table"]:
        vector = len(state.get(row["name"].removeprefix("backbone."), torch.zeros(2, 2)).shape) == 1
        vector |= "norm" in row["name"]
        layer, scale, decays = decayed_group(row["name"], vector, decay["num_layers"], decay["rate"])
        yield f"params layer of {row['name']}", (layer, decays), (row["layer_id"], row["weight_decayed"]), EXACT
        yield f"params lr_scale of {row['name']}", scale, row["lr_scale"], Tolerance(rtol=1e-12)


@torch.no_grad()
def udi(case: Case) -> Iterator[tuple]:
    p = case.params
    side = p["img"] // p["patch"]
    model = built(case, case.state("sd"), (side, side), p["out"], norm=False)
    for name, size in p["sizes"].items():
        images = case.tensor(f"x_{name}")
        yield f"params {name}", list(images.shape[-2:]), size, EXACT
        for level, found in enumerate(model(images)):
            output = f"level{level}_{name}"
            yield output, found, case.arrays[output]


RUNNERS = {"mugs/dense_backbone": mugs, "udi/dense_backbone": udi}
