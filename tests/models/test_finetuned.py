"""Networks that are fine-tuned: forms that no golden case has, and weights fitted to them."""

import numpy as np
import pytest
import torch

from models.adapt import _growing_distances, _spline_matrix, resize_bias_table, select_class_tokens
from models.finetuned import FinetunedTransformer, bias_index, layer_decay_groups
from models.vit import Variant, VisionTransformer
from utils import UsageError

SHAPE = {"patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 3, "img_size": 32}


def test_without_new_parts_it_is_the_backbone_and_a_linear_layer():
    model = FinetunedTransformer(5, **SHAPE).double().eval()
    backbone = VisionTransformer(**SHAPE).double().eval()
    backbone.load_state_dict({n: t for n, t in model.state_dict().items() if not n.startswith("head.")})
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    torch.testing.assert_close(model(images), model.head(backbone(images)))
    with pytest.raises(ValueError, match="built for 32"):
        model(torch.randn(2, 3, 40, 40, dtype=torch.float64))


def test_the_start_is_beits():
    torch.manual_seed(0)
    model = FinetunedTransformer(50, init_scale=0.5, **SHAPE | {"embed_dim": 96})
    assert model.head.weight.std().item() == pytest.approx(0.01, rel=0.1)
    for number, block in enumerate(model.blocks, start=1):
        for layer in (block.attn.proj, block.mlp.fc2):
            assert layer.weight.std().item() == pytest.approx(0.02 / (2 * number) ** 0.5, rel=0.1)
        assert block.mlp.fc1.weight.std().item() == pytest.approx(0.02, rel=0.1)


def test_the_attention_that_is_shown_has_the_bias():
    model = FinetunedTransformer(5, False, True, **SHAPE).double().eval()
    images = torch.randn(1, 3, 32, 32, dtype=torch.float64)
    before = model.get_last_selfattention(images)
    table = model.blocks[-1].attn.relative_position_bias_table
    torch.nn.init.normal_(table)
    after = model.get_last_selfattention(images)
    bias = table[bias_index(4)].permute(2, 0, 1)
    torch.testing.assert_close(after, (before.log() + bias).softmax(-1))
    torch.testing.assert_close(model.get_last_selfattention(images, queries=1), after[:, :, :1])


def test_dropout_draws_in_training_only():
    model = FinetunedTransformer(5, drop=0.3, attn_drop=0.3, init_scale=1.0, **SHAPE)
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(model.eval()(images), model(images))
    assert not torch.equal(model.train()(images), model(images))
    plain = FinetunedTransformer(5, **SHAPE)
    plain.load_state_dict(model.state_dict())
    torch.testing.assert_close(plain.eval()(images), model.eval()(images))


def test_bias_tables_may_be_spared_weight_decay():
    model = FinetunedTransformer(5, False, True, **SHAPE)
    for spared in (False, True):
        groups = layer_decay_groups(model, 0.5, 0.05, decay_bias_tables=not spared)
        decays = {name: group["decays"] for group in groups for name in group["names"]}
        assert decays["blocks.0.attn.relative_position_bias_table"] != spared
        assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))


def test_relative_positions_and_registers_do_not_go_together():
    with pytest.raises(UsageError, match="--disable_rel_pos_bias"):
        FinetunedTransformer(5, False, True, num_registers=2, **SHAPE)


@pytest.mark.parametrize("points", [3, 7, 13, 27])
def test_the_spline_passes_through_what_is_known_and_keeps_cubics(points):
    """Both hold for the not-a-knot spline, and for no smoother or rougher curve."""
    known = _growing_distances(points, points + 4)
    np.testing.assert_allclose(_spline_matrix(known, known), np.eye(points), atol=1e-8)
    wanted = np.linspace(known[0], known[-1], 11)
    for power in range(min(4, points)):
        found = _spline_matrix(known, wanted) @ known**power
        np.testing.assert_allclose(found, wanted**power, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize(("old", "new"), [(4, 7), (7, 4), (14, 24), (3, 3)])
def test_a_bias_table_of_another_side_keeps_what_is_near_and_the_class_token(old, new):
    rows, wanted = (2 * old - 1, 2 * new - 1)
    offsets = torch.arange(rows, dtype=torch.float64) - old + 1
    table = torch.exp(-(offsets[:, None] ** 2 + offsets[None] ** 2) / old**2).reshape(-1, 1)
    table = torch.cat((table, torch.tensor([[1.0], [2.0], [3.0]], dtype=torch.float64)))
    resized = resize_bias_table(table, wanted**2 + 3)
    assert resized.shape == (wanted**2 + 3, 1) and torch.equal(resized[-3:], table[-3:])
    grid = resized[:-3].view(wanted, wanted)
    assert grid[new - 1, new - 1].item() == pytest.approx(1.0)  # no offset is where no offset was
    torch.testing.assert_close(grid, grid.flip(0))
    torch.testing.assert_close(grid, grid.T)
    if new > old:  # one patch away is one patch away, the farthest offset the farthest
        assert grid[new - 1, new].item() == pytest.approx(table[:-3].view(rows, rows)[old - 1, old].item())
        assert grid[0, 0].item() == pytest.approx(table[0].item(), rel=1e-3)


def test_class_tokens_are_selected_with_their_positions():
    state = {"cls_token": torch.arange(2.0).view(1, 2, 1), "pos_embed": torch.arange(6.0).view(1, 6, 1)}
    one = select_class_tokens(state, 1)
    assert one["cls_token"].flatten().tolist() == [0] and one["pos_embed"].flatten().tolist() == [0, 2, 3, 4, 5]
    none = select_class_tokens(state, 0)
    assert "cls_token" not in none and none["pos_embed"].flatten().tolist() == [2, 3, 4, 5]
    assert state["cls_token"].shape == (1, 2, 1)


def test_the_gate_of_a_swiglu_is_dropped_and_scaled_where_a_plain_mlp_is():
    torch.manual_seed(0)
    options = {"variant": Variant(mlp="swiglu"), "use_mean_pooling": True, "init_values": 0.1}
    model = FinetunedTransformer(5, drop=1.0, **options, **SHAPE)
    images = torch.randn(2, 3, SHAPE["img_size"], SHAPE["img_size"])
    assert not model.train().blocks[0].mlp(torch.randn(4, SHAPE["embed_dim"])).any()
    assert model.eval()(images).shape == (2, 5)
    last, first = (model.blocks[i].mlp.w3.weight.std().item() for i in (-1, 0))
    assert last / first == pytest.approx(len(model.blocks) ** -0.5, rel=0.1)
