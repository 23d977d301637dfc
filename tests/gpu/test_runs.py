"""Whole runs on a real card: what a run ends with does not depend on how it was carried out."""

import os
import socket

import pytest

import main_pretrain
from tests.launch import assert_same_run, finish, load, make_images, run_here, start, wait_for_line
from utils import RunStopped

CARD = {"device": "cuda", "drop_path_rate": 0.1}
SWIN = {"arch": "swin_tiny", "patch_size": 4, "window_size": 4, "global_crops_size": 64, "local_crops_size": 32}
MASKED = {"patch_out_dim": 48, "shared_head": "true", "warmup_teacher_temp_epochs": 0}
RUNS = {
    "bf16": {"precision": "bf16"},
    "fp16": {"precision": "fp16", "accum_iter": 2},
    "fp32": {"precision": "fp32", "grad_checkpointing": True},
    "iBOT": {"method": "ibot", "precision": "bf16", **MASKED},
    "AttMask": {"method": "attmask", "precision": "fp16", **MASKED},
    "UDI": {"method": "udi", "precision": "bf16", "warmup_teacher_temp_epochs": 0, "local_sampling_window_size": 1},
    "Swin": {"precision": "bf16", **SWIN},
    "ResNet": {"precision": "bf16", "arch": "resnet18", "optimizer": "lars", "use_bn_in_head": "true"},
}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return make_images(tmp_path_factory.mktemp("images"))


@pytest.mark.parametrize("options", RUNS.values(), ids=RUNS)
def test_a_run_that_is_stopped_and_continued_ends_with_the_same_bits(images, tmp_path, monkeypatch, options):
    options = {"data_path": images, **CARD, **options}
    run_here(monkeypatch, output_dir=tmp_path / "whole", **options)

    check = main_pretrain.save_or_stop

    def stop_once(run, epoch, step, *rest, **named):
        if (epoch, step) == (1, 2):
            main_pretrain.save(run, epoch, step)
            raise RunStopped("for the test")
        check(run, epoch, step, *rest, **named)

    with monkeypatch.context() as patch:
        patch.setattr(main_pretrain, "save_or_stop", stop_once)
        with pytest.raises(RunStopped):
            run_here(monkeypatch, output_dir=tmp_path / "stopped", **options)
    assert load(tmp_path / "stopped")["tutelage"]["step"] == 2
    run_here(monkeypatch, output_dir=tmp_path / "stopped", **options)
    assert_same_run(tmp_path / "whole", tmp_path / "stopped")


def test_a_run_that_is_killed_and_continued_ends_with_the_same_bits(images, tmp_path, monkeypatch):
    options = {"data_path": images, **CARD, "precision": "bf16", "save_every_minutes": 1e-9, "num_workers": 2}
    run_here(monkeypatch, output_dir=tmp_path / "whole", **options)
    process = start(output_dir=tmp_path / "killed", **options)
    wait_for_line(process, "[1/2]  [1/5]")
    process.kill()
    process.wait()
    run_here(monkeypatch, output_dir=tmp_path / "killed", **options)
    assert_same_run(tmp_path / "whole", tmp_path / "killed")


@pytest.mark.parametrize("options", [{}, {"use_bn_in_head": "true"}], ids=["layer norm", "batch norm in the head"])
def test_two_processes_on_one_card_equal_one_with_twice_the_batch(images, tmp_path, monkeypatch, options):
    """Each process is told that it is alone on its machine, so that both take the first card; NCCL would refuse."""
    options = {"data_path": images, **CARD, **options}
    run_here(monkeypatch, output_dir=tmp_path / "one", **options)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    meeting = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    processes = []
    for rank in range(2):
        for name, value in {**meeting, "RANK": str(rank), "LOCAL_RANK": "0"}.items():
            monkeypatch.setitem(os.environ, name, value)
        processes.append(start(output_dir=tmp_path / "two", backend="gloo", **options | {"batch_size_per_gpu": 4}))
    for process in processes:
        finish(process)
    assert_same_run(tmp_path / "one", tmp_path / "two", rtol=1e-6, atol=1e-9)
