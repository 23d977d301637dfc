"""Whole runs of UDI: what tests/test_runs.py holds of DINO, with sampled places."""

import json

import pytest

from models.checkpoints import network_from_file
from tests.launch import assert_same_run, finish, load, make_images, run_here, start, wait_for_line

UDI = {"method": "udi", "warmup_teacher_temp_epochs": 1, "save_every_minutes": 1e-9, "local_sampling_window_size": 1}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return make_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def uninterrupted(images, tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    patch = pytest.MonkeyPatch()
    run_here(patch, output_dir=folder, data_path=images, accum_iter=2, **UDI)
    patch.undo()
    return folder


def test_training_moves_everything_and_logs_what_the_original_logs(uninterrupted):
    state = load(uninterrupted)
    assert set(state) == {"student", "teacher", "udi_loss", "optimizer", "epoch", "args", "tutelage"}
    centre = state["udi_loss"]["centering.center"]
    assert centre.shape == (3, 48) and (centre.abs().sum(dim=1) > 0).all()
    for line in map(json.loads, (uninterrupted / "log.txt").read_text().splitlines()):
        assert {"train_loss", "train_g_cl", "train_l_cl", "train_g_mcl", "train_l_mcl", "train_g_pch"} <= set(line)
    for key in ("teacher", "student"):
        network = network_from_file(uninterrupted / "checkpoint.pth", key)
        assert network.report.complete and network.arguments["num_class_tokens"] == 2


def test_two_processes_equal_one_with_two_pieces(images, uninterrupted, tmp_path):
    """parity: the patch loss is divided by the places of a process, so pieces are what processes are."""
    finish(start(nproc=2, data_path=images, output_dir=tmp_path, **UDI, batch_size_per_gpu=4))
    assert_same_run(uninterrupted, tmp_path, rtol=1e-6, atol=1e-9)


def test_without_patches_two_processes_equal_one_with_twice_the_batch(images, tmp_path, monkeypatch):
    options = {"data_path": images, **UDI, "include_patch": "false", "number_cls_token": 1, "local_crops_number": 0}
    run_here(monkeypatch, output_dir=tmp_path / "one", epochs=1, warmup_epochs=0, **options)
    small = options | {"batch_size_per_gpu": 4}
    finish(start(nproc=2, output_dir=tmp_path / "two", epochs=1, warmup_epochs=0, **small))
    assert_same_run(tmp_path / "one", tmp_path / "two", rtol=1e-6, atol=1e-9)


def test_killed_within_an_epoch_and_started_again_ends_with_the_same_bits(images, uninterrupted, tmp_path, monkeypatch):
    options = {"data_path": images, "output_dir": tmp_path, "accum_iter": 2, **UDI}
    for line in ("[0/2]  [3/5]", "[1/2]  [1/5]"):
        process = start(**options | {"num_workers": 1})
        wait_for_line(process, line)
        process.kill()
        process.wait()
    assert load(tmp_path)["tutelage"]["step"] > 0
    run_here(monkeypatch, **options | {"num_workers": 2})
    assert_same_run(uninterrupted, tmp_path)


def test_bf16_and_the_originals_pixels_train(images, tmp_path, monkeypatch):
    options = {"data_path": images, **UDI, "precision": "bf16", "augment": "pil", "epochs": 1, "warmup_epochs": 0}
    run_here(monkeypatch, output_dir=tmp_path, **options)
    assert load(tmp_path)["epoch"] == 1
