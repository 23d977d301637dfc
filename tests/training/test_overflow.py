"""Steps in fp16, whose gradients overflow now and then: a scaler works on a processor, too."""

import dataclasses
import math

import pytest
import torch

import main_pretrain
from methods.dino import DINO
from tests.launch import argv, load, make_images
from training.blackbox import SCALE_FALLS
from training.options import check_options, parse_options
from utils import RunStopped, World

ALONE = World(0, 1, 0, torch.device("cpu"))
TOO_LARGE = 2.0**127  # a scale that no gradient survives


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return make_images(tmp_path_factory.mktemp("images"))


@pytest.fixture
def scaled_run(images, tmp_path):
    def build(**options) -> main_pretrain.Run:
        options = {"precision": "fp32", "warmup_epochs": 0, "lr": 0.01, "freeze_last_layer": 0, **options}
        args = parse_options(argv(data_path=images, output_dir=tmp_path, epochs=1, **options))
        check_options(args, ALONE)
        run = main_pretrain.build(args, ALONE)
        run.scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        run.monitor.world = dataclasses.replace(ALONE, rank=1)  # which writes nothing
        return run

    return build


def watch(monkeypatch, run, between=lambda iteration: None) -> list[set[str]]:
    """Which parts every step changed; ``between`` is called after it."""
    parts = {"student": run.method.student, "teacher": run.method.teacher, "centre": run.method.centres}
    before = {name: {key: value.clone() for key, value in part.state_dict().items()} for name, part in parts.items()}
    changed, after_step = [], DINO.after_step

    def watched(self, clock, gate):
        after_step(self, clock, gate)
        now = {name: {key: value.clone() for key, value in part.state_dict().items()} for name, part in parts.items()}
        changed.append({n for n in parts if any(not torch.equal(before[n][key], now[n][key]) for key in now[n])})
        before.update(now)
        between(clock.iteration)

    monkeypatch.setattr(DINO, "after_step", watched)
    return changed


def train(run) -> None:
    main_pretrain.train_one_epoch(run, 0, main_pretrain.device_pieces(run, 0, 0))


EVERYTHING = {"student", "teacher", "centre"}


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "lars"])
def test_an_overflow_stops_the_optimiser_alone_as_in_the_original_and_nobody_waits_to_know(
    scaled_run, tmp_path, monkeypatch, optimizer
):
    run, counts = scaled_run(optimizer=optimizer), []

    def between(iteration):
        counts.append(run.blackbox.overflowed_in_a_row)
        if iteration in (1, 2):
            run.scaler.update(TOO_LARGE if iteration == 1 else 4.0)

    changed = watch(monkeypatch, run, between)
    monkeypatch.setattr(run.scaler, "_maybe_opt_step", lambda *_: pytest.fail("the scaler asks for a value"))
    train(run)
    assert changed == [EVERYTHING, EVERYTHING, {"teacher", "centre"}, EVERYTHING, EVERYTHING]
    assert counts == [0, 0, 1, 0, 0] and run.blackbox.skipped_in_a_row == 0
    assert not list(tmp_path.glob("nonfinite_*"))


def test_a_loss_that_is_not_finite_changes_nothing_even_where_its_gradients_are(scaled_run, tmp_path, monkeypatch):
    run, forward = scaled_run(), DINO.forward

    def poisoned(self, batch, clock):
        losses = forward(self, batch, clock)
        return {**losses, "loss": losses["loss"] + (math.nan if clock.iteration == 2 else 0.0)}

    monkeypatch.setattr(DINO, "forward", poisoned)
    changed = watch(monkeypatch, run)
    train(run)
    assert changed == [EVERYTHING, EVERYTHING, set(), EVERYTHING, EVERYTHING]
    assert [path.name for path in tmp_path.glob("nonfinite_*")] == ["nonfinite_0000002.pth"]
    assert run.scaler.get_scale() == 2.0


def test_overflows_without_end_stop_the_run_but_not_those_of_a_scale_that_is_being_found(scaled_run, tmp_path):
    run = scaled_run(max_skipped=2, batch_size_per_gpu=2)
    run.method.student.backbone.cls_token.register_hook(lambda gradient: gradient * math.inf)
    with pytest.raises(RunStopped, match=rf"{SCALE_FALLS + 2} steps in a row overflowed in fp16.*--precision bf16"):
        train(run)
    state = load(tmp_path)
    assert state["tutelage"]["step"] == SCALE_FALLS + 2
    assert state["fp16_scaler"]["scale"] == 4.0 * 0.5 ** (SCALE_FALLS + 2)


def test_a_scaler_goes_on_from_a_checkpoint(scaled_run, tmp_path):
    run, other = scaled_run(), scaled_run()
    train(run)
    run.monitor.world = other.monitor.world = ALONE
    main_pretrain.save(run, 0, run.niter)
    main_pretrain.begin(other)
    assert other.scaler.state_dict() == run.scaler.state_dict()
    assert other.scaler.state_dict()["_growth_tracker"] == 5
