import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from methods.base import Clock
from models import FAMILIES, build_backbone
from models.layouts.names import to_timm
from models.vit import Variant, VisionTransformer

SIZES = {"patch_size": 8, "img_size": 32, "embed_dim": 24, "depth": 3, "num_heads": 3}


def textbook(vit, images, draws=None):
    """The network as papers write it: one size, all tokens, explicit softmax attention, masks for dropped samples."""
    x = vit.prepare_tokens(images)
    for index, block in enumerate(vit.blocks):
        for branch, run in enumerate((lambda y, b=block: attention(b, y), lambda y, b=block: b.mlp(b.norm2(y)))):
            gamma = (block.gamma_1, block.gamma_2)[branch]
            y = run(x) if gamma is None else gamma * run(x)
            if draws is not None:
                kept = torch.from_numpy(draws[index, branch] >= block.drop_path)[:, None, None]
                y = y * kept / (1 - block.drop_path)
            x = x + y
    return vit.norm(x)


def attention(block, x):
    batch, tokens, dim = x.shape
    heads = block.attn.num_heads
    qkv = block.attn.qkv(block.norm1(x)).reshape(batch, tokens, 3, heads, dim // heads).permute(2, 0, 3, 1, 4)
    weights = (qkv[0] @ qkv[1].transpose(-2, -1) * (dim // heads) ** -0.5).softmax(dim=-1)
    return block.attn.proj((weights @ qkv[2]).transpose(1, 2).reshape(batch, tokens, dim))


def gradients(vit, output):
    vit.zero_grad()
    (output * torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)).sum().backward()
    return {name: p.grad for name, p in vit.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("options", [{}, {"init_values": 0.3}, {"num_class_tokens": 2}, {"num_registers": 3}])
def test_crops_packed_together_equal_the_textbook_network_on_each(options, double):
    vit = VisionTransformer(**SIZES, **options)
    if vit.register_tokens is not None:
        torch.nn.init.normal_(vit.register_tokens)
    crops = [torch.randn(2, 3, 32, 32), torch.randn(2, 3, 16, 24), torch.randn(2, 3, 16, 24), torch.randn(1, 3, 40, 40)]
    packed = vit.forward_crops(crops)
    classes = vit.num_class_tokens
    apart = torch.cat([textbook(vit, crop)[:, :classes] for crop in crops])
    apart = apart if classes > 1 else apart[:, 0]
    torch.testing.assert_close(packed, apart, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(gradients(vit, packed), gradients(vit, apart), rtol=1e-8, atol=1e-10)


def test_a_network_that_pools_its_patches_does_so_for_packed_crops_and_norms_nothing_else(double):
    vit = VisionTransformer(**SIZES, use_mean_pooling=True, num_registers=2, drop_path_rate=0.5)
    torch.nn.init.normal_(vit.fc_norm.weight)
    crops = [torch.randn(2, 3, 32, 32), torch.randn(3, 3, 16, 24)]
    for crop, packed in zip(crops, vit.forward_crops(crops).split([2, 3]), strict=True):
        tokens = textbook(vit, crop)
        pooled = vit.fc_norm(tokens[:, 3:].mean(dim=1))
        torch.testing.assert_close(packed, pooled, rtol=1e-10, atol=1e-12)
        expected = torch.cat((pooled[:, None], tokens[:, 1:]), dim=1)
        torch.testing.assert_close(vit.forward_features(crop), expected, rtol=1e-10, atol=1e-12)
    draws = np.random.default_rng(0).random((SIZES["depth"], 2, 5))
    apart = torch.cat([vit(crop, draws[..., part]) for crop, part in zip(crops, (slice(2), slice(2, 5)), strict=True)])
    torch.testing.assert_close(vit.forward_crops(crops, draws), apart, rtol=1e-10, atol=1e-12)


def test_intermediate_layers_without_the_norm_pass_it_to_become_those_with_it(double):
    vit, images = VisionTransformer(**SIZES), torch.randn(2, 3, 32, 32)
    for bare, normed in zip(*(vit.get_intermediate_layers(images, 2, norm) for norm in (False, True)), strict=True):
        torch.testing.assert_close(vit.norm(bare), normed)


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("rate", [0.3, 0.95])
def test_stochastic_depth_that_skips_equals_stochastic_depth_that_multiplies(skip, rate, double):
    vit = VisionTransformer(**SIZES, drop_path_rate=rate)
    vit.skip_dropped = skip
    crops = [torch.randn(4, 3, 32, 32), torch.randn(4, 3, 16, 16)]
    draws = Clock(0, 5, seed=1).drop_path_draws(3, 2, 4)
    packed = vit.forward_crops(crops, draws)
    apart = torch.cat([textbook(vit, crop, draws[..., 4 * i : 4 * i + 4])[:, 0] for i, crop in enumerate(crops)])
    torch.testing.assert_close(packed, apart, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(gradients(vit, packed), gradients(vit, apart), rtol=1e-8, atol=1e-10)


def kept_by_rank(vit, uniforms):
    """(depth, 2, batch) factors of the branches as DINOv2 drops: above a rate of 0.1 an exact number, the largest."""
    factors = (uniforms >= np.array([block.drop_path for block in vit.blocks])[:, None, None]).astype(float)
    for block, branches, draws in zip(vit.blocks, factors, uniforms, strict=True):
        branches /= 1 - block.drop_path
        if block.drop_path > 0.1:
            number = max(int(draws.shape[-1] * (1 - block.drop_path)), 1)
            branches[:] = 0.0
            np.put_along_axis(branches, np.argsort(-draws)[:, :number], draws.shape[-1] / number, axis=-1)
    return factors


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("rate", [0.05, 0.1, 0.6, 0.95])
def test_a_batch_drops_an_exact_number_of_samples_however_it_is_divided(skip, rate, double):
    """A rate of 0.1 is just above it as float32, so that the last block alone drops in that way."""
    vit, images = VisionTransformer(**SIZES, drop_path_rate=rate), torch.randn(6, 3, 32, 32)
    vit.skip_dropped = skip
    assert (vit.blocks[-1].drop_path > 0.1) == (rate >= 0.1) and vit.blocks[1].drop_path < rate
    clocks = [Clock(0, 5, seed=1, first_sample=first, global_batch=6) for first in (0, 0, 2)]
    whole, *parts = (clock.batch_draws(3, batch) for clock, batch in zip(clocks, (6, 2, 4), strict=True))
    x, factors, expected = vit.prepare_tokens(images), torch.from_numpy(kept_by_rank(vit, whole.uniforms)), []
    for block, (attn, mlp) in zip(vit.blocks, factors[..., None, None], strict=True):
        x = x + attention(block, x) * attn
        x = x + block.mlp(block.norm2(x)) * mlp
        expected.append(x)
    together = vit.forward_blocks(images, whole)
    torch.testing.assert_close(together, expected, rtol=1e-10, atol=1e-12)
    apart = [vit.forward_blocks(part, draws) for part, draws in zip(images.split([2, 4]), parts, strict=True)]
    torch.testing.assert_close([torch.cat(part) for part in zip(*apart, strict=True)], together)
    torch.testing.assert_close(
        gradients(vit, torch.stack(together)), gradients(vit, torch.stack(expected)), rtol=1e-8, atol=1e-10
    )


def test_the_tokens_of_every_block_are_those_that_the_others_stand_on(double):
    vit, images = VisionTransformer(**SIZES, num_registers=2), torch.randn(2, 3, 32, 48)
    blocks = vit.forward_blocks(images)
    assert len(blocks) == 3 and blocks[0].shape == (2, 3 + 24, 24)
    torch.testing.assert_close(vit.norm(blocks[-1]), vit.forward_features(images))
    torch.testing.assert_close(blocks[1:], vit.get_intermediate_layers(images, 2, norm=False))
    draws = Clock(0, 5, seed=1).drop_path_draws(3, 1, 2)
    vit = VisionTransformer(**SIZES, drop_path_rate=0.5)
    torch.testing.assert_close(vit.norm(vit.forward_blocks(images, draws)[-1])[:, 0], vit(images, draws))
    vit.grad_checkpointing = True
    torch.testing.assert_close(vit.norm(vit.forward_blocks(images, draws)[-1])[:, 0], vit(images, draws))


def test_everything_dropped_leaves_the_embedding(double):
    vit = VisionTransformer(**SIZES, drop_path_rate=0.5)
    vit.blocks[0].drop_path = 0.5
    images = torch.randn(2, 3, 32, 32)
    output = vit.forward_crops([images], np.zeros((3, 2, 2)))
    torch.testing.assert_close(output, vit.norm(vit.prepare_tokens(images))[:, 0])


def test_forward_features_and_intermediate_layers_agree(double):
    vit = VisionTransformer(**SIZES, num_class_tokens=2)
    images = torch.randn(2, 3, 32, 48)
    tokens = vit.forward_features(images)
    torch.testing.assert_close(tokens, textbook(vit, images))
    torch.testing.assert_close(vit.get_intermediate_layers(images, 2)[-1], tokens)
    torch.testing.assert_close(vit(images), tokens[:, :2])


def test_masked_patches_are_replaced_before_positions_are_added(double):
    vit = VisionTransformer(**SIZES, masked_im_modeling=True)
    torch.nn.init.normal_(vit.masked_embed)
    images, masks = torch.randn(2, 3, 32, 32), torch.rand(2, 4, 4) < 0.5
    tokens = vit.prepare_tokens(images, masks)[:, 1:] - vit.pos_embed[:, 1:]
    expected = vit.masked_embed.expand(int(masks.sum()), -1)
    torch.testing.assert_close(tokens[masks.flatten(1)], expected)
    untouched = vit.prepare_tokens(images)[:, 1:] - vit.pos_embed[:, 1:]
    torch.testing.assert_close(tokens[~masks.flatten(1)], untouched[~masks.flatten(1)])


def test_masks_for_a_network_without_mask_token_are_refused():
    with pytest.raises(ValueError, match="masked_im_modeling"):
        VisionTransformer(**SIZES).prepare_tokens(torch.randn(1, 3, 32, 32), torch.zeros(1, 4, 4, dtype=torch.bool))


@pytest.mark.parametrize("size", [(16, 16), (40, 56), (96, 96), (43, 49)])
def test_positions_equal_the_bicubic_resize_by_scale_factor(size, double):
    vit = VisionTransformer(**SIZES)
    rows, columns = size[0] // 8, size[1] // 8
    grid = vit.pos_embed[:, 1:].reshape(1, 4, 4, -1).permute(0, 3, 1, 2)
    resized = F.interpolate(grid, scale_factor=((rows + 0.1) / 4, (columns + 0.1) / 4), mode="bicubic")
    expected = torch.cat((vit.pos_embed[:, :1], resized.flatten(2).transpose(1, 2)), dim=1)
    torch.testing.assert_close(vit.position_embedding(*size), expected)


@pytest.mark.parametrize("size", [(16, 16), (40, 56), (96, 96), (43, 49)])
def test_positions_of_a_network_with_registers_equal_the_antialiased_resize_to_the_exact_size(size, double):
    vit = VisionTransformer(**SIZES, num_registers=1)
    grid = vit.pos_embed[:, 1:].reshape(1, 4, 4, -1).permute(0, 3, 1, 2)
    resized = F.interpolate(grid, size=(size[0] // 8, size[1] // 8), mode="bicubic", antialias=True)
    expected = torch.cat((vit.pos_embed[:, :1], resized.flatten(2).transpose(1, 2)), dim=1)
    torch.testing.assert_close(vit.position_embedding(*size), expected)


def test_a_network_with_swiglu_and_a_first_norm_equals_the_textbook_form(double):
    vit, images = VisionTransformer(**SIZES, variant=Variant(mlp="swiglu", norm_first=True)), torch.randn(2, 3, 32, 32)
    torch.nn.init.normal_(vit.norm_pre.weight)
    mlp, x = vit.blocks[0].mlp, torch.randn(5, 24)
    x1, x2 = (x @ mlp.w12.weight.t() + mlp.w12.bias).split(64, dim=-1)
    torch.testing.assert_close(mlp(x), (x1 * x1.sigmoid() * x2) @ mlp.w3.weight.t() + mlp.w3.bias)
    tokens = vit.prepare_tokens(images)
    torch.testing.assert_close((tokens / vit.norm_pre.weight).mean(dim=-1), torch.zeros(2, 17))
    torch.testing.assert_close(vit.forward_features(images), textbook(vit, images))


def test_recomputed_activations_give_the_same_gradients(double):
    vit = VisionTransformer(**SIZES, drop_path_rate=0.5)
    crops = [torch.randn(3, 3, 32, 32), torch.randn(3, 3, 16, 16)]
    draws = Clock(0, 1).drop_path_draws(3, 2, 3)
    stored = gradients(vit, vit.forward_crops(crops, draws))
    vit.grad_checkpointing = True
    torch.testing.assert_close(gradients(vit, vit.forward_crops(crops, draws)), stored)


def test_half_precision_attention_on_a_processor_is_close_to_float32():
    vit = VisionTransformer(**SIZES)
    images = torch.randn(2, 3, 32, 32)
    with torch.autocast("cpu", torch.bfloat16):
        half = vit(images)
    torch.testing.assert_close(half.float(), vit(images), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("arch", ["vit_tiny", "vit_small"])
def test_names_and_features_are_those_of_timm(arch):
    import timm

    ours = build_backbone(arch, patch_size=16).eval()
    theirs = timm.create_model(f"{arch}_patch16_224", num_classes=0).eval()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    images = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        torch.testing.assert_close(ours(images), theirs(images), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("arch", "timms", "options"),
    [
        ("vit_giant2", "vit_giant_patch14_reg4_dinov2", {"num_registers": 4, "init_values": 1.0}),
        (
            "vit_huge",
            "vit_huge_patch14_clip_quickgelu_224",
            {"variant": Variant(mlp="quick_gelu", norm_first=True), "norm_eps": 1e-5},
        ),
    ],
)
def test_the_largest_networks_are_timms_at_another_size_too(arch, timms, options):
    """Of one block; the number of blocks is compared by itself."""
    import timm

    def shallow(**arguments) -> VisionTransformer:
        return VisionTransformer(**arguments | {"depth": 1})

    ours = FAMILIES[0].networks[arch](shallow, patch_size=14, img_size=56, **options).eval()
    for parameter in ours.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    torch.nn.init.zeros_(ours.patch_embed.proj.bias)
    theirs = timm.create_model(timms, num_classes=0, depth=1, img_size=56, dynamic_img_size=True).eval()
    missing = theirs.load_state_dict(to_timm(ours.state_dict()), strict=False)
    assert not missing.missing_keys and set(missing.unexpected_keys) <= {"patch_embed.proj.bias"}
    with torch.no_grad():
        for side in (56, 84) if ours.num_registers else (56,):  # others resize positions as DINO does
            images = torch.randn(1, 3, side, side)
            torch.testing.assert_close(ours(images), theirs(images), rtol=1e-4, atol=1e-4)
    blocks = timm.create_model(timms, embed_dim=24, num_heads=1).blocks
    assert FAMILIES[0].networks[arch](dict)["depth"] == len(blocks)


def test_the_teacher_can_be_copied():
    vit = VisionTransformer(**SIZES)
    vit(torch.randn(1, 3, 16, 16))
    again = copy.deepcopy(vit)
    assert torch.equal(again(torch.ones(1, 3, 16, 16)), vit(torch.ones(1, 3, 16, 16)))


def test_a_patch_that_does_not_divide_the_construction_size_is_refused():
    with pytest.raises(ValueError, match="patch_size 15"):
        VisionTransformer(patch_size=15)
