"""Mugs: what of it is not seen in whole runs (tests/test_mugs_runs.py) or in golden cases (tests/parity/mugs.py)."""

import torch

from methods.base import Clock
from methods.mugs import Mugs, from_file, to_file
from models import build_backbone
from tests.narrow_heads import narrow
from tests.parity.mugs_training import small_mugs
from tests.twins import random
from training.options import parse_options

SIZES = {"dim": 6, "depth": 2, "heads": 2, "patch": 4, "img": 8, "hid": 5, "pred": 4, "out": 3, "gout": 7, "bott": 4}


def batch(images: int, first: int = 0) -> dict:
    def crops(side: int, seed: int) -> torch.Tensor:
        return torch.stack([random(3, side, side, seed=100 * seed + first + image) for image in range(images)])

    weak = torch.tensor([(first + image) % 3 > 0 for image in range(images)])
    crops_ = [crops(8, seed) for seed in range(4)] + [crops(4, 4)]
    return {"crops": crops_, "weak": weak, "indices": first + torch.arange(images)}


def test_the_original_clips_its_largest_network_closer_after_epoch_100(monkeypatch):
    for late, epoch, factor in ((True, 101, 0.1), (True, 100, 1.0), (False, 101, 1.0)):
        method = small_mugs(SIZES, clip_late=late).double()
        for parameter in method.student.parameters():
            parameter.grad = torch.ones_like(parameter)
        method.clip_gradients(0.5, Clock(epoch, 0))
        norms = [parameter.grad.norm() for parameter in method.student.parameters() if parameter.numel() > 1]
        assert max(norms) <= 0.5 * factor < max(norms) * 1.01
    narrow(monkeypatch)
    monkeypatch.setattr("methods.mugs.build_backbone", lambda arch, **options: build_backbone("vit_micro", **options))
    built = [Mugs.build(small_options(arch)).clip_late for arch in ("vit_large", "vit_base")]
    assert built == [True, False]


def small_options(arch: str):
    sizes = "--group_out_dim 8 --instance_queue_size 9 --local_group_queue_size 9 --patch_size 112"
    return parse_options(["--method", "mugs", "--arch", arch, *sizes.split()])


def test_what_is_erased_is_what_the_networks_see_and_without_it_they_see_the_crop():
    method = small_mugs(SIZES).double()
    whole, marked = batch(2), batch(2)
    marked["crops"][2].view(-1)[[5, 7]] = torch.tensor([9.0, -9.0]).double()
    nothing = [torch.empty(0, dtype=torch.int64), torch.empty(0)]
    erased = [nothing, nothing, [torch.tensor([5, 7]), torch.tensor([9.0, -9.0])], nothing, nothing]
    losses = [method(given, Clock(0, 0))["loss"] for given in (marked, whole | {"erased": erased}, batch(2))]
    assert losses[0] == losses[1] != losses[2]


def test_names_in_files_are_the_originals_and_come_back():
    state = small_mugs(SIZES).student.state_dict()
    stored = to_file(state)
    assert [name for name in stored if name not in state] == [
        f"group_head.projector.{layer}.{kind}" for layer in (0, 2, 4) for kind in ("weight", "bias")
    ]
    assert list(from_file(stored)) == list(state)


def test_the_teacher_follows_all_but_the_predictors_and_its_relation_block_too():
    method = small_mugs(SIZES)
    followed = {id(ours) for ours, _ in method.follower.pairs}
    assert followed == {id(parameter) for parameter in method.teacher.parameters()}
    extra = {name.split(".")[1] for name, _ in method.student.named_parameters()} - {
        name.split(".")[1] for name, _ in method.teacher.named_parameters()
    }
    assert extra == {"predictor"}
    assert torch.equal(method.teacher.backbone.cls_token, method.student.backbone.cls_token)


def test_health_tells_what_the_memory_returned_and_where_positives_stand():
    method = small_mugs(SIZES, queue_sizes=(16, 16), top_n=2).double()
    for step in range(2):
        method(batch(4, 4 * step), Clock(0, step))
        method.after_step(Clock(0, step), None)
    found = {name: float(value) for name, value in method.health().items()}
    assert {"instance_rank", "local_group_rank", "effective_rank", "prototypes_used"} <= set(found)
    assert 0 < found["memory_written"] < 1 and found["retrieved_age"] >= 0 and 0 <= found["retrieved_spread"] <= 1
    method.memories["student"].unit.fill_(0.5)
    method.memories["student"].unit[:, 1:] = 0
    assert float(method.health()["retrieved_spread"]) == 0.75
