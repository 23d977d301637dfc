"""Everything that a method may decide for itself, decided otherwise by one of them: the loop knows none of it."""

import shutil

import numpy as np
import pytest
import torch

from methods import METHODS
from methods.dino import DINO
from methods.parts import Renamed
from tests.launch import assert_same_run, load, make_images, run_here, tensorboard_of
from training import online_knn


class Count:
    """A state that is no module."""

    def __init__(self):
        self.steps = torch.zeros((), dtype=torch.int64)

    def state_dict(self) -> dict:
        return {"of": {"steps": self.steps.clone()}}

    def load_state_dict(self, state: dict) -> None:
        self.steps = state["of"]["steps"].clone()


def to_file(state: dict) -> dict:
    return {name.replace("backbone.", "encoder."): value for name, value in state.items()}


def from_file(state: dict) -> dict:
    return {name.replace("encoder.", "backbone."): value for name, value in state.items()}


class Odd(DINO):
    name = "odd"
    wrapped = ("model",)
    inherited = ("model",)

    @staticmethod
    def add_arguments(parser):
        DINO.add_arguments(parser)
        parser.set_defaults(weight_decay_end=None)

    @staticmethod
    def image_size(args):
        return 24

    @staticmethod
    def schedules(args, niter, global_batch):
        last = np.full(args.epochs * niter, 1 / global_batch)
        return DINO.schedules(args, niter, global_batch) | {"momentum": last}

    def place(self, device, dtype, half):
        self.placed, self.count, self.clocks, self.drawn = (dtype, half), Count(), [], 0
        return super().place(device, dtype, half)

    def clip_gradients(self, clip, clock):
        self.clocks.append(clock)
        return super().clip_gradients(clip / 10 if clock.epoch else clip, clock)

    def after_step(self, clock, gate):
        super().after_step(clock, gate)
        self.count.steps += 1

    def pictures(self, batch, clock):
        yield "whole", np.zeros((4, 6, 3), np.uint8)
        self.drawn += 1
        yield "more", np.zeros((2, 2, 3), np.uint8)

    def checkpoint_parts(self):
        student = Renamed(self.student, to_file, from_file)
        return {"model": student, "teacher": self.teacher, "dino_loss": self.centres, "count": self.count}


@pytest.fixture
def odd(tmp_path, monkeypatch):
    """(methods that were built, how to run one)."""
    images, built, build = make_images(tmp_path / "images", count=16), [], Odd.build.__func__
    monkeypatch.setitem(METHODS, "odd", Odd)
    monkeypatch.setattr(Odd, "build", classmethod(lambda cls, args: built.append(build(cls, args)) or built[-1]))

    def run(folder: str, **options) -> int:
        return run_here(monkeypatch, method="odd", data_path=images, output_dir=tmp_path / folder, **options)

    return built, run


def test_a_run_follows_whatever_its_method_decides(odd, tmp_path, monkeypatch):
    (built, run), crops = odd, []
    monkeypatch.setattr(online_knn, "eval_transform", lambda crop, resize: crops.append(crop))
    assert run("out", saveckp_freq=1) == 0
    (method,), state = built, load(tmp_path / "out")
    assert method.placed == (torch.float64, None) and crops == [24]
    assert [(clock.iteration, clock.global_batch, clock.momentum) for clock in method.clocks] == [
        (iteration, 8, 1 / 8) for iteration in range(4)
    ]
    assert {clock.weight_decay for clock in method.clocks} == {0.04}
    assert state["count"] == {"of": {"steps": torch.tensor(4)}} and state["tutelage"]["image_size"] == 24
    assert all(name.startswith(("module.encoder.", "module.head.")) for name in state["model"])
    assert all(name.startswith(("backbone.", "head.")) for name in state["teacher"])
    assert tensorboard_of(tmp_path / "out").Tags()["images"][:1] == ["crops"] and method.drawn == 0

    (tmp_path / "again").mkdir()
    shutil.copy(tmp_path / "out" / "checkpoint0000.pth", tmp_path / "again" / "checkpoint.pth")
    run("again", saveckp_freq=1)
    assert_same_run(tmp_path / "out", tmp_path / "again", first_epoch=1)
    assert built[-1].count.steps == 4

    run("next", init_from=tmp_path / "out" / "checkpoint.pth", epochs=1)
    assert built[-1].count.steps == 2, "what is not inherited began fresh"


def test_the_dry_run_draws_all_it_wants_to_be_seen_and_counts_what_has_parameters(odd, tmp_path, caplog):
    caplog.set_level("INFO", "tutelage")
    (built, run) = odd
    assert run("dry", dry_run=True, precision="bf16") == 0
    assert sorted(path.name for path in (tmp_path / "dry").iterdir()) == ["more.png", "whole.png"]
    assert built[0].drawn == 1 and built[0].placed == (torch.float32, torch.bfloat16)
    assert "parameters of the model" in caplog.text and "parameters of the count" not in caplog.text
