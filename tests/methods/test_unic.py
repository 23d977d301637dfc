"""UNIC: one step against its definition, what is never trained, files, and what is refused."""

import argparse
import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from methods.base import Clock
from methods.unic import UNIC, Student, keep_teachers, mean_of_kept, token_losses
from models.ladder import Ladder, ladder_arguments
from models.layouts.names import below
from models.layouts.shapes import vit_arguments
from models.reading import read_backbone
from models.safe_load import load_file
from models.vit import VisionTransformer
from training.checkpointing import unwrapped
from training.optim import build_optimizer, set_schedules
from training.options import check_options, parse_options
from utils import UsageError, World

GOLDEN = Path(__file__).resolve().parent.parent / "golden" / "unic"
ALONE = World(0, 1, 0, torch.device("cpu"))
VIT = {"patch_size": 8, "embed_dim": 12, "depth": 3, "num_heads": 2}


class Given(nn.Module):
    """A teacher with a batch norm, which would move if it were trained."""

    def __init__(self, name: str, dim: int):
        super().__init__()
        self.name, self.dim = name, dim
        self.network = VisionTransformer(img_size=16, **VIT | {"embed_dim": dim, "depth": 1})
        self.norm = nn.BatchNorm1d(dim)

    def forward(self, images):
        tokens = self.network.forward_features(images)
        return self.norm(tokens[:, 0]), tokens[:, 1:]


def small_unic(blocks=(0, 1, 2), size: int = 16, heads=(("b", 4), ("a", 6)), seed: int = 0, **options) -> UNIC:
    torch.manual_seed(seed)
    encoder = VisionTransformer(img_size=size, masked_im_modeling=True, **VIT)
    lp = Ladder(12, dict(heads), dict.fromkeys(blocks, 5), std=0.2)
    return UNIC(Student(encoder, lp), [Given(name, dim) for name, dim in heads], **options).double()


def batch(images: int = 4, size: int = 16) -> dict:
    return {"crops": [torch.randn(images, 3, size, size, generator=torch.Generator().manual_seed(5)).double()]}


def clock(iteration: int = 0, momentum: float = 0.5, first_sample: int = 0) -> Clock:
    return Clock(0, iteration, momentum=momentum, first_sample=first_sample, global_batch=4)


def test_the_loss_is_the_double_loop_over_images_and_teachers():
    torch.manual_seed(0)
    sides = [
        {name: (torch.randn(5, d).double(), torch.randn(5, 3, d).double()) for name, d in (("a", 6), ("b", 4))}
        for _ in range(2)
    ]
    draws = np.random.default_rng(0).random((2, 5))
    for drop, weights in itertools.product((0.0, 0.4, 1.0), ((0.5, 0.5), (0.2, 0.9))):
        of_pairs = token_losses(*sides, weights).mean(dim=1)
        found = mean_of_kept(of_pairs, keep_teachers(of_pairs, drop, draws))
        total, pairs = 0.0, 0
        for i in range(5):
            each = []
            for name in ("a", "b"):
                parts = []
                for y, z in zip(sides[0][name], sides[1][name], strict=True):
                    rows = zip(y[i].reshape(-1, y.shape[-1]), z[i].reshape(-1, z.shape[-1]), strict=True)
                    one = [
                        weights[0] * (1 - u @ v / (u.norm() * v.norm())) + weights[1] * F.smooth_l1_loss(u, v)
                        for u, v in rows
                    ]
                    parts.append(sum(one) / len(one))
                each.append(sum(parts) / 2)
            hardest = max(range(2), key=lambda t: each[t])
            for t in range(2):
                if t == hardest or draws[t, i] >= drop:
                    total, pairs = total + each[t], pairs + 1
        torch.testing.assert_close(found, total / pairs)


def test_which_teachers_an_image_keeps_depends_on_its_place_in_the_whole_batch_alone():
    method = small_unic()
    whole = method.uniforms(clock(3), 4)
    parts = [method.uniforms(clock(3, first_sample=first), 2) for first in (0, 2)]
    assert np.array_equal(whole, np.concatenate(parts, axis=1))
    assert not np.array_equal(whole, method.uniforms(clock(4), 4))


