import argparse

import numpy as np
import pytest
import torch

from methods.base import Clock, Method, clip_per_tensor_, ema_update_
from utils import cosine_scheduler


def test_clipping_equals_a_loop_over_tensors():
    grads = [torch.randn(n) * scale for n, scale in ((3, 0.01), (50, 2.0), (7, 0.0))]
    expected = [g * min(1.0, 0.5 / (g.norm().item() + 1e-6)) for g in grads]
    norms = [g.norm() for g in grads]
    returned = clip_per_tensor_(grads, 0.5)
    torch.testing.assert_close(grads, expected)
    torch.testing.assert_close(returned, torch.stack(norms))


def test_zero_clips_nothing():
    grads = [torch.randn(5) * 100]
    before = grads[0].clone()
    clip_per_tensor_(grads, 0)
    assert torch.equal(grads[0], before)


@pytest.mark.parametrize("gate", [None, torch.tensor(1.0, dtype=torch.float64)])
def test_ema_equals_its_formula(gate, double):
    teacher, student = [torch.randn(3, 4), torch.randn(5)], [torch.randn(3, 4), torch.randn(5)]
    expected = [0.9 * t + 0.1 * s for t, s in zip(teacher, student, strict=True)]
    ema_update_(teacher, student, 0.9, gate)
    torch.testing.assert_close(teacher, expected, rtol=1e-14, atol=1e-14)


def test_a_closed_gate_leaves_the_teacher_bit_for_bit():
    teacher, student = [torch.randn(3, 4)], [torch.full((3, 4), 1e30)]
    before = teacher[0].clone()
    ema_update_(teacher, student, 0.9, torch.tensor(0.0))
    assert torch.equal(teacher[0], before)


def test_drop_path_draws_do_not_depend_on_how_a_batch_is_divided():
    whole = Clock(epoch=1, iteration=7, seed=3).drop_path_draws(depth=4, crops=3, batch=6)
    parts = [Clock(1, 7, seed=3, first_sample=first).drop_path_draws(4, 3, 2) for first in (0, 2, 4)]
    together = np.concatenate([part.reshape(4, 2, 3, 2) for part in parts], axis=-1)
    assert np.array_equal(whole.reshape(4, 2, 3, 6), together)


def test_drop_path_draws_are_uniform_and_new_at_every_iteration():
    draws = np.stack([Clock(0, i, seed=0).drop_path_draws(12, 10, 64) for i in range(4)])
    assert abs(draws.mean() - 0.5) < 0.005
    assert abs((draws < 0.1).mean() - 0.1) < 0.003
    flat = draws.reshape(4, -1)
    assert np.abs(np.corrcoef(flat) - np.eye(4)).max() < 0.03


@pytest.mark.parametrize("momentum", [{}, {"momentum_teacher": 0.9}])
@pytest.mark.parametrize(("last", "decays"), [(0.4, True), (0.0, True), (None, False)])
def test_schedules_are_those_of_the_options_and_a_decay_without_an_end_is_constant(last, decays, momentum):
    args = argparse.Namespace(lr=0.5, min_lr=0.01, epochs=4, warmup_epochs=1, weight_decay=0.04, weight_decay_end=last)
    found = Method.schedules(argparse.Namespace(**vars(args), **momentum), niter=5, global_batch=64)
    assert np.array_equal(found["lr"], cosine_scheduler(0.125, 0.01, 4, 5, 1))
    constant = np.full(20, 0.04)
    assert np.array_equal(found["weight_decay"], cosine_scheduler(0.04, last, 4, 5) if decays else constant)
    assert np.array_equal(found["momentum"], cosine_scheduler(momentum.get("momentum_teacher", 1.0), 1.0, 4, 5))


def test_a_method_stands_where_it_is_placed_whatever_products_are_computed_in():
    class Two(Method):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(2, 2)

    placed = Two().place(torch.device("cpu"), torch.float64, torch.bfloat16)
    assert isinstance(placed, Two) and placed.layer.weight.dtype == torch.float64
