"""One training step: this repository's against the plain formulation, and fp32 against bf16. Time and peak memory.

    python benchmarks/bench_step.py                          ViT-S/16, 65536 prototypes, 2 x 224 + 8 x 96, batch 4
    python benchmarks/bench_step.py --method ibot            ViT-S/16, 8192 prototypes, 2 x 224 + 10 x 96, batch 4
    python benchmarks/bench_step.py --method esvit --arch swin_tiny --batch 2          2 x 224 + 8 x 96, windows of 7
    python benchmarks/bench_step.py --batch 64 --device cuda

Both sides run alternately in one process under the same settings of the allocator, and must give the same loss. On a
processor its own seconds are counted.
Memory is the peak of a fresh process per side. The floor is the time that the step's multiply-adds need at the rate of
matrix products measured between the steps; work that stochastic depth drops is counted as if it were done.
"""

import argparse
import copy
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import heads
import numpy as np
import plain
import torch
from plain import textbook
from torch.utils.flop_counter import FlopCounterMode

from data.device import to_device_ahead
from data.loader import stack
from methods import METHODS
from methods.base import Clock, Method
from models import build_backbone
from training.optim import build_optimizer, optimizer_step, set_schedules
from training.options import parse_options
from utils import Parser, UsageError, autocast, has_bf16, keep_large_blocks, run_cli

CLIP = {"unic": 0.0}  # all others clip at 3
SETTINGS = {  # what the published recipes have and the defaults have not
    "dino": "--out_dim 65536 --local_crops_number 8",
    "ibot": "--out_dim 8192 --local_crops_number 10 --shared_head true --pred_ratio 0 0.3 --pred_ratio_var 0 0.2",
    "attmask": "--out_dim 8192 --local_crops_number 10 --shared_head true --pred_ratio 0.3 --pred_ratio_var 0.2",
    "udi": "--out_dim 65536 --local_crops_number 10 --norm_last_layer false",
    "unic": "--image_size 224",
    "esvit": "--use_dense_prediction true --out_dim 65536 --local_crops_number 8 --norm_last_layer false",
    "mugs": "--norm_last_layer false",
}
TEACHERS = ("vit_small", "vit_small")  # of random weights, where a method has frozen ones
SHARES = ("forward", "backward", "clip", "optimiser", "EMA and centre")


def get_bench_parser() -> argparse.ArgumentParser:
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("--method", default="dino", choices=sorted(plain.FORWARD))
    parser.add_argument("--arch", default="vit_small")
    parser.add_argument("--patch_size", type=int, help="left out: the architecture's")
    parser.add_argument("--batch", default=4, type=int, help="images per step")
    parser.add_argument("--local_crops_number", type=int, help="left out: as in the method's recipe")
    parser.add_argument("--out_dim", type=int, help="left out: as in the method's recipe")
    parser.add_argument("--drop_path_rate", default=0.1, type=float)
    parser.add_argument("--steps", default=5, type=int, help="timed steps per side, after one that is not")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--deterministic", action="store_true", help="both sides as main_pretrain.py runs unless told")
    parser.add_argument("--default_malloc", action="store_true", help="leave the C allocator as it is")
    parser.add_argument("--side", choices=["plain", "fast"], help=argparse.SUPPRESS)
    parser.add_argument("--part", default="step", choices=["step", "heads"], help=argparse.SUPPRESS)
    parser.add_argument("--precision", default="fp32", help=argparse.SUPPRESS)
    return parser


def build(args: argparse.Namespace) -> tuple[Method, dict]:
    """The method as its recipe and ``args`` have it, and a batch for it. What ``args`` leaves out is filled in."""
    names = ("arch", "patch_size", "local_crops_number", "out_dim", "drop_path_rate")
    given = [f"--{name}={value}" for name in names if (value := getattr(args, name)) is not None]
    options = parse_options(["--method", args.method, *SETTINGS[args.method].split(), *given])
    vars(args).update({name: getattr(options, name, None) for name in names})
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        if hasattr(options, "teachers"):
            options.teachers = save_teachers(Path(folder), options.patch_size)
        method = METHODS[args.method].build(options).to(args.device)
    return method, noise_batch(METHODS[args.method].views(options), args.batch, torch.device(args.device))


def save_teachers(folder: Path, patch_size: int) -> str:
    """Networks of random weights in files, as ``--teachers`` names them."""
    names = [f"teacher{number}" for number in range(len(TEACHERS))]
    for name, arch in zip(names, TEACHERS, strict=True):
        torch.save(build_backbone(arch, patch_size).state_dict(), folder / f"{name}.pth")
    return ",".join(f"{name}={folder / name}.pth" for name in names)