def test_pieces_see_the_same_statistics_and_the_step_commits_them_once():
    one, two = small_unic(), small_unic()
    one(batch(), clock())
    for first in (0, 2):
        two({"crops": [batch()["crops"][0][first : first + 2]]}, clock(first_sample=first))
    for method in (one, two):
        method.after_step(clock(), None)
    torch.testing.assert_close(one.standardisation.state_dict(), two.standardisation.state_dict())


def test_a_skipped_step_leaves_the_statistics():
    method = small_unic()
    before = method.standardisation.mean.clone()
    method(batch(), clock())
    method.after_step(clock(), torch.tensor(0.0))
    assert torch.equal(method.standardisation.mean, before)


@pytest.mark.parametrize("blocks", [(0, 1, 2), (0, 1)])
def test_everything_that_wants_a_gradient_gets_one_and_the_rest_stands_in_the_groups_as_well(blocks):
    method = small_unic(blocks)
    method(batch(), clock())["loss"].backward()
    trained = {name for name, p in method.student.named_parameters() if p.requires_grad}
    assert trained == {name for name, p in method.student.named_parameters() if p.grad is not None}
    untrained = {name for name, _ in method.student.named_parameters()} - trained
    assert {"encoder.norm.weight", "encoder.norm.bias", "encoder.masked_embed"} <= untrained
    assert any(name.startswith("encoder.blocks.2.") for name in untrained) == (2 not in blocks)
    groups = method.param_groups()
    assert sum(len(group["params"]) for group in groups) == len(list(method.student.parameters()))
    assert all(group["betas"] == (0.9, 0.99) and group["eps"] == 1e-8 for group in groups)


def test_teachers_are_never_in_training_mode_and_never_move():
    method = small_unic()
    before = {name: value.clone() for name, value in method.teachers.state_dict().items()}
    method.train()
    method(batch(), clock())["loss"].backward()
    assert method.student.training and not any(module.training for module in method.teachers.modules())
    after = method.teachers.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert all(parameter.grad is None for parameter in method.teachers.parameters())


def test_teachers_are_placed_in_the_type_of_the_runs_products(monkeypatch):
    method, asked = small_unic(), []
    monkeypatch.setattr(Given, "place", lambda self, half: asked.append((self.name, half)), raising=False)
    method.place(torch.device("cpu"), torch.float32, torch.bfloat16)
    assert asked == [("a", torch.bfloat16), ("b", torch.bfloat16)]
    assert {p.dtype for p in method.student.parameters()} == {torch.float32}
    with torch.autocast("cpu", torch.bfloat16):
        losses = method({"crops": [batch()["crops"][0].float()]}, clock())
    assert losses["loss"].dtype == torch.float32 and losses["loss"].isfinite()


def test_measures_say_what_each_teacher_costs_and_how_often_it_is_kept():
    method = small_unic(t_drop_prob=0.0)
    losses = method(batch(), clock())
    assert set(losses) == {"loss", *(f"{what}{t}" for t in "ab" for what in ("loss/cls_", "loss/patch_", "kept/"))}
    of_all = sum(losses[f"loss/{kind}_{t}"] for kind in ("cls", "patch") for t in "ab") / 4
    torch.testing.assert_close(losses["loss"], of_all)
    assert losses["kept/a"] == losses["kept/b"] == 1
    method.after_step(clock(), None)
    health = method.health()
    of_teachers = {f"{what}_of_{t}" for what in ("relative_loss", "hardest") for t in "ab"}
    assert set(health) == {"effective_rank", "statistics_drift"} | of_teachers and health["statistics_drift"] > 0


