"""iBOT and AttMask: the fast step against the textbook's, and what may not change a number."""

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from methods.attmask import AttMask
from methods.base import Clock
from methods.heads import IBOTHead
from methods.ibot import IBOT
from methods.masked_distillation import MaskedDistillation
from methods.masking import MaskedViews, MaskRatio
from methods.multicrop import MultiCropNetwork
from models.swin import SwinTransformer
from models.vit import VisionTransformer

VIT = {"patch_size": 8, "img_size": 32, "embed_dim": 24, "depth": 2, "num_heads": 3}
SWIN = {"img_size": 32, "embed_dim": 6, "depths": [1, 1], "num_heads": [1, 2], "window_size": 4}
CLOCK = Clock(1, 5, momentum=0.9)


def make(
    cls=IBOT, backbone="vit", drop_path_rate=0.3, shared=(True, True), norm=None, masking=True, **settings
) -> MaskedDistillation:
    networks = []
    for rate, own, masked in zip((drop_path_rate, 0.0), shared, (masking, False), strict=True):
        options = {"drop_path_rate": rate, "masked_im_modeling": masked}
        network = VisionTransformer(**VIT, **options) if backbone == "vit" else SwinTransformer(**SWIN, **options)
        head = IBOTHead(network.embed_dim, 20, 20, shared_head=own, norm=norm, hidden_dim=16, bottleneck_dim=8)
        networks.append(MultiCropNetwork(network, head))
    if cls is AttMask:
        settings = {"pred_shape": "attmask_high", "ratio": MaskRatio([0.3], [0.2]), **settings}
    method = cls(*networks, np.full(5, 0.04), np.full(5, 0.05), **settings)
    for parameter in method.teacher.parameters():  # a teacher of its own
        parameter.mul_(0.9)
    return method


def make_batch(batch, local=3, views=2, hidden=0.4):
    crops = [torch.randn(batch, 3, 32, 32) for _ in range(views)]
    crops += [torch.randn(batch, 3, 16, 16) for _ in range(local)]
    samples = [{"masks": [torch.rand(4, 4) < hidden * (i % 3) for _ in range(views)]} for i in range(batch)]
    return {"crops": crops, **MaskedViews.collate(samples)}


def part_of(batch: dict, first: int, size: int) -> dict:
    masks = [mask[first : first + size] for mask in batch["masks"]]
    samples = [{"masks": list(sample)} for sample in zip(*masks, strict=True)]
    return {"crops": [crop[first : first + size] for crop in batch["crops"]], **MaskedViews.collate(samples)}


def textbook(method: MaskedDistillation, batch: dict, clock: Clock, masks: torch.Tensor) -> dict[str, torch.Tensor]:
    """The two losses and the two centres, crop by crop and pair by pair; every token goes through the head."""
    crops, views = batch["crops"], method.teacher_views
    student, teacher, size = method.student, method.teacher, len(crops[0])
    draws = clock.drop_path_draws(student.backbone.depth, len(crops), size)
    shown = masks if student.backbone.masked_embed is not None else None
    with torch.no_grad():
        t, u = teacher.head(teacher.backbone.forward_features(torch.cat(crops[:views])))
    s, r = student.head(student.backbone.forward_features(torch.cat(crops[:views]), shown, draws[..., : views * size]))
    if len(crops) > views:
        local = student.backbone.forward_features(torch.cat(crops[views:]), None, draws[..., views * size :])
        s = torch.cat((s, student.head(local)[0]))
    targets = F.softmax((t - method.centres.center) / method.teacher_temps[clock.epoch], dim=-1).chunk(views)
    patch_targets = F.softmax((u - method.centres.center2) / method.teacher_patch_temps[clock.epoch], dim=-1)
    predictions = F.log_softmax(s / 0.1, dim=-1).chunk(len(crops))
    pairs = [(q, v) for q in range(views) for v in range(len(crops)) if q != v]
    cls = sum(-(targets[q] * predictions[v]).sum(-1).mean() for q, v in pairs) / len(pairs)
    per_patch, hidden = -(patch_targets * F.log_softmax(r / 0.1, dim=-1)).sum(-1), masks.flatten(1)
    patch = ((per_patch * hidden).sum(1) / hidden.sum(1).clamp(min=1)).mean()
    return {
        "loss": method.lambda1 * cls + method.lambda2 * patch,
        "cls": method.lambda1 * cls,
        "patch": method.lambda2 * patch,
        "acc": (t[:size].argmax(1) == s[size : 2 * size].argmax(1)).double().mean(),
        "center": 0.9 * method.centres.center + 0.1 * t.mean(0, keepdim=True),
        "center2": 0.9 * method.centres.center2 + 0.1 * u.mean(1, keepdim=True).mean(0, keepdim=True),
    }


