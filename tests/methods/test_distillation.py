import pytest
import torch
import torch.nn.functional as F

from methods import distillation
from methods.distillation import (
    Targets,
    cross_view_loss,
    mean_logits,
    prototype_cross_entropy,
    teacher_probabilities,
)


def double_loop(z, weight, probs, temperature):
    """The textbook form: one log-softmax for every pair of a teacher view with another student view."""
    teacher_views, batch, _ = probs.shape
    log_probs = (z @ weight.t() / temperature).log_softmax(dim=-1).unflatten(0, (-1, batch))
    terms = [
        -(probs[i] * log_probs[v]).sum(dim=-1).mean()
        for i in range(teacher_views)
        for v in range(log_probs.shape[0])
        if v != i
    ]
    return sum(terms) / len(terms)


def inputs(views, batch, prototypes, dim, dtype=torch.float64):
    z = torch.nn.functional.normalize(torch.randn(views * batch, dim, dtype=dtype), dim=-1).requires_grad_()
    weight = torch.nn.functional.normalize(torch.randn(prototypes, dim, dtype=dtype), dim=-1).requires_grad_()
    probs = torch.randn(2, batch, prototypes, dtype=dtype).mul(4).softmax(dim=-1)
    return z, weight, probs


@pytest.mark.parametrize("views", [2, 3, 10])
@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("prototypes", [1, 2, 33])
@pytest.mark.parametrize("chunk", [2**24, 70, 1])
def test_cross_view_loss_and_its_gradients_equal_the_double_loop(views, batch, prototypes, chunk, monkeypatch):
    monkeypatch.setattr(distillation, "CHUNK_ELEMENTS", chunk)
    z, weight, probs = inputs(views, batch, prototypes, dim=5)
    fast, slow = cross_view_loss(z, weight, probs, 0.1), double_loop(z, weight, probs, 0.1)
    torch.testing.assert_close(fast, slow, rtol=1e-12, atol=1e-12)
    fast_grads, slow_grads = (torch.autograd.grad(3 * loss, [z, weight]) for loss in (fast, slow))
    torch.testing.assert_close(fast_grads, slow_grads, rtol=1e-10, atol=1e-12)


