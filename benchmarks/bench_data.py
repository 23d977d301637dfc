"""Images per second on one core: decoding and cropping, Pillow path against fast path, alternating in one run.

    python benchmarks/bench_data.py                    # 2 x 224 + 10 x 96
    python benchmarks/bench_data.py --local_crops_number 0
    python benchmarks/bench_data.py --method unic      # 1 x 224; pil is the original's floating point pipeline
    python benchmarks/bench_data.py --method mugs      # 4 x 224 + 10 x 96, and DINO's crops beside them
    python benchmarks/bench_data.py --stored           # the fast path from a folder, tar shards, a mapped zip, TSV

The images are JPEG files of 500 x 375 pixels (ImageNet's usual size), made from the bundled photographs or, without
them, from noise with a photograph's spectrum. The numbers are medians over the rounds of processor seconds.
"""

import argparse
import base64
import contextlib
import io
import os
import platform
import statistics
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import PIL
import torch
import torchvision
from PIL import Image, ImageOps

from data.datasets import open_source
from data.decode import decode_array, decode_pil
from data.encoded import IndexedSource
from data.mugs_views import MugsViews
from data.published import Published
from data.unic_views import UNICViews
from methods.multicrop import add_crop_arguments, multi_crop_views
from utils import Parser, UsageError, run_cli

WIDTH, HEIGHT = 500, 375
GLOBAL_CROPS = {"unic": 1, "mugs": 4, "dino": 2}
SHARDS = 4
READINGS = 20  # of every image, so that the processor's clock sees them


def make_parser() -> Parser:
    parser = Parser(description="Images per second and core of both augmentation paths.")
    add = parser.add_argument
    add_crop_arguments(parser)
    parser.set_defaults(local_crops_number=10)
    help_ = "unic: one crop of --global_crops_size; mugs: its weak and strong crops, in its areas"
    add("--method", "--recipe", default="dino", choices=["dino", "unic", "mugs"], help=help_)
    add("--images", default=16, type=int, help="different images")
    add("--rounds", default=7, type=int, help="how often each path handles every image")
    add("--quality", default=92, type=int, help="JPEG quality")
    add("--stored", action="store_true", help="compare how images are stored instead of how they are decoded")
    return parser


def main() -> None:
    args = make_parser().parse_args()
    if min(args.images, args.rounds) < 1:
        raise UsageError(f"--images {args.images} --rounds {args.rounds}: both have to be at least 1")
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    files = [encode(image, args.quality) for image in make_images(args.images)]
    if args.stored:
        compare_forms(args, files)
        return
    sides = {"pil": (decode_pil, make_views(args, args.method, "pil"))}
    sides["fast"] = (decode_array, make_views(args, args.method, "fast"))
    if args.method == "mugs":
        sides["dino"] = (decode_array, make_views(args, "dino", "fast"))
    decode_seconds, seconds = {side: [] for side in sides}, {side: [] for side in sides}
    for round_ in range(args.rounds + 1):
        for side, (decode, views) in sides.items():
            decoded, total = measure(files, decode, views, round_)
            if round_:  # the first round warms up
                decode_seconds[side].append(decoded)
                seconds[side].append(total)
    print_table(args, files, seconds, decode_seconds)


def make_views(args: argparse.Namespace, method: str, augment: str) -> Callable:
    if method == "unic":
        return UNICViews(args.global_crops_size, augment)
    if method == "mugs":
        sizes = {name: getattr(args, name) for name in ("local_crops_number", "global_crops_size", "local_crops_size")}
        return MugsViews(**sizes, augment=augment)
    return multi_crop_views(argparse.Namespace(**vars(args), augment=augment))


def measure(files: list[bytes], decode: Callable, views: Callable, round_: int) -> tuple[float, float]:
    """Processor seconds per image of decoding, and of decoding and cropping."""
    start = time.process_time()
    images = [decode(data, "benchmark") for data in files]
    decoded = time.process_time() - start
    for index, image in enumerate(images):
        views(image, (0, round_, index))
    return decoded / len(files), (time.process_time() - start) / len(files)


