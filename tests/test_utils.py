import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import utils
from utils import (
    Parser,
    UsageError,
    all_gather_rows,
    barrier,
    bool_flag,
    check_writable,
    cosine_scheduler,
    escape,
    init_world,
    make_folder,
    run_cli,
    save_atomically,
    save_torch,
    warmup_scheduler,
)


def test_the_cosine_begins_with_its_warm_up_and_never_reaches_its_end():
    values = cosine_scheduler(1.0, 0.1, epochs=10, niter_per_ep=5, warmup_epochs=2)
    assert len(values) == 50
    assert values[0] == 0.0
    assert values[9] == values[10] == 1.0, "the peak stands on both sides of the junction"
    assert 0.1 < values[-1] < 0.11
    assert np.all(np.diff(values[10:]) < 0)


def test_a_warm_up_as_long_as_training_is_all_there_is():
    assert np.array_equal(cosine_scheduler(1.0, 0.0, 2, 3, warmup_epochs=2), np.linspace(0, 1, 6))
    assert np.array_equal(warmup_scheduler(0.0, 1.0, 3, 3), [0.0, 0.5, 1.0])


def test_schedules_without_warm_up_are_constant_or_cosine():
    assert np.array_equal(warmup_scheduler(0.04, 0.07, 0, 3), [0.07] * 3)
    assert cosine_scheduler(0.996, 1.0, 1, 4)[0] == 0.996


def test_a_warm_up_longer_than_training_is_refused():
    with pytest.raises(ValueError, match="longer than the 2 epochs"):
        cosine_scheduler(1, 0, 2, 5, warmup_epochs=3)
    with pytest.raises(ValueError, match="3 epochs is longer"):
        warmup_scheduler(1, 0, 3, 2)


@pytest.mark.parametrize(("text", "value"), [("on", True), ("TRUE", True), ("1", True), ("Off", False), ("0", False)])
def test_booleans_are_read_as_the_originals_read_them(text, value):
    assert bool_flag(text) is value


def test_help_shows_defaults(capsys):
    parser = Parser()
    parser.add_argument("--size", default=7, help="pixels")
    with pytest.raises(SystemExit):
        parser.parse_args(["--help"])
    assert "pixels (default: 7)" in capsys.readouterr().out


def test_a_usage_error_is_one_line_and_exit_code_2(capsys):
    def main():
        raise UsageError("--x 3: too large; use 2")

    with pytest.raises(SystemExit) as caught:
        run_cli(main)
    assert caught.value.code == 2
    assert capsys.readouterr().err == "error: --x 3: too large; use 2\n"


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("photo 1.jpg", "photo 1.jpg"),
        ("Größe/日本.png", "Größe/日本.png"),
        ("a\nerror: b\r\t\x00", r"a\nerror: b\r\t\x00"),
        ("\x1b[2J\x9b31m.png", r"\x1b[2J\x9b31m.png"),
        (os.fsdecode(b"\xff\xe9.png"), r"\xff\xe9.png"),
        ("gpj.\u202egnp", r"gpj.\u202egnp"),  # turns what follows around
    ],
)
def test_a_name_is_shown_on_one_line_and_without_codes(name, shown):
    assert escape(name) == shown == escape(escape(name)) and escape(Path(name)) == shown


def test_an_error_obeys_no_code_in_a_name(capsys):
    def main():
        raise UsageError("--x \x1b]0;title\x07: a table\n  of two lines")

    with pytest.raises(SystemExit):
        run_cli(main)
    assert capsys.readouterr().err == "error: --x \\x1b]0;title\\x07: a table\n  of two lines\n"


@pytest.mark.parametrize(("place", "told"), [("0", True), ("1", False), ("", True), ("one", True)])
def test_of_several_processes_one_tells_and_every_one_that_does_not_know_its_place(monkeypatch, capsys, place, told):
    monkeypatch.setenv("LOCAL_RANK", place)

    def main():
        raise UsageError("--x 3: too large")

    with pytest.raises(SystemExit):
        run_cli(main)
    assert bool(capsys.readouterr().err) == told


def test_a_failed_write_leaves_the_old_file_and_no_rest(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")

    def fail(temporary):
        temporary.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        save_atomically(path, fail)
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_what_is_saved_loads_without_pickle(tmp_path):
    save_torch({"a": torch.ones(2), "b": [1, "x"]}, tmp_path / "file.pth")
    loaded = torch.load(tmp_path / "file.pth", weights_only=True)
    assert torch.equal(loaded["a"], torch.ones(2)) and loaded["b"] == [1, "x"]


def test_folders_that_cannot_be_made_are_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="is a file"):
        check_writable(tmp_path / "file" / "out")
    with pytest.raises(UsageError, match="cannot be made"):
        make_folder(tmp_path / "file" / "out")
    check_writable(tmp_path / "deep" / "er")
    assert not (tmp_path / "deep").exists()


