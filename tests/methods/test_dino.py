import copy
import math

import numpy as np
import pytest
import torch

from methods.base import Clock
from methods.dino import DINO
from methods.heads import DINOHead
from methods.multicrop import MultiCropNetwork
from models.vit import VisionTransformer
from training.optim import build_optimizer, optimizer_step, set_schedules

SIZES = {"patch_size": 8, "img_size": 32, "embed_dim": 24, "depth": 2, "num_heads": 3}


def make_dino(prototypes=32, drop_path_rate=0.0, bottleneck=8, **kwargs):
    student, teacher = (
        MultiCropNetwork(
            VisionTransformer(**SIZES, drop_path_rate=rate),
            DINOHead(24, prototypes, hidden_dim=16, bottleneck_dim=bottleneck),
        )
        for rate in (drop_path_rate, 0.0)
    )
    return DINO(student, teacher, teacher_temps=np.full(5, 0.04), **kwargs)


def make_crops(batch, local=3):
    return [torch.randn(batch, 3, 32, 32) for _ in range(2)] + [torch.randn(batch, 3, 16, 16) for _ in range(local)]


def state_of(method):
    return {f"{k}.{n}": v.clone() for k, p in method.checkpoint_parts().items() for n, v in p.state_dict().items()}


def test_the_teacher_starts_as_the_student_and_never_takes_a_gradient():
    method = make_dino()
    for a, b in zip(method.student.parameters(), method.teacher.parameters(), strict=True):
        assert torch.equal(a, b)
    method({"crops": make_crops(2)}, Clock(0, 0))["loss"].backward()
    assert all(p.grad is None for p in method.teacher.parameters())


def test_the_first_loss_is_near_ln_k():
    loss = make_dino(prototypes=4096, bottleneck=256)({"crops": make_crops(4)}, Clock(0, 0))["loss"].item()
    assert abs(loss - math.log(4096)) < 1.5


@pytest.mark.parametrize("local", [0, 3])
def test_pieces_of_a_batch_equal_the_whole(local, double):
    crops = make_crops(6, local)
    whole = make_dino(drop_path_rate=0.4)
    pieces = copy.deepcopy(whole)
    loss = whole({"crops": crops}, Clock(0, 0, momentum=0.9))["loss"]
    loss.backward()
    total = 0.0
    for first in (0, 2, 4):
        part = [crop[first : first + 2] for crop in crops]
        piece_loss = pieces({"crops": part}, Clock(0, 0, momentum=0.9, first_sample=first))["loss"] / 3
        piece_loss.backward()
        total += piece_loss.item()
    assert abs(total - loss.item()) < 1e-12
    for (name, a), b in zip(whole.student.named_parameters(), pieces.student.parameters(), strict=True):
        if a.grad is not None:
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-9, atol=1e-12, msg=name)
    for method in (whole, pieces):
        method.after_step(Clock(0, 0, momentum=0.9), None)
    torch.testing.assert_close(whole.centres.center, pieces.centres.center, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("optimizer_name", ["adamw", "sgd", "lars"])
def test_a_step_that_is_not_finite_changes_nothing(optimizer_name):
    method = make_dino(freeze_last_layer=0)
    optimizer = build_optimizer(optimizer_name, method.param_groups())
    for iteration, poison in enumerate((0.0, math.nan, 0.0)):
        clock = Clock(0, iteration, lr=0.1, weight_decay=0.04, momentum=0.9)
        set_schedules(optimizer, clock)
        optimizer.zero_grad()
        crops = make_crops(2)
        crops[0] = crops[0] + poison
        before = state_of(method)
        moments = copy.deepcopy(optimizer.state_dict()["state"])
        loss = method({"crops": crops}, clock)["loss"]
        loss.backward()
        gate = None if loss.isfinite() else torch.tensor(0.0)
        optimizer_step(optimizer, None, gate)
        method.after_step(clock, gate)
        after = state_of(method)
        changed = [name for name in before if not torch.equal(before[name], after[name])]
        if poison == 0.0:
            assert "dino_loss.center" in changed and "teacher.backbone.cls_token" in changed
        else:
            assert not changed
            same = optimizer.state_dict()["state"]
            for key, values in moments.items():
                for name, value in values.items():
                    assert torch.equal(torch.as_tensor(value), torch.as_tensor(same[key][name])), name
    assert all(torch.isfinite(value).all() for value in state_of(method).values())


def test_the_last_layer_rests_while_it_is_frozen():
    method = make_dino(freeze_last_layer=2)
    for epoch in range(3):
        method({"crops": make_crops(2)}, Clock(epoch, epoch))["loss"].backward()
        method.after_backward(Clock(epoch, epoch))
        assert (method.student.head.last_layer.weight_v.grad is None) == (epoch < 2)
        assert method.student.head.mlp[0].weight.grad is not None


def test_health_tells_entropy_from_divergence():
    method = make_dino(prototypes=64)
    crops = make_crops(8)
    loss = method({"crops": crops}, Clock(0, 0))["loss"].item()
    health = {name: value.item() for name, value in method.health().items()}
    assert health["teacher_entropy"] + health["teacher_kl"] == pytest.approx(loss, rel=1e-5)
    assert health["loss_over_ln_k"] == pytest.approx(loss / math.log(64), rel=1e-5)
    assert 0 < health["prototypes_used"] <= 16 / 64
    assert 1 <= health["effective_rank"] <= 15


def test_the_prototypes_used_before_an_interruption_count_in_its_epoch_alone(double):
    whole, first, second = (make_dino(prototypes=6) for _ in range(3))
    early, late = torch.eye(6)[[0, 3]], torch.eye(6)[[1, 3]]
    for method in (whole, first):
        method.note_prototypes(early, Clock(2, 20))
    second.load_epoch_state(first.epoch_state())
    for method in (whole, second):
        method.note_prototypes(late, Clock(2, 21))
    assert second.used.tolist() == whole.used.tolist() == [True, True, False, True, False, False]
    second.note_prototypes(late, Clock(3, 30))
    assert second.used.sum() == 2
