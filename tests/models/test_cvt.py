"""Our form of CvT against that of the original: maps with channels first, window by window and head by head."""

import copy

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from methods.base import Clock
from models import CVT, build_backbone
from models import cvt as file
from models.cvt import CvT, Stage
from models.layouts.stages import CVT_OF_SHAPE

STAGES = (
    Stage(kernel=7, stride=4, padding=2, dim=4, num_heads=1, depth=1, window=3, mlp_ratio=2),
    Stage(kernel=3, stride=2, padding=1, dim=6, num_heads=3, depth=2, window=4, qkv_kernel=5, qkv_padding=2),
    Stage(kernel=3, stride=2, padding=1, dim=8, num_heads=2, depth=1, window=3, qkv_bias=False),
)


def cvt(**kwargs) -> CvT:
    model = CvT(STAGES, **kwargs)
    for name, parameter in model.named_parameters():  # large enough for attention to matter
        one = ("norm" in name or ".bn." in name) and name.endswith("weight")
        nn.init.normal_(parameter, mean=float(one), std=0.4)
    for name, buffer in model.named_buffers():
        if name.endswith(("mean", "var")):
            nn.init.uniform_(buffer, 0.5, 1.5)
    return model


def textbook(model, images, draws=None):
    """Normalised tokens of the last stage (batch, tokens, dim); batch norm as the mode of the model has it."""
    x, index = images, 0
    for embed, body in model.stages:
        x = layer_norm(
            embed.norm, F.conv2d(x, embed.proj.weight, embed.proj.bias, embed.proj.stride, embed.proj.padding)
        )
        for block in body.layers:
            for branch, run in enumerate((attention, mlp)):
                y = run(block[branch].fn, layer_norm(block[branch].norm, x))
                if draws is not None:
                    kept = torch.from_numpy(draws[index, branch] >= block.drop_path)[:, None, None, None]
                    y = y * kept / (1 - block.drop_path)
                x = x + y
            index += 1
    return layer_norm(model.norm, x).flatten(2).transpose(1, 2)


def layer_norm(norm, x):
    """Over the channels of (batch, channels, height, width)."""
    return F.layer_norm(x.permute(0, 2, 3, 1), x.shape[1:2], norm.weight, norm.bias, 1e-5).permute(0, 3, 1, 2)


def mlp(fn, x):
    first, _, second = fn.net
    y = F.conv2d(x, first.weight, first.bias)
    return F.conv2d(y * torch.sigmoid(1.702 * y), second.weight, second.bias)


def attention(fn, x):
    height, width, dim = x.shape[2], x.shape[3], x.shape[1]
    w, head = min(fn.window, height, width), dim // fn.num_heads
    x = F.pad(x, (0, -width % w, 0, -height % w))
    y = F.conv2d(x, fn.qkv.dw.weight, padding=fn.qkv.dw.padding, groups=dim)
    bn = fn.qkv.bn
    y = F.batch_norm(y, bn.running_mean.clone(), bn.running_var.clone(), bn.weight, bn.bias, bn.training)
    q, k, v = F.conv2d(y, fn.qkv.pw.weight, fn.qkv.pw.bias).split(dim, dim=1)
    out = torch.zeros_like(x)
    places = list(np.ndindex(w, w))
    for top, left, h in np.ndindex(x.shape[2] // w, x.shape[3] // w, fn.num_heads):
        at = (slice(None), slice(h * head, (h + 1) * head), slice(top * w, top * w + w), slice(left * w, left * w + w))
        rows, keys, values = (part[at].flatten(2).transpose(1, 2) for part in (q, k, v))
        logits = rows @ keys.transpose(1, 2) / dim**0.5
        if fn.rel_pos_bias_table is not None:
            entries = [[(a - c + w - 1) * (2 * w - 1) + b - d + w - 1 for c, d in places] for a, b in places]
            logits = logits + fn.rel_pos_bias_table[torch.tensor(entries), h]
        out[at] = (logits.softmax(-1) @ values).transpose(1, 2).unflatten(2, (w, w))
    return F.conv2d(out[:, :, :height, :width], fn.proj_out.weight, fn.proj_out.bias)


def gradients(model, output):
    model.zero_grad()
    (output * torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)).sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def same(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("height", "width"), [(64, 64), (28, 28), (40, 60), (8, 5)])
def test_maps_of_every_size_equal_the_textbook_network(height, width, training, double):
    model = cvt().train(training)
    images = torch.randn(2, 3, height, width)
    expected = textbook(model, images)
    pooled, (tokens,) = model.forward_regions([images])
    same(tokens, expected)
    same(pooled, expected.mean(dim=1))
    same(gradients(model, pooled), gradients(model, expected.mean(dim=1)))


