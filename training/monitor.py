"""What a person sees of a run: lines or a progress bar, log.txt, TensorBoard, warnings. Never waits for the device.

Measures travel to the host in a copy that is read one step later, when it has long arrived.
"""

import datetime
import json
import math
import resource
import statistics
import sys
import time
from collections import deque
from pathlib import Path

import torch

from methods.base import Clock
from training.health import diagnose
from utils import World, all_gather_rows, all_reduce_sum, log, save_atomically

WINDOW = 20
FORETELLING = 10  # steps, after which it can be said how long a run will take
CLOCKS = ("time", "data")  # meters that no two runs share: shown, never written to log.txt
OWN = ("lr", "wd", *CLOCKS)  # meters that are not losses


class Meter:
    """Median of the last values and mean of all, as DINO's logs show them."""

    def __init__(self):
        self.total, self.count, self.recent = 0.0, 0, deque(maxlen=WINDOW)

    def add(self, value: float) -> None:
        self.total, self.count = self.total + value, self.count + 1
        self.recent.append(value)

    @property
    def mean(self) -> float:
        return self.total / max(1, self.count)

    @property
    def median(self) -> float:
        return statistics.median_low(self.recent) if self.recent else math.nan


class Monitor:
    def __init__(
        self,
        output_dir: Path,
        epochs: int,
        niter: int,
        print_freq: int,
        batch: int,
        world: World,
        quiet_epochs: int = 0,
    ):
        """``quiet_epochs``: the first ones, in which health is not judged, since every run begins uniform."""
        self.output_dir, self.epochs, self.niter, self.print_freq = output_dir, epochs, niter, print_freq
        self.batch, self.world = batch, world
        self.quiet_iterations = quiet_epochs * niter
        self.meters: dict[str, Meter] = {}
        self.writer = None
        self._arriving: deque[tuple] = deque()
        self._warned: set[str] = set()
        self._foretold = False  # whether it was said how long the run will take
        self._last_step = time.perf_counter()

    def open(self, epoch: int, step: int) -> None:
        """Begin to log at a position: anything written later than it belongs to steps that will be taken again."""
        if self.world.rank:
            return
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(self.output_dir / "tensorboard"), purge_step=epoch * self.niter + step)
        path = self.output_dir / "log.txt"
        if path.exists():
            lines = [line for line in path.read_text().splitlines() if epoch_of(line) < epoch]
            save_atomically(path, lambda temporary: temporary.write_text("".join(f"{line}\n" for line in lines)))

    def begin_epoch(self) -> None:
        self._last_step = time.perf_counter()

    # ---- every step -------------------------------------------------------------------------------------------------

    def wants_health(self, step: int) -> bool:
        return step % self.print_freq == 0 or step == self.niter - 1

    def step(
        self, losses: dict[str, torch.Tensor], health: dict[str, torch.Tensor], clock: Clock, waited: float
    ) -> None:
        """0-dim tensors on the device; ``waited``: seconds this step spent waiting for data."""
        now = time.perf_counter()
        seconds, self._last_step = now - self._last_step, now
        values = {**losses, **{f"health/{name}": value for name, value in health.items()}}
        stacked = torch.stack([value.detach().double().reshape(()) for value in values.values()])
        arrived = None
        if stacked.is_cuda:
            host = torch.empty(stacked.shape, pin_memory=True)
            host.copy_(stacked, non_blocking=True)
            arrived, stacked = torch.cuda.Event(), host
            arrived.record()
        self._arriving.append((list(values), stacked, arrived, clock, seconds, waited))
        if arrived is None or len(self._arriving) > 1:
            self._read()

    def flush(self) -> None:
        """Read everything that is still on its way."""
        while self._arriving:
            self._read()

    def _read(self) -> None:
        names, stacked, arrived, clock, seconds, waited = self._arriving.popleft()
        if arrived is not None:
            arrived.synchronize()
        values = dict(zip(names, stacked.tolist(), strict=True))
        for name, value in {**values, "lr": clock.lr, "wd": clock.weight_decay}.items():
            meter = self._meter(name)
            if math.isfinite(value):  # a step that was skipped does not count
                meter.add(value)
        self._meter("time").add(seconds)
        self._meter("data").add(waited)
        step = clock.iteration - clock.epoch * self.niter
        if self.wants_health(step):
            self._report(clock, step, values)

    def _meter(self, name: str) -> Meter:
        return self.meters.setdefault(name, Meter())

    def _report(self, clock: Clock, step: int, values: dict[str, float]) -> None:
        if self.world.rank:
            return
        times, waits = self.meters["time"], self.meters["data"]
        speed = self.batch / max(1e-9, times.median)
        share = sum(waits.recent) / max(1e-9, sum(times.recent))
        self._print(clock, step, speed)
        if not self._foretold and times.count >= FORETELLING:
            self._foretold = True
            left = self.epochs * self.niter - 1 - clock.iteration
            log.info("about %s to go: %d steps of %.2f s on this machine, tests not counted",
                     spoken(left * times.median), left, times.median)  # fmt: skip
        scalars = {
            **values,
            "schedule/lr": clock.lr,
            "schedule/weight_decay": clock.weight_decay,
            "schedule/momentum": clock.momentum,
            "speed/images_per_second": speed,
            "speed/data_wait_share": share,
            "speed/max_memory_mb": max_memory_mb(self.world.device),
        }
        for name, value in scalars.items():
            self.writer.add_scalar(name if "/" in name else f"train/{name}", value, clock.iteration)
        if share > 0.3 and len(times.recent) == WINDOW:
            self.warn({"data": f"{share:.0%} of the time is spent waiting for images; raise --num_workers"})
        if clock.iteration >= self.quiet_iterations:
            health = {name.removeprefix("health/"): v for name, v in values.items() if name.startswith("health/")}
            self.warn(diagnose(health) if all(map(math.isfinite, health.values())) else {})

    def warn(self, problems: dict[str, str]) -> None:
        """Say each problem once per epoch."""
        for name, text in problems.items():
            if name not in self._warned:
                self._warned.add(name)
                log.warning("warning: %s", text)

    def _print(self, clock: Clock, step: int, speed: float) -> None:
        eta = datetime.timedelta(seconds=int(self.meters["time"].mean * (self.niter - 1 - step)))
        width = len(str(self.niter))
        shown = [
            f"{name}: {meter.median:.4f} ({meter.mean:.4f})"
            for name, meter in self.meters.items()
            if name not in OWN and "/" not in name
        ]
        line = (
            f"Epoch: [{clock.epoch}/{self.epochs}]  [{step:{width}d}/{self.niter}]  eta: {eta}  {'  '.join(shown)}  "
            f"lr: {clock.lr:.6f}  wd: {clock.weight_decay:.4f}  time: {self.meters['time'].median:.4f}  "
            f"data: {self.meters['data'].median:.4f}  img/s: {speed:.1f}  "
            f"max mem: {max_memory_mb(self.world.device):.0f}"
        )
        if sys.stdout.isatty():
            done = (step + 1) / self.niter
            bar = "█" * round(20 * done) + "·" * (20 - round(20 * done))
            print(f"\r{bar} {line}\x1b[K", end="\n" if step == self.niter - 1 else "", flush=True)
        else:
            print(line, flush=True)

    # ---- every epoch ------------------------------------------------------------------------------------------------

    def note(self, values: dict[str, float]) -> None:
        """Measures of the whole epoch, the same on all processes; checkpoints keep them like those of the steps."""
        for name, value in values.items():
            self._meter(name).add(value)

    def end_epoch(
        self, epoch: int, knn: dict[str, dict], knn_unreadable: dict[str, int] | None = None, unreadable: int = 0
    ) -> dict:
        """Averages over the epoch and all processes, written to log.txt and TensorBoard; the meters begin anew.

        ``knn``: for every number of neighbours its accuracies in percent; empty where there was no test.
        ``knn_unreadable``: how many images it did without, where there were such. ``unreadable``: how many times
        another image had to stand for one in training.
        """
        self.flush()
        names = [name for name in self.meters if name not in CLOCKS]
        sums = torch.tensor([[self.meters[n].total, self.meters[n].count] for n in names], dtype=torch.float64)
        sums = all_reduce_sum(sums.to(self.world.device)).cpu()
        averages = {n: (total / max(1.0, count)) for n, (total, count) in zip(names, sums.tolist(), strict=True)}
        first = [name for name in ("loss", "lr", "wd") if name in averages]
        rest = [name for name in names if name not in first]
        line = {f"train_{name}": averages[name] for name in first}
        line |= {"epoch": epoch, "train_unreadable": unreadable}
        line |= {f"train_{name.removeprefix('health/')}": averages[name] for name in rest}
        line |= {"k-NN": knn} if knn else {}
        line |= {"k-NN_unreadable": knn_unreadable} if knn and knn_unreadable else {}
        if self.world.rank == 0:
            with open(self.output_dir / "log.txt", "a") as file:
                file.write(json.dumps(line) + "\n")
            scalars = {name.removeprefix("health/"): value for name, value in averages.items()}
            scalars |= {
                f"knn{k}_{name}": row[name] for k, row in knn.items() for name in ("top1", "top5") if name in row
            }
            for name, value in scalars.items():
                self.writer.add_scalar(f"epoch/{name}", value, (epoch + 1) * self.niter)
        log.info("Averaged stats: %s", "  ".join(f"{name}: {averages[name]:.6g}" for name in names))
        self.meters.clear()
        self._warned.clear()
        return line

    def add_image(self, name: str, picture, iteration: int) -> None:
        """``picture``: uint8 (height, width, 3)."""
        if self.writer is not None:
            self.writer.add_image(name, picture, iteration, dataformats="HWC")

    def close(self) -> None:
        self.flush()
        if self.writer is not None:
            self.writer.close()

    # ---- continuing -------------------------------------------------------------------------------------------------

    def state_dict(self) -> list[dict]:
        """Every process's sums of the unfinished epoch, so that its averages are those of a run that was never
        interrupted. All processes take part.
        """
        self.flush()
        if not self.meters:
            return []
        sums = torch.tensor([[meter.total, meter.count] for meter in self.meters.values()], dtype=torch.float64)
        rows = all_gather_rows(sums.to(self.world.device)).unflatten(0, (-1, len(self.meters)))
        return [dict(zip(self.meters, process, strict=True)) for process in rows.tolist()]

    def load_state_dict(self, state: list[dict] | dict) -> None:
        """Each process goes on from its own sums; when their number has changed, each from the mean of all."""
        processes = state if isinstance(state, list) else [state]  # one of the first process alone was kept once
        if len(processes) == self.world.size:
            processes = [processes[self.world.rank]]
        for name in processes[0] if processes else ():
            meter, sums = self._meter(name), [process[name] for process in processes]
            meter.total, meter.count = (sum(column) / len(sums) for column in zip(*sums, strict=True))


def spoken(seconds: float) -> str:
    """A time in the unit that people would say it in."""
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.0f} {unit}" if seconds >= 9.5 * size else f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} seconds"


def epoch_of(line: str) -> float:
    """The epoch of a line of log.txt; infinity for one that was torn when the machine went down."""
    try:
        return json.loads(line)["epoch"]
    except ValueError:
        return math.inf


def max_memory_mb(device: torch.device) -> float:
    """Largest memory so far: of the GPU's tensors, or of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
