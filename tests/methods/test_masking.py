import random

import numpy as np
import pytest
import torch

from methods.masking import (
    MaskedViews,
    MaskRatio,
    attention_mask,
    block_mask,
    draw_hints,
    hidden_ranks,
    random_mask,
)


class NoCrops:
    augment = "fast"

    def __call__(self, image, key) -> dict:
        return {"crops": []}


def views(shape="block", ratio=None, crops=2, grid=(14, 14)) -> MaskedViews:
    return MaskedViews(NoCrops(), crops, grid, shape, ratio or MaskRatio([0.3], [0.2]))


@pytest.mark.parametrize("grid", [(14, 14), (7, 7), (28, 28), (4, 9), (2, 2)])
def test_blocks_never_hide_more_than_the_target(grid):
    rng = random.Random(0)
    shares = []
    for _ in range(2000):
        target = rng.uniform(0, 0.9) * grid[0] * grid[1]
        mask = block_mask(*grid, target, rng)
        assert mask.shape == grid and mask.sum() <= target
        shares.append(mask.sum() / max(target, 1))
    if grid == (14, 14):
        assert np.mean(shares) > 0.9
        assert not block_mask(*grid, 0.0, rng).any()


def test_random_masks_hide_exactly_the_target_and_every_cell_alike():
    shuffle = np.random.RandomState(0).shuffle
    masks = np.stack([random_mask(14, 14, 58.8, shuffle) for _ in range(4000)])
    assert set(masks.sum(axis=(1, 2))) == {58}
    assert abs(masks.mean(axis=0) - 58 / 196).max() < 5 * np.sqrt(0.21 / 4000)


def test_of_several_ratios_one_is_taken():
    ratio, rng = MaskRatio([0.0, 0.3], [0.0, 0.2]), random.Random(0)
    drawn = np.array([ratio.draw(0, rng) for _ in range(4000)])
    assert abs((drawn == 0).mean() - 0.5) < 0.03
    masked = drawn[drawn > 0]
    assert masked.min() >= 0.1 and masked.max() <= 0.5 and abs(masked.mean() - 0.3) < 0.01
    assert MaskRatio([0.3], [0.0], start_epoch=2).draw(1, rng) == 0.0


def test_a_mask_depends_on_its_image_and_epoch_alone():
    again = views()
    for shape in ("block", "rand"):
        one = views(shape)
        masks = [one(None, (0, epoch, index))["masks"] for epoch in (0, 1) for index in (0, 1)]
        again = views(shape)
        for key, expected in zip([(0, 1, 1), (0, 0, 0)], [masks[3], masks[0]], strict=True):
            for ours, theirs in zip(again(None, key)["masks"], expected, strict=True):
                assert torch.equal(ours, theirs)
        flat = [torch.cat(pair).flatten() for pair in masks]
        assert not any(torch.equal(a, b) for i, a in enumerate(flat) for b in flat[:i])
        assert not torch.equal(*masks[0]), "every crop has a mask of its own"


def test_the_loader_lists_what_is_hidden():
    piece = MaskedViews.collate([views()(None, (0, 0, index)) for index in range(5)])
    masks = torch.cat(piece["masks"])
    assert masks.shape == (10, 14, 14)
    assert torch.equal(piece["masked"], masks.flatten().nonzero().flatten())
    empty = views(ratio=MaskRatio([0.0], [0.0]))
    assert len(MaskedViews.collate([empty(None, (0, 0, 0))])["masked"]) == 0


def test_hints_are_drawn_without_replacement_and_every_rank_alike():
    rng = np.random.default_rng(0)
    hints = draw_hints(rng.random((6000, 19)), 5)
    assert all(len(set(row)) == 5 for row in hints.tolist())
    share = np.bincount(hints.ravel(), minlength=19) / 6000
    assert abs(share - 5 / 19).max() < 5 * np.sqrt(0.2 / 6000)
    assert draw_hints(rng.random((3, 0)), 0).shape == (3, 0)


def test_equal_attention_is_hidden_in_the_order_of_the_patches():
    masks, masked = attention_mask(torch.ones(2, 6), hidden_ranks(6, 2, np.array([True, False])))
    assert masks.tolist() == [[True, True, False, False, False, False], [False] * 6]
    assert masked.tolist() == [0, 1]