def noise_batch(views: Callable, images: int, device: torch.device) -> dict:
    """What the loader makes of pictures of noise, ready on the device: crops, and masks or places where there are."""
    rng = np.random.default_rng(0)
    pictures = (rng.integers(0, 256, (375, 500, 3), np.uint8) for _ in range(images))
    samples = [views(picture, (0, 0, index)) for index, picture in enumerate(pictures)]
    return next(iter(to_device_ahead([getattr(views, "collate", stack)(samples)], device)))


def now(device: torch.device) -> float:
    """Seconds, when everything that was asked of the device is done; of the processor those it worked for us, of all
    threads, whatever else runs beside.
    """
    if device.type == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


class Side:
    """One formulation with its own weights; ``step`` returns the loss and the seconds of every phase."""

    def __init__(self, name: str, method: Method, precision: str, device: torch.device):
        self.name, self.method, self.precision, self.device = name, method, precision, device
        groups = method.param_groups()
        self.optimizer = textbook.plain_optimizer(groups) if name == "plain" else build_optimizer("adamw", groups)
        self.times: list[list[float]] = []

    def step(self, batch: dict, iteration: int) -> float:
        clock, clip = clock_of(iteration, len(batch["crops"][0])), CLIP.get(self.method.name, 3.0)
        marks = [now(self.device)]
        set_schedules(self.optimizer, clock)
        self.optimizer.zero_grad(set_to_none=True)
        with autocast(self.precision, self.device):
            if self.name == "plain":
                loss = plain.FORWARD[self.method.name](self.method, batch, clock)
            else:
                loss = self.method(batch, clock)["loss"]
        marks.append(now(self.device))
        loss.backward()
        marks.append(now(self.device))
        if self.name == "plain":
            textbook.update(self.method, self.optimizer, clip, clock)
            marks += [marks[-1], marks[-1]]
        else:
            self.method.clip_gradients(clip, clock)
            marks.append(now(self.device))
            optimizer_step(self.optimizer, None, None)
            marks.append(now(self.device))
            self.method.after_step(clock, None)
        marks.append(now(self.device))
        self.times.append([b - a for a, b in itertools.pairwise(marks)])
        return loss.item()

    def phases(self) -> list[float]:
        return [statistics.median(column) for column in zip(*self.times[1:], strict=True)]

    def seconds(self) -> float:
        return statistics.median(sum(times) for times in self.times[1:])


def product_rate(device: torch.device, dtype: torch.dtype = torch.float32) -> float:
    """Multiply-adds per second, times two, of a product of the shape of a ViT-S MLP."""
    a, b = torch.randn(1576, 384, device=device, dtype=dtype), torch.randn(384, 1536, device=device, dtype=dtype)
    repeats = 30 if device.type == "cpu" else 300
    for _ in range(5):
        a @ b
    began = now(device)
    for _ in range(repeats):
        a @ b
    return repeats * 2 * 1576 * 384 * 1536 / (now(device) - began)


def clock_of(iteration: int, images: int = 0) -> Clock:
    return Clock(epoch=9, iteration=iteration, lr=1e-4, weight_decay=0.04, momentum=0.996, global_batch=images)


def necessary_flops(method: Method, batch: dict) -> float:
    """Two per multiply-add of one step, nothing dropped."""
    method = copy.deepcopy(method)
    for module in method.modules():
        if hasattr(module, "drop_path"):
            module.drop_path = 0.0
    with FlopCounterMode(display=False) as counter:
        method(batch, Clock(epoch=9, iteration=0))["loss"].backward()
    return float(counter.get_total_flops())


def compare(args: argparse.Namespace, precision: str, method: Method, batch: dict) -> tuple[list[Side], list]:
    device = torch.device(args.device)
    sides = [Side(name, copy.deepcopy(method), precision, device) for name in ("plain", "fast")]
    rates = []
    for iteration in range(args.steps + 1):
        losses = []
        for side in sides:
            rates.append(product_rate(device))
            losses.append(side.step(batch, iteration))
        tolerance = 1e-4 if precision == "fp32" else 2e-2
        if abs(losses[0] - losses[1]) > tolerance * abs(losses[0]):
            raise UsageError(f"the two formulations disagree in step {iteration}: {losses[0]} and {losses[1]}")
    return sides, rates


def peak_memory(side: str, precision: str, part: str = "step") -> float:
    """Megabytes at the peak of two steps of one side in a process of its own; of heads and loss, what they add."""
    command = [sys.executable, __file__, *sys.argv[1:], "--side", side, "--precision", precision, "--part", part]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def resident_bytes(field: str) -> float:
    """Now (VmRSS) or at the peak (VmHWM), of this process alone; ``getrusage`` reports the parent's after a fork."""
    status = Path("/proc/self/status").read_text()
    return float(status.split(f"{field}:")[1].split()[0]) * 1024


