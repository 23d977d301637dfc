"""Classes of an image from its logits: along borders only, against stretching all logits first. Processor seconds.

    python benchmarks/bench_segmentation.py                          150 classes, 512 x 683 to 768 x 1024

The original stretches the mean logits of all windows over the image, takes a softmax and its largest class. Both sides
run in turn in this process on logits as smooth as a head's on patches of 16 pixels, and must agree in every pixel
but those whose first two classes are equal up to rounding.
"""

import time

import torch

from evaluation.segmentation import resized, resized_classes
from utils import Parser, UsageError, run_cli

ROUNDED = 1e-5  # of the pixels may differ


def main() -> None:
    parser = Parser(prog="bench_segmentation.py", description=__doc__.splitlines()[0])
    parser.add_argument("--classes", default=150, type=int)
    parser.add_argument("--size", default=[512, 683], nargs=2, type=int, help="height and width that logits have")
    parser.add_argument("--image", default=[768, 1024], nargs=2, type=int, help="height and width of the image")
    parser.add_argument("--repeats", default=5, type=int)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    regions = resized(4 * torch.randn(1, args.classes, 6, 8), [side // 16 for side in args.size])
    logits = resized(regions + 0.3 * torch.randn_like(regions), args.size)
    sides = {
        "original": lambda: resized(logits, args.image).softmax(dim=1).argmax(dim=1)[0],
        "borders": lambda: resized_classes(logits[0], args.image),
    }
    seconds, largest = dict.fromkeys(sides, 0.0), 0
    for _ in range(args.repeats):
        found = {}
        for name, classes in sides.items():
            before = time.process_time()
            found[name] = classes()
            seconds[name] += time.process_time() - before
        largest = max(largest, int((found["original"] != found["borders"]).sum()))
    if largest > ROUNDED * args.image[0] * args.image[1]:
        raise UsageError(f"{largest} pixels differ")
    per_image = {name: total / args.repeats for name, total in seconds.items()}
    print("  ".join(f"{name}: {value:.3f} s" for name, value in per_image.items()))
    print(f"{per_image['original'] / per_image['borders']:.1f} times; pixels that differ: {largest}")


if __name__ == "__main__":
    run_cli(main)
