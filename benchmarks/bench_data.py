"""Images per second on one core: decoding and cropping, Pillow path against fast path, alternating in one run.

    python benchmarks/bench_data.py                    # 2 x 224 + 10 x 96
    python benchmarks/bench_data.py --local_crops_number 0
    python benchmarks/bench_data.py --recipe unic      # 1 x 224; pil is the original's floating point pipeline

The images are JPEG files of 500 x 375 pixels (ImageNet's usual size), made from the bundled photographs or, without
them, from noise with a photograph's spectrum. The numbers are medians over the rounds of processor seconds.
"""

import argparse
import io
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import PIL
import torch
import torchvision
from PIL import Image, ImageOps

from data.decode import decode_array, decode_pil
from data.unic_views import UNICViews
from methods.multicrop import add_crop_arguments, multi_crop_views
from utils import Parser, UsageError, run_cli

WIDTH, HEIGHT = 500, 375


def make_parser() -> Parser:
    parser = Parser(description="Images per second and core of both augmentation paths.")
    add = parser.add_argument
    add_crop_arguments(parser)
    parser.set_defaults(local_crops_number=10)
    add("--recipe", default="multicrop", choices=["multicrop", "unic"], help="unic: one crop of --global_crops_size")
    add("--images", default=16, type=int, help="different images")
    add("--rounds", default=7, type=int, help="how often each path handles every image")
    add("--quality", default=92, type=int, help="JPEG quality")
    return parser


def main() -> None:
    args = make_parser().parse_args()
    if min(args.images, args.rounds) < 1:
        raise UsageError(f"--images {args.images} --rounds {args.rounds}: both have to be at least 1")
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    files = [encode(image, args.quality) for image in make_images(args.images)]
    decoders = {"pil": decode_pil, "fast": decode_array}
    views = {path: make_views(args, path) for path in decoders}
    decode_seconds, seconds = {"pil": [], "fast": []}, {"pil": [], "fast": []}
    for round_ in range(args.rounds + 1):
        for path, decode in decoders.items():
            decoded, total = measure(files, decode, views[path], round_)
            if round_:  # the first round warms up
                decode_seconds[path].append(decoded)
                seconds[path].append(total)
    print_table(args, files, seconds, decode_seconds)


def make_views(args: argparse.Namespace, path: str) -> Callable:
    if args.recipe == "unic":
        return UNICViews(args.global_crops_size, path)
    return multi_crop_views(argparse.Namespace(**vars(args), augment=path))


def measure(files: list[bytes], decode: Callable, views: Callable, round_: int) -> tuple[float, float]:
    """Processor seconds per image of decoding, and of decoding and cropping."""
    start = time.process_time()
    images = [decode(data, "benchmark") for data in files]
    decoded = time.process_time() - start
    for index, image in enumerate(images):
        views(image, (0, round_, index))
    return decoded / len(files), (time.process_time() - start) / len(files)


def make_images(count: int) -> list[Image.Image]:
    paths = sorted((Path(__file__).parent.parent / "data" / "photographs").glob("*.jpg"))
    if not paths:
        return [photograph_like_noise(seed) for seed in range(count)]
    photographs = [Image.open(path).convert("RGB") for path in paths[:count]]
    fitted = [ImageOps.fit(photograph, (WIDTH, HEIGHT), Image.Resampling.BICUBIC) for photograph in photographs]
    return [fitted[index % len(fitted)] for index in range(count)]


def photograph_like_noise(seed: int) -> Image.Image:
    """Amplitudes that fall with the frequency, as those of natural images do, and correlated colours."""
    random = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(HEIGHT)[:, None], np.fft.rfftfreq(WIDTH)[None])
    spectrum = np.fft.rfft2(random.normal(size=(3, HEIGHT, WIDTH))) / np.maximum(frequency, 1 / WIDTH)
    planes = np.fft.irfft2(spectrum, s=(HEIGHT, WIDTH))
    planes = np.tensordot([[1, 0.3, 0.1], [1, 0, -0.1], [1, -0.3, 0.1]], planes, 1)
    planes = (planes - planes.mean()) / planes.std() * 55 + 120
    return Image.fromarray(np.clip(planes, 0, 255).astype(np.uint8).transpose(1, 2, 0).copy())


def encode(image: Image.Image, quality: int) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def print_table(args, files: list[bytes], seconds: dict, decode_seconds: dict) -> None:
    crops = f"2 x {args.global_crops_size} + {args.local_crops_number} x {args.local_crops_size}"
    crops = f"1 x {args.global_crops_size}, UNIC" if args.recipe == "unic" else crops
    size = sum(map(len, files)) / len(files) / 1000
    print(f"{crops}, {len(files)} JPEG files of {WIDTH} x {HEIGHT}, {size:.0f} kB each, median of {args.rounds} rounds")
    print(f"{processor()}, one core; Python {platform.python_version()}, torch {torch.__version__}, torchvision "
          f"{torchvision.__version__}, OpenCV {cv2.__version__}, Pillow {PIL.__version__}")  # fmt: skip
    print(f"{'path':6} {'ms/image':>9} {'images/s/core':>14} {'decoding ms':>12} {'decoding share':>15} {'ratio':>6}")
    slow = statistics.median(seconds["pil"])
    for path in ("pil", "fast"):
        total, decoding = statistics.median(seconds[path]), statistics.median(decode_seconds[path])
        print(
            f"{path:6} {total * 1e3:9.2f} {1 / total:14.0f} {decoding * 1e3:12.2f} {decoding / total:14.0%} "
            f"{slow / total:6.2f}x"
        )


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


if __name__ == "__main__":
    run_cli(main)
