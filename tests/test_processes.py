"""What torchrun, srun, a batch script and a mistyped variable give a process, and how processes wait for each other."""

import os
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

import processes
from processes import ALONE, MeetingPoint, Place, first_host, idle_tasks, meet, meeting_point, world_from
from utils import UsageError

TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
SRUN = {
    "SLURM_JOB_ID": "1234567",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "7",
    "SLURM_STEP_TASKS_PER_NODE": "2(x3),1",
    "SLURM_STEP_NODELIST": "node[01-03,7],gpu5",
    "SLURM_NTASKS": "7",
    "SLURM_PROCID": "3",
    "SLURM_NODEID": "1",
    "SLURM_LOCALID": "1",
}
BATCH_SCRIPT = {"SLURM_JOB_ID": "77", "SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
BATCH_SCRIPT |= {"SLURM_JOB_NODELIST": "node[1-2]", "SLURM_TASKS_PER_NODE": "2(x2)", "SLURM_NODEID": "0"}


def without(env: dict, *names: str) -> dict:
    return {name: value for name, value in env.items() if name not in names}


@pytest.mark.parametrize(
    ("env", "place"),
    [
        ({}, ALONE),
        ({"WORLD_SIZE": "1"}, ALONE),
        (TORCHRUN, Place(5, 8, 1, 4)),
        (TORCHRUN | SRUN, Place(5, 8, 1, 4)),
        (without(TORCHRUN, "LOCAL_WORLD_SIZE"), Place(5, 8, 1, 2)),
        ({"RANK": "1", "WORLD_SIZE": "2"}, Place(1, 2, 0, 1)),
        (SRUN, Place(3, 7, 1, 2)),
        (SRUN | {"SLURM_PROCID": "6", "SLURM_NODEID": "3", "SLURM_LOCALID": "0"}, Place(6, 7, 0, 1)),
        (without(SRUN, "SLURM_NTASKS", "SLURM_NODEID"), Place(3, 7, 1, 2)),
        (without(SRUN, "SLURM_STEP_NUM_TASKS"), Place(3, 7, 1, 2)),
        (without(SRUN, "SLURM_STEP_TASKS_PER_NODE"), Place(3, 7, 1, 2)),
        (without(SRUN, "SLURM_STEP_TASKS_PER_NODE") | {"SLURM_NTASKS_PER_NODE": "1(x2)"}, Place(3, 7, 1, 2)),
        (without(SRUN, "SLURM_STEP_TASKS_PER_NODE") | {"SLURM_NTASKS_PER_NODE": "4"}, Place(3, 7, 1, 4)),
        (BATCH_SCRIPT, ALONE),
        (without(BATCH_SCRIPT, "SLURM_NTASKS"), ALONE),
        (BATCH_SCRIPT | {"SLURM_NTASKS": "1", "MASTER_ADDR": "node1"}, ALONE),
        (BATCH_SCRIPT | {"MASTER_ADDR": "node1"}, Place(0, 4, 0, 2)),
        (BATCH_SCRIPT | {"SLURM_STEP_ID": "4294967290", "SLURM_STEP_NUM_TASKS": "1"}, ALONE),  # the shell of salloc
    ],
)
def test_every_launcher_is_understood(env, place):
    assert world_from(env) == place


@pytest.mark.parametrize(
    ("env", "message"),
    [
        (TORCHRUN | {"RANK": ""}, r"^RANK='': a whole number from 0 on .*unset RANK to run one process alone$"),
        (TORCHRUN | {"RANK": "-1"}, r"^RANK='-1': a whole number"),
        (TORCHRUN | {"RANK": "8"}, r"^RANK=8 with WORLD_SIZE=8: it goes from 0 to 7; "),
        (without(TORCHRUN, "WORLD_SIZE"), r"^WORLD_SIZE is not set: torchrun sets"),
        (TORCHRUN | {"WORLD_SIZE": "0"}, r"^WORLD_SIZE='0': a whole number from 1 on"),
        (TORCHRUN | {"LOCAL_RANK": ""}, r"^LOCAL_RANK='': "),
        (TORCHRUN | {"LOCAL_RANK": "four"}, r"^LOCAL_RANK='four': "),
        (TORCHRUN | {"LOCAL_RANK": "4"}, r"^LOCAL_RANK=4 with LOCAL_WORLD_SIZE=4: "),
        (TORCHRUN | {"LOCAL_WORLD_SIZE": "x"}, r"^LOCAL_WORLD_SIZE='x': "),
        (without(TORCHRUN, "RANK"), r"^WORLD_SIZE='8', but RANK is not set: "),
        (SRUN | {"SLURM_PROCID": ""}, r"^SLURM_PROCID='': .*unset SLURM_PROCID to run one process alone$"),
        (SRUN | {"SLURM_PROCID": "7"}, r"^SLURM_PROCID=7 with SLURM_STEP_NUM_TASKS=7: "),
        (without(SRUN, "SLURM_LOCALID"), r"^SLURM_LOCALID is not set: "),
        (SRUN | {"SLURM_LOCALID": "one"}, r"^SLURM_LOCALID='one': "),
        (SRUN | {"SLURM_STEP_TASKS_PER_NODE": "2(y3)"}, r"^SLURM_STEP_TASKS_PER_NODE='2\(y3\)': numbers of tasks such"),
        (SRUN | {"SLURM_NODEID": "?"}, r"^SLURM_NODEID='\?': "),
        ({"SLURM_PROCID": "1"}, r"^SLURM_NTASKS is not set: "),
        ({"SLURM_PROCID": "0", "MASTER_ADDR": "node1"}, r"^SLURM_NTASKS is not set: "),
        (BATCH_SCRIPT | {"SLURM_NTASKS": "", "MASTER_ADDR": "node1"}, r"^SLURM_NTASKS='': "),
    ],
)
def test_a_variable_that_is_missing_or_odd_is_named_with_what_to_do(env, message):
    with pytest.raises(UsageError, match=message) as caught:
        world_from(env)
    assert "\n" not in str(caught.value)


def test_the_script_of_a_job_knows_how_many_tasks_it_leaves_idle():
    assert idle_tasks(BATCH_SCRIPT) == 3
    for env in ({}, TORCHRUN, BATCH_SCRIPT | TORCHRUN, SRUN, BATCH_SCRIPT | {"MASTER_ADDR": "node1"}):
        assert idle_tasks(env) == 0


@pytest.mark.parametrize(
    ("hosts", "first"),
    [
        ("gpu5", "gpu5"),
        ("gpu5,gpu6", "gpu5"),
        ("node[01-03,7],gpu5", "node01"),
        ("node[7,01-03]", "node7"),
        ("rack[1-2]-node[003-010].example", "rack1-node003.example"),
    ],
)
def test_the_first_of_slurms_hosts_is_found(hosts, first):
    assert first_host(SRUN | {"SLURM_STEP_NODELIST": hosts}) == first
    assert first_host(without(SRUN, "SLURM_STEP_NODELIST") | {"SLURM_JOB_NODELIST": hosts}) == first


@pytest.mark.parametrize("hosts", ["", "[", "node[", "a b", ",x", "$(reboot)"])
def test_hosts_that_cannot_be_read_are_refused(hosts):
    with pytest.raises(UsageError, match="MASTER_ADDR"):
        first_host(SRUN | {"SLURM_STEP_NODELIST": hosts})


def test_tasks_of_srun_meet_at_the_first_host_and_a_port_of_their_step():
    assert meeting_point(SRUN)[:2] == ("node01", 20000 + 1234567 % 20000)
    assert meeting_point(SRUN | {"MASTER_ADDR": "a", "MASTER_PORT": "29500"})[:2] == ("a", 29500)
    assert meeting_point(SRUN | {"MASTER_ADDR": ""})[0] == "node01"
    ports = {meeting_point(SRUN | {"SLURM_JOB_ID": job, "SLURM_STEP_ID": s})[1] for job in ("7", "8") for s in "012"}
    assert len(ports) == 6 and min(ports) >= 20000 and max(ports) < 40000


def test_a_url_says_where_to_meet_whatever_the_environment_says():
    assert meeting_point(SRUN | {"MASTER_PORT": "?"}, "tcp://10.0.0.1:2345")[:2] == ("10.0.0.1", 2345)
    assert meeting_point({}, "tcp://[::1]:2345")[:2] == ("::1", 2345)


@pytest.mark.parametrize(
    ("env", "url", "message"),
    [
        (TORCHRUN, "env://", r"^MASTER_ADDR is not set: "),
        (TORCHRUN | {"MASTER_ADDR": "a"}, "env://", r"^MASTER_PORT is not set: name a free port"),
        (TORCHRUN | {"MASTER_ADDR": "a", "MASTER_PORT": "abc"}, "env://", r"^MASTER_PORT='abc': .*from 1 to 65535"),
        (TORCHRUN | {"MASTER_ADDR": "a", "MASTER_PORT": "70000"}, "env://", r"^MASTER_PORT='70000': "),
        (BATCH_SCRIPT | {"SLURM_PROCID": "1"}, "env://", r"^MASTER_ADDR is not set: "),
        ({}, "tcp://host", r"^--dist_url tcp://host: .*tcp://HOST:PORT"),
        ({}, "tcp://host:0x50", r"^--dist_url tcp://host:0x50: "),
        ({}, "host:2345", r"^--dist_url host:2345: "),
    ],
)
def test_a_place_to_meet_that_cannot_be_known_is_refused(env, url, message):
    with pytest.raises(UsageError, match=message):
        meeting_point(env, url)


@pytest.fixture
def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def test_whoever_waits_says_so_again_and_again_until_all_have_come(free_port, monkeypatch):
    monkeypatch.setattr(processes, "GRACE", 0.0)
    monkeypatch.setattr(processes, "REMINDER", 0.0)
    point = MeetingPoint("127.0.0.1", free_port, "MASTER_PORT")
    said = {rank: [] for rank in range(3)}

    def come(rank: int):
        return pool.submit(meet, Place(rank, 3, 0, 1), point, "run", "; or alone", said[rank].append)

    def hear(rank: int, words: str, times: int = 1) -> None:
        while said[rank].count(words) < times:
            assert not any(f.done() and f.exception() for f in came)

    with ThreadPoolExecutor() as pool:
        came = [come(1)]
        hear(1, f"process 1 of 3 is waiting for process 0 at 127.0.0.1:{free_port}; or alone", 2)
        came.append(come(0))
        hear(0, f"waiting for 1 more process of 3 at 127.0.0.1:{free_port}; or alone", 2)
        came.append(come(2))
        stores = [future.result() for future in came]
        stores[0].set("key", "value")
        assert stores[2].get("key") == b"value"


def test_patience_ends_in_one_line(free_port, monkeypatch):
    monkeypatch.setattr(processes, "PATIENCE", 0.2)
    point = MeetingPoint("127.0.0.1", free_port, "MASTER_PORT")
    for rank, message in ((0, "waiting for 1 more process of 2"), (1, "process 1 of 2 is waiting for process 0")):
        with pytest.raises(UsageError, match=rf"^{message} at 127\.0\.0\.1:{free_port} has lasted 0 minutes"):
            meet(Place(rank, 2, 0, 1), point, say=lambda _: None)


def test_a_port_in_use_and_a_machine_that_does_not_exist_are_named():
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UsageError, match=rf"^MASTER_PORT: port {port} is in use on this machine; choose another"):
            meet(Place(0, 2, 0, 1), MeetingPoint("127.0.0.1", port, "MASTER_PORT"))
    with pytest.raises(UsageError, match=r"^MASTER_ADDR: there is no machine nowhere\.invalid"):
        meet(Place(1, 2, 0, 1), MeetingPoint("nowhere.invalid", port, "MASTER_PORT"))


