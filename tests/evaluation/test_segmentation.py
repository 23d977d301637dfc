"""Segmentation's estimators: classes of stretched logits, windows, scores, and what a process adds."""

import pytest
import torch

from evaluation.segmentation import (
    LinearHead,
    Segmenter,
    Window,
    count_pixels,
    image_logits,
    pixel_loss,
    resized,
    resized_classes,
    scores,
    windows,
)
from evaluation.semantic_fpn import SemanticFPN
from models.vit import VisionTransformer


@pytest.mark.parametrize("size", [(40, 61), (9, 12), (5, 7), (10, 20)])
def test_classes_along_borders_only_are_those_of_all_pixels(size):
    logits = torch.randn(6, 10, 20, dtype=torch.float64)
    smooth = resized(torch.randn(1, 6, 3, 4, dtype=torch.float64), (10, 20))[0]
    for values in (logits, smooth):
        assert torch.equal(resized_classes(values, size), resized(values[None], size)[0].argmax(0))


def test_windows_cover_an_image_and_end_with_it():
    places = windows((43, 20), Window((24, 32), (17, 9)))
    assert [(rows.start, rows.stop) for rows, _ in places] == [(0, 24), (17, 41), (19, 43)]
    assert {(columns.start, columns.stop) for _, columns in places} == {(0, 20)}
    assert len(windows((512, 683), Window((512, 512), (341, 341)))) == 2


def test_windows_in_other_batches_give_the_same_logits():
    network = VisionTransformer(8, 16, 2, 2, img_size=32)
    segmenter = Segmenter(network, [1], True, LinearHead(16, 3)).eval()
    image, window = torch.randn(1, 3, 50, 70), Window((32, 32), (21, 21))
    one, many = (image_logits(segmenter, image, window, batch_size) for batch_size in (1, 8))
    torch.testing.assert_close(one, many)


def test_a_frozen_network_gets_no_gradient_and_stays_in_evaluation_mode():
    network = VisionTransformer(8, 16, 2, 2, img_size=32)
    segmenter = Segmenter(network, [0, 1], True, LinearHead(32, 3, norm=False)).train()
    loss, _ = pixel_loss(segmenter(torch.randn(2, 3, 20, 32)), torch.zeros(2, 20, 32, dtype=torch.uint8))
    loss.backward()
    assert not network.training and all(p.grad is None for p in network.parameters())
    assert segmenter.decode_head.conv_seg.weight.grad is not None
    assert segmenter.decode_head.conv_seg.bias.abs().sum() == 0


def test_labels_that_are_all_ignored_cost_nothing():
    labels = torch.full((2, 8, 8), 255, dtype=torch.uint8)
    loss, share = pixel_loss(torch.randn(2, 3, 4, 4), labels)
    assert loss == share == 0


def test_a_class_that_is_nowhere_is_left_out_of_the_means():
    counts = count_pixels(torch.tensor([[0, 0, 1, 2]]), torch.tensor([[0, 1, 1, 255]]), 4)
    found = scores(counts)
    assert counts.tolist() == [[1, 1, 0, 0], [2, 1, 0, 0], [1, 2, 0, 0]]
    assert found["mIoU"] == pytest.approx(0.5) and found["IoU"].isnan().tolist() == [False, False, True, True]
    assert found["aAcc"] == pytest.approx(2 / 3) and found["mAcc"] == pytest.approx(0.75)


def test_dropout_of_a_share_of_a_batch_is_that_of_the_batch():
    head = SemanticFPN(8, 3, width=8, channels=16)
    whole = head.drawn(seed=1, iteration=5, first_sample=0, batch=6)
    assert torch.equal(whole[4:], head.drawn(1, 5, 4, 2)) and 0.75 < whole.float().mean() < 1
    assert not torch.equal(whole, head.drawn(1, 6, 0, 6))
    maps = [torch.randn(6, 8, 4, 4) for _ in range(4)]
    assert head(maps, whole).shape == (6, 3, 4, 4)
    other = head.eval()(maps, torch.ones_like(whole))
    expected = (other - head.conv_seg.bias.view(1, -1, 1, 1)) * 0.9
    torch.testing.assert_close(head(maps) - head.conv_seg.bias.view(1, -1, 1, 1), expected)
