"""Whole runs of Mugs: what tests/test_runs.py holds of DINO, with queues and memories."""

import json
import math
import signal
from pathlib import Path

import pytest
import torch

from methods.mugs import Mugs
from models.checkpoints import network_from_file
from tests.launch import assert_same_run, finish, flatten, load, make_images, run_here, start
from tests.narrow_heads import narrow
from training.online_knn import OnlineKNN

MUGS = {
    "method": "mugs",
    "out_dim": None,
    "group_out_dim": 48,
    "instance_queue_size": 56,
    "local_group_queue_size": 32,
    "local_group_knn_top_n": 3,
    "instance_out_dim": 12,
    "local_group_out_dim": 12,
    "norm_last_layer": "false",
    "drop_path_rate": 0.2,
}
NARROW = ["-m", "tests.narrow_heads"]  # not as a file, whose folder has a package named methods
STATE = ("student_mem", "teacher_mem", "instance-sup.", "local-group-sup.", "group-sup.")


@pytest.fixture(autouse=True)
def narrow_heads(monkeypatch):
    narrow(monkeypatch)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return make_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def uninterrupted(images, tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    patch = pytest.MonkeyPatch()
    narrow(patch)
    run_here(patch, output_dir=folder, data_path=images, **MUGS)
    patch.undo()
    return folder


def log_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]


def assert_same_notes(one: Path, other: Path, exact: bool = True) -> None:
    """Which images the rows of both memories are of, since when, and their norms."""
    a, b = (flatten(load(folder)["tutelage"]["epoch_state"]["memories"]) for folder in (one, other))
    for name, value in a.items():
        same = torch.equal if exact or not name.endswith("norms") else torch.allclose
        assert same(value, b[name]), name


def test_training_moves_everything_and_its_checkpoint_is_in_the_originals_layout(uninterrupted):
    state = load(uninterrupted)
    assert set(state) == {"student", "teacher", "optimizer", "epoch", "args", "tutelage", *STATE}
    heads = {"instance_head", "local_group_head", "group_head"}
    assert {name.split(".")[1] for name in state["student"]} == {"backbone", *heads}
    assert "module.group_head.projector.4.bias" in state["student"]
    assert not [name for name in state["teacher"] if "predictor" in name or name.startswith("module.")]
    memory = state["student_mem"]
    assert list(memory) == ["block.queue_q", "block.queue_k", "block.queue_v", "block.queue_ptr"]
    assert memory["block.queue_v"].data_ptr() == memory["block.queue_k"].data_ptr()
    # ten steps of eight images: 16 keys a step; 8 rows a step and a stride of 16 in 32 places, so two of four blocks
    assert state["instance-sup."]["queue"].shape == (12, 56) and int(state["instance-sup."]["queue_ptr"]) == 160 % 56
    assert int(state["teacher_mem"]["block.queue_ptr"]) == 0 and state["group-sup."]["center"].abs().sum() > 0
    notes = state["tutelage"]["epoch_state"]["memories"]
    assert (notes["teacher_mem"]["images"] >= 0).tolist() == ([True] * 8 + [False] * 8) * 2
    assert notes["teacher_mem"]["written"].max() == 9
    groups = state["optimizer"]["param_groups"]
    assert [group["name"] for group in groups] == ["normal_params", "patch_embed", "no_wd", "patch_embed_no_wd"]
    assert groups[1]["lr"] == pytest.approx(0.2 * groups[0]["lr"]) and groups[3]["weight_decay"] == 0
    logged = {"loss", "instance-sup.", "local-group-sup.", "group-sup.", "weak aug. ratio", "lr", "wd"}
    for line in log_of(uninterrupted):
        assert {f"train_{name}" for name in logged} <= set(line)
        parts = [line[f"train_{name}"] for name in ("instance-sup.", "local-group-sup.", "group-sup.")]
        assert line["train_loss"] == pytest.approx(sum(parts) / 3)
    for key in ("teacher", "student"):
        assert network_from_file(uninterrupted / "checkpoint.pth", key).report.complete


def test_two_processes_equal_one_with_twice_the_batch(images, uninterrupted, tmp_path):
    finish(start(nproc=2, script=NARROW, output_dir=tmp_path, data_path=images, **MUGS, batch_size_per_gpu=4))
    assert_same_run(uninterrupted, tmp_path, rtol=1e-6, atol=1e-9)
    assert_same_notes(uninterrupted, tmp_path, exact=False)
    for ours, theirs in zip(log_of(tmp_path), log_of(uninterrupted), strict=True):
        assert ours["train_loss"] == pytest.approx(theirs["train_loss"], rel=1e-9)


def test_pieces_and_recomputed_activations_equal_the_whole_batch(images, uninterrupted, tmp_path, monkeypatch):
    run_here(monkeypatch, output_dir=tmp_path, data_path=images, accum_iter=4, grad_checkpointing=True, **MUGS)
    assert_same_run(uninterrupted, tmp_path, rtol=1e-6, atol=1e-9)
    assert_same_notes(uninterrupted, tmp_path, exact=False)


def test_killed_while_it_saves_within_an_epoch_and_continued_ends_with_the_same_bits(
    images, uninterrupted, tmp_path, monkeypatch
):
    options = {"output_dir": tmp_path, "data_path": images, **MUGS, "save_every_minutes": 1e-9}
    dying = (
        "import os, signal, runpy, utils, torch\n"
        "save, count = torch.save, iter(range(99))\n"
        "def torn(value, file, *rest, **more):\n"
        "    save(value, file, *rest, **more)\n"
        "    if next(count) == 7:\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "torch.save = torn\n"
        f"runpy.run_module({NARROW[1]!r}, run_name='__main__')\n"
    )
    finish(start(script=["-c", dying], **options), code=-signal.SIGKILL)
    assert load(tmp_path)["tutelage"]["step"] > 0
    run_here(monkeypatch, **options)
    assert_same_run(uninterrupted, tmp_path)
    assert_same_notes(uninterrupted, tmp_path)