def test_rows_may_weigh_differently_and_repeat_a_target():
    z, weight, _ = inputs(views=6, batch=1, prototypes=7, dim=4)
    targets = torch.rand(3, 7, dtype=torch.float64)
    rows, mass = torch.tensor([0, 1, 2, 2, 1, 0]), None
    mass = targets.sum(dim=1)[rows]
    row_weight = torch.tensor([0.5, 0.0, 2.0, 1.0, 1e-3, 1.0], dtype=torch.float64)
    fast, _ = prototype_cross_entropy(z, weight, [Targets(targets, rows, mass, row_weight)], 0.2)
    log_probs = (z @ weight.t() / 0.2).log_softmax(dim=-1)
    slow = -(row_weight[:, None] * targets[rows] * log_probs).sum()
    torch.testing.assert_close(fast, slow, rtol=1e-12, atol=1e-12)
    grads = [torch.autograd.grad(loss, [z, weight]) for loss in (fast, slow)]
    torch.testing.assert_close(*grads, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("chunk", [2**24, 16])
def test_groups_of_rows_add_up_by_their_shares(chunk, monkeypatch):
    monkeypatch.setattr(distillation, "CHUNK_ELEMENTS", chunk)
    z, weight, probs = inputs(views=7, batch=1, prototypes=8, dim=4)
    ones = torch.ones(7, dtype=torch.float64)
    first = Targets(probs[0], torch.zeros(5, dtype=torch.int64), ones[:5], 0.25, share=3.0)
    empty = Targets(probs[0, :0], torch.zeros(0, dtype=torch.int64), ones[:0], 1.0)
    second = Targets(probs[1], torch.zeros(2, dtype=torch.int64), ones[5:], 0.5, share=1e-4)
    together, parts = prototype_cross_entropy(z, weight, [first, empty, second], 0.1)
    apart = [prototype_cross_entropy(z[at], weight, [group._replace(share=1.0)], 0.1)[0] for at, group in (
        (slice(0, 5), first), (slice(5, 5), empty), (slice(5, 7), second)
    )]  # fmt: skip
    torch.testing.assert_close(parts, torch.stack(apart), rtol=1e-12, atol=0)
    assert not parts.requires_grad and parts[1] == 0
    grads = [torch.autograd.grad(loss, [z, weight]) for loss in (together, 3 * apart[0] + 1e-4 * apart[2])]
    torch.testing.assert_close(*grads, rtol=1e-10, atol=1e-14)


def test_only_the_gradient_that_is_asked_for_is_formed():
    z, weight, probs = inputs(views=3, batch=2, prototypes=8, dim=4)
    (alone,) = torch.autograd.grad(cross_view_loss(z.detach(), weight, probs, 0.1), [weight])
    (together,) = torch.autograd.grad(cross_view_loss(z, weight, probs, 0.1), [weight])
    torch.testing.assert_close(alone, together, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_close_to_float32(dtype):
    z, weight, probs = (t.detach().float().requires_grad_(t.requires_grad) for t in inputs(6, 4, 512, dim=32))
    exact = cross_view_loss(z, weight, probs, 0.1)
    exact_grads = torch.autograd.grad(exact, [z, weight])
    with torch.autocast("cpu", dtype):
        half = cross_view_loss(z, weight, probs, 0.1)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, exact, rtol=5e-3, atol=0)
    for got, expected in zip(torch.autograd.grad(half, [z, weight]), exact_grads, strict=True):
        assert got.dtype == torch.float32
        assert (got - expected).norm() < 0.02 * expected.norm()


@pytest.mark.parametrize("alike", [0.1, 0.3, 1.0])
def test_fp16_gradients_of_similar_rows_with_one_target_stay_finite(alike):
    """Where a run begins to collapse: no scale of the loss would help, since the products come before it."""
    rows, prototypes = 2048, 4096
    z = F.normalize(torch.randn(1, 64) + 0.01 * torch.randn(rows, 64)).requires_grad_()
    weight = F.normalize(torch.randn(prototypes, 64)).requires_grad_()
    choice = torch.where(torch.arange(rows) < alike * rows, 7, torch.arange(rows))
    targets = [Targets(F.one_hot(choice, prototypes).float(), torch.arange(rows), 2 * torch.ones(rows), 1 / rows)]
    exact = torch.autograd.grad(prototype_cross_entropy(z, weight, targets, 0.1)[0], [z, weight])
    with torch.autocast("cpu", torch.float16):
        half = torch.autograd.grad(prototype_cross_entropy(z, weight, targets, 0.1)[0], [z, weight])
    for got, expected in zip(half, exact, strict=True):
        assert (got - expected).norm() < 0.01 * expected.norm()


def test_a_perfect_student_pays_the_teachers_entropy():
    probs = torch.randn(2, 3, 16, dtype=torch.float64).softmax(dim=-1)[:1].expand(2, -1, -1)
    logits = probs.log().flatten(0, 1)[:3].repeat(4, 1)
    loss = cross_view_loss(logits * 0.1, torch.eye(16, dtype=torch.float64), probs, 0.1)
    torch.testing.assert_close(loss, torch.special.entr(probs[0]).sum(-1).mean(), rtol=1e-12, atol=0)


def test_teacher_probabilities_are_computed_in_float32_or_better():
    logits = torch.randn(4, 9)
    assert teacher_probabilities(logits.bfloat16(), torch.zeros(1, 9), 0.04).dtype == torch.float32
    assert teacher_probabilities(logits.double(), torch.zeros(1, 9).double(), 0.04).dtype == torch.float64
    torch.testing.assert_close(teacher_probabilities(logits, torch.zeros(1, 9), 0.04).sum(-1), torch.ones(4))


@pytest.mark.parametrize("chunk", [2**24, 50, 1])
@pytest.mark.parametrize("terms", [1, 2, 3])
def test_a_row_may_have_several_teacher_rows_and_equals_the_double_loop(terms, chunk, monkeypatch):
    monkeypatch.setattr(distillation, "CHUNK_ELEMENTS", chunk)
    z, weight, _ = inputs(views=7, batch=1, prototypes=9, dim=4)
    probs = torch.randn(6, 9, dtype=torch.float64).softmax(dim=-1)
    source = torch.randint(6, (4, terms))  # the same row may stand in it twice
    single, ones = torch.tensor([5, 0, 5]), torch.ones(7, dtype=torch.float64)
    groups = [Targets(probs, source, terms * ones[:4], 0.25, share=0.5), Targets(probs, single, ones[4:], 1.0)]
    fast, parts = prototype_cross_entropy(z, weight, groups, 0.1)
    log_probs = (z @ weight.t() / 0.1).log_softmax(dim=-1)
    several = sum(-(probs[source[row, term]] * log_probs[row]).sum() / 4 for row in range(4) for term in range(terms))
    alone = sum(-(probs[single[row]] * log_probs[4 + row]).sum() for row in range(3))
    torch.testing.assert_close(parts, torch.stack((several, alone)), rtol=1e-12, atol=0)
    torch.testing.assert_close(fast, 0.5 * several + alone, rtol=1e-12, atol=0)
    grads = [torch.autograd.grad(loss, [z, weight]) for loss in (fast, 0.5 * several + alone)]
    torch.testing.assert_close(*grads, rtol=1e-10, atol=1e-13)


def test_logits_of_a_row_with_several_teacher_rows_are_formed_once(monkeypatch):
    z, weight, probs = inputs(views=3, batch=2, prototypes=8, dim=4)
    source, mass = torch.tensor([[0, 1]] * 6), torch.full((6,), 2.0, dtype=torch.float64)
    formed = []
    logsumexp = torch.Tensor.logsumexp
    monkeypatch.setattr(torch.Tensor, "logsumexp", lambda t, **kw: formed.append(len(t)) or logsumexp(t, **kw))
    prototype_cross_entropy(z, weight, [Targets(probs.flatten(0, 1), source, mass, 1.0)], 0.1)
    assert formed == [6]


def test_the_mean_logit_is_the_logit_of_the_mean():
    layer = torch.nn.Linear(5, 7, bias=False).double()
    z = torch.randn(3, 4, 5, dtype=torch.float64)
    torch.testing.assert_close(mean_logits(layer, z), layer(z).mean(dim=1), rtol=1e-12, atol=1e-14)
    with torch.autocast("cpu", torch.bfloat16):
        assert mean_logits(layer.float(), z.float()).dtype == torch.float32
