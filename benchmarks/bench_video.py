"""Label propagation through a video: this repository's form against the originals', on the same features.

    python benchmarks/bench_video.py                                 frames of DAVIS with patches of 16 pixels
    python benchmarks/bench_video.py --rows 60 --columns 104         with patches of 8

The originals' form names the neighbours of a video's tokens in four nested loops, compares every token of a frame with
all of the context, normalises the context anew for every frame, and searches along the columns. Both sides run in one
process, a frame of each in turn; times are the process's own, so that other load on the machine does not count. Labels
have to be the same, but for the few tokens of which two neighbours are equally like up to rounding; what these take is
carried on.
"""

import time
from collections import deque
from collections.abc import Iterator

import torch
import torch.nn.functional as F

from evaluation.propagation import TEMPERATURE, Settings, one_hot_labels, propagate
from utils import Parser, UsageError, run_cli

SAME, ROUNDED = 1e-3, 0.01  # of soft labels; and the share of a frame's tokens that may have other ones


def plain_neighbours(rows: int, columns: int, radius: int) -> torch.Tensor:
    """(tokens, tokens) of 0 and 1, entry by entry."""
    near = torch.zeros(rows, columns, rows, columns)
    for row in range(rows):
        for column in range(columns):
            for other_row in range(max(0, row - radius), min(rows, row + radius + 1)):
                for other_column in range(max(0, column - radius), min(columns, column + radius + 1)):
                    near[row, column, other_row, other_column] = 1
    return near.view(rows * columns, rows * columns)


def plain_propagation(features: Iterator[torch.Tensor], first: torch.Tensor, settings: Settings) -> Iterator:
    """Steps of the originals: everything with everything, then what may not be looked at is set to nothing."""
    classes, rows, columns = first.shape
    start, recent = (next(features).T, first), deque(maxlen=settings.n_last_frames)
    near = plain_neighbours(rows, columns, settings.size_mask_neighborhood)
    for tokens in features:
        context = [start, *recent]
        sources = F.normalize(torch.stack([feature for feature, _ in context]), dim=1)
        targets = F.normalize(tokens, dim=1).expand(len(context), -1, -1)
        affinity = torch.exp(torch.bmm(targets, sources) / TEMPERATURE) * near
        affinity = affinity.transpose(2, 1).reshape(-1, rows * columns)
        best, _ = torch.topk(affinity, dim=0, k=settings.topk)
        affinity[affinity < best.min(dim=0).values] = 0
        affinity = affinity / affinity.sum(dim=0, keepdim=True)
        labels = torch.stack([label for _, label in context]).flatten(2).transpose(2, 1).reshape(-1, classes).T
        soft = (labels @ affinity).view(first.shape)
        recent.append((tokens.T, soft))
        yield soft


def clip(frames: int, rows: int, columns: int, dim: int) -> torch.Tensor:
    """Features of a picture that moves by a column every frame, and of what changes between frames."""
    generator = torch.Generator().manual_seed(0)
    picture = torch.randn(rows, columns, dim, generator=generator)
    moved = torch.stack([picture.roll(number, dims=1) for number in range(frames)])
    return (moved + 0.5 * torch.randn(moved.shape, generator=generator)).flatten(1, 2)


def get_bench_parser() -> Parser:
    parser = Parser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--frames", default=70, type=int, help="of the clip; those of DAVIS 2017 val have 67 on average")
    add("--rows", default=30, type=int, help="tokens from top to bottom")
    add("--columns", default=52, type=int, help="tokens from left to right")
    add("--dim", default=384, type=int, help="width of a token")
    add("--classes", default=4, type=int, help="objects and the background")
    return parser


def main() -> None:
    args, settings = get_bench_parser().parse_args(), Settings()
    features = clip(args.frames, args.rows, args.columns, args.dim)
    first = one_hot_labels(torch.arange(args.rows * args.columns).view(args.rows, args.columns).numpy() % args.classes)
    sides = {
        "plain": plain_propagation(iter(features), first, settings),
        "ours": propagate(iter(features), first, settings),
    }
    times: dict[str, list[float]] = {name: [] for name in sides}
    differing = 0.0
    for number in range(1, args.frames):
        found = {}
        for name, frames in sides.items():
            began = time.process_time()
            found[name] = next(frames)
            times[name].append(time.process_time() - began)
        other = ((found["ours"] - found["plain"]).abs() > SAME).any(dim=0).double().mean().item()
        if other > ROUNDED:
            raise UsageError(f"frame {number}: {other:.1%} of the tokens have other labels on the two sides")
        differing = max(differing, other)
    print(
        f"{args.frames} frames of {args.rows} x {args.columns} tokens, {args.dim} wide, {args.classes} classes, "
        f"{settings}, float32, {torch.get_num_threads()} threads, torch {torch.__version__}"
    )
    later = {name: sum(spent[1:]) / max(1, len(spent) - 1) for name, spent in times.items()}
    for name, spent in times.items():
        print(
            f"{name:<6}{sum(spent):9.2f} s, first frame {spent[0]:7.2f} s, later ones {1000 * later[name]:8.1f} ms each"
        )
    total, each = sum(times["plain"]) / sum(times["ours"]), later["plain"] / later["ours"]
    print(
        f"ours takes 1/{total:.1f} of the time of the clip, 1/{each:.1f} of that of a later frame; "
        f"at most {differing:.2%} of a frame's tokens have other labels"
    )


if __name__ == "__main__":
    run_cli(main)