def test_a_gpu_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(UsageError, match="shows no GPU"):
        init_world("cuda")


def test_nccl_without_a_gpu_is_refused(monkeypatch):
    with pytest.raises(UsageError, match=r"--backend nccl: .*pass --backend gloo"):
        init_world("cpu", backend="nccl")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(UsageError, match="--backend nccl"):
        init_world("auto", backend="nccl")


def test_more_processes_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for name, value in {"RANK": "0", "WORLD_SIZE": "4", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match=r"4 processes on this machine, .* 2 GPU\(s\): .*--nproc_per_node"):
        init_world("auto")


@pytest.mark.parametrize("bound", [True, False])
def test_a_task_of_srun_that_is_shown_one_gpu_takes_it(monkeypatch, bound):
    """``srun --gpus-per-task=1``: every task of a machine has its own, as cuda:0. torchrun shows all to everybody."""
    joined = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", joined.append)
    monkeypatch.setattr(utils, "join", lambda *arguments: joined.append(arguments[-2:]))
    srun = {"SLURM_PROCID": "3", "SLURM_LOCALID": "3", "SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_TASKS_PER_NODE": "4"}
    torchrun = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "3", "LOCAL_WORLD_SIZE": "4"}
    for name, value in (srun if bound else srun | torchrun).items():
        monkeypatch.setenv(name, value)
    if not bound:
        with pytest.raises(UsageError, match="4 processes on this machine"):
            init_world("auto")
        return
    world = init_world("auto")
    own = torch.device("cuda", 0)
    assert world == utils.World(3, 4, 3, own) and joined == [own, ("nccl", own)]


def two_tasks(code: str) -> list[list[str]]:
    """The words that two tasks of srun print."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    env = {**os.environ, "SLURM_NTASKS": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    tasks = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            env={**env, "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    try:
        return [task.communicate(timeout=60)[0].split() for task in tasks]
    finally:
        for task in tasks:
            task.kill()


GATHER = """
from utils import *

world = init_world("cpu")
print(world.rank, world.size, world.local_rank)
for kind in (torch.float32, torch.float64, torch.int64, torch.bool, torch.bfloat16):
    rows = torch.tensor([[0, 1, 0], [1, 1, 0]]).mul(world.rank).to(kind)[:, :2].requires_grad_(kind.is_floating_point)
    gathered = all_gather_rows(rows)
    assert gathered.dtype == kind and not gathered.requires_grad
    print("".join(str(int(value)) for value in gathered.flatten()))
print(all_gather_rows(torch.full((3,), world.rank)).tolist() == [0, 0, 0, 1, 1, 1])
leave_world()
"""


def test_tasks_of_srun_find_their_place_and_gather_rows_in_the_order_of_their_ranks():
    gathered = ["00000111"] * 5 + ["True"]
    assert two_tasks(GATHER) == [["0", "2", "0", *gathered], ["1", "2", "1", *gathered]]


def test_a_process_alone_gathers_its_own_rows():
    rows = torch.arange(6).view(3, 2)
    assert all_gather_rows(rows) is rows


LEAVE_OFTEN = """
import torch
import torch.distributed as dist
from utils import init_world, leave_world

world = init_world("cpu")
store = dist.distributed_c10d._get_default_store()
leave_world()
for number in range(40):
    dist.init_process_group("gloo", store=dist.PrefixStore(str(number), store), rank=world.rank, world_size=2)
    dist.all_gather([torch.empty(1000) for _ in range(2)], torch.ones(1000))
    leave_world()
print(number)
"""


def test_processes_that_just_talked_end():
    """With torch 2.6 one of some dozens waited for ever."""
    assert two_tasks(LEAVE_OFTEN) == [["39"], ["39"]]


@pytest.mark.parametrize(("backend", "told"), [("nccl", {"device_ids": [3]}), ("gloo", {})])
def test_processes_that_wait_for_each_other_on_gpus_say_on_which(monkeypatch, backend, told):
    calls = []
    monkeypatch.setattr("utils.world_size", lambda: 4)
    monkeypatch.setattr("torch.distributed.get_backend", lambda: backend)
    monkeypatch.setattr("torch.distributed.barrier", lambda **options: calls.append(options))
    monkeypatch.setattr("torch.cuda.current_device", lambda: 3)
    barrier()
    assert calls == [told]