def test_relative_biases_equal_the_textbook_network_and_want_maps_as_large_as_their_windows(double):
    model = cvt(rel_pos_embed=True).eval()
    images = torch.randn(2, 3, 64, 48)
    same(model.forward_features(images)[:, 1:], textbook(model, images))
    same(gradients(model, model(images)), gradients(model, textbook(model, images).mean(dim=1)))
    with pytest.raises(ValueError, match="a map of 2 tokens: the relative bias is that of windows of 3"):
        model(torch.randn(1, 3, 32, 32))


def test_windows_of_a_relative_bias_fit_from_the_smallest_side_on(monkeypatch):
    small = [s._replace(dim=2, num_heads=1, depth=1) for s in file.TINY]
    model = CvT(small, rel_pos_embed=True)
    side = file.smallest_side(windows=True)
    assert model(torch.randn(1, 3, side, side)).shape == (1, 2)
    with pytest.raises(ValueError, match="relative bias"):
        model(torch.randn(1, 3, side - 1, side - 1))
    assert CvT(small)(torch.randn(2, 3, *[file.smallest_side()] * 2)).shape == (2, 2)


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("rate", [0.3, 0.95])
def test_crops_of_several_sizes_with_stochastic_depth_equal_the_textbook_network(skip, rate, double):
    """Batch norm sees dropped samples too, and every size by itself."""
    model = cvt(drop_path_rate=rate)
    model.skip_dropped = skip
    crops = [torch.randn(3, 3, size, size) for size in (32, 20, 20)]
    draws = Clock(0, 5, seed=1).drop_path_draws(model.depth, 3, 3)
    pooled, tokens = model.forward_regions(crops, draws)
    apart = [textbook(model, crops[0], draws[..., :3]), textbook(model, torch.cat(crops[1:]), draws[..., 3:])]
    same(tokens[0], apart[0])
    same(tokens[1], apart[1])
    expected = torch.cat([x.mean(dim=1) for x in apart])
    same(pooled, expected)
    same(gradients(model, model.forward_crops(crops, draws)), gradients(model, expected))


def test_everything_dropped_leaves_the_gradient_zero_not_none(double):
    model = cvt(drop_path_rate=0.5)
    found = gradients(model, model.forward_crops([torch.randn(2, 3, 20, 20)], np.zeros((model.depth, 2, 2))))
    assert set(found) == {name for name, _ in model.named_parameters()}


def test_recomputed_activations_give_the_same_gradients_and_the_same_running_statistics(double):
    crops = [torch.randn(3, 3, 32, 32), torch.randn(3, 3, 16, 16)]
    draws, found = Clock(0, 1).drop_path_draws(4, 2, 3), []
    start = cvt(drop_path_rate=0.5)
    for recompute in (False, True):
        model = copy.deepcopy(start)
        model.grad_checkpointing = recompute
        found.append((gradients(model, model.forward_crops(crops, draws)), dict(model.named_buffers())))
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)
    assert found[0][1]["stage0.1.layers.0.0.fn.qkv.bn.num_batches_tracked"] == 2


def test_intermediate_layers_end_with_the_features_and_begin_without_norm(double):
    model = cvt().eval()
    images = torch.randn(2, 3, 40, 40)
    layers = model.get_intermediate_layers(images, 3)
    assert [tuple(layer.shape) for layer in layers] == [(2, 26, 6), (2, 26, 6), (2, 10, 8)]
    same(layers[-1], model.forward_features(images))
    for layer in layers:
        same(layer[:, 0], layer[:, 1:].mean(dim=1))


def test_float32_and_half_precision_are_close_to_float64():
    model = cvt().eval()
    images = torch.randn(2, 3, 40, 40)
    exact = copy.deepcopy(model).double()(images.double())
    torch.testing.assert_close(model(images).double(), exact, rtol=1e-4, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        half = model(images)
    torch.testing.assert_close(half.double(), exact, rtol=0.1, atol=0.1)


def test_names_are_told_from_shapes():
    for name, stages in (("cvt_tiny", file.TINY), ("cvt_small", file.SMALL)):
        assert CVT_OF_SHAPE[tuple(s.dim for s in stages), tuple(s.depth for s in stages)] == name
    assert list(CVT_OF_SHAPE.values()) == list(CVT.networks)
    assert build_backbone("cvt_tiny").embed_dim == 768
