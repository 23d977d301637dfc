"""The adapter of detectors and segmenters: what it costs, what it refuses, what becomes of class tokens."""

import pytest
import torch

from models.dense import DenseBackbone, lay_out, pyramid, without_class_tokens
from models.vit import VisionTransformer


def network(**options) -> VisionTransformer:
    return VisionTransformer(**{"patch_size": 16, "embed_dim": 8, "depth": 4, "num_heads": 2, "img_size": 64} | options)


def test_blocks_after_the_last_map_are_not_computed():
    model = network()
    model.blocks[3].register_forward_pre_hook(lambda *_: pytest.fail("computed"))
    maps = model.patch_maps(torch.randn(2, 3, 32, 48), [0, 2])
    assert [tuple(x.shape) for x in maps] == [(2, 8, 2, 3)] * 2


def test_the_maps_are_those_of_the_intermediate_layers_registers_and_two_class_tokens_left_out():
    model = network(num_class_tokens=2, num_registers=3).eval()
    images = torch.randn(2, 3, 32, 48)
    layers = model.get_intermediate_layers(images, 2)
    for found, tokens in zip(model.patch_maps(images, [2, 3]), layers, strict=True):
        assert torch.equal(found.flatten(2).transpose(1, 2), tokens[:, 5:])


def test_without_class_tokens_the_patches_keep_their_positions():
    model = network(num_class_tokens=2)
    bare = without_class_tokens(model)
    assert torch.equal(bare.pos_embed, model.pos_embed[:, 2:]) and model.num_class_tokens == 2
    assert bare.prepare_tokens(torch.randn(1, 3, 32, 48)).shape == (1, 6, 8)
    assert "cls_token" not in {name for name, p in bare.named_parameters() if p.requires_grad}


def test_positions_laid_out_twice_are_those_of_the_last_grid():
    model = network()
    lay_out(model, 3, 5)
    assert model.pos_embed.shape == (1, 16, 8)
    before = model.pos_embed.clone()
    lay_out(model, 3, 5)
    assert torch.equal(model.pos_embed, before)
    assert torch.equal(model.position_embedding(48, 80), before)


def test_what_it_cannot_do_is_refused():
    with pytest.raises(ValueError, match="blocks 0 to 3"):
        DenseBackbone(network(), (1, 2, 3, 4))
    with pytest.raises(ValueError, match="ascending"):
        DenseBackbone(network(), (0, 2, 1, 3))
    with pytest.raises(ValueError, match="8 and 16"):
        pyramid(8, 14)
