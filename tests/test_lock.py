"""Who may write to a folder: one living run, whatever was left by those that are no more."""

import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import lock
from lock import NAME, Lock, hold
from utils import UsageError, World

ALONE = World(0, 1, 0, torch.device("cpu"))
FORK = multiprocessing.get_context("fork")


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """A lock of another machine; what waits for it does not sleep, but calls ``elsewhere.meanwhile``."""

    def write(**changes) -> Path:
        path = tmp_path / NAME
        path.write_text(json.dumps(lock._myself() | {"machine": "another", "host": "node7", "token": "x"} | changes))
        return path

    write.meanwhile = lambda: pytest.fail("there was nothing to wait for")
    monkeypatch.setattr(lock.time, "sleep", lambda seconds: write.meanwhile())
    return write


def child(function, *arguments) -> multiprocessing.Process:
    process = FORK.Process(target=function, args=arguments)
    process.start()
    return process


def test_a_second_run_is_told_of_the_first_and_nothing_remains_of_it(tmp_path):
    folder = tmp_path / "out"
    with hold(folder, ALONE):
        told = rf"--output_dir {folder}: .*process {os.getpid()} on .*, since 20.*choose"
        with pytest.raises(UsageError, match=told), hold(folder, ALONE):
            pytest.fail("two runs in one folder")
        assert [path.name for path in folder.iterdir()] == [NAME]
    assert not folder.exists(), "nothing was written"
    folder.mkdir()
    with pytest.raises(ValueError, match="an error"), hold(folder, ALONE):
        raise ValueError("an error")
    assert not list(folder.iterdir())


def test_only_the_first_process_of_a_run_takes_it(tmp_path):
    with hold(tmp_path, ALONE), hold(tmp_path, World(1, 2, 1, torch.device("cpu"))):
        pass


def take_and_die(folder: Path) -> None:
    Lock(folder / NAME).acquire()
    os.kill(os.getpid(), signal.SIGKILL)


def test_what_a_killed_run_left_is_taken_over_at_once(tmp_path, caplog):
    caplog.set_level("INFO", "tutelage")
    process = child(take_and_die, tmp_path)
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # dead, and nobody has asked for its exit code yet
    left = json.loads((tmp_path / NAME).read_text())
    assert left["process"] == process.pid
    with hold(tmp_path, ALONE):
        assert "taken over from a run that is no more" in caplog.text and f"process {process.pid} on" in caplog.text
        assert json.loads((tmp_path / NAME).read_text())["process"] == os.getpid()
    process.join()
    assert not list(tmp_path.iterdir())


def test_a_number_that_another_process_has_now_does_not_deceive(elsewhere, tmp_path):
    elsewhere(machine=lock._machine(), process_began="long ago")
    with hold(tmp_path, ALONE):
        pass


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"process": "1"}'])
def test_a_lock_that_says_nothing_counts_while_it_is_young(elsewhere, tmp_path, text):
    path = elsewhere()
    path.write_text(text)
    elsewhere.meanwhile = lambda: os.utime(path)
    with pytest.raises(UsageError, match="its lock does not say which"), hold(tmp_path, ALONE):
        pass
    os.utime(path, (1, 1))
    with hold(tmp_path, ALONE):
        pass


def test_a_run_of_another_machine_lives_as_long_as_it_touches_its_lock(elsewhere, tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO", "tutelage")
    path, waited = elsewhere(job="cluster 77", began="\x1b[2J"), []
    monkeypatch.setattr(lock, "_age", lambda _: 20.0 * len(waited))

    elsewhere.meanwhile = lambda: waited.append(1) if len(waited) < 2 else os.utime(path)
    with pytest.raises(UsageError, match=r"on node7, since \\x1b\[2J, SLURM job cluster 77\)"), hold(tmp_path, ALONE):
        pass
    assert caplog.text.count("looking for up to 60 s whether its run lives") == 1

    waited.clear()
    elsewhere.meanwhile = lambda: waited.append(1)
    with hold(tmp_path, ALONE):
        assert len(waited) == 4


def test_a_run_of_another_machine_that_stopped_long_ago_is_not_waited_for(elsewhere, tmp_path):
    os.utime(elsewhere(), (1, 1))
    with hold(tmp_path, ALONE):
        pass
    assert not list(tmp_path.iterdir())


def test_a_job_that_was_put_back_into_the_queue_goes_on_at_once_on_another_machine(elsewhere, tmp_path, monkeypatch):
    elsewhere(job="cluster 77", restarts=1)
    for name, value in (("CLUSTER_NAME", "cluster"), ("JOB_ID", "77"), ("RESTART_COUNT", "2")):
        monkeypatch.setenv(f"SLURM_{name}", value)
    with hold(tmp_path, ALONE):
        pass


def test_a_folder_that_takes_no_files_is_refused(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(lock.os, "open", full)
    told = r"run\.lock cannot be written \(No space left on device\)"
    with pytest.raises(UsageError, match=told), hold(tmp_path, ALONE):
        pass


def race(folder: Path, start, answers, end) -> None:
    one = Lock(folder / NAME)
    start.wait()
    try:
        one.acquire()
        answers.put("won")
    except UsageError:
        answers.put("refused")
    end.wait()
    one.release()


@pytest.mark.parametrize("left", [False, True], ids=["in an empty folder", "for what a dead run left"])
def test_of_runs_that_start_at_the_same_moment_one_wins(tmp_path, left):
    count = 6
    for number in range(5):
        folder = tmp_path / str(number)
        folder.mkdir()
        if left:
            dead = lock._myself() | {"process_began": "long ago"}
            (folder / NAME).write_text(json.dumps(dead))
        start, end, answers = FORK.Barrier(count), FORK.Event(), FORK.Queue()
        racers = [child(race, folder, start, answers, end) for _ in range(count)]
        found = sorted(answers.get(timeout=60) for _ in racers)
        end.set()
        for racer in racers:
            racer.join()
        assert found == ["refused"] * (count - 1) + ["won"]
        assert not list(folder.iterdir())


def hold_for_ever(folder: Path, taken) -> None:
    lock.BEAT = 0.01
    with hold(folder, ALONE):
        taken.set()
        signal.pause()


def test_a_living_run_touches_its_lock_and_ends_when_another_one_has_it(tmp_path):
    taken = FORK.Event()
    process = child(hold_for_ever, tmp_path, taken)
    taken.wait(60)
    path = tmp_path / NAME
    os.utime(path, (1, 1))
    while path.stat().st_mtime == 1:
        assert process.is_alive()
    path.with_name("other").write_text("another run's")
    os.replace(path.with_name("other"), path)
    process.join()
    assert process.exitcode == 2
    assert path.read_text() == "another run's"


def test_all_processes_of_a_refused_run_end(tmp_path):
    script = (
        "import pathlib, sys\nfrom lock import hold\nfrom utils import init_world, run_cli\n"
        "def main():\n    with hold(pathlib.Path(sys.argv[1]), init_world('cpu')):\n        print('inside')\n"
        "run_cli(main)"
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        env = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    with hold(tmp_path, ALONE):
        tasks = [
            subprocess.Popen(
                [sys.executable, "-c", script, str(tmp_path)],
                env=env | {"RANK": rank, "LOCAL_RANK": rank},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in "01"
        ]
        try:
            answers = [task.communicate(timeout=60) for task in tasks]
        finally:
            for task in tasks:
                task.kill()
    assert [task.returncode for task in tasks] == [2, 2]
    errors = "".join(errors for _, errors in answers)
    assert errors.startswith("error: --output_dir") and errors.count("\n") == 1
    assert "inside" not in "".join(output for output, _ in answers)
