"""InfoNCE with one product against the textbook form, and what it says of the queue."""

import pytest
import torch
import torch.nn.functional as F

from methods import contrast
from methods.contrast import info_nce
from tests.twins import random


def textbook(z, keys, queue, temperature):
    """A product and concatenated logits for every pair of views."""
    views = z.chunk(len(z) // keys.shape[1])

    def pair(v, i):
        positive = (views[v] * keys[i]).sum(dim=1, keepdim=True)
        logits = torch.cat((positive, views[v] @ queue), dim=1) / temperature
        return -logits.log_softmax(dim=1)[:, 0].mean()

    large = (pair(0, 1) + pair(1, 0)) / 2
    small = [pair(v, i) for v in range(2, len(views)) for i in (0, 1)]
    return (large + sum(small) / len(small)) / 2 if small else large


@pytest.mark.parametrize("views", [2, 5])
@pytest.mark.parametrize("rows_at_once", [1, 100])
def test_one_product_equals_one_for_every_pair_and_so_do_gradients(monkeypatch, views, rows_at_once):
    monkeypatch.setattr(contrast, "CHUNK_ELEMENTS", rows_at_once * 11)
    z, keys = F.normalize(random(views * 3, 4), dim=1), F.normalize(random(2, 3, 4, seed=1), dim=2)
    queue, both = F.normalize(random(4, 11, seed=2), dim=0), []
    for loss in (textbook, lambda *given: info_nce(*given).loss):
        leaf = z.clone().requires_grad_()
        value = loss(leaf, keys, queue, 0.3)
        value.backward()
        both.append((value.detach(), leaf.grad))
    torch.testing.assert_close(both[0], both[1], rtol=1e-12, atol=1e-14)


def test_half_precision_around_it_changes_nothing_and_the_loss_is_float32():
    z, keys = F.normalize(torch.randn(12, 8), dim=1), F.normalize(torch.randn(2, 3, 8), dim=2)
    queue = F.normalize(torch.randn(8, 50), dim=0)
    with torch.autocast("cpu", torch.bfloat16):
        inside = info_nce(z, keys, queue, 0.2)
    assert inside.loss.dtype == torch.float32 and torch.equal(inside.loss, info_nce(z, keys, queue, 0.2).loss)


def test_the_rank_is_the_share_of_the_queue_that_is_nearer_than_the_positive():
    queue = torch.eye(4)
    z = F.normalize(torch.tensor([[3.0, 2.0, 1.0, 0.0]]), dim=1).repeat(2, 1)
    keys = torch.stack((torch.eye(4)[3:], F.normalize(torch.tensor([[1.0, 2.0, 1.0, 0.0]]), dim=1)))
    assert info_nce(z, keys, queue, 0.2).rank == 0.0
    keys[1] = F.normalize(torch.tensor([[0.0, 1.0, 1.0, 1.0]]), dim=1)
    assert info_nce(z, keys, queue, 0.2).rank == 0.5