def measure_memory(args: argparse.Namespace) -> int:
    method, batch = build(args)
    cuda, before = args.device.startswith("cuda"), 0.0
    if args.part == "heads":
        tokens = heads.random_tokens(method, batch, clock_of(0))
        before = torch.cuda.memory_allocated() if cuda else resident_bytes("VmRSS")
        heads.run(args.side, method, tokens, clock_of(0))
    else:
        side = Side(args.side, method, args.precision, torch.device(args.device))
        for iteration in range(2):
            side.step(batch, iteration)
    peak = torch.cuda.max_memory_allocated() if cuda else resident_bytes("VmHWM")
    print(json.dumps((peak - before) / 2**20))
    return 0


def compare_heads(args: argparse.Namespace, method: Method, batch: dict) -> None:
    """Heads and loss alone, forward and backward in fp32: seconds, and memory beyond what was there before."""
    tokens, device = heads.random_tokens(method, batch, clock_of(0)), torch.device(args.device)
    sides = {name: copy.deepcopy(method) for name in ("plain", "fast")}
    seconds = {name: [] for name in sides}
    for repeat in range(args.steps + 1):
        losses = []
        for name, side in sides.items():
            began = now(device)
            losses.append(heads.run(name, side, tokens, clock_of(repeat)))
            seconds[name].append(now(device) - began)
            side.load_state_dict(method.state_dict())  # the centres of one side move in the part that is measured
        if abs(losses[0] - losses[1]) > 1e-4 * abs(losses[0]):
            raise UsageError(f"heads and loss disagree: {losses[0]} and {losses[1]}")
    slow, fast = (statistics.median(values[1:]) for values in seconds.values())
    memory = [peak_memory(side, "fp32", "heads") for side in ("plain", "fast")]
    what = heads.describe(tokens)
    print(
        f"heads  {slow * 1e3:9.0f} {fast * 1e3:9.0f} {slow / fast:6.2f} {memory[0]:9.0f} {memory[1]:8.0f}   "
        f"with loss, fp32, forward and backward; {what}; memory they add"
    )


def main() -> int:
    args = get_bench_parser().parse_args()
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: this machine shows no GPU")
    if device.type == "cpu" and not args.default_malloc:
        keep_large_blocks()
    if args.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False
    if args.side:
        return measure_memory(args)

    method, batch = build(args)
    name = torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or platform.machine()
    sizes = Counter(crop.shape[-1] for crop in batch["crops"])
    print(
        f"{args.method}, {args.arch}/{args.patch_size}, out_dim {args.out_dim}, batch {args.batch}, "
        f"{' + '.join(f'{count} x {size}' for size, count in sizes.items())} pixels, drop path {args.drop_path_rate}"
    )
    print(
        f"{name}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, torch {torch.__version__}, "
        f"allocator {'as it is' if args.default_malloc else 'keeping large blocks'}"
        f"{', deterministic' if args.deterministic else ''}"
    )
    flops = necessary_flops(method, batch)
    print(f"{flops / 1e9:.0f} GFLOP per step\n")
    print(
        f"{'':6s} {'plain ms':>9s} {'fast ms':>9s} {'ratio':>6s} {'plain MB':>9s} {'fast MB':>8s} {'floor ms':>9s} "
        f"{'fast/floor':>10s} {'clip+optimiser+EMA':>19s}"
    )
    fast_seconds = {}
    for precision in ("fp32", "bf16"):
        sides, rates = compare(args, precision, method, batch)
        slow, fast = (side.seconds() for side in sides)
        fast_seconds[precision] = fast
        memory = [peak_memory(side, precision) for side in ("plain", "fast")]
        phases = sides[1].phases()
        rate = statistics.median(rates)
        steps = [sum(times) for times in sides[1].times[1:]]
        floor = flops / rate if precision == "fp32" else float("nan")
        print(
            f"{precision:6s} {slow * 1e3:9.0f} {fast * 1e3:9.0f} {slow / fast:6.2f} {memory[0]:9.0f} {memory[1]:8.0f} "
            f"{floor * 1e3:9.0f} {fast / floor:10.2f} {sum(phases[2:]) / fast:18.1%}"
        )
        print(
            "       fast: "
            + ", ".join(f"{n} {s * 1e3:.0f}" for n, s in zip(SHARES, phases, strict=True))
            + f" ms; steps {min(steps) * 1e3:.0f}-{max(steps) * 1e3:.0f}; "
            f"products at {min(rates) / 1e9:.0f}-{max(rates) / 1e9:.0f} GFLOP/s"
        )
    if args.method in heads.PARTS:
        compare_heads(args, method, batch)
    native = "" if has_bf16(device) else " (emulated: this hardware has no bf16)"
    print(f"\nbf16 is {fast_seconds['fp32'] / fast_seconds['bf16']:.2f}x as fast as fp32{native}")
    return 0


if __name__ == "__main__":
    run_cli(main)
