"""Where a process stands among those it was started with, and how they meet.

    torchrun    RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, and MASTER_ADDR:MASTER_PORT to meet at
    srun        SLURM_PROCID, SLURM_STEP_NUM_TASKS, SLURM_LOCALID, SLURM_STEP_TASKS_PER_NODE; they meet at the step's
                first host and a port made from the job's number, unless MASTER_ADDR and MASTER_PORT say otherwise
    neither     alone

The script of an sbatch job sees SLURM_PROCID=0 and the whole job's SLURM_NTASKS, but none of SLURM_STEP_*: python in it
is no task of srun. It runs alone, unless MASTER_ADDR shows that others are meant to come: then it says that it waits.
"""

import re
import socket
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import NamedTuple
from urllib.parse import urlsplit

import torch
import torch.distributed as dist

from errors import UsageError

GRACE, REMINDER, PATIENCE = 1.0, 30.0, 1800.0  # seconds: before the first word, between words, until giving up
NO_TORCHRUN = "torchrun sets RANK, WORLD_SIZE and LOCAL_RANK; unset RANK to run one process alone"
NO_SRUN = "srun sets it for every task; unset SLURM_PROCID to run one process alone"


class Place(NamedTuple):
    """Where a process stands: ``rank`` of ``size``, and ``local_rank`` of the ``local_size`` on its machine."""

    rank: int
    size: int
    local_rank: int
    local_size: int


ALONE = Place(0, 1, 0, 1)


def world_from(env: Mapping[str, str]) -> Place:
    """The place that torchrun or srun gave this process. Raises UsageError for variables that do not fit together."""
    if "RANK" in env:
        return _place_of_torchrun(env)
    if "SLURM_PROCID" in env:
        return _place_of_srun(env)
    if env.get("WORLD_SIZE", "1").strip() not in ("", "1"):
        raise UsageError(f"WORLD_SIZE={env['WORLD_SIZE']!r}, but RANK is not set: {NO_TORCHRUN} (and WORLD_SIZE)")
    return ALONE


def _place_of_torchrun(env: Mapping[str, str]) -> Place:
    rank, size = _number(env, "RANK", NO_TORCHRUN), _number(env, "WORLD_SIZE", NO_TORCHRUN, least=1)
    local_rank = _number(env, "LOCAL_RANK", NO_TORCHRUN) if "LOCAL_RANK" in env else 0
    local_size = local_rank + 1
    if "LOCAL_WORLD_SIZE" in env:
        local_size = _number(env, "LOCAL_WORLD_SIZE", NO_TORCHRUN, least=1)
    _check_rank("RANK", rank, "WORLD_SIZE", size, NO_TORCHRUN)
    _check_rank("LOCAL_RANK", local_rank, "LOCAL_WORLD_SIZE", local_size, NO_TORCHRUN)
    return Place(rank, size, local_rank, local_size)


def _place_of_srun(env: Mapping[str, str]) -> Place:
    rank = _number(env, "SLURM_PROCID", NO_SRUN)
    if rank == 0 and not _is_task(env) and not env.get("MASTER_ADDR"):
        return ALONE
    name = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in env else "SLURM_NTASKS"
    size = _number(env, name, NO_SRUN, least=1)
    _check_rank("SLURM_PROCID", rank, name, size, NO_SRUN)
    if size == 1:
        return ALONE
    local_rank = _number(env, "SLURM_LOCALID", NO_SRUN)
    return Place(rank, size, local_rank, max(local_rank + 1, _tasks_on_this_node(env)))


def _is_task(env: Mapping[str, str]) -> bool:
    """Whether srun started this process; a job's script and the shell of salloc are not started so."""
    return "SLURM_STEP_NUM_TASKS" in env or "SLURM_STEP_ID" in env or "SLURM_STEPID" in env


def bound_by_srun(env: Mapping[str, str]) -> bool:
    """Whether srun, which can show every task a GPU of its own (--gpus-per-task), started this process."""
    return "RANK" not in env and "SLURM_PROCID" in env and _is_task(env)


def idle_tasks(env: Mapping[str, str]) -> int:
    """Tasks that SLURM would start and that are not used, because this process was not started by srun."""
    tasks = env.get("SLURM_NTASKS", "")
    unused = "RANK" not in env and "SLURM_PROCID" in env and tasks.isdecimal() and world_from(env).size == 1
    return int(tasks) - 1 if unused and not _is_task(env) else 0


