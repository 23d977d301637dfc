"""Our form of Vision Longformer against that of the paper: all pairs of tokens, and a mask, head by head."""

import copy
import functools
import math

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from evaluation.features import Feature
from methods.base import Clock
from models import VIL, build_backbone
from models.layouts.stages import VIL_OF_DEPTHS
from models.sparse_attention import SparseAttention
from models.vil import DEPTHS, VisionLongformer, architecture_string, parse_architecture, stages_of

TEXT = "l1,h2,d8,n2,s1,g1,p2,f3,a0_l2,h3,d6,n1,s1,g2,p2,f2,a0_l3,h1,d8,n1,s1,g0,p1,f2,a0_l4,h2,d12,n2,s0,g{},p2,f3,a0"
CHUNKS = [(-1, -1), (-1, 0), (-1, 1), (0, -1), (0, 1), (1, -1), (1, 0), (1, 1)]  # of mode 1: row and column


def vil(last_globals=0, **kwargs) -> VisionLongformer:
    model = VisionLongformer(parse_architecture(TEXT.format(last_globals)), img_size=48, **kwargs)
    for name, parameter in model.named_parameters():  # large enough for attention to matter
        nn.init.normal_(parameter, mean=float("norm" in name and name.endswith("weight")), std=0.4)
    return model


def textbook(model, images, neighbours=(), draws=None):
    """[global tokens | tokens] of the last stage, normalised (batch, tokens, dim)."""
    x, neighbours, index = images, list(neighbours), 0
    for stage, layer in zip(model.architecture, model.layers, strict=True):
        embed = layer[0]
        x = F.conv2d(x, embed.proj.weight, embed.proj.bias, stride=stage.patch)
        size = x.shape[2:]
        x = layer_norm(embed.norm_embed, x.flatten(2).transpose(1, 2))
        if stage.global_tokens:
            x = torch.cat((embed.cls_token.expand(len(x), -1, -1), x), dim=1)
        for attention, mlp in zip(layer[1::2], layer[2::2], strict=True):
            drawn = neighbours.pop(0) if neighbours and stage.sparse else None
            for branch, part in enumerate((attention, mlp)):
                y = layer_norm(part.norm, x)
                y = attend_to_all(attention.attn, stage, y, size, drawn) if branch == 0 else part.mlp(y)
                if draws is not None:
                    y = (
                        y
                        * torch.from_numpy(draws[index, branch] >= part.drop_path)[:, None, None]
                        / (1 - part.drop_path)
                    )
                x = x + y
            index += 1
        if layer is not model.layers[-1]:
            x = x[:, stage.global_tokens :].transpose(1, 2).unflatten(2, size)
    return layer_norm(model.norm, x)


def layer_norm(norm, x):
    return F.layer_norm(x, x.shape[-1:], norm.weight, norm.bias, 1e-6)


def attend_to_all(attn, stage, x, size, drawn):
    g, head = stage.global_tokens, stage.dim // stage.num_heads
    if stage.sparse:
        q, (k, v) = attn.query(x), attn.kv(x).chunk(2, dim=-1)
    else:
        q, k, v = attn.qkv(x).chunk(3, dim=-1)
    heads = []
    for h in range(stage.num_heads):
        part = slice(h * head, (h + 1) * head)
        logits = q[..., part] @ k[..., part].transpose(1, 2) / head**0.5
        local = pair_bias(attn, stage, size, h, drawn)
        bias = F.pad(local, (g, 0, g, 0))
        if g:
            bias[:g, :g] = attn.g2g_relative_position_bias[h]
            bias[:g, g:] = attn.g2l_relative_position_bias[0, h][:, None]
            bias[g:, :g] = attn.g2l_relative_position_bias[1, h]
        heads.append((logits + bias).softmax(dim=-1) @ v[..., part])
    return attn.proj(torch.cat(heads, dim=-1))


def pair_bias(attn, stage, size, h, drawn):
    """Of one head: (tokens, tokens), minus infinity where a token does not attend to another."""
    table = attn.local_relative_position_bias_table[:, h]
    if not stage.sparse:
        side = attn.side
        built = list(np.ndindex(side, side))
        rows = [[(a - c + side - 1) * (2 * side - 1) + b - d + side - 1 for c, d in built] for a, b in built]
        matrix = table[torch.tensor(rows)][None, None]
        return (
            F.interpolate(matrix, size=(math.prod(size),) * 2, mode="bicubic")[0, 0]
            if size != (side, side)
            else matrix[0, 0]
        )
    rows = pairs(size, stage.window, attn.mode, drawn)
    return torch.cat((table, table.new_full((1,), -torch.inf)))[rows]


