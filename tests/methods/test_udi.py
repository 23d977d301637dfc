"""UDI: the fast step against the textbook's with dense maps, and what may not change a number."""

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from data.udi_views import UDIViews
from methods.base import Clock
from methods.centring import LevelCentre
from methods.heads import DINOHead
from methods.srs import SampledBackbone
from methods.udi import UDI, UDINetwork
from models.vit import VisionTransformer

VIT = {"patch_size": 8, "img_size": 32, "embed_dim": 24, "depth": 2, "num_heads": 3}
CLOCK = Clock(1, 5, momentum=0.9)


def make(classes=2, patch=True, drop_path_rate=0.3, **settings) -> UDI:
    networks = []
    for rate in (drop_path_rate, 0.0):
        vit = VisionTransformer(**VIT, drop_path_rate=rate, num_class_tokens=classes)
        head = DINOHead(24, 20, hidden_dim=16, bottleneck_dim=8)
        networks.append(UDINetwork(SampledBackbone(vit, patch), head, classes + patch))
    method = UDI(*networks, np.full(5, 0.04), patch, **settings)
    for parameter in method.teacher.parameters():  # a teacher of its own
        parameter.mul_(0.9)
    return method


def make_batch(batch, local=3, patch=True, first=0) -> dict:
    """Real crops and places of random pictures."""
    sizes = {"global_crops_size": 32, "local_crops_size": 16, "patch_size": 8}
    views = UDIViews(local_crops_number=local, global_sampling_window_size=2, include_patch=patch, **sizes)
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 256, (first + batch, 40, 60, 3), dtype=np.uint8)[first:]
    piece = views.collate([views(picture, (0, 0, first + i)) for i, picture in enumerate(pictures)])
    piece["crops"] = [crop.to(torch.get_default_dtype()) / 128 - 1 for crop in piece["crops"]]
    return piece


def dense(index: torch.Tensor, weight: torch.Tensor, patches: int) -> torch.Tensor:
    return torch.zeros(*index.shape[:-1], patches).scatter_add_(-1, index, weight.to(torch.get_default_dtype()))


def sampled(backbone: SampledBackbone, patches: torch.Tensor, maps: torch.Tensor) -> torch.Tensor:
    """Section by section as the paper has it: (rows, places, dim) for maps (rows, places, patches)."""
    y, attn = backbone.norm1(patches), backbone.attn
    q, k, v = (x.unflatten(-1, (attn.num_heads, -1)).transpose(1, 2) for x in attn.qkv(y).chunk(3, dim=-1))
    weights = ((maps[:, None] @ q) @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(dim=-1)
    return attn.norm(attn.proj((weights @ v).transpose(1, 2).flatten(2)) + maps @ y)


def textbook(method: UDI, batch: dict, clock: Clock) -> dict[str, torch.Tensor]:
    """Logits of everything, masked means of logits, a loss for every pair."""
    crops, alpha, nl = batch["crops"], method.alpha, len(batch["crops"]) - 2
    student, teacher, size = method.student, method.teacher, len(crops[0])
    vit, head, target_head = student.backbone.backbone, student.head[0], teacher.head[0]
    draws = clock.drop_path_draws(vit.depth, len(crops), size)
    own = np.split(draws, len(crops), axis=-1)
    parts = [vit.forward_with_patches([crop], (), d) for crop, d in zip(crops, own, strict=True)]
    classes, patches = [part[0] for part in parts], torch.cat([parts[0][1], parts[1][1]])
    with torch.no_grad():
        t_classes, t_patches = teacher.backbone.backbone.forward_with_patches([crops[1], crops[0]])
        t_cls = target_head(t_classes[:, 0])
    centre, temp = method.centres.center, method.teacher_temps[clock.epoch]

    def target(logits, level):
        return F.softmax((logits - centre[level]) / temp, dim=-1)

    def entropy(probs, logits):
        return -(probs * F.log_softmax(logits / 0.1, dim=-1)).sum(-1)

    found, batch_means, levels = {}, [t_cls.mean(0)], []
    goals = {"cl": (t_cls, [t_cls] * nl)}
    if method.include_patch:
        n = patches.shape[1]
        source = F.one_hot(batch["source"].transpose(0, 1).flatten(0, 1), n).to(patches.dtype)
        places = torch.arange(source.shape[1])
        valid = (places < batch["valid"].T.flatten()[:, None]).to(patches.dtype)
        maps = dense(batch["target_index"], batch["target_weight"], n).transpose(0, 1).flatten(0, 1)
        with torch.no_grad():
            t_g, m_g = target_head(sampled(teacher.backbone, t_patches, maps)), maps.sum(-1)
            t_l, m_l = [], []
            for crop in range(nl):
                local = dense(batch["local_index"][:, crop], batch["local_weight"][:, crop], n)
                local = local.transpose(0, 1).flatten(0, 1)
                t_l.append(target_head(sampled(teacher.backbone, t_patches, local)))
                m_l.append(local.sum(-1))
            sets = list(zip([t_g, *t_l], [m_g, *m_l], strict=True))
            mean = [(m[..., None] * t).sum(1) / (m.sum(1, keepdim=True) + 1e-5) for t, m in sets]
            blend = [alpha * logits + (1 - alpha) * t_cls for logits in mean]
        if method.two_classes:
            goals["mcl"] = (blend[0], blend[1:])
            batch_means.append(torch.cat(blend).mean(0))
        total = sum((m[..., None] * t).sum((0, 1)) for t, m in sets)
        batch_means.append(total / sum(m.sum() for _, m in sets))
    for level, (name, (whole, local)) in enumerate(goals.items()):
        rows = [head(tokens[:, level]) for tokens in classes]
        found[f"g_{name}"] = entropy(target(whole, level), torch.cat(rows[:2])).mean()
        term = found[f"g_{name}"]
        if nl:
            pairs = [entropy(target(local[c], level), torch.cat([rows[2 + c]] * 2)) for c in range(nl)]
            found[f"l_{name}"] = torch.stack(pairs).mean()
            term = (term + nl * found[f"l_{name}"]) / (1 + nl)
        levels.append(term)
    if method.include_patch:
        losses = entropy(target(t_g, -1), head(sampled(student.backbone, patches, source)))
        found["g_pch"] = (losses * valid).sum() / valid.sum()
        levels.append(found["g_pch"])
    found["loss"] = sum(levels) / len(levels)
    found["center"] = 0.9 * centre + 0.1 * torch.stack(batch_means)
    return found


@pytest.mark.parametrize("local", [0, 3])
@pytest.mark.parametrize("options", [{}, {"alpha": 0.3}, {"classes": 1}, {"classes": 1, "patch": False}], ids=str)
def test_a_step_equals_the_textbooks(local, options, double):
    ours = make(**options)
    theirs = copy.deepcopy(ours)
    batch = make_batch(4, local, options.get("patch", True))
    losses = ours(batch, CLOCK)
    losses["loss"].backward()
    ours.after_step(CLOCK, None)
    expected = textbook(theirs, batch, CLOCK)
    expected["loss"].backward()
    assert losses.keys() == expected.keys() - {"center"}
    for name, value in losses.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-10, atol=1e-12, msg=name)
    torch.testing.assert_close(ours.centres.center, expected["center"], rtol=1e-10, atol=1e-12)
    theirs = dict(theirs.student.named_parameters())
    for name, parameter in ours.student.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, theirs[name].grad, rtol=1e-8, atol=1e-11, msg=name)