def _number(env: Mapping[str, str], name: str, hint: str, least: int = 0, most: float = float("inf")) -> int:
    if name not in env:
        raise UsageError(f"{name} is not set: {hint}")
    text = env[name].strip()
    if not (text.isascii() and text.isdecimal() and least <= int(text) <= most):
        span = f"from {least} on" if most == float("inf") else f"from {least} to {most}"
        raise UsageError(f"{name}={env[name]!r}: a whole number {span} is expected; {hint}")
    return int(text)


def _check_rank(name: str, rank: int, size_name: str, size: int, hint: str) -> None:
    if rank >= size:
        raise UsageError(f"{name}={rank} with {size_name}={size}: it goes from 0 to {size - 1}; {hint}")


def _tasks_on_this_node(env: Mapping[str, str]) -> int:
    """From lists such as '2(x3),1': two tasks on each of the first three nodes, one on the fourth; 0 if unknown."""
    for name in ("SLURM_STEP_TASKS_PER_NODE", "SLURM_TASKS_PER_NODE", "SLURM_NTASKS_PER_NODE"):
        if name not in env:
            continue
        groups = [re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part.strip(), re.ASCII) for part in env[name].split(",")]
        if not all(groups):
            raise UsageError(f"{name}={env[name]!r}: numbers of tasks such as 8 or 2(x3),1 are expected; {NO_SRUN}")
        node = _number(env, "SLURM_NODEID", NO_SRUN) if "SLURM_NODEID" in env else 0
        for group in groups:
            node -= int(group[2] or 1)
            if node < 0:
                break
        return int(group[1])
    return 0


# ---------------------------------------------------------------------------------------------------------------------
# Meeting
# ---------------------------------------------------------------------------------------------------------------------


class MeetingPoint(NamedTuple):
    host: str
    port: int
    settled_by: str  # what the user changes to meet elsewhere


def meeting_point(env: Mapping[str, str], dist_url: str = "env://") -> MeetingPoint:
    """Where all processes meet; the same on each of them. Raises UsageError where this cannot be known."""
    if not dist_url.startswith("env://"):
        return _point_of_url(dist_url)
    host, hint = env.get("MASTER_ADDR", "").strip(), "name a free port of the machine of process 0, such as 29500"
    if not host:
        host = first_host(env)
    if "MASTER_PORT" in env or not env.get("SLURM_JOB_ID", "").isdecimal():
        return MeetingPoint(host, _number(env, "MASTER_PORT", hint, 1, 65535), "MASTER_PORT")
    return MeetingPoint(host, job_port(env), "MASTER_PORT")


def job_port(env: Mapping[str, str]) -> int:
    """A port for SLURM_JOB_ID: jobs that share a node must not share one, nor must the steps of a job."""
    step = env.get("SLURM_STEP_ID", "")
    return 20000 + (int(env["SLURM_JOB_ID"]) + 101 * int(step if step.isdecimal() else 0)) % 20000


def first_host(env: Mapping[str, str]) -> str:
    """The first of SLURM's hosts, which may be written as node[01-03,7],gpu5."""
    hint = "the machine of process 0 (localhost if all processes run on one)"
    name = next((n for n in ("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST") if env.get(n)), None)
    if name is None or "RANK" in env or not _is_task(env):
        raise UsageError(f"MASTER_ADDR is {'empty' if 'MASTER_ADDR' in env else 'not set'}: name {hint}")
    first = re.fullmatch(r"((?:[^,\[\]]|\[[^\]]*\])+)(?:,.*)?", env[name].strip())
    host = re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", first[1]) if first else ""
    if not re.fullmatch(r"[\w.-]+", host, re.ASCII):
        raise UsageError(f"{name}={env[name]!r}: its first host cannot be read; set MASTER_ADDR to {hint}")
    return host


def _point_of_url(dist_url: str) -> MeetingPoint:
    try:
        parts = urlsplit(dist_url)
        host, port = parts.hostname, parts.port
    except ValueError:
        host = port = None
    if not (dist_url.startswith("tcp://") and host and port):
        raise UsageError(f"--dist_url {dist_url}: env://, file:///PATH or tcp://HOST:PORT is expected")
    return MeetingPoint(host, port, "--dist_url")


