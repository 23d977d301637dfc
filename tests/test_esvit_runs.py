"""EsViT from the command line: regions on a small Swin, continued, divided, evaluated."""

import json
import os
import socket
import subprocess
import sys

import pytest
import torch

import training.checkpointing
from models.checkpoints import network_from_file
from models.reading import read_backbone
from tests.launch import ROOT, argv, assert_same_run, finish, load, make_images, run_here, start, wait_for_line
from utils import UsageError

ESVIT = {
    "method": "esvit",
    "arch": "swin_micro",
    "patch_size": None,
    "window_size": 3,
    "use_dense_prediction": "true",
    "global_crops_size": 64,
    "local_crops_size": 32,
    "drop_path_rate": 0.3,
    "batch_size_per_gpu": 8,
}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return make_images(tmp_path_factory.mktemp("images"), count=24)


@pytest.fixture(scope="module")
def uninterrupted(images, tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    patch = pytest.MonkeyPatch()
    run_here(patch, **ESVIT, data_path=images, output_dir=folder)
    patch.undo()
    return folder


def test_a_run_has_the_originals_names_and_its_checkpoint_is_evaluated(uninterrupted):
    state = load(uninterrupted)
    assert set(state) == {"student", "teacher", "dino_loss", "optimizer", "epoch", "args", "tutelage"}
    for key, prefix in (("student", "module."), ("teacher", "")):
        assert state[key][f"{prefix}layers.0.blocks.0.attn.qkv.weight"].shape == (96, 32)
        assert state[key][f"{prefix}head_dense.last_layer.weight_g"].shape == (48, 1)
    assert all((state["dino_loss"][name] != 0).all() for name in ("center", "center_grid"))
    network = network_from_file(uninterrupted / "checkpoint.pth")
    assert network.arch == "swin_micro" and network.report.complete and network.arguments["window_size"] == 3
    plain = {name: value for name, value in state.items() if name != "tutelage"}
    torch.save(plain, uninterrupted / "as_theirs.pth")
    assert read_backbone(uninterrupted / "as_theirs.pth")[1].layout.name == "EsViT training checkpoint"
    lines = [json.loads(line) for line in (uninterrupted / "log.txt").read_text().splitlines()]
    assert {"train_loss", "train_view", "train_region"} <= lines[-1].keys()
    (line,) = {tuple(name for name in line if "matched" in name or "region_c" in name) for line in lines}
    assert len(line) == 3


def test_two_nodes_of_a_process_each_equal_one_process_with_twice_the_batch(images, uninterrupted, tmp_path):
    """The command of two nodes, which meet at one address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = argv(**ESVIT | {"batch_size_per_gpu": 4}, data_path=images, output_dir=tmp_path)
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    node = ["--nnodes", "2", "--nproc_per_node", "1", "--master_addr", "127.0.0.1", "--master_port", str(port)]
    nodes = [
        subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", *node, "--node_rank", rank, "main_pretrain.py", *options],
            **{"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "env": env, "cwd": ROOT},
        )
        for rank in ("0", "1")
    ]
    for process in nodes:
        finish(process)
    assert_same_run(uninterrupted, tmp_path, rtol=1e-6, atol=1e-9)


def test_killed_within_an_epoch_and_while_saving_it_ends_with_the_same_bits(
    images, uninterrupted, tmp_path, monkeypatch
):
    options = {**ESVIT, "data_path": images, "output_dir": tmp_path, "save_every_minutes": 1e-9}
    process = start(**options)
    wait_for_line(process, "[0/2]  [1/3]")
    process.kill()
    process.wait()
    assert load(tmp_path)["tutelage"]["step"] > 0
    save, saved = training.checkpointing.save_torch, []

    def cut_off(state, path):
        saved.append(path)
        if len(saved) == 3:
            path.with_name(f"{path.name}.tmp").write_bytes(b"half of it")
            raise KeyboardInterrupt
        save(state, path)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(training.checkpointing, "save_torch", cut_off)
        run_here(patch, **options)
    run_here(monkeypatch, **options)
    assert_same_run(uninterrupted, tmp_path)


def test_regions_continue_a_run_of_views_with_its_epoch_and_moments_and_begin_fresh_themselves(
    images, tmp_path, monkeypatch, capsys
):
    options = {**ESVIT, "data_path": images}
    views = {**options, "use_dense_prediction": "false", "epochs": 1}
    run_here(monkeypatch, **views, output_dir=tmp_path / "views")
    file = tmp_path / "views" / "checkpoint.pth"
    before = load(tmp_path / "views")
    assert not any("head_dense" in name for name in before["student"])
    theirs = {name: value for name, value in before.items() if name != "tutelage"}  # as the original writes it
    torch.save(theirs, file)
    options["pretrained_weights_ckpt"] = file
    capsys.readouterr()
    run_here(monkeypatch, **options, output_dir=tmp_path / "both")
    said = capsys.readouterr().out
    (line,) = (line for line in said.splitlines() if line.startswith("beginning with"))
    assert "head_dense.mlp.0.* (2)" in line and "dino_loss.center_grid" in line
    assert "moments of student.head_dense.mlp.0.* (2)" in line and "moments of student.backbone" not in line
    assert "going on with its epoch 1, step 0 of 3" in said
    after = load(tmp_path / "both")
    assert after["epoch"] == 2 and (after["dino_loss"]["center_grid"] != 0).all()
    names = [name for group in after["tutelage"]["parameters"] for name in group]
    steps = {name: int(after["optimizer"]["state"][i]["step"]) for i, name in enumerate(names)}
    assert steps["student.backbone.norm.weight"] == 6 and steps["student.head_dense.mlp.0.weight"] == 3
    run_here(monkeypatch, **options, output_dir=tmp_path / "both")
    assert "not read, since the run in" in capsys.readouterr().out  # a run that is found goes on
    others = {"arch": "swin_tiny", "window_size": 7, "pretrained_weights_ckpt": file}
    with pytest.raises(UsageError) as error:
        run_here(monkeypatch, **options | others, output_dir=tmp_path / "other")
    assert "checkpoint.pth: its student is a swin_micro" in str(error.value) and "\n" not in str(error.value)
    assert not list((tmp_path / "other").glob("checkpoint*"))


def test_pieces_are_refused_where_batch_norm_would_see_them(images, tmp_path, monkeypatch):
    options = {**ESVIT, "use_bn_in_head": "true", "accum_iter": 2, "data_path": images}
    with pytest.raises(UsageError, match=r"--accum_iter 2: .*head.* is a batch norm"):
        run_here(monkeypatch, **options, output_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()
