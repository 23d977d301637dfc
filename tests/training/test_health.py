import math

import pytest
import torch

from methods.health import clustering_health, effective_rank
from training.health import diagnose


def test_effective_rank_counts_equal_directions():
    basis = torch.eye(6).repeat(50, 1)[:, :6] * torch.randn(300, 1)
    assert effective_rank(torch.randn(4000, 5)).item() == pytest.approx(5, rel=0.05)
    assert effective_rank(torch.randn(300, 1) @ torch.randn(1, 8)).item() == pytest.approx(1, abs=1e-3)
    assert effective_rank(basis).item() <= 6
    wide = torch.randn(10, 400)
    assert effective_rank(wide).item() == pytest.approx(
        effective_rank(wide @ torch.linalg.qr(torch.randn(400, 400))[0]).item(), rel=1e-3
    )


def measures(probs, loss):
    k = probs.shape[-1]
    health = clustering_health(probs, torch.tensor(loss), torch.zeros(1, k), torch.ones(k) > 0, torch.randn(64, 16))
    return {name: value.item() for name, value in health.items()}


def test_a_uniform_teacher_is_named():
    assert set(diagnose(measures(torch.full((2, 4, 128), 1 / 128), math.log(128)))) == {"uniform teacher"}


def test_one_prototype_for_all_is_named():
    probs = torch.zeros(2, 4, 128)
    probs[..., 3] = 1.0
    assert set(diagnose(measures(probs, 0.01))) == {"one prototype"}


def test_a_loss_that_stays_at_ln_k_is_named():
    probs = torch.randn(2, 4, 128).mul(4).softmax(-1)
    assert set(diagnose(measures(probs, math.log(128)))) == {"flat loss"}


def test_a_healthy_run_is_left_alone():
    assert diagnose(measures(torch.randn(2, 4, 128).mul(3).softmax(-1), 3.0)) == {}


def test_a_contrast_that_tells_nothing_apart_and_a_memory_of_one_direction_are_named():
    fine = {"instance_rank": 0.2, "local_group_rank": 0.3, "retrieved_spread": 0.6, "effective_rank": 9.0}
    assert diagnose(fine) == {}
    assert set(diagnose(fine | {"local_group_rank": 0.47})) == {"positives among negatives"}
    assert set(diagnose(fine | {"retrieved_spread": 0.003})) == {"one neighbourhood"}


def test_features_on_a_line_are_named():
    assert set(diagnose({"effective_rank": 1.01, "entropy_over_ln_k": 0.5, "loss_over_ln_k": 0.7})) == {"flat features"}


def test_what_goes_wrong_with_frozen_teachers_is_named_with_the_teacher():
    healthy = {"effective_rank": 9.0, "statistics_drift": 0.1, "relative_loss_of_a": 0.7, "hardest_of_a": 0.6}
    assert diagnose(healthy) == {}
    for measure, value, said in (
        ("relative_loss_of_a", 0.99, "of teacher a the student has learnt nothing: its class tokens cost 0.99"),
        ("hardest_of_a", 0.99, "teacher a is the hardest for 99% of the images"),
        ("statistics_drift", 0.7, "moves by 0.70 of a spread in a step"),
    ):
        ((_, text),) = diagnose(healthy | {measure: value}).items()
        assert said in text and "; " in text
