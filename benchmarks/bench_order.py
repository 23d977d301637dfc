"""What the order of an epoch costs: time and memory to read a batch at its start and in its middle.

    python benchmarks/bench_order.py                   # up to 1,000,000,000 images

For comparison the stored permutation that other loaders draw (torch.randperm), up to ``--stored_up_to`` images.
"""

import time
import tracemalloc

import numpy as np
import torch

from randomness import Permutation
from utils import Parser, run_cli


def make_parser() -> Parser:
    parser = Parser(description="Time and memory of the epoch's order, by the number of images.")
    add = parser.add_argument
    add("--images", default=(10_000, 1_281_167, 10**8, 10**9), type=int, nargs="+", help="sizes of the data set")
    add("--batch", default=1024, type=int, help="images of a global batch")
    add("--stored_up_to", default=2 * 10**7, type=int, help="largest data set for the comparison")
    return parser


def main() -> None:
    args = make_parser().parse_args()
    print(f"a batch of {args.batch}, medians of 20 seeds; memory: the most that NumPy held at once")
    print(f"{'images':>13} {'first batch':>12} {'from middle':>12} {'memory':>9} {'us per image':>13} {'stored':>18}")
    for images in args.images:
        middle = images // 2 // args.batch * args.batch
        first, last = (median_seconds(images, start, args.batch) * 1e3 for start in (0, middle))
        memory = peak_memory(images, middle, args.batch)
        order = Permutation(images, 0, 0)
        chunk = np.arange(min(images, 100_000))
        per_image = seconds(lambda: order[chunk]) / len(chunk)  # noqa: B023
        print(
            f"{images:13,} {first:9.2f} ms {last:9.2f} ms {memory:6.0f} kB {per_image * 1e6:13.3f} "
            f"{stored(images, args.stored_up_to):>18}"
        )


def median_seconds(images: int, start: int, batch: int) -> float:
    """To make the order of an epoch and read one batch of it."""
    positions = np.arange(start, min(start + batch, images))
    return float(np.median([seconds(lambda: Permutation(images, seed, 0)[positions]) for seed in range(20)]))  # noqa: B023


def peak_memory(images: int, start: int, batch: int) -> float:
    tracemalloc.start()
    Permutation(images, 0, 0)[np.arange(start, min(start + batch, images))]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak / 1000


def stored(images: int, limit: int) -> str:
    memory = f"{images * 8 / 1e6:.0f} MB"
    if images > limit:
        return f"{memory}, not run"
    return f"{memory}, {seconds(lambda: torch.randperm(images)) * 1e3:.1f} ms"


def seconds(function) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


if __name__ == "__main__":
    run_cli(main)