def test_without_a_common_place_the_patch_terms_are_zero_and_so_are_their_gradients(double):
    method, batch = make(), make_batch(2)
    for name in ("target_weight", "local_weight", "valid", "local_valid"):
        batch[name] = torch.zeros_like(batch[name])
    batch["points"] = batch["local_points"] = torch.zeros(0, dtype=torch.long)
    losses = method(batch, CLOCK)
    losses["loss"].backward()
    method.after_step(CLOCK, None)
    assert losses["g_pch"].item() == 0.0 and losses["loss"].isfinite()
    for name, parameter in method.student.named_parameters():
        assert parameter.grad is not None or not parameter.requires_grad, name
        if name.startswith(("backbone.attn", "backbone.norm1")):
            assert not parameter.grad.any(), name
    assert not method.centres.center[2].any() and method.centres.center[:2].any()


def test_a_step_that_is_not_finite_moves_neither_teacher_nor_centre():
    method = make()
    for poison in (0.0, math.nan):
        batch = make_batch(2)
        batch["crops"][0] += poison
        before = {name: value.clone() for name, value in method.state_dict().items() if not name.startswith("student")}
        loss = method(batch, CLOCK)["loss"]
        method.after_step(CLOCK, None if loss.isfinite() else torch.tensor(0.0))
        same = all(torch.equal(before[name], method.state_dict()[name]) for name in before)
        assert same == (poison != 0.0)


def test_pieces_of_a_batch_average_their_patch_losses_as_processes_do(double):
    whole = make()
    pieces = copy.deepcopy(whole)
    losses = [pieces(make_batch(2, first=first), Clock(1, 5, first_sample=first)) for first in (0, 2)]
    found = whole(make_batch(4), CLOCK)
    for name in ("g_cl", "l_cl", "g_mcl", "l_mcl"):
        assert sum(part[name] for part in losses).item() / 2 == pytest.approx(found[name].item(), rel=1e-12), name
    for method in (whole, pieces):
        method.after_step(CLOCK, None)
    torch.testing.assert_close(whole.centres.center[:2], pieces.centres.center[:2], rtol=1e-12, atol=1e-14)


def test_a_level_without_rows_keeps_its_centre():
    centre = LevelCentre(2, 3)
    centre.collect(torch.ones(2, 3), torch.tensor([2.0, 0.0]))
    centre.collect(torch.ones(2, 3), torch.tensor([1.0, 0.0]))
    centre.commit(None)
    torch.testing.assert_close(centre.center, torch.tensor([[0.075] * 3, [0.0] * 3]))
    assert list(centre.state_dict()) == ["center", "count"]


def test_all_levels_share_one_head_and_the_checkpoint_names_it_for_each():
    method = make()
    names = method.student.state_dict()
    assert {name.split(".")[1] for name in names if name.startswith("head.")} == {"0", "1", "2"}
    assert not [name for name, _ in method.student.named_parameters() if name.startswith(("head.1", "head.2"))]
    assert set(method.checkpoint_parts()["udi_loss"].state_dict()) == {"centering.center", "centering.count"}
