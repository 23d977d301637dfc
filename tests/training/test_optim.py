import pytest
import torch

from methods.base import Clock
from training.optim import LARS, build_optimizer, optimizer_step, set_schedules
from utils import UsageError


def parameters():
    torch.manual_seed(1)
    return [
        torch.nn.Parameter(torch.randn(4, 3)),
        torch.nn.Parameter(torch.randn(5)),
        torch.nn.Parameter(torch.zeros(2, 2)),
    ]


def test_multipliers_scale_the_schedules():
    a, b, _ = parameters()
    optimizer = build_optimizer("adamw", [{"params": [a], "lr_multiplier": 0.5}, {"params": [b], "wd_multiplier": 0.0}])
    set_schedules(optimizer, Clock(0, 0, lr=0.2, weight_decay=0.04))
    assert [(g["lr"], g["weight_decay"]) for g in optimizer.param_groups] == [(0.1, 0.04), (0.2, 0.0)]


def test_the_fused_adamw_equals_the_plain_one():
    ours, theirs = parameters(), parameters()
    fused = build_optimizer("adamw", [{"params": ours}])
    plain = torch.optim.AdamW(theirs, lr=0.0, foreach=False, fused=False)
    for step in range(4):
        for optimizer, params in ((fused, ours), (plain, theirs)):
            set_schedules(optimizer, Clock(0, step, lr=0.01, weight_decay=0.1))
            for i, p in enumerate(params):
                p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(10 * step + i))
            optimizer_step(optimizer, None, None)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def lars_by_hand(p, g, mu, lr, wd, momentum=0.9, eta=0.001):
    if p.ndim != 1:
        g = g + wd * p
        p_norm, g_norm = p.norm(), g.norm()
        if p_norm > 0 and g_norm > 0:
            g = g * (eta * p_norm / g_norm)
    mu = momentum * mu + g
    return p - lr * mu, mu


@pytest.mark.parametrize("gate", [None, torch.tensor(1.0)])
def test_lars_equals_its_definition_with_and_without_an_open_gate(gate):
    params = parameters()
    optimizer = LARS(params, lr=0.3, weight_decay=0.01)
    expected = [(p.detach().clone(), torch.zeros_like(p)) for p in params]
    for _ in range(3):
        for i, p in enumerate(params):
            p.grad = torch.randn_like(p)
            expected[i] = lars_by_hand(expected[i][0], p.grad, expected[i][1], 0.3, 0.01)
        optimizer_step(optimizer, None, gate)
    for p, (value, _) in zip(params, expected, strict=True):
        torch.testing.assert_close(p.detach(), value, rtol=1e-5, atol=1e-6)


def test_an_unknown_optimiser_is_refused():
    with pytest.raises(UsageError, match="--optimizer adam: choose one of adamw, sgd, lars"):
        build_optimizer("adam", [])


def test_sgd_takes_in_a_layer_that_rested_for_the_first_steps():
    ours, theirs = parameters(), parameters()
    fused = build_optimizer("sgd", [{"params": ours}])
    plain = torch.optim.SGD(theirs, lr=0.0, momentum=0.9, foreach=False)
    for step in range(4):
        for optimizer, params in ((fused, ours), (plain, theirs)):
            set_schedules(optimizer, Clock(0, step, lr=0.1, weight_decay=0.01))
            for i, p in enumerate(params):
                grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(10 * step + i))
                p.grad = None if i == 1 and step < 2 else grad
            optimizer_step(optimizer, None, None)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
