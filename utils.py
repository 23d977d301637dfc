"""What every script needs: processes, options and errors, schedules, files. Nothing here knows a method or a model."""

import argparse
import contextlib
import ctypes
import difflib
import inspect
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
from torch.nn.parallel import DistributedDataParallel

from errors import UsageError
from processes import bound_by_srun, idle_tasks, join, world_from

log = logging.getLogger("tutelage")

# ---------------------------------------------------------------------------------------------------------------------
# Processes
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class World:
    """Where this process stands: ``rank`` of ``size`` processes, computing on ``device``."""

    rank: int
    size: int
    local_rank: int
    device: torch.device


BACKENDS = ("nccl", "gloo")


def init_world(device: str = "auto", dist_url: str = "env://", backend: str | None = None) -> World:
    """Join the processes that torchrun or ``srun`` (one task per GPU) started; alone when neither did (processes.py).

    ``backend``: one of BACKENDS; None is the first on GPUs, the second on processors. Raises UsageError when a node has
    more processes than GPUs, when a GPU is asked for where there is none, or when the processes cannot meet.
    """
    place = world_from(os.environ)
    gpus = torch.cuda.device_count() if device != "cpu" else 0
    if device == "cuda" and gpus == 0:
        raise UsageError("--device cuda: this machine shows no GPU; use --device cpu or check the driver")
    if backend == "nccl" and gpus == 0:
        raise UsageError("--backend nccl: it connects GPUs and there is none to use; pass --backend gloo")
    own_gpu = gpus == 1 and bound_by_srun(os.environ)
    if gpus and place.local_size > gpus and not own_gpu:
        raise UsageError(
            f"{place.local_size} processes on this machine, which shows each of them {gpus} GPU(s): start at most "
            f"{gpus} (torchrun --nproc_per_node, SLURM's --ntasks-per-node with --gpus-per-node), or pass --device cpu "
            "to run them all on the processor"
        )
    used = torch.device("cuda", 0 if own_gpu else place.local_rank) if gpus else torch.device("cpu")
    if gpus:
        torch.cuda.set_device(used)
    if place.size > 1 and not dist.is_initialized():
        join(place, os.environ, dist_url, backend or ("nccl" if gpus else "gloo"), used)
    log.handlers = [logging.StreamHandler(sys.stdout)]
    log.setLevel(logging.INFO if place.rank == 0 else logging.ERROR)
    if idle := idle_tasks(os.environ):
        log.info("not started by srun: one process alone, %d of SLURM's tasks stay idle", idle)
    return World(place.rank, place.size, place.local_rank, used)


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def all_reduce_sum(tensor: torch.Tensor) -> torch.Tensor:
    """Sum over processes, in place."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def all_gather_rows(tensor: torch.Tensor) -> torch.Tensor:
    """Rows (rows, ...) of all processes, those of rank 0 first: (processes * rows, ...), the same on all of them.

    Every process has as many. No gradient crosses processes. A process alone gets ``tensor`` back.
    """
    if world_size() == 1:
        return tensor
    parts = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(world_size())]
    dist.all_gather(parts, tensor.detach().contiguous())
    return torch.cat(parts)


def distributed(module: nn.Module, device: torch.device) -> DistributedDataParallel:
    """What exchanges the gradients of ``module``; its buffers are each process's own, and equal by construction."""
    renamed = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters  # from torch 2.14 on
    options = {"forward_sync_buffers" if renamed else "broadcast_buffers": False, "gradient_as_bucket_view": True}
    on_gpu = {"device_ids": [device.index]} if device.type == "cuda" else {}
    return DistributedDataParallel(module, **options, **on_gpu)


def barrier() -> None:
    if world_size() > 1:
        # not told, NCCL guesses the device by the rank while nothing was sent yet: another process's, on some clusters
        on_gpu = {"device_ids": [torch.cuda.current_device()]} if dist.get_backend() == "nccl" else {}
        dist.barrier(**on_gpu)


def all_gather_objects(value) -> list:
    """What every process has, in the order of their ranks. For small things: it waits for the device."""
    values = [value]
    if world_size() > 1:
        values = [None] * world_size()
        dist.all_gather_object(values, value)
    return values


def usable_cpus() -> int:
    """Processors this process may use: what a container or ``taskset`` grants, not what the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def leave_world() -> None:
    """End the group of processes, so that none of them waits for another's end; nothing where there is none."""
    if not dist.is_initialized():
        return
    if dist.get_backend() == "gloo":
        # torch 2.6 keeps the interpreter locked until gloo's threads have ended, and a thread that drops its last
        # tensors needs it (pytorch/pytorch#154976): neither would ever end. Such a thread needs microseconds.
        time.sleep(0.05)
    dist.destroy_process_group()


