"""Whole runs of iBOT and AttMask: what tests/test_runs.py holds of DINO, with masks."""

import json
from pathlib import Path

import pytest
import torch

from models.checkpoints import network_from_file
from tests.launch import assert_same_run, finish, load, make_images, run_here, start, wait_for_line

MASKED = {
    "patch_out_dim": 48,
    "shared_head": "true",
    "warmup_teacher_temp_epochs": 1,
    "save_every_minutes": 1e-9,
}
METHODS = {
    "ibot": {"method": "ibot", "norm_last_layer": "false"},
    "attmask": {"method": "attmask", "pred_shape": "attmask_hint", "pred_ratio_var": 0.2, "show_max": 0.25},
}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return make_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module", params=METHODS)
def uninterrupted(request, images, tmp_path_factory):
    """(options, folder) of a run on one process that was never stopped."""
    folder = tmp_path_factory.mktemp(request.param)
    options = {"data_path": images, **MASKED, **METHODS[request.param]}
    patch = pytest.MonkeyPatch()
    run_here(patch, output_dir=folder, **options)
    patch.undo()
    return options, folder


def log_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]


def test_training_moves_everything_and_logs_what_the_original_logs(uninterrupted):
    _, folder = uninterrupted
    state = load(folder)
    assert set(state) == {"student", "teacher", "ibot_loss", "optimizer", "epoch", "args", "tutelage"}
    assert state["ibot_loss"]["center"].shape == (1, 48) and state["ibot_loss"]["center2"].shape == (1, 1, 48)
    assert all(centre.abs().sum() > 0 for centre in state["ibot_loss"].values())
    assert state["student"]["module.backbone.masked_embed"].abs().sum() > 0
    assert "backbone.masked_embed" not in state["teacher"]
    for name in ("loss", "cls", "patch", "acc", "lr", "wd", "nmi", "ari", "fscore", "adjacc"):
        assert all(f"train_{name}" in line for line in log_of(folder)), name
    for key in ("teacher", "student"):
        assert network_from_file(folder / "checkpoint.pth", key).report.complete


def test_two_processes_equal_one_with_twice_the_batch(uninterrupted, tmp_path):
    options, reference = uninterrupted
    finish(start(nproc=2, output_dir=tmp_path, **{**options, "batch_size_per_gpu": 4}))
    assert_same_run(reference, tmp_path, rtol=1e-6, atol=1e-9)
    for ours, theirs in zip(log_of(tmp_path), log_of(reference), strict=True):
        for name in ("loss", "cls", "patch", "acc", "nmi", "ari", "fscore"):
            assert ours[f"train_{name}"] == pytest.approx(theirs[f"train_{name}"], rel=1e-9), name


def test_killed_within_an_epoch_and_started_again_ends_with_the_same_bits(uninterrupted, tmp_path, monkeypatch):
    options, reference = uninterrupted
    for line in ("[0/2]  [3/5]", "[1/2]  [1/5]"):
        process = start(output_dir=tmp_path, **options | {"num_workers": 1})
        wait_for_line(process, line)
        process.kill()
        process.wait()
    assert load(tmp_path)["tutelage"]["step"] > 0
    run_here(monkeypatch, output_dir=tmp_path, **options | {"num_workers": 2})
    assert_same_run(reference, tmp_path)


def test_pieces_and_recomputed_activations_equal_the_whole_batch(uninterrupted, tmp_path, monkeypatch):
    options, reference = uninterrupted
    run_here(monkeypatch, output_dir=tmp_path, accum_iter=4, grad_checkpointing=True, **options)
    assert_same_run(reference, tmp_path, rtol=1e-6, atol=1e-9)


def test_batch_norm_in_the_head_sees_the_batches_of_all_processes(images, tmp_path, monkeypatch):
    options = {"data_path": images, **MASKED, **METHODS["ibot"], "epochs": 1, "warmup_epochs": 0}
    options |= {"shared_head": "false", "norm_in_head": "syncbn"}
    run_here(monkeypatch, output_dir=tmp_path / "one", **options)
    finish(start(nproc=2, output_dir=tmp_path / "two", **options | {"batch_size_per_gpu": 4}))
    assert_same_run(tmp_path / "one", tmp_path / "two", rtol=1e-6, atol=1e-9)


def test_a_swin_student_is_shown_masks_and_its_teacher_evaluates(images, tmp_path, monkeypatch):
    sizes = {"global_crops_size": 64, "local_crops_size": 32, "local_crops_number": 1, "batch_size_per_gpu": 4}
    short = {"subset": 1, "epochs": 1, "warmup_epochs": 0, "pred_ratio": 0.5}
    options = {**METHODS["ibot"], **MASKED, **sizes, **short, "arch": "swin_tiny", "patch_size": None}  # left out
    run_here(monkeypatch, data_path=images, output_dir=tmp_path, **options)
    assert log_of(tmp_path)[0]["train_hidden_patches"] > 0 and log_of(tmp_path)[0]["train_patch"] > 0
    network = network_from_file(tmp_path / "checkpoint.pth")
    assert network.arch == "swin_tiny" and network.report.complete
    assert load(tmp_path)["args"]["patch_size"] == 4


@pytest.mark.parametrize("name", METHODS)
def test_bf16_trains_and_the_dry_run_shows_what_is_hidden(images, tmp_path, monkeypatch, name):
    options = {"data_path": images, **MASKED, **METHODS[name], "precision": "bf16", "epochs": 1, "warmup_epochs": 0}
    assert run_here(monkeypatch, output_dir=tmp_path / "dry", dry_run=True, **options) == 0
    picture = torch.from_numpy(read_picture(tmp_path / "dry" / "first_batch.png"))
    pink = (picture[..., 0] > 150) & (picture[..., 1] < 110) & (picture[..., 2] > 90)
    assert pink.float().mean() > 0.02
    run_here(monkeypatch, output_dir=tmp_path / "run", **options)
    assert all(torch.isfinite(tensor).all() for tensor in load(tmp_path / "run")["student"].values())


def read_picture(path: Path):
    import numpy as np
    from PIL import Image

    return np.array(Image.open(path))


def test_an_iteration_that_was_not_finite_is_run_again_with_its_masks(images, tmp_path, monkeypatch, caplog):
    from utils import RunStopped

    caplog.set_level("INFO", "tutelage")
    options = {"data_path": images, **MASKED, **METHODS["attmask"]}
    options |= {"optimizer": "sgd", "lr": 1e150, "clip_grad": 0, "warmup_epochs": 0, "max_skipped": 3}
    with pytest.raises(RunStopped, match="3 steps in a row"):
        run_here(monkeypatch, output_dir=tmp_path, **options)
    (box,) = tmp_path.glob("nonfinite_*.pth")
    assert run_here(monkeypatch, replay=box, output_dir=tmp_path, data_path=images) == 0
    assert "first broken layer: " in caplog.text