def gradients(method: MaskedDistillation) -> dict[str, torch.Tensor | None]:
    return {name: p.grad for name, p in method.student.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("local", [0, 3])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"shared": (False, True), "lambda2": 0.5},
        {"shared": (False, False), "norm": "ln"},
        {"norm": "bn", "drop_path_rate": 0.0},
        {"backbone": "swin"},
        {"teacher_views": 3},
        {"masking": False},
        {"cls": AttMask},
        {"cls": AttMask, "pred_shape": "attmask_hint", "show_max": 0.3},
        {"cls": AttMask, "pred_shape": "block"},
    ],
    ids=str,
)
def test_a_step_equals_the_textbooks(local, options, double):
    ours = make(**options)
    theirs = copy.deepcopy(ours)
    batch = make_batch(4, local, views=ours.teacher_views)
    losses = ours(batch, CLOCK)
    losses["loss"].backward()
    ours.after_step(CLOCK, None)
    expected = textbook(theirs, batch, CLOCK, theirs.masks(batch, CLOCK).flatten(0, 1))
    expected["loss"].backward()
    for name, value in losses.items():
        torch.testing.assert_close(value.detach().double(), expected[name].detach(), rtol=1e-10, atol=1e-12, msg=name)
    for name in ("center", "center2"):
        torch.testing.assert_close(getattr(ours.centres, name), expected[name], rtol=1e-10, atol=1e-12)
    theirs = gradients(theirs)
    for name, grad in gradients(ours).items():
        torch.testing.assert_close(grad, theirs[name], rtol=1e-8, atol=1e-11, msg=name)
    assert losses["patch"] > 0


@pytest.mark.parametrize("cls", [IBOT, AttMask])
def test_without_hidden_patches_the_patch_loss_is_zero_and_so_is_its_gradient(cls, double):
    never = {"ratio": MaskRatio([0.3], [0.0], start_epoch=2)} if cls is AttMask else {}
    method = make(cls, shared=(False, False), **never)
    losses = method(make_batch(3, hidden=0.0), CLOCK)
    losses["loss"].backward()
    assert losses["patch"].item() == 0.0
    for name in ("head.last_layer2.weight_v", "backbone.masked_embed"):
        grad = dict(method.student.named_parameters())[name].grad
        assert grad is not None and not grad.any(), "weight decay still moves it, as in the original"