@functools.cache
def pairs(size, w, mode, drawn):
    """Row of the table for every pair of tokens; that behind the last where one does not attend to the other."""

    def row(a, b, c, d):
        offset = c // w - a // w, d // w - b // w
        if mode < 0:
            seen = offset == (0, 0)
        elif drawn is not None:
            seen = offset in ((0, 0), CHUNKS[drawn - 1])
        else:
            seen = max(map(abs, offset)) <= 1
        return (a - c + 2 * w - 1) * (4 * w - 1) + b - d + 2 * w - 1 if seen else (4 * w - 1) ** 2

    places = list(np.ndindex(*size))
    return torch.tensor([[row(a, b, c, d) for c, d in places] for a, b in places])


def gradients(model, output):
    model.zero_grad()
    (output * torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)).sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def same(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-11)


# ---- the network ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cheaper", [None, False, True], ids=["as it likes", "by chunks", "whole maps"])
@pytest.mark.parametrize(("mode", "height", "width"), [(0, 48, 48), (0, 36, 26), (-1, 26, 36), (1, 26, 36), (0, 9, 8)])
def test_every_mode_and_size_equals_the_textbook_network(mode, height, width, cheaper, double, monkeypatch):
    if cheaper is not None:
        monkeypatch.setattr(SparseAttention, "_map_is_cheaper", lambda *sizes: cheaper)
    model = vil(mode=mode)
    images = torch.randn(1, 3, height, width)
    neighbours = np.array([[2, 8, 3, 5]]) if mode == 1 else None
    assert model.attention_calls == (4 if mode == 1 else 0)
    pooled, (tokens,) = model.forward_regions([images], neighbours=neighbours)
    expected = textbook(model, images, () if neighbours is None else neighbours[0].tolist())
    same(tokens, expected)
    same(pooled, expected.mean(dim=1))
    same(gradients(model, pooled), gradients(model, expected.mean(dim=1)))
    if mode == 1:
        same(model.eval().forward_features(images)[:, 1:], textbook(model, images))  # all chunks when evaluated


def test_each_of_the_eight_neighbours_is_the_one_of_its_number(double):
    model = vil(mode=1)
    images = torch.randn(1, 3, 14, 14)
    for number in range(1, 9):
        drawn = [number] * 4
        _, (tokens,) = model.forward_regions([images], neighbours=np.array([drawn]))
        same(tokens, textbook(model, images, drawn))


def test_neighbours_are_asked_for_in_training_alone_and_have_to_be_as_many(double):
    images = torch.randn(1, 3, 16, 16)
    model = vil(mode=1)
    for wrong in (None, np.ones((1, 3), dtype=int), np.full((1, 4), 9), np.zeros((1, 4), dtype=int)):
        with pytest.raises(ValueError, match="mode 1 wants 4 of every size, from 1 to 8"):
            model.forward_regions([images], neighbours=wrong)
    model.eval()(images)
    assert vil().attention_calls == 0


def test_several_global_tokens_in_the_last_stage_are_pooled_by_the_first(double):
    model = vil(last_globals=2)
    images = torch.randn(2, 3, 36, 36)
    pooled, (tokens,) = model.forward_regions([images])
    expected = textbook(model, images)
    same(pooled, expected[:, 0])
    same(tokens, expected[:, 2:])
    same(model(images), pooled)
    same(model.forward_features(images), torch.cat((pooled[:, None], tokens), dim=1))


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("rate", [0.3, 0.95])
def test_crops_of_several_sizes_with_stochastic_depth_equal_the_textbook_network(skip, rate, double):
    model = vil(drop_path_rate=rate, mode=1)
    model.skip_dropped = skip
    crops = [torch.randn(3, 3, size, size) for size in (32, 20, 20)]
    draws, neighbours = Clock(0, 5, seed=1).drop_path_draws(model.depth, 3, 3), np.array([[1, 2, 3, 4], [5, 6, 7, 8]])
    pooled, tokens = model.forward_regions(crops, draws, neighbours)
    drawn = [neighbours[0], neighbours[1], neighbours[1]]
    apart = [textbook(model, crop, drawn[i].tolist(), draws[..., 3 * i : 3 * i + 3]) for i, crop in enumerate(crops)]
    same(pooled, torch.cat([x.mean(dim=1) for x in apart]))
    same(tokens[0], apart[0])
    same(tokens[1], torch.cat(apart[1:]))
    same(model.forward_crops(crops, draws, neighbours), pooled)
    same(gradients(model, pooled), gradients(model, torch.cat([x.mean(dim=1) for x in apart])))