def join(place: Place, env: Mapping[str, str], dist_url: str, backend: str, device: torch.device) -> None:
    """Make the group of all processes, each with its ``device``. Whoever waits says so. Raises UsageError when they
    cannot meet.
    """
    at_torchrun = ("env://", f"tcp://{env.get('MASTER_ADDR')}:{env.get('MASTER_PORT')}")
    if dist_url.startswith("file://"):
        meeting = {"init_method": dist_url}
    elif dist_url in at_torchrun and env.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        meeting = {"init_method": "env://"}  # torchrun itself keeps the place, and watches over the processes
    else:
        meeting = {"store": meet(place, meeting_point(env, dist_url), _run_name(env), _advice(env))}
    try:
        # told, NCCL connects at once, and nothing is guessed from ranks
        on_gpu = {"device_id": device} if backend == "nccl" else {}
        dist.init_process_group(backend, rank=place.rank, world_size=place.size, **meeting, **on_gpu)
    except (RuntimeError, ValueError) as error:
        raise UsageError(f"{place.size} processes cannot be connected: {_one_line(error)}") from None


def meet(
    place: Place, point: MeetingPoint, run: str = "", advice: str = "", say: Callable[[str], None] | None = None
) -> dist.Store:
    """The store in which the processes find each other. ``run`` keeps apart those that end up at one port by mistake;
    ``advice`` is for someone who did not expect to wait.
    """
    waiting = _Waiting(place, point, advice, say or (lambda text: print(text, flush=True)))
    size, timeout = place.size, timedelta(seconds=PATIENCE)
    try:
        if place.rank == 0:
            # its own store by way of the loopback: that others reach it under the host's name is theirs to find out
            store = dist.TCPStore("127.0.0.1", point.port, size, True, timeout, wait_for_workers=False)
        else:
            _knock(point, waiting)
            store = dist.TCPStore(point.host, point.port, size, False, timeout)
    except RuntimeError as error:
        if "EADDRINUSE" in str(error):
            raise UsageError(
                f"{point.settled_by}: port {point.port} is in use on this machine; choose another, or end what uses it"
            ) from None
        raise UsageError(f"{point.settled_by}: no meeting at {point.host}:{point.port}: {_one_line(error)}") from None
    store = dist.PrefixStore(run, store) if run else store
    store.add("arrived", 1)
    while place.rank == 0 and (missing := size - store.add("arrived", 0)) > 0:
        waiting.go_on(f"waiting for {missing} more process{'es' * (missing > 1)} of {size}")
    return store


def _knock(point: MeetingPoint, waiting: "_Waiting") -> None:
    """Return when somebody listens there; torch, left to wait itself, fills the screen with its retries."""
    while True:
        try:
            socket.create_connection((point.host, point.port), timeout=5).close()
            return
        except OSError as error:
            if not isinstance(error, socket.gaierror) or error.errno == socket.EAI_AGAIN:
                waiting.go_on(f"process {waiting.place.rank} of {waiting.place.size} is waiting for process 0")
                continue
            name = "MASTER_ADDR" if point.settled_by == "MASTER_PORT" else point.settled_by
            raise UsageError(f"{name}: there is no machine {point.host} ({error.strerror})") from None


class _Waiting:
    """Patience with words: soon on the first process of a machine, later on the others, and then again and again."""

    def __init__(self, place: Place, point: MeetingPoint, advice: str, say: Callable[[str], None]):
        self.place, self.at, self.advice, self.say = place, f"at {point.host}:{point.port}", advice, say
        self.began = time.monotonic()
        self.next = self.began + (GRACE if place.local_rank == 0 else REMINDER)

    def go_on(self, what: str) -> None:
        now = time.monotonic()
        if now - self.began > PATIENCE:
            raise UsageError(f"{what} {self.at} has lasted {PATIENCE / 60:.0f} minutes: were all processes started?")
        if now >= self.next:
            self.say(f"{what} {self.at}{self.advice}")
            self.next = now + REMINDER
        time.sleep(0.05)


def _advice(env: Mapping[str, str]) -> str:
    if "RANK" in env or _is_task(env):
        return ""
    return "; this process was not started by srun: put srun before the command, or unset MASTER_ADDR to run alone"


def _run_name(env: Mapping[str, str]) -> str:
    if "RANK" in env:
        return env.get("TORCHELASTIC_RUN_ID", "")
    return f"{env.get('SLURM_JOB_ID', '')}.{env.get('SLURM_STEP_ID', '')}"


def _one_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