def compare_forms(args: argparse.Namespace, files: list[bytes]) -> None:
    """Processor seconds per image of reading alone, and of reading, decoding and cropping, form after form."""
    views = make_views(args, args.method, "fast")
    reading, seconds = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = f"{folder}/cache"
        sources = store(Path(folder), files)
        for round_ in range(args.rounds + 1):
            for form, source in sources.items():
                order = np.random.default_rng(round_).permutation(len(source)).tolist()
                start = time.process_time()
                for index in order * READINGS:
                    source.read(index)
                read = (time.process_time() - start) / READINGS
                start = time.process_time()
                for index in order:
                    views(source.array(index), (0, round_, index))
                if round_:  # the first round opens the files
                    reading.setdefault(form, []).append(read / len(source))
                    seconds.setdefault(form, []).append((time.process_time() - start) / len(source))
    print_heading(args, files)
    print(f"{'form':8} {'ms/image':>9} {'images/s/core':>14} {'reading us':>11} {'to folder':>10}")
    slow = statistics.median(seconds["folder"])
    for form, values in seconds.items():
        total, read = statistics.median(values), statistics.median(reading[form])
        print(f"{form:8} {total * 1e3:9.2f} {1 / total:14.0f} {read * 1e6:11.1f} {total / slow:9.3f}x")


def store(root: Path, files: list[bytes]) -> dict[str, IndexedSource]:
    """The same images in every form: as files, in tar shards, in a zip with a map, in a TSV file."""
    starts, lines = [], _made(root / "tsv" / "train.tsv")
    shards = [_made(root / "shards" / f"train-{shard:04}.tar") for shard in range(SHARDS)]
    with contextlib.ExitStack() as opened:
        archives = [opened.enter_context(tarfile.open(shard, "w")) for shard in shards]
        packed = opened.enter_context(zipfile.ZipFile(_made(root / "zip" / "train.zip"), "w"))
        tsv = opened.enter_context(open(lines, "wb"))
        for index, data in enumerate(files):
            name = f"class0/{index:06}.jpg"
            _made(root / "folder" / name).write_bytes(data)
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archives[index % SHARDS].addfile(entry, io.BytesIO(data))
            packed.writestr(name, data)
            starts.append(tsv.tell())
            tsv.write(f"{name}\t0\t".encode() + base64.b64encode(data) + b"\n")
    lines.with_suffix(".lineidx").write_text("".join(f"{start}\n" for start in starts))
    entries = [f"train.zip@/class0/{index:06}.jpg\t0\n" for index in range(len(files))]
    (root / "zip" / "train_map.txt").write_text("".join(entries))
    places = {form: str(root / form) for form in ("folder", "shards")}
    places |= {form: Published(form, str(root / form)) for form in ("zip", "tsv")}
    return {form: open_source(place) for form, place in places.items()}


def _made(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


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


def print_heading(args: argparse.Namespace, files: list[bytes]) -> None:
    crops = f"{GLOBAL_CROPS[args.method]} x {args.global_crops_size}"
    crops += "" if args.method == "unic" else f" + {args.local_crops_number} x {args.local_crops_size}"
    size = sum(map(len, files)) / len(files) / 1000
    stored = f"{len(files)} JPEG files of {WIDTH} x {HEIGHT}, {size:.0f} kB each"
    print(f"{args.method}, {crops}, {stored}, median of {args.rounds} rounds")
    print(f"{processor()}, one core; Python {platform.python_version()}, torch {torch.__version__}, torchvision "
          f"{torchvision.__version__}, OpenCV {cv2.__version__}, Pillow {PIL.__version__}")  # fmt: skip


def print_table(args, files: list[bytes], seconds: dict, decode_seconds: dict) -> None:
    print_heading(args, files)
    print(f"{'':6} {'ms/image':>9} {'images/s/core':>14} {'decoding ms':>12} {'decoding share':>15} {'ratio':>6}")
    slow = statistics.median(seconds["pil"])
    for side in seconds:
        total, decoding = statistics.median(seconds[side]), statistics.median(decode_seconds[side])
        print(
            f"{side:6} {total * 1e3:9.2f} {1 / total:14.0f} {decoding * 1e3:12.2f} {decoding / total:14.0%} "
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
