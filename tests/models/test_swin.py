"""Our form of a Swin transformer against that of the papers: padded, rolled, cut into windows, head by head."""

import copy
import functools

import numpy as np
import pytest
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F

from methods.base import Clock
from models import SWIN, build_backbone
from models.swin import DEFAULT_DROP_PATH, SwinTransformer, shift_mask
from utils import UsageError

SIZES = {"embed_dim": 8, "depths": (2, 2, 2, 1), "num_heads": (1, 2, 2, 4), "mlp_ratio": 2}
SMALL = {"img_size": 32, "embed_dim": 8, "depths": (2, 2), "num_heads": (2, 4), "window_size": 4, "mlp_ratio": 2}


def swin(**kwargs) -> SwinTransformer:
    model = SwinTransformer(**kwargs)
    for name, parameter in model.named_parameters():  # large enough for attention to matter
        nn.init.normal_(parameter, mean=float("norm" in name and name.endswith("weight")), std=0.4)
    return model


def textbook(model, images, masks=None, draws=None, changed=()):
    """Tokens (batch, tokens, dim) of one size. ``changed``: mistakes to make on purpose."""
    x = model.patch_embed.proj(images).permute(0, 2, 3, 1)
    x = F.layer_norm(x, x.shape[-1:], model.patch_embed.norm.weight, model.patch_embed.norm.bias, 1e-6)
    if masks is not None:
        cells = model.mask_unit // model.patch_size
        for b, i, j in np.ndindex(*x.shape[:3]):
            if masks[b, i // cells, j // cells]:
                x = x.index_put((torch.tensor(b), torch.tensor(i), torch.tensor(j)), model.masked_embed[0])
    index = 0
    for layer in model.layers:
        for block in layer.blocks:
            for branch, run in enumerate((window_attention, lambda b, y, _: b.mlp(b.norm2(y)))):
                y = run(block, x, changed)
                if draws is not None:
                    kept = torch.from_numpy(draws[index, branch] >= block.drop_path)[:, None, None, None]
                    y = y * kept / (1 - block.drop_path)
                x = x + y
            index += 1
        if layer.downsample is not None:
            x = F.pad(x, (0, 0, 0, x.shape[2] % 2, 0, x.shape[1] % 2))
            x = torch.cat((x[:, ::2, ::2], x[:, 1::2, ::2], x[:, ::2, 1::2], x[:, 1::2, 1::2]), dim=-1)
            x = layer.downsample.reduction(layer.downsample.norm(x))
    return model.norm(x).flatten(1, 2)


def window_attention(block, x, changed):
    attn, (batch, side, _, dim) = block.attn, x.shape
    window, shift, head = attn.window, attn.shift, dim // attn.num_heads
    x = block.norm1(x)
    padded = -(-side // window) * window
    if "shift before padding" in changed:
        x = x.roll((-shift, -shift), (1, 2))
    x = F.pad(x, (0, 0, 0, padded - side, 0, padded - side))
    if "shift before padding" not in changed:
        x = x.roll((-shift, -shift), (1, 2))
    out = torch.zeros_like(x)

    def region(position):
        return 0 if position < padded - window else 1 if position < padded - shift else 2

    for top in range(0, padded, window):
        for left in range(0, padded, window):
            places = [(top + i, left + j) for i in range(window) for j in range(window)]
            rows = x[:, top : top + window, left : left + window].flatten(1, 2)
            q, k, v = attn.qkv(rows).split(dim, dim=-1)
            heads = []
            for number in range(attn.num_heads):
                part = slice(number * head, (number + 1) * head)
                logits = q[..., part] @ k[..., part].transpose(1, 2) / head**0.5
                entries = [
                    [(a - c + window - 1) * (2 * window - 1) + b - d + window - 1 for c, d in places] for a, b in places
                ]
                logits = logits + attn.relative_position_bias_table[:, number][torch.tensor(entries)]
                if shift:
                    labels = torch.tensor([3 * region(a) + region(b) for a, b in places])
                    logits = logits - 100.0 * (labels[:, None] != labels[None])
                heads.append(logits.softmax(-1) @ v[..., part])
            out[:, top : top + window, left : left + window] = torch.cat(heads, -1).view(batch, window, window, dim)
    if "shift before padding" in changed:
        return attn.proj(out[:, :side, :side].roll((shift, shift), (1, 2)))
    return attn.proj(out.roll((shift, shift), (1, 2))[:, :side, :side])


def gradients(model, output):
    model.zero_grad()
    (output * torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)).sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def same(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-11)


# ---- the network ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [7, 14])
@pytest.mark.parametrize("size", [96, 100])
def test_padded_and_shifted_windows_equal_the_textbook_network(window, size, double):
    model = swin(**SIZES, window_size=window)
    images = torch.randn(1, 3, size, size)
    expected = textbook(model, images)
    features = model.forward_features(images)
    same(features[:, 1:], expected)
    same(features[:, 0], expected.mean(dim=1))
    same(model(images), expected.mean(dim=1))
    same(gradients(model, model(images)), gradients(model, expected.mean(dim=1)))
    assert (textbook(model, images, changed=("shift before padding",)) - expected).abs().max() > 1e-3


@pytest.mark.parametrize("size", [32, 20, 12, 4])
def test_small_maps_down_to_one_patch_equal_the_textbook_network(size, double):
    model = swin(**SMALL)
    images = torch.randn(2, 3, size, size)
    same(model.forward_features(images)[:, 1:], textbook(model, images))
    same(gradients(model, model(images)), gradients(model, textbook(model, images).mean(dim=1)))


@pytest.mark.parametrize("window", [7, 14])
def test_at_its_own_size_it_equals_timms(window):
    norm = functools.partial(nn.LayerNorm, eps=1e-6)
    theirs = timm.create_model("swin_tiny_patch4_window7_224", num_classes=0, window_size=window, norm_layer=norm)
    ours = build_backbone("swin_tiny", window_size=window).eval()
    state = {}
    for name, tensor in ours.state_dict().items():
        stage = name.split(".")[1]
        renamed = (
            name.replace(f"layers.{stage}.downsample", f"layers.{1 + int(stage)}.downsample")
            if "downs" in name
            else name
        )
        if "position_index" not in name:
            state[renamed] = tensor
    theirs.load_state_dict(state)
    images = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        torch.testing.assert_close(ours(images), theirs.eval()(images), rtol=1e-4, atol=1e-4)


def test_window_and_shift_are_those_of_the_construction_size():
    def built(**kwargs):
        layers = SwinTransformer(embed_dim=4, depths=(2, 2, 2, 2), num_heads=(1, 1, 1, 1), **kwargs).layers
        return [(layer.blocks[1].attn.window, layer.blocks[1].attn.shift) for layer in layers]

    assert built() == [(7, 3), (7, 3), (7, 3), (7, 0)]
    assert built(window_size=14) == [(14, 7), (14, 7), (14, 0), (7, 0)]
    assert built(window_size=4, img_size=56) == [(4, 2), (4, 2), (3, 0), (1, 0)]


def test_the_mask_of_a_single_window_still_separates_its_ends():
    (mask,) = shift_mask(4, 4, 2)
    assert sorted(mask.unique().tolist()) == [-100.0, 0.0]
    assert mask[0, 1] == 0 and mask[0, 2] == -100 and mask[0, 8] == -100


@pytest.mark.parametrize(
    ("arch", "window", "parameters"),
    [
        ("swin_tiny", 7, 27_519_354),
        ("swin_tiny", 14, 27_569_754),
        ("swin_small", 7, 48_837_258),
        ("swin_base", 7, 86_743_224),
        ("swin_large", 7, 194_995_476),
    ],
)
def test_parameters_are_as_many_as_published(arch, window, parameters, monkeypatch):
    monkeypatch.setattr(SwinTransformer, "_init_weights", lambda self: None)
    model = build_backbone(arch, 4, window_size=window)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert model.embed_dim == {"swin_base": 1024, "swin_large": 1536}.get(arch, 768)
    assert (model.mask_unit, model.num_prefix_tokens, model.depth) == (32, 1, 12 if arch == "swin_tiny" else 24)
    assert len(model.blocks) == model.depth and not hasattr(model, "get_last_selfattention")


def test_every_architecture_has_the_drop_path_it_was_published_with():
    assert list(DEFAULT_DROP_PATH) == list(SWIN.networks)


# ---- masks ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [32, 20, 36])
def test_masked_cells_equal_the_textbook_network(size, double):
    model = swin(**SMALL, masked_im_modeling=True)
    cells = -(-size // 8)
    images, masks = torch.randn(2, 3, size, size), torch.rand(2, cells, cells) < 0.5
    tokens = model.forward_features(images, masks)
    same(tokens[:, 1:], textbook(model, images, masks))
    found = gradients(model, tokens[:, 1:])
    same(found, gradients(model, textbook(model, images, masks)))
    assert found["masked_embed"].abs().sum() > 0
    same(model.forward_features(images, torch.zeros_like(masks)), model.forward_features(images))


@pytest.mark.parametrize("local_sizes", [(), (16, 16), (32,), (16, 24, 24)])
@pytest.mark.parametrize("with_masks", [True, False])
def test_forward_masked_equals_forward_features_crop_by_crop(local_sizes, with_masks, double):
    model = swin(**SMALL, masked_im_modeling=True, drop_path_rate=0.5)
    globals_ = [torch.randn(3, 3, 32, 32) for _ in range(2)]
    locals_ = [torch.randn(3, 3, size, size) for size in local_sizes]
    masks = torch.rand(6, 4, 4) < 0.4 if with_masks else None
    masked = torch.tensor([0, 3, 17, 50, 95])
    draws = Clock(0, 3).drop_path_draws(model.depth, 2 + len(locals_), 3)
    means, tokens = model.forward_masked(globals_, locals_, masks, masked, draws)
    apart = [
        model.forward_features(
            crop, masks[3 * i : 3 * i + 3] if with_masks and i < 2 else None, draws[..., 3 * i : 3 * i + 3]
        )
        for i, crop in enumerate([*globals_, *locals_])
    ]
    same(means, torch.cat([features[:, 0] for features in apart]))
    same(tokens, torch.cat([features[:, 1:] for features in apart[:2]]).flatten(0, 1)[masked])


# ---- several crops, stochastic depth, recomputation -----------------------------------------------------------------


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("rate", [0.3, 0.95])
def test_crops_of_several_sizes_with_stochastic_depth_equal_the_textbook_network(skip, rate, double):
    model = swin(**SMALL, drop_path_rate=rate)
    model.skip_dropped = skip
    crops = [torch.randn(3, 3, size, size) for size in (32, 20, 20, 32)]
    draws = Clock(0, 5, seed=1).drop_path_draws(model.depth, 4, 3)
    together = model.forward_crops(crops, draws)
    apart = [textbook(model, crop, draws=draws[..., 3 * i : 3 * i + 3]).mean(dim=1) for i, crop in enumerate(crops)]
    same(together, torch.cat(apart))
    same(gradients(model, together), gradients(model, torch.cat(apart)))


def test_everything_dropped_leaves_the_gradient_zero_not_none(double):
    model = swin(**SMALL, drop_path_rate=0.5)
    model.blocks[0].drop_path = 0.5
    output = model.forward_crops([torch.randn(2, 3, 20, 20)], np.zeros((4, 2, 2)))
    found = gradients(model, output)
    assert set(found) == {name for name, _ in model.named_parameters()}
    assert not found["layers.0.blocks.0.attn.qkv.weight"].any()


def test_recomputed_activations_give_the_same_gradients(double):
    model = swin(**SMALL, drop_path_rate=0.5)
    crops = [torch.randn(3, 3, 32, 32), torch.randn(3, 3, 16, 16)]
    draws = Clock(0, 1).drop_path_draws(4, 2, 3)
    stored = gradients(model, model.forward_crops(crops, draws))
    model.grad_checkpointing = True
    torch.testing.assert_close(gradients(model, model.forward_crops(crops, draws)), stored)


# ---- looking inside, precision, copies ------------------------------------------------------------------------------


def test_intermediate_layers_end_with_the_features_and_begin_without_norm(double):
    model = swin(**SMALL)
    images = torch.randn(2, 3, 20, 20)
    layers = model.get_intermediate_layers(images, 3)
    assert [tuple(layer.shape) for layer in layers] == [(2, 26, 8), (2, 10, 16), (2, 10, 16)]
    same(layers[-1], model.forward_features(images))
    for layer in layers:
        same(layer[:, 0], layer[:, 1:].mean(dim=1))


def test_attention_of_the_last_block_has_a_row_per_window_and_sums_to_one(double):
    weights = swin(**SMALL).window_attention(torch.randn(3, 3, 40, 40))
    assert weights.shape == (3 * 4, 4, 16, 16)
    same(weights.sum(dim=-1), torch.ones(12, 4, 16))


def test_float32_and_half_precision_are_close_to_float64():
    model = swin(**SMALL)
    images = torch.randn(2, 3, 20, 20)
    exact = copy.deepcopy(model).double()(images.double())
    torch.testing.assert_close(model(images).double(), exact, rtol=1e-4, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        half = model(images)
    torch.testing.assert_close(half.double(), exact, rtol=0.1, atol=0.1)


def test_one_network_can_change_its_precision_after_use():
    model = swin(**SMALL)
    model(torch.randn(1, 3, 20, 20))
    images = torch.randn(1, 3, 20, 20, dtype=torch.float64)
    assert model.double()(images).dtype == torch.float64
    assert torch.equal(copy.deepcopy(model)(images), model(images))


# ---- refusals -------------------------------------------------------------------------------------------------------


def test_what_it_cannot_take_is_refused():
    model = SwinTransformer(**SMALL, masked_im_modeling=True)
    with pytest.raises(ValueError, match=r"32 x 36 pixels: .* square"):
        model(torch.randn(1, 3, 32, 36))
    with pytest.raises(ValueError, match="smaller than one patch"):
        model(torch.randn(1, 3, 3, 3))
    with pytest.raises(ValueError, match=r"masks of shape \(1, 8, 8\), expected \(1, 4, 4\)"):
        model.forward_features(torch.randn(1, 3, 32, 32), torch.zeros(1, 8, 8, dtype=torch.bool))
    with pytest.raises(ValueError, match="masked_im_modeling"):
        SwinTransformer(**SMALL).forward_features(torch.randn(1, 3, 32, 32), torch.zeros(1, 4, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match="window_size 0"):
        SwinTransformer(**SMALL | {"window_size": 0})
    with pytest.raises(UsageError, match="--patch_size 16: Swin's patches are 4 pixels; pass --patch_size 4"):
        build_backbone("swin_tiny", 16)
