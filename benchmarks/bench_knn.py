"""Weighted k-NN: this repository's form against the original's, on the same features. Time and peak memory.

    python benchmarks/bench_knn.py                        a tenth of ImageNet on a processor, all of it on a GPU
    python benchmarks/bench_knn.py --bank 1280000 --queries 50000 --dim 384

The original's form searches the bank anew for every k, in a hundred chunks of the queries, and turns the neighbours'
labels into a one-hot tensor (chunk, k, classes). Both sides run in processes of their own, one after the other; memory
is the peak beyond the features themselves. They must predict the same class for every image and every k, but for the
few whose first two classes have the same votes up to rounding, which depends on the shapes of products.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from evaluation.knn import class_votes, knn_classify, neighbours_in_chunks
from utils import Parser, UsageError, run_cli

KS = (10, 20, 100, 200)
TEMPERATURE = 0.07
ROUNDED = 1e-4  # of the predictions may differ
FULL, TENTH = (1_280_000, 50_000), (128_000, 5_000)  # training and validation images of ImageNet, in round numbers


def make_features(args: argparse.Namespace) -> tuple[torch.Tensor, ...]:
    """Normalised features around one centre per class, as spread as a trained network's, and their labels."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(args.classes, args.dim, generator=generator)
    tensors = []
    for count in (args.bank, args.queries):
        labels = torch.randint(args.classes, (count,), generator=generator)
        features = torch.randn(count, args.dim, generator=generator).mul_(4.0).add_(centres[labels])
        tensors += [F.normalize(features, dim=1).to(args.device), labels.to(args.device)]
    return tuple(tensors)


def original_form(bank, labels, queries, classes: int, predict: Callable) -> None:
    """Steps of the original's classifier: everything again for every k, a one-hot tensor for every chunk."""
    chunk = len(queries) // 100
    for k in KS:
        for start in range(0, len(queries), chunk):
            similarities, indices = (queries[start : start + chunk] @ bank.T).topk(k, largest=True, sorted=True)
            neighbours = labels[indices].view(-1, 1)
            one_hot = torch.zeros(len(neighbours), classes, device=bank.device).scatter_(1, neighbours, 1)
            weights = (similarities / TEMPERATURE).exp().view(-1, k, 1)
            votes = (one_hot.view(-1, k, classes) * weights).sum(dim=1)
            predict(k, start, votes.sort(dim=1, descending=True).indices)


def our_predictions(bank, labels, queries, classes: int, predict: Callable) -> None:
    """What knn_classify counts, before it counts it."""
    for part, similarities, neighbours in neighbours_in_chunks(bank, labels, queries, max(KS), classes):
        for k in KS:
            votes = class_votes(similarities[:, :k], neighbours[:, :k], TEMPERATURE, classes)
            predict(k, part.start, votes.argmax(dim=1, keepdim=True))


def run_side(args: argparse.Namespace) -> dict:
    """Seconds and peak bytes beyond the features of one side; its predictions are written to --predictions."""
    bank, labels, queries, truth = make_features(args)
    predictions = {k: torch.empty(len(queries), dtype=torch.long, device=bank.device) for k in KS}

    def predict(k: int, start: int, ranked: torch.Tensor) -> None:
        predictions[k][start : start + len(ranked)] = ranked[:, 0]

    knn_classify(bank[:1000], labels[:1000], queries[:200], truth[:200], KS)  # warm up
    before = reset_peak(args.device)
    start = time.perf_counter()
    if args.side == "original":
        original_form(bank, labels, queries, args.classes, predict)
    else:
        accuracies = knn_classify(bank, labels, queries, truth, KS, TEMPERATURE, args.classes)
    synchronise(args.device)
    seconds, peak = time.perf_counter() - start, peak_bytes(args.device) - before
    if args.side == "ours":  # not timed: the same predictions again, to be compared
        our_predictions(bank, labels, queries, args.classes, predict)
        for k in KS:
            found = 100 * int((predictions[k] == truth).sum()) / len(truth)
            assert abs(accuracies[k][0] - found) <= 100 * ROUNDED, f"k={k}: {accuracies[k][0]} counted, {found} found"
    right = {k: 100 * float((predictions[k] == truth).float().mean()) for k in KS}
    torch.save(torch.stack(list(predictions.values())).cpu(), args.predictions)
    return {"seconds": seconds, "peak": peak, "top1": right}


def synchronise(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def reset_peak(device: str) -> int:
    """Forget the peak so far; returns the bytes in use."""
    synchronise(device)
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    return peak_bytes(device)


def peak_bytes(device: str) -> int:
    if device != "cpu":
        return torch.cuda.max_memory_allocated()
    with open("/proc/self/status") as file:
        return next(1024 * int(line.split()[1]) for line in file if line.startswith("VmHWM"))


def get_bench_parser() -> Parser:
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("--bank", default=None, type=int, help="training images; left out: 1.28 M, on a CPU a tenth")
    parser.add_argument("--queries", default=None, type=int, help="test images; left out: 50 k, on a CPU a tenth")
    parser.add_argument("--dim", default=384, type=int, help="width of a feature")
    parser.add_argument("--classes", default=1000, type=int)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--side", choices=["original", "ours"], help=argparse.SUPPRESS)
    parser.add_argument("--predictions", help=argparse.SUPPRESS)
    return parser


def main() -> None:
    args = get_bench_parser().parse_args()
    sizes = TENTH if args.device == "cpu" else FULL
    if sizes is TENTH and not (args.bank or args.queries or args.side):
        print("on a processor: a tenth of ImageNet's images on both sides; pass --bank and --queries for more")
    args.bank, args.queries = args.bank or sizes[0], args.queries or sizes[1]
    if args.queries < 100 or args.bank < max(KS):
        raise UsageError(f"--queries {args.queries} --bank {args.bank}: the original's form needs 100 and {max(KS)}")
    if args.side:
        print(json.dumps(run_side(args)))
        return
    options = [f"--{name}={getattr(args, name)}" for name in ("bank", "queries", "dim", "classes", "device")]
    sides, predictions = {}, []
    for side in ("original", "ours"):
        with tempfile.NamedTemporaryFile() as file:
            command = [sys.executable, __file__, *options, f"--side={side}", f"--predictions={file.name}"]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise UsageError(f"the {side} side failed: {done.stderr.strip().splitlines()[-1]}")
            sides[side] = json.loads(done.stdout.splitlines()[-1])
            predictions.append(torch.load(file.name, weights_only=True))
    differing = int((predictions[0] != predictions[1]).sum())
    assert differing <= ROUNDED * predictions[0].numel(), f"the two sides differ in {differing} predictions"
    where = torch.cuda.get_device_name() if args.device != "cpu" else platform.processor() or platform.machine()
    print(f"bank {args.bank}, queries {args.queries}, dim {args.dim}, classes {args.classes}, k {KS}, float32")
    print(f"{where}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, torch {torch.__version__}")
    for side, result in sides.items():
        print(f"{side:<10}{result['seconds']:9.2f} s {result['peak'] / 2**20:9.0f} MiB")
    ratio = [sides["original"][key] / max(sides["ours"][key], 1e-9) for key in ("seconds", "peak")]
    top1 = ", ".join(f"k={k}: {value:.2f}" for k, value in sides["ours"]["top1"].items())
    print(
        f"ours takes 1/{ratio[0]:.1f} of the time and 1/{ratio[1]:.1f} of the memory; "
        f"{differing} of {predictions[0].numel()} predictions differ (top-1 {top1})"
    )


if __name__ == "__main__":
    run_cli(main)
