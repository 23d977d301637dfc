"""Twins of the golden cases of detection and segmentation: the same format with other numbers, in textbook form."""

import torch
import torch.nn as nn
import torch.nn.functional as F

from models.dense import DenseBackbone
from models.vit import VisionTransformer
from tests.twins import agrees, golden, random, randomise, rewrite


def plain_maps(state: dict, images: torch.Tensor, grid: tuple[int, int], heads: int, taps, norm: bool, eps: float):
    """Maps of blocks, a layer after the other; ``state`` has no class token where ``cls_token`` is missing."""
    patch, dim = state["patch_embed.proj.weight"].shape[-1], state["patch_embed.proj.weight"].shape[0]
    rows, columns = images.shape[-2] // patch, images.shape[-1] // patch
    first = int("cls_token" in state)
    x = F.conv2d(images, state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], stride=patch)
    positions = state["pos_embed"][0, first:].T.reshape(1, dim, *grid)
    if (rows, columns) != grid:
        factor = ((rows + 0.1) / grid[0], (columns + 0.1) / grid[1])
        positions = F.interpolate(positions, scale_factor=factor, mode="bicubic")
    x = (x + positions).flatten(2).transpose(1, 2)
    if first:
        classes = (state["cls_token"] + state["pos_embed"][:, :1]).expand(len(x), -1, -1)
        x = torch.cat((classes, x), dim=1)

    def normed(x, name):
        return F.layer_norm(x, (dim,), state[f"{name}.weight"], state[f"{name}.bias"], eps)

    def linear(x, name):
        return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])

    found = []
    for block in range(max(taps) + 1):
        name = f"blocks.{block}"
        q, k, v = linear(normed(x, f"{name}.norm1"), f"{name}.attn.qkv").unflatten(-1, (3, heads, -1)).permute(
            2, 0, 3, 1, 4
        )  # fmt: skip
        weights = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(dim=-1)
        x = x + linear((weights @ v).transpose(1, 2).flatten(2), f"{name}.attn.proj")
        x = x + linear(F.gelu(linear(normed(x, f"{name}.norm2"), f"{name}.mlp.fc1")), f"{name}.mlp.fc2")
        if block in taps:
            found.append((normed(x, "norm") if norm else x)[:, first:].transpose(1, 2).unflatten(2, (rows, columns)))
    return found


def plain_pyramid(state: dict, maps: list[torch.Tensor], patch: int) -> list[torch.Tensor]:
    def up(x, name):
        return F.conv_transpose2d(x, state[f"{name}.weight"], state[f"{name}.bias"], stride=2)

    if patch == 8:
        return [up(maps[0], "fpn1.0"), maps[1], F.max_pool2d(maps[2], 2), F.max_pool2d(maps[3], 4)]
    mean, var = state["fpn1.1.running_mean"], state["fpn1.1.running_var"]
    x = F.batch_norm(up(maps[0], "fpn1.0"), mean, var, state["fpn1.1.weight"], state["fpn1.1.bias"])
    return [up(F.gelu(x), "fpn1.3"), up(maps[1], "fpn2.0"), maps[2], F.max_pool2d(maps[3], 2)]


def adapter(patch: int, dim: int, depth: int, tokens: int, classes: int) -> dict[str, torch.Tensor]:
    network = VisionTransformer(patch, dim, depth, num_heads=2, img_size=patch, num_class_tokens=classes)
    network.pos_embed = nn.Parameter(torch.zeros(1, classes + tokens, dim))
    model = randomise(DenseBackbone(network, range(4)))
    state = {name.removeprefix("network."): tensor for name, tensor in model.state_dict().items()}
    if "fpn1.1.running_var" in state:
        state["fpn1.1.running_var"] = random(dim).abs() + 0.5
        state["fpn1.1.running_mean"] = random(dim, seed=4)
    return state if classes else {name: tensor for name, tensor in state.items() if name != "cls_token"}


def test_an_adapter_of_other_patches_blocks_and_grid():
    for patch, grid, taps in ((8, (4, 6), [0, 2, 3, 4]), (16, (3, 2), [1, 2, 3, 4])):
        case = golden("mugs", "dense_backbone")
        state = adapter(patch, 8, 5, grid[0] * grid[1], classes=1)
        table = [("backbone.blocks.2.attn.proj.weight", 3, 0.5**3, True), ("neck.bias", 6, 1.0, False)]
        rows = [dict(zip(("name", "layer_id", "lr_scale", "weight_decayed"), row, strict=True)) for row in table]
        p = {"embed_dim": 8, "depth": 5, "num_heads": 2, "patch_size": patch, "img_size": [patch * n for n in grid]}
        case.params |= p | {"out_indices": taps, "layer_decay": {"num_layers": 5, "rate": 0.5, "table": rows}}
        inputs = {f"sd.det.{name}": tensor for name, tensor in state.items()}
        sizes = {"x0": grid, "x1": (grid[0] + 4, grid[1] + 3)}
        outputs = {}
        for name, (rows, columns) in sizes.items():
            images = inputs[f"in.{name}"] = random(2, 3, rows * patch, columns * patch)
            for norm in (0, 1):
                maps = plain_maps(state, images, grid, 2, taps, bool(norm), 1e-6)
                levels = plain_pyramid(state, maps, patch)
                outputs |= {f"out.{name}.norm{norm}.map{j}": x for j, x in enumerate(maps)}
                outputs |= {f"out.{name}.norm{norm}.pyr{j}": x for j, x in enumerate(levels)}
        learnt = inputs["in.pos_ckpt"] = random(1, 1 + 9, 8)
        patches = F.interpolate(learnt[:, 1:].transpose(1, 2).reshape(1, 8, 3, 3), size=grid, mode="bicubic")
        outputs["out.pos_resized"] = torch.cat((learnt[:, :1], patches.flatten(2).transpose(1, 2)), dim=1)
        agrees(rewrite(case, inputs, outputs))


def test_an_adapter_without_class_tokens_of_other_sizes():
    for patch in (8, 16):
        case = golden("udi", "dense_backbone")
        state = adapter(patch, 6, 6, 16, classes=0)
        sizes = {"native": [4 * patch, 4 * patch], "wide": [5 * patch, 7 * patch]}
        case.params |= {"img": 4 * patch, "patch": patch, "dim": 6, "depth": 6, "heads": 2, "out": [0, 1, 3, 5]}
        case.params["sizes"] = sizes
        inputs, outputs = {f"sd/{name}": tensor for name, tensor in state.items()}, {}
        for name, size in sizes.items():
            inputs[f"x_{name}"] = random(1, 3, *size)
            maps = plain_maps(state, inputs[f"x_{name}"], (4, 4), 2, [0, 1, 3, 5], False, 1e-6)
            outputs |= {f"level{j}_{name}": x for j, x in enumerate(plain_pyramid(state, maps, patch))}
        agrees(rewrite(case, inputs, outputs))