@pytest.mark.parametrize("cls", [IBOT, AttMask])
def test_pieces_of_a_batch_equal_the_whole(cls, double):
    batch = make_batch(6)
    whole = make(cls)
    pieces = copy.deepcopy(whole)
    loss = whole(batch, CLOCK)["loss"]
    loss.backward()
    total = 0.0
    for first in (0, 2, 4):
        clock = Clock(CLOCK.epoch, CLOCK.iteration, momentum=0.9, first_sample=first)
        piece_loss = pieces(part_of(batch, first, 2), clock)["loss"] / 3
        piece_loss.backward()
        total += piece_loss.item()
    assert abs(total - loss.item()) < 1e-12
    theirs = gradients(pieces)
    for name, grad in gradients(whole).items():
        torch.testing.assert_close(grad, theirs[name], rtol=1e-9, atol=1e-12, msg=name)
    for method in (whole, pieces):
        method.after_step(CLOCK, None)
    for name in ("center", "center2"):
        torch.testing.assert_close(getattr(whole.centres, name), getattr(pieces.centres, name), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("cls", [IBOT, AttMask])
def test_a_step_that_is_not_finite_moves_neither_teacher_nor_centres(cls):
    method = make(cls)
    for poison in (0.0, math.nan):
        batch = make_batch(2)
        batch["crops"][0] += poison
        before = {name: value.clone() for name, value in method.state_dict().items() if not name.startswith("student")}
        loss = method(batch, CLOCK)["loss"]
        method.after_step(CLOCK, None if loss.isfinite() else torch.tensor(0.0))
        same = all(torch.equal(before[name], method.state_dict()[name]) for name in before)
        assert same == bool(poison != 0.0)


def test_the_teacher_follows_what_it_has_in_common_with_the_student():
    method = make(shared=(False, True))
    before = {name: value.clone() for name, value in method.teacher.state_dict().items()}
    method.after_step(Clock(0, 0, momentum=0.0), None)  # the teacher becomes the student
    student = method.student.state_dict()
    for name, value in method.teacher.state_dict().items():
        if "last_layer2" not in name:
            assert torch.equal(value, student[name]), name
    assert "backbone.masked_embed" in student and "backbone.masked_embed" not in before


def test_hidden_patches_do_not_reach_the_student():
    method, batch = make(drop_path_rate=0.0), make_batch(2, hidden=0.7)
    changed = copy.deepcopy(batch)
    hidden = batch["masks"][0].repeat_interleave(8, 1).repeat_interleave(8, 2)[:, None]
    changed["crops"][0] = torch.where(hidden, torch.randn(2, 3, 32, 32), batch["crops"][0])
    masks = torch.cat(batch["masks"])
    before, after = (
        method.student_vectors(crops["crops"], masks, batch["masked"], CLOCK) for crops in (batch, changed)
    )
    for one, other in zip(before, after, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("shape", ["attmask_high", "attmask_low", "attmask_hint"])
def test_attention_decides_what_is_hidden(shape, double):
    method = make(AttMask, pred_shape=shape, ratio=MaskRatio([0.5], [0.0]), masking_prob=1.0, show_max=0.25)
    batch = make_batch(3)
    attention = method.teacher.backbone.get_last_selfattention(torch.cat(batch["crops"][:2]))[:, :, 0, 1:].mean(1)
    masks = method.masks(batch, CLOCK).flatten(0, 1).flatten(1)
    ranks = attention.argsort(1, descending=True).argsort(1)
    if shape == "attmask_low":
        assert torch.equal(masks, ranks >= 8)
    elif shape == "attmask_high":
        assert torch.equal(masks, ranks < 8)
    else:  # int(0.25 * 0.5 * 16) = 2 of the 4 most attended patches are shown
        assert masks.sum(1).tolist() == [6] * 6
        assert (masks & (ranks < 4)).sum(1).tolist() == [2] * 6 and not (masks & (ranks >= 8)).any()


def test_the_gate_is_drawn_for_every_crop_of_the_whole_batch():
    method = make(AttMask, ratio=MaskRatio([0.5], [0.0]))
    hidden = method.draw_hidden_ranks(Clock(0, 3), 4000, 16).any(axis=1)
    assert abs(hidden.mean() - 0.5) < 0.03
    first, second = hidden.reshape(2, -1)
    assert 0.2 < (first & second).mean() < 0.3, "the two crops of an image are gated apart"
    shifted = method.draw_hidden_ranks(Clock(0, 3, first_sample=1000), 1000, 16).any(axis=1).reshape(2, -1)
    assert np.array_equal(shifted[0], first[1000:2000]) and np.array_equal(shifted[1], second[1000:2000])


def test_health_and_pseudo_labels():
    method = make()
    batch = make_batch(8)
    method(batch, CLOCK)
    health = {name: value.item() for name, value in method.health().items()}
    assert health["hidden_patches"] == pytest.approx(torch.cat(batch["masks"]).float().mean().item())
    assert 0 < health["prototypes_used"] <= 1 and health["effective_rank"] >= 1
    with torch.no_grad():
        logits, _ = method.teacher.head(method.teacher.backbone.forward_features(batch["crops"][0]))
    assert torch.equal(method.pseudo_labels(), logits.argmax(dim=1))