def test_health_counts_the_images_of_the_epoch_and_what_a_silent_student_would_cost():
    method, shown = small_unic(weights=(0.3, 0.7)), [batch(3), batch(5)]
    costs, silent, hits, images = torch.zeros(2).double(), torch.zeros(2).double(), torch.zeros(2), 0
    for piece in shown:
        (crop,) = piece["crops"]
        projected = method.student.lp(method.student.encoder.forward_blocks(crop))
        targets = method.standardisation({teacher.name: teacher(crop) for teacher in method.teachers})
        losses = token_losses(projected, targets, (0.3, 0.7))
        zeros = {name: (torch.zeros_like(c), torch.zeros_like(p)) for name, (c, p) in targets.items()}
        costs += losses[:, 0].sum(dim=1)
        silent += token_losses(zeros, targets, (0.3, 0.7))[:, 0].sum(dim=1)
        hits += torch.bincount(losses.mean(dim=1).argmax(dim=0), minlength=2)
        images += len(crop)
    method(batch(6), clock())  # of another epoch
    for piece in shown:
        method(piece, replace(clock(), epoch=1))
    method({"crops": [torch.full((3, 3, 16, 16), float("nan")).double()]}, replace(clock(), epoch=1))
    method._features = torch.randn(4, 12).double()
    health = method.health()
    for place, name in enumerate("ab"):
        torch.testing.assert_close(health[f"relative_loss_of_{name}"], (costs / silent)[place])
        assert health[f"hardest_of_{name}"] == hits[place] / 64  # of few images a share says little
    other = small_unic()
    other.load_epoch_state(method.epoch_state())
    assert torch.equal(other.record.sums, method.record.sums)
    other.load_epoch_state({})  # of a file of before
    other.load_epoch_state({"epoch": 1, "sums": torch.stack((method.record.sums, method.record.sums))})
    assert torch.equal(other.record.sums, 2 * method.record.sums)


def test_files_have_the_originals_names_and_load_again():
    method, other = small_unic(), small_unic(seed=1)
    method(batch(), clock())
    method.after_step(clock(), None)
    saved = {key: part.state_dict() for key, part in method.checkpoint_parts().items()}
    names = list(saved["model"])
    assert "encoder.mask_token" in names and "encoder.blocks.0.2.attn.qkv.weight" in names
    assert "lp.heads.a.cls.0.layers.0.weight" in names and set(saved["teacher_ft_stats"]) == {"a", "b"}
    for key, part in other.checkpoint_parts().items():
        part.load_state_dict(saved[key])
    torch.testing.assert_close(other.student.state_dict(), method.student.state_dict(), rtol=0, atol=0)
    torch.testing.assert_close(other.standardisation.mean, method.standardisation.mean, rtol=0, atol=0)


def test_a_run_at_another_size_begins_as_the_old_network_sees_that_size():
    old, new = small_unic(), small_unic(size=32, seed=1)
    old(batch(), clock())
    old.after_step(clock(), None)
    state = {key: part.state_dict() for key, part in old.checkpoint_parts().items()}
    assert new.adopt(state) == []
    images = batch(size=32)["crops"][0]
    for ours, theirs in zip(*(m.student.encoder.forward_blocks(images) for m in (new, old)), strict=True):
        torch.testing.assert_close(ours, theirs)
    assert torch.equal(new.standardisation.mean, old.standardisation.mean)
    fresh = small_unic(size=32, fresh_statistics=True)
    assert fresh.adopt(state) == ["teacher_ft_stats"] and not fresh.standardisation.mean.any()


def test_a_ladder_for_other_teachers_or_of_other_widths_is_refused():
    state = {key: part.state_dict() for key, part in small_unic().checkpoint_parts().items()}
    for changed, said in (
        ({"heads": (("a", 6), ("c", 4))}, "its ladder leads to a, b, --teachers are a, c"),
        ({"blocks": (0, 1)}, r"lp.heads.a.cls.2.layers.0.weight: \(5, 12\) there, none here\); pass its --lp_args"),
        ({"heads": (("a", 6), ("b", 8))}, r"lp.heads.b.cls.0.layers.2.weight: \(4, 5\) there, \(8, 5\) here"),
    ):
        with pytest.raises(UsageError, match=said):
            small_unic(**changed).adopt(state)
    alone = {name: value for name, value in state["model"].items() if not name.startswith("lp.")}
    fresh = small_unic().adopt({**state, "model": alone})
    assert all(name.startswith("model.lp.") for name in fresh) and fresh
    with pytest.raises(UsageError, match="its statistics are of a, the teachers are a, b"):
        small_unic().adopt({"model": alone, "teacher_ft_stats": {"a": state["teacher_ft_stats"]["a"]}})
    with pytest.raises(UsageError, match="its statistics are not those of teachers"):
        small_unic().adopt({"model": alone, "teacher_ft_stats": {"a": {}, "b": 1}})