def test_everything_dropped_leaves_the_gradient_zero_not_none(double):
    model = vil(drop_path_rate=0.5)
    found = gradients(model, model.forward_crops([torch.randn(2, 3, 20, 20)], np.zeros((model.depth, 2, 2))))
    # global tokens end with their stage: what the last attention gives them is read by nobody
    assert {name for name, _ in model.named_parameters()} == set(found)


def test_recomputed_activations_give_the_same_gradients(double):
    model = vil(drop_path_rate=0.5)
    crops, draws = [torch.randn(3, 3, 32, 32), torch.randn(3, 3, 16, 16)], Clock(0, 1).drop_path_draws(6, 2, 3)
    stored = gradients(model, model.forward_crops(crops, draws))
    model.grad_checkpointing = True
    torch.testing.assert_close(gradients(model, model.forward_crops(crops, draws)), stored)


# ---- looking inside, precision, copies ------------------------------------------------------------------------------


def test_a_stage_with_a_global_token_is_summed_up_by_it_and_the_last_by_its_mean(double):
    model = vil().eval()
    images = torch.randn(2, 3, 40, 40)
    layers = model.get_intermediate_layers(images, 6)
    assert [tuple(layer.shape) for layer in layers] == [
        (2, n, d) for n, d in ((401, 8), (401, 8), (101, 6), (101, 8), (26, 12), (26, 12))
    ]
    same(layers[-1], model.forward_features(images))
    same(layers[3][:, 0], layers[3][:, 1:].mean(dim=1))  # the third stage has no global token
    assert (layers[2][:, 0] - layers[2][:, 1:].mean(dim=1)).abs().max() > 1e-3
    same(Feature(6)(model, images), torch.cat([layer[:, 0] for layer in layers], dim=1))
    same(Feature(2)(model, images)[:, 12:], model(images))


def test_float32_and_half_precision_are_close_to_float64():
    model = vil().eval()
    images = torch.randn(2, 3, 36, 36)
    exact = copy.deepcopy(model).double()(images.double())
    torch.testing.assert_close(model(images).double(), exact, rtol=1e-4, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        half = model(images)
    torch.testing.assert_close(half.double(), exact, rtol=0.1, atol=0.1)
    assert copy.deepcopy(model).double()(images.double()).dtype == torch.float64


# ---- architectures --------------------------------------------------------------------------------------------------


def test_strings_and_stages_are_the_same_networks():
    published = (
        "l1,h3,d96,n2,s1,g1,p4,f7,a0_l2,h6,d192,n2,s1,g1,p2,f7,a0_l3,h12,d384,n6,s0,g1,p2,f7,a0_"
        "l4,h24,d768,n2,s0,g0,p2,f7,a0"
    )
    assert (
        parse_architecture(published) == stages_of("vil_2262")
        and architecture_string(stages_of("vil_2262")) == published
    )
    assert [stage.sparse for stage in parse_architecture("l1,a0,s1_l2,a0,s0_l3,a0,s1")] == [True, False, False]
    first = parse_architecture("l1,a0")[0]
    assert tuple(first) == (3, 192, 1, True, 1, 2, 7)
    assert {DEPTHS[name]: name for name in VIL.networks} == VIL_OF_DEPTHS


def test_the_shapes_of_a_file_show_string_and_size():
    stages = parse_architecture(TEXT.format(1))
    shown = VIL.shapes(VisionLongformer(stages, img_size=48).state_dict())
    again = parse_architecture(shown["vil_arch"])
    assert shown["img_size"] == 48 and [s._replace(window=0) for s in again] == [s._replace(window=0) for s in stages]
    assert [stage.window for stage in again[:3]] == [3, 2, 2]  # a full attention has no window
    model = build_backbone("vil_2262", vil_arch=shown["vil_arch"], img_size=48)
    model.load_state_dict(VisionLongformer(stages, img_size=48).state_dict())


def test_a_size_that_leaves_no_token_is_refused():
    with pytest.raises(ValueError, match="img_size 4: no token is left in stage 4"):
        VisionLongformer(parse_architecture(TEXT.format(0)), img_size=4)
