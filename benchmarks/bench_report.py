"""How long a report takes and how large it is: ten results, two logs and fifty pictures as visualize_attention draws.

    python benchmarks/bench_report.py

The pictures are contact sheets of the bundled photographs, lit by made-up attention. Only writing table.csv and
report.html is timed.
"""

import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from data.bundled import photograph_paths
from data.pictures import save_picture
from data.preprocess import to_pixels
from evaluation.attention import attention_sheet
from evaluation.image_files import read_image
from evaluation.report import Report, Row, write_report
from utils import Parser, run_cli


def main() -> None:
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("--pictures", default=50, type=int)
    parser.add_argument("--results", default=10, type=int)
    args, generator, paths = parser.parse_args(), torch.Generator().manual_seed(0), photograph_paths()
    with tempfile.TemporaryDirectory() as folder:
        files = []
        for number in range(args.pictures):
            image = to_pixels(read_image(paths[number % len(paths)], [480, 480]))
            maps = torch.rand(6, 30, 30, generator=generator) ** 4
            files.append((f"picture {number}", Path(folder) / f"{number}.png"))
            save_picture(attention_sheet(image, maps), files[-1][1])
        rows = [
            Row(
                f"run {n % 2}",
                "dino",
                "boosted",
                n,
                "ab" * 32,
                "cd" * 32,
                f"protocol {n // 2}",
                "class token",
                70.0 + n,
            )
            for n in range(args.results)
        ]
        steps = np.arange(800)
        log = [{"epoch": int(e), **{f"measure {m}": float(np.exp(-e / 90) * m) for m in range(1, 9)}} for e in steps]
        report = Report(rows, {"run 0": log, "run 1": log}, {"Attention": files})
        wall, spent = time.perf_counter(), time.process_time()
        write_report(report, Path(folder))
        wall, spent = time.perf_counter() - wall, time.process_time() - spent
        size = (Path(folder) / "report.html").stat().st_size / 1e6
    what = f"{args.results} results, {args.pictures} pictures"
    print(f"{what}: {spent:.2f} s of processor time, {wall:.2f} s, {size:.1f} MB")


if __name__ == "__main__":
    run_cli(main)