def keep_large_blocks() -> None:
    """Ask glibc to keep freed tensors instead of returning them to the system.

    A CPU step allocates the same large tensors again and again; by default every one of them costs its page faults
    (up to 40 % of a step). Changes no arithmetic. Without glibc nothing happens.
    """
    m_trim_threshold, m_mmap_max = -1, -4
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(m_mmap_max, 0)
        libc.mallopt(m_trim_threshold, 2**31 - 1)


# ---------------------------------------------------------------------------------------------------------------------
# Precision: what the batch, the weights and the products are computed in
# ---------------------------------------------------------------------------------------------------------------------

PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64}


def batch_dtype(precision: str) -> torch.dtype:
    """Type of weights and images: float32, but for proofs in double precision."""
    return torch.float64 if precision == "fp64" else torch.float32


def half_dtype(precision: str) -> torch.dtype | None:
    """Type of matrix products where that is half of the weights' precision; None where it is theirs."""
    return PRECISIONS[precision] if precision in ("bf16", "fp16") else None


def autocast(precision: str, device: torch.device) -> contextlib.AbstractContextManager:
    """Half precision for matrix products, where that is what was asked for."""
    half = half_dtype(precision)
    return torch.autocast(device.type, half) if half else contextlib.nullcontext()


def to_device(tensor: torch.Tensor, device: torch.device, dtype: torch.dtype | None = None) -> torch.Tensor:
    """A tensor that was made on the host, on ``device``; to a GPU it goes through pinned memory, and nobody waits."""
    tensor = tensor.to(dtype or tensor.dtype)
    if torch.device(device).type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def has_bf16(device: torch.device) -> bool:
    """Whether bf16 products are computed by the hardware, not emulated."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return any(getattr(torch.cpu, f"_is_{isa}_supported", lambda: False)() for isa in ("avx512_bf16", "amx_tile"))


# ---------------------------------------------------------------------------------------------------------------------
# Options and errors
# ---------------------------------------------------------------------------------------------------------------------


EXIT_REQUEUE = 75  # saved on SIGTERM or SIGUSR1: start the same command again, as scripts/slurm_pretrain.sh does


class RunStopped(UsageError):
    """A run that ended early on purpose, with the reason. State is saved before this is raised."""

    def __init__(self, message: str, exit_code: int = 1):
        super().__init__(message)
        self.exit_code = exit_code


def run_cli(main: Callable[[], int | None]) -> None:
    """Run a script's ``main``; a UsageError becomes one line on stderr and its exit code, never a traceback."""
    try:
        code = main()
    except UsageError as error:
        if _speaks_for_its_machine():
            lines = [escape(line) for line in f"error: {error}".split("\n")]
            print("\n".join(lines), file=sys.stderr, flush=True)
        code = error.exit_code
    except BrokenPipeError:
        code = 141
    if not code or _on_gloo():
        leave_world()
    sys.stdout.flush()
    sys.exit(code or 0)


def _on_gloo() -> bool:
    """Whether an error leaves the world too. Threads of gloo that still run when Python ends abort the process (exit
    code -6 in place of ours), and gloo waits for nobody; NCCL waits for processes that may not have failed.
    """
    return dist.is_initialized() and dist.get_backend() == "gloo"


def _speaks_for_its_machine() -> bool:
    """Every process meets most errors; one of them tells. Where it is not clear which one, each does: tasks of srun
    that have not met may have failed for reasons of their own.
    """
    place = os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "") if dist.is_initialized() else "")
    return not place.isdecimal() or int(place) == 0


