"""Which regions are matched, and what a region loss comes to, against the double loop."""

import pytest
import torch
import torch.nn.functional as F

from methods.distillation import prototype_cross_entropy
from methods.regions import match_regions, matched_rows, region_targets, share_matched, tokens_of_crops
from tests.twins import random

VIEWS, DIM, K, TEMPS = 2, 6, 11, (0.1, 0.05)
SIZES = {  # images, tokens of the teacher's views, (crops, tokens) of every further size
    "two sizes": (3, 9, [(3, 4)]),
    "no local crops": (3, 9, []),
    "one image": (1, 9, [(2, 4)]),
    "one token": (2, 1, [(1, 1)]),
    "three sizes": (2, 9, [(1, 4), (3, 1), (1, 16)]),
    "local crops of the global size": (2, 4, [(2, 4)]),
}


def crops_of(batch: int, per_view: int, further: list[tuple[int, int]]) -> list[torch.Tensor]:
    counts = [per_view] * VIEWS + [tokens for crops, tokens in further for _ in range(crops)]
    return [random(batch, tokens, DIM, seed=10 + v) for v, tokens in enumerate(counts)]


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_the_region_loss_is_the_double_loop_over_pairs_images_and_tokens(sizes):
    batch, per_view, _ = sizes
    student, teacher = crops_of(*sizes), [random(batch, per_view, DIM, seed=v) for v in range(VIEWS)]
    weight = F.normalize(random(K, DIM, seed=90), dim=1)
    logits = [random(batch, per_view, K, seed=70 + v) for v in range(VIEWS)]
    vectors = [F.normalize(random(*crop.shape, seed=50 + v), dim=2) for v, crop in enumerate(student)]
    z = torch.cat([part.flatten(0, 1) for part in vectors]).requires_grad_()
    total, split, pairs = 0.0, z.split([part[..., 0].numel() for part in vectors]), 0
    for i in range(VIEWS):
        for v, crop in enumerate(student):
            if v == i:
                continue
            pairs += 1
            for b in range(batch):
                for j in range(crop.shape[1]):
                    ours, theirs = crop[b, j] / crop[b, j].norm(), teacher[i][b]
                    best = max(range(per_view), key=lambda m: (ours @ theirs[m] / theirs[m].norm()).item())
                    target = torch.softmax(logits[i][b, best] / TEMPS[1], dim=0)
                    row = split[v][b * crop.shape[1] + j]
                    term = -(target * torch.log_softmax(row @ weight.t() / TEMPS[0], dim=0)).sum()
                    total = total + term / (batch * crop.shape[1])
    total = total / pairs
    (expected,) = torch.autograd.grad(total, z)

    sources = match_regions(student, teacher)
    rows, sources = matched_rows(sources)
    probs = torch.softmax(torch.cat([part.flatten(0, 1) for part in logits])[rows] / TEMPS[1], dim=1)
    loss, _ = prototype_cross_entropy(z, weight, region_targets(probs, sources, pairs), TEMPS[0])
    (gradient,) = torch.autograd.grad(loss, z)
    torch.testing.assert_close(loss, total)
    torch.testing.assert_close(gradient, expected)


def test_of_equal_cosines_the_first_is_taken_and_half_precision_has_no_say():
    teacher = F.normalize(random(1, 5, DIM), dim=2).float()
    teacher[0, 3] = teacher[0, 1]
    (source, _) = match_regions([teacher, teacher], [teacher, teacher])
    assert source.flatten().tolist() == [5, 6, 7, 6, 9]
    near = torch.stack((teacher[0, 0], teacher[0, 0] + 1e-2 * teacher[0, 2]))[None]
    with torch.autocast("cpu", torch.bfloat16):
        (_, source) = match_regions([near, near], [near, near])
    assert source.flatten().tolist() == [0, 1]


def test_a_view_is_not_compared_with_itself_and_a_local_crop_with_both():
    student = crops_of(2, 4, [(1, 1)])
    sources = match_regions(student, student[:2])
    assert [source.shape for source in sources] == [(8, 1), (8, 1), (2, 2)]
    assert (sources[0] >= 8).all() and (sources[1] < 8).all()
    image = torch.arange(2).repeat_interleave(4)
    assert torch.equal(sources[1][:, 0] // 4, image)  # a region looks for its like in its own image


def test_rows_that_nothing_matches_are_left_out_and_the_others_are_those_they_were():
    sources = [torch.tensor([[7], [2]]), torch.tensor([[2, 9]])]
    rows, renumbered = matched_rows(sources)
    assert rows.tolist() == [2, 7, 9]
    assert all(torch.equal(rows[new], old) for new, old in zip(renumbered, sources, strict=True))
    assert share_matched(sources, 12).item() == pytest.approx(3 / 12)


def test_tokens_of_sizes_are_those_of_crops():
    groups = [random(6, 4, DIM), random(2, 1, DIM, seed=1)]
    crops = tokens_of_crops(groups, 2)
    assert [crop.shape[:2] for crop in crops] == [(2, 4)] * 3 + [(2, 1)]
    assert torch.equal(crops[1], groups[0][2:4])