@pytest.mark.parametrize("epoch", [0, 1], ids=["the first epoch's", "the last epoch's, behind which no step is left"])
def test_stopped_in_the_online_test_and_continued_ends_with_the_same_bits(
    images, uninterrupted, tmp_path, monkeypatch, epoch
):
    options = {"output_dir": tmp_path, "data_path": images, **MUGS}
    with monkeypatch.context() as patch:
        patch.setattr(OnlineKNN, "due", lambda self, now: now == epoch)
        patch.setattr(OnlineKNN, "__call__", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run_here(monkeypatch, **options)
    state = load(tmp_path)
    assert (state["epoch"], state["tutelage"]["step"]) == (epoch, 5)
    run_here(monkeypatch, **options)
    assert_same_run(uninterrupted, tmp_path)
    assert_same_notes(uninterrupted, tmp_path)


def test_a_step_that_is_not_finite_leaves_queues_memories_and_pointers(images, tmp_path, monkeypatch):
    forward, after_step, unchanged = Mugs.forward, Mugs.after_step, []

    def poisoned(self, batch, clock):
        losses = forward(self, batch, clock)
        return losses | {"loss": losses["loss"] * (math.nan if clock.iteration in (3, 4) else 1.0)}

    def watch(self, clock, gate):
        before = {name: value.clone() for name, value in (*self.named_parameters(), *self.named_buffers())}
        after_step(self, clock, gate)
        now = dict((*self.named_parameters(), *self.named_buffers()))
        same = {name for name, value in before.items() if torch.equal(value, now[name])}
        if before.keys() - same <= {"used", "centres.pending"}:
            unchanged.append(clock.iteration)

    monkeypatch.setattr(Mugs, "forward", poisoned)
    monkeypatch.setattr(Mugs, "after_step", watch)
    run_here(monkeypatch, data_path=images, output_dir=tmp_path, **MUGS)
    assert unchanged == [3, 4]
    state = load(tmp_path)
    assert int(state["instance-sup."]["queue_ptr"]) == 8 * 16 % 56
    assert all(torch.isfinite(value).all() for key in STATE for value in state[key].values())


@pytest.mark.parametrize(
    ("weights", "local", "there"),
    [
        ("0 0.5 0", 0, {"local-group-sup.", "student_mem", "teacher_mem"}),
        ("1 0 2", 2, {"instance-sup.", "group-sup."}),
    ],
)
def test_a_loss_of_no_weight_is_not_built_and_global_crops_are_enough(
    images, tmp_path, monkeypatch, weights, local, there
):
    options = {"data_path": images, **MUGS, "local_crops_number": local, "epochs": 1, "warmup_epochs": 0}
    (tmp_path / "weights.yaml").write_text(f"loss_weights: [{', '.join(weights.split())}]\n")
    run_here(monkeypatch, output_dir=tmp_path, config=tmp_path / "weights.yaml", **options)
    state = load(tmp_path)
    assert there == set(STATE) & set(state)
    assert any("relation_blocks" in name for name in state["student"]) == ("student_mem" in there)
    assert any("instance_head" in name for name in state["student"]) == ("instance-sup." in there)
    (line,) = log_of(tmp_path)
    parts = [line[f"train_{name}"] for name in there if name.endswith("sup.")]
    assert line["train_loss"] == pytest.approx(sum(parts) / sum(map(float, weights.split())))


def test_bf16_and_the_originals_pixels_train_with_losses_in_float32(images, tmp_path, monkeypatch):
    options = {"data_path": images, **MUGS, "precision": "bf16", "augment": "pil", "epochs": 1, "warmup_epochs": 0}
    options |= {"local_group_advance_once": "true", "print_freq": 2}
    run_here(monkeypatch, output_dir=tmp_path, **options)
    state = load(tmp_path)
    assert int(state["teacher_mem"]["block.queue_ptr"]) == 5 * 8 % 32
    assert state["student_mem"]["block.queue_k"].dtype == torch.float32
    assert math.isfinite(log_of(tmp_path)[0]["train_loss"])


def test_a_run_of_the_original_goes_on_and_another_run_begins_with_its_networks(
    images, uninterrupted, tmp_path, monkeypatch, caplog
):
    file = load(uninterrupted)
    theirs = {key: value for key, value in file.items() if key != "tutelage"} | {"epoch": 1}
    (tmp_path / "on").mkdir()
    torch.save(theirs, tmp_path / "on" / "checkpoint.pth")
    run_here(monkeypatch, output_dir=tmp_path / "on", data_path=images, **MUGS)
    state = load(tmp_path / "on")
    assert "written by the original code" in caplog.text and state["epoch"] == 2
    assert int(state["instance-sup."]["queue_ptr"]) == (160 + 80) % 56
    written = state["tutelage"]["epoch_state"]["memories"]["teacher_mem"]["written"]
    assert sorted(set(written.tolist())) == [-1, *range(8, 10)], "of earlier rows nothing is known"

    options = {**MUGS, "epochs": 1, "warmup_epochs": 0, "lr": 0.0, "min_lr": 0.0, "momentum_teacher": 1.0}
    first = tmp_path / "on" / "checkpoint.pth"
    run_here(monkeypatch, output_dir=tmp_path / "next", data_path=images, init_from=first, **options)
    ours = load(tmp_path / "next")
    assert all(torch.equal(ours["teacher"][name], value) for name, value in state["teacher"].items())
    assert int(ours["instance-sup."]["queue_ptr"]) == 80 % 56, "queues begin anew"