class _HelpWithDefaults(argparse.ArgumentDefaultsHelpFormatter):
    """Defaults in the help, where there is one worth telling."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default in (None, False, "") else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """An argument parser whose help shows defaults and whose errors are one line with the nearest valid name."""

    def __init__(self, **kwargs):
        super().__init__(formatter_class=_HelpWithDefaults, allow_abbrev=False, **kwargs)

    def error(self, message: str) -> NoReturn:
        raise UsageError(message)

    def parse_args(self, args: list[str] | None = None, namespace=None) -> argparse.Namespace:
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            name = unknown[0].split("=")[0]
            raise UsageError(f"unknown option {name}{nearest(name, self._option_string_actions)}")
        return parsed


def nearest(name: str, valid) -> str:
    """``; did you mean X?`` when something valid looks like ``name``, else an empty string."""
    match = difflib.get_close_matches(name, list(valid), n=1, cutoff=0.65)
    return f"; did you mean {match[0]}?" if match else ""


def escape(name: str | os.PathLike) -> str:
    """A name from a disk or an archive as it may be shown: on one line and without codes that a terminal obeys.

    What cannot be printed is written as in Python's strings, bytes that are no text too. Twice is as once.
    """
    name = os.fspath(name)
    return name if name.isprintable() else "".join(c if c.isprintable() else _escaped(c) for c in name)


def _escaped(character: str) -> str:
    undecoded = 0xDC80 <= ord(character) <= 0xDCFF  # a byte that is no text, as os.fsdecode keeps it
    return f"\\x{ord(character) - 0xDC00:02x}" if undecoded else ascii(character)[1:-1]


def shortened(text: object, length: int = 80) -> str:
    """A name or a value from a file for a line: its beginning where it is longer, harmless to a terminal."""
    text = str(text) if isinstance(text, str) else str(text)[: length + 1]
    return escape(text if len(text) <= length else f"{text[: length - 3]}...")


def bool_flag(text: str) -> bool:
    """on/off, true/false, 1/0, whatever the case, as the original scripts accept them."""
    try:
        return {"on": True, "true": True, "1": True, "off": False, "false": False, "0": False}[str(text).lower()]
    except KeyError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false") from None


def git_revision() -> str:
    """Commit of the checkout this file belongs to, and whether it was changed since; 'unknown' outside git."""
    here = Path(__file__).resolve().parent
    try:
        run = [
            subprocess.run(["git", *command], cwd=here, capture_output=True, text=True, timeout=10, check=True).stdout
            for command in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        ]
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return run[0].strip() + (" with local changes" if run[1].strip() else "")


# ---------------------------------------------------------------------------------------------------------------------
# Schedules: float64 arrays, one value per iteration or per epoch
# ---------------------------------------------------------------------------------------------------------------------


def cosine_scheduler(
    base_value: float,
    final_value: float,
    epochs: int,
    niter_per_ep: int,
    warmup_epochs: int = 0,
    start_warmup_value: float = 0.0,
    warmup_steps: int = -1,
) -> np.ndarray:
    """Linear warm-up, then half a cosine; shape (epochs * niter_per_ep,).

    ``warmup_steps``, if positive, is the length of the warm-up whatever ``warmup_epochs`` says.

    parity: the warm-up includes both ends, so ``base_value`` occurs twice around the junction, and the cosine never
    reaches ``final_value`` (DINO utils.py).
    """
    warmup_iters = warmup_steps if warmup_steps > 0 else int(warmup_epochs * niter_per_ep)
    total = epochs * niter_per_ep
    if warmup_iters > total:
        raise ValueError(f"a warm-up of {warmup_iters} steps is longer than the {epochs} epochs of training")
    warmup = np.linspace(start_warmup_value, base_value, warmup_iters)
    steps = np.arange(total - warmup_iters)
    cosine = final_value + 0.5 * (base_value - final_value) * (1 + np.cos(np.pi * steps / max(1, len(steps))))
    return np.concatenate((warmup, cosine))


def warmup_scheduler(start_value: float, final_value: float, warmup_epochs: int, epochs: int) -> np.ndarray:
    """Linear from start to final over the first ``warmup_epochs`` epochs, then constant; shape (epochs,)."""
    if warmup_epochs > epochs:
        raise ValueError(f"warm-up of {warmup_epochs} epochs is longer than the {epochs} epochs of training")
    constant = np.full(epochs - warmup_epochs, float(final_value))
    return np.concatenate((np.linspace(start_value, final_value, warmup_epochs), constant))


# ---------------------------------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------------------------------


def check_writable(folder: Path) -> None:
    """Raise UsageError when ``folder`` could not be made or written to; nothing is made yet."""
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    if not existing.is_dir():
        raise UsageError(f"--output_dir {folder}: {existing} is a file; choose a folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UsageError(f"--output_dir {folder}: {existing} is not writable; choose another folder")


def make_folder(folder: Path) -> None:
    """Make a folder for results. Raises UsageError when that is not possible."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--output_dir {folder}: cannot be made ({error.strerror}); choose another folder") from None


def save_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Let ``write`` fill a temporary file beside ``path``, flush it to disk, then rename it over ``path``.

    A reader sees the old file or the new one, never half of either; a full disk leaves the old one in place.
    Raises OSError when the file cannot be written.
    """
    temporary = path.with_name(f"{path.name}.tmp{os.getpid()}")
    try:
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def save_torch(obj, path: Path) -> None:
    """``torch.save`` that is atomic and reports a full disk as the OSError it is."""

    def write(temporary: Path) -> None:
        with open(temporary, "wb") as file:
            try:
                torch.save(obj, file)
            except RuntimeError as error:  # torch wraps the failed write of its zip archive
                raise OSError(f"cannot write {temporary}: {error.__cause__ or error.__context__ or error}") from error

    save_atomically(path, write)
