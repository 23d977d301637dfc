"""One run per folder: who writes to it says so in run.lock, and a second run is refused.

The lock names host, process and time. The first process of a run takes it for all of them; it goes with every end that
Python sees. What a killed run left is recognised:

    on the same machine          its process is gone, or another one has its number: taken over at once
    a SLURM job put back         its earlier start is over, wherever it ran: at once
    anywhere else                nobody has touched the file for STALE seconds, as a living run does every BEAT seconds
"""

import contextlib
import datetime
import hashlib
import json
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import torch.distributed as dist

from utils import UsageError, World, escape, log, make_folder, world_size

NAME = "run.lock"
BEAT, STALE = 10.0, 60.0  # seconds


@contextlib.contextmanager
def hold(folder: Path, world: World) -> Iterator[None]:
    """Make ``folder`` and keep it for this run. Raises UsageError on all its processes when another run has it."""
    lock, refusal, is_new = Lock(folder / NAME), "", False
    if world.rank == 0:
        try:
            is_new = not folder.exists()
            make_folder(folder)
            lock.acquire()
        except UsageError as error:
            refusal = str(error)
    if world_size() > 1:
        answer = [refusal]
        dist.broadcast_object_list(answer)
        (refusal,) = answer
    if refusal:
        raise UsageError(refusal)
    try:
        yield
    finally:
        lock.release()
        if is_new:
            with contextlib.suppress(OSError):
                folder.rmdir()  # where nothing was written after all


class Lock:
    def __init__(self, path: Path):
        self.path = path
        self.text = json.dumps(_myself())
        self._released = threading.Event()
        self._beating: threading.Thread | None = None

    def acquire(self) -> None:
        """Raises UsageError when a living run has it."""
        first = None  # how a lock looked whose run cannot be seen from here
        try:
            while not _create(self.path, self.text):
                found = _read(self.path)
                if found is None:
                    continue
                holder = _holder(found[0])
                lives = _lives(holder)
                if lives is None and _age(self.path) > STALE:
                    lives = False
                if lives or (lives is None and first not in (None, found)):
                    raise UsageError(
                        f"--output_dir {self.path.parent}: a run is writing there ({_described(holder)}); let it end, "
                        "stop it, or choose another folder"
                    )
                if lives is False and self._succeed(found[0]):
                    log.info("%s: taken over from a run that is no more (%s)", escape(self.path), _described(holder))
                    break
                if lives is None and first is None:
                    first = found
                    told = (escape(self.path), STALE, _described(holder))
                    log.info("%s: looking for up to %.0f s whether its run lives (%s)", *told)
                time.sleep(0.2)
        except OSError as error:
            raise UsageError(f"--output_dir {self.path.parent}: {NAME} cannot be written ({error.strerror})") from None
        self._beating = threading.Thread(target=self._beat, daemon=True)
        self._beating.start()

    def release(self) -> None:
        """Nothing where it was never taken."""
        if self._beating is None:
            return
        self._released.set()
        self._beating.join()
        with contextlib.suppress(OSError):
            if self._is_mine():
                self.path.unlink()

    def _is_mine(self) -> bool:
        return self.path.read_text() == self.text

    def _succeed(self, text: str) -> bool:
        """Replace the lock ``text`` of a dead run; only one of those who try at the same moment can.

        Whoever may replace a lock is settled by a file that is named after it. It is looked at again then: a successor
        may have been quicker, whose lock must stay.
        """
        claim = self.path.with_name(f"{NAME}.{hashlib.sha256(text.encode()).hexdigest()[:16]}")
        if not _create(claim, self.text):
            if _age(claim) > STALE:  # killed within this very function
                claim.unlink(missing_ok=True)
            return False
        found = _read(self.path)
        if found is None or found[0] != text:
            claim.unlink()
            return False
        os.replace(claim, self.path)
        return True

    def _beat(self) -> None:
        while not self._released.wait(BEAT):
            try:
                mine = self._is_mine()
                if mine:
                    os.utime(self.path)
            except OSError:  # a server that is away, or a lock that somebody removed
                continue
            if not mine:  # this process stood still for so long that it was taken for dead
                print(
                    f"error: {escape(self.path)} belongs to another run now; this one ends", file=sys.stderr, flush=True
                )
                os._exit(UsageError.exit_code)


def _create(path: Path, text: str) -> bool:
    """Whether ``path`` was made; False where there is one."""
    try:
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
    except FileExistsError:
        return False
    with open(descriptor, "w") as file:
        file.write(text)
    return True


def _read(path: Path) -> tuple[str, int] | None:
    """Text and time of the last touch; None where there is no file. Opening it makes NFS ask its server."""
    try:
        with open(path, errors="replace") as file:
            return file.read(10_000), os.fstat(file.fileno()).st_mtime_ns
    except FileNotFoundError:
        return None


def _age(path: Path) -> float:
    """Seconds since the last touch by the clock of the file system, which is that of both machines."""
    now = path.with_name(f"{NAME}.{secrets.token_hex(8)}")
    now.touch()
    try:
        found = _read(path)
        return (now.stat().st_mtime_ns - found[1]) / 1e9 if found else 0.0
    finally:
        now.unlink()


# ---------------------------------------------------------------------------------------------------------------------
# Who is it, and does it live?
# ---------------------------------------------------------------------------------------------------------------------


def _myself() -> dict:
    restarts = os.environ.get("SLURM_RESTART_COUNT", "")
    return {
        "host": socket.gethostname(),
        "process": os.getpid(),
        "began": datetime.datetime.now().isoformat(" ", "seconds"),
        "machine": _machine(),
        "process_began": _process_began(os.getpid()),
        "job": f"{os.environ.get('SLURM_CLUSTER_NAME', '')} {os.environ.get('SLURM_JOB_ID', '')}".strip(),
        "restarts": int(restarts) if restarts.isdecimal() else 0,
        "token": secrets.token_hex(8),
    }


def _holder(text: str) -> dict:
    """What a lock says, {} where it cannot be understood."""
    try:
        holder = json.loads(text)
        return holder if {type(holder[name]) for name in ("process", "restarts")} == {int} else {}
    except (ValueError, TypeError, KeyError):
        return {}


def _described(holder: dict) -> str:
    if not holder:
        return "its lock does not say which"
    job = f", SLURM job {holder['job']}" if holder.get("job") else ""
    return escape(f"process {holder['process']} on {holder.get('host')}, since {holder.get('began')}{job}")


def _lives(holder: dict) -> bool | None:
    """None when it cannot be known from here."""
    if not holder:
        return None
    me = _myself()
    if holder.get("machine") == me["machine"]:
        return _process_began(holder["process"]) in (holder.get("process_began"), "?")
    if me["job"] and holder.get("job") == me["job"] and holder["restarts"] < me["restarts"]:
        return False
    return None


def _machine() -> str:
    """Where a process number means the same process: one start of one machine, and one container on it."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


def _process_began(process: int) -> str:
    """When a process of this machine began, in the kernel's words; "" without one, "?" where it cannot be seen."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        return "" if fields[0] in "ZX" else fields[19]
    except OSError:
        pass
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return ""
    except (OSError, OverflowError):
        pass
    return "?"