SCRIPT = "from utils import init_world, run_cli\nrun_cli(lambda: print(init_world('cpu')))"


def start_with(env: dict) -> subprocess.Popen:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "MASTER_"))}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-c", SCRIPT], env=inherited | env, **pipes)


def test_an_odd_variable_ends_in_one_line_and_exit_code_2():
    process = start_with(TORCHRUN | {"LOCAL_RANK": ""})
    output, errors = process.communicate(timeout=60)
    assert (process.returncode, output, errors.count("\n")) == (2, "", 1)
    assert errors.startswith("error: LOCAL_RANK='': ")


def test_python_in_a_batch_script_says_that_it_waits(free_port):
    process = start_with(BATCH_SCRIPT | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port)})
    try:
        line = process.stdout.readline()
    finally:
        process.kill()
        process.communicate()
    assert f"waiting for 3 more processes of 4 at 127.0.0.1:{free_port}" in line and "srun" in line


def test_tasks_of_srun_without_an_address_meet_at_the_first_host():
    env = SRUN | {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NODELIST": "localhost,other", "SLURM_NODEID": "0"}
    env |= {"SLURM_JOB_ID": str(os.getpid())}
    tasks = [start_with(env | {"SLURM_PROCID": rank, "SLURM_LOCALID": rank}) for rank in "01"]
    try:
        answers = [task.communicate(timeout=60)[0] for task in tasks]
    finally:
        for task in tasks:
            task.kill()
    for rank, answer in enumerate(answers):
        assert f"World(rank={rank}, size=2, local_rank={rank}" in answer