@pytest.mark.parametrize("name", ["checkpoint_plain.pth", "checkpoint_namespace.pth"])
def test_a_run_begins_with_a_file_of_the_original(name):
    file = load_file(GOLDEN / name)
    state = {key: unwrapped(file[key]) for key in ("model", "teacher_ft_stats")}
    sizes = vit_arguments(read_backbone(GOLDEN / name)[0]) | {"num_heads": 3, "masked_im_modeling": True}
    lp = Ladder(**ladder_arguments(below(state["model"], "lp.")))
    heads = ladder_arguments(lp.state_dict())["heads"]
    method = UNIC(Student(VisionTransformer(**sizes), lp), [Given(*pair) for pair in heads.items()])
    assert method.adopt(state) == []
    saved = method.checkpoint_parts()["model"].state_dict()
    assert all(torch.equal(value, state["model"][name]) for name, value in saved.items())


def test_one_batch_is_learnt():
    method = small_unic()
    optimizer = build_optimizer("adamw", method.param_groups())
    losses = []
    for iteration in range(40):
        set_schedules(optimizer, Clock(0, iteration, lr=0.01))
        optimizer.zero_grad()
        loss = method(batch(), clock(iteration))["loss"]
        loss.backward()
        optimizer.step()
        method.after_step(clock(iteration), None)
        losses.append(loss.item())
    assert losses[-1] < 0.5 * max(losses[:3])


def options(*words: str) -> argparse.Namespace:
    args = parse_options(["--method", "unic", "--output_dir", ".", "--precision", "fp32", *words])
    check_options(args, ALONE)
    return args


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--t_drop_prob", "1.5"), "--t_drop_prob 1.5: must be from 0 to 1"),
        (("--t_drop_prob", "nan"), "--t_drop_prob nan: must be from 0 to 1"),
        (("--tnorm_ema_momentum_end", "-1"), "--tnorm_ema_momentum_end -1.0"),
        (("--lam_lcos", "-1"), "--lam_lcos -1.0: a weight"),
        (("--lam_lcos", "0", "--lam_lsl1", "0"), "nothing would be learnt"),
        (("--image_size", "225"), "--patch_size 16 does not divide --image_size 225; nearest 224 or 240"),
        (("--image_size", "0"), "--image_size 0 is smaller than one patch"),
        (("--arch", "swin_tiny"), "--arch swin_tiny: unic's student needs class tokens and patches"),
        (("--teachers", ""), "--teachers"),
        (("--batch_size_per_gpu", "1"), "--batch_size_per_gpu 1: teachers are standardised over the images of a step"),
        (("--lp_args", "{"), "--lp_args {: no Python literal"),
        (("--optim_args", "{'betas': (0.9, 1.0)}"), "--optim_args: betas (0.9, 1.0) have to be two numbers"),
        (("--optim_args", "{'eps': 0}"), "--optim_args: eps 0 has to be a positive number"),
        (("--optim_args", "{'lr': 1}"), "--optim_args: unknown key lr"),
    ],
)
def test_options_that_cannot_work_are_refused_in_one_line(words, said):
    with pytest.raises(UsageError) as error:
        options(*words)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_two_ways_to_write_the_same_dictionary_are_the_same_run():
    texts = ("{'std':0.02}", "{ 'std' : 2e-2, 'hidden_dim': 768 }")
    assert len({options("--lp_args", text).lp_args for text in texts}) == 1
    assert options("--optim_args", "{'betas': [0.9,0.99]}").optim_args == options().optim_args
