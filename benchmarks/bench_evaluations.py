"""Evaluations without training: what they take beside the products of their network, and beside one setting at a time.

    python benchmarks/bench_evaluations.py                       ViT-S/16 on the bundled photographs
    python benchmarks/bench_evaluations.py --arch vit_micro --images 8 --repeats 2

Retrieval and copy detection decode, resize, normalise, run the network and gather; beside it stands the network alone
on tensors that are there. Masked images take all ratios from one decoding and one attention; beside it stands a run for
every ratio. Processor seconds of this process, both sides in turn, the least of ``--repeats``.
"""

import argparse
import json
import time
from collections.abc import Callable

import torch
from torchvision import transforms

from data.bundled import photograph_paths
from data.named import NamedFiles
from data.preprocess import MEAN, STD, eval_transform
from evaluation.attention import attention_maps
from evaluation.features import Feature, class_token, extract_features, rows_of_images
from evaluation.retrieval import multiscale
from evaluation.retrieval_run import Thumbnail, descriptor
from evaluation.robustness import most_attended, outcomes, painted
from models import build_backbone
from utils import Parser, World, run_cli

RATIOS = (0.1, 0.3, 0.5, 0.7, 0.9)


def in_turn(sides: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """The least processor seconds of each."""
    least = dict.fromkeys(sides, float("inf"))
    for _ in range(repeats):
        for name, side in sides.items():
            start = time.process_time()
            side()
            least[name] = min(least[name], time.process_time() - start)
    return least


@torch.no_grad()
def measure(args: argparse.Namespace) -> dict[str, dict[str, float]]:
    paths = photograph_paths()
    files = [paths[index % len(paths)].name for index in range(args.images)]
    source = NamedFiles(paths[0].parent, files, "photographs")
    model = build_backbone(args.arch, patch_size=16).eval()
    world = World(0, 1, 0, torch.device("cpu"))
    options = {"world": world, "num_workers": 0, "device": world.device}
    thumbnail = Thumbnail(args.imsize, 32)
    square = transforms.Compose([
        transforms.Resize((args.imsize, args.imsize), transforms.InterpolationMode.BICUBIC),
        transforms.ToTensor(),
        transforms.Normalize(MEAN, STD),
    ])  # fmt: skip
    small = [thumbnail(source.pil(index))[None] for index in range(len(source))]
    squares = torch.stack([square(source.pil(index)) for index in range(len(source))])

    def scaled(network, images):
        return multiscale(network, images, class_token)

    found = {}
    for name, feature in (("retrieval", class_token), ("retrieval, three scales", scaled)):
        found[name] = in_turn({
            "ours": lambda f=feature: extract_features(model, source, thumbnail, feature=f, batch_size=1, **options),
            "the network alone": lambda f=feature: [f(model, image) for image in small],
        }, args.repeats)  # fmt: skip
    found["copy detection"] = in_turn({
        "ours": lambda: extract_features(model, source, square, feature=descriptor, batch_size=16, **options),
        "the network alone": lambda: [descriptor(model, part) for part in squares.split(16)],
    }, args.repeats)  # fmt: skip
    weight = torch.randn(1000, model.embed_dim)

    def masked(ratios):
        def row(_, images):
            attention = attention_maps(model, images).mean(dim=1)
            seen = [images, *(painted(images, most_attended(attention, ratio)) for ratio in ratios)]
            labels = torch.zeros(len(images), dtype=torch.long)
            return torch.cat(
                [outcomes(Feature(4)(model, x)[:, -model.embed_dim :] @ weight.T, labels) for x in seen], 1
            )

        rows_of_images(row, source, eval_transform(), batch_size=16, **options)

    found["masked, five ratios"] = in_turn(
        {"ours": lambda: masked(RATIOS), "a run for each": lambda: [masked([ratio]) for ratio in RATIOS]}, args.repeats
    )
    return found


def get_args_parser() -> Parser:
    parser = Parser(prog="bench_evaluations.py", description="Processor seconds of evaluations without training.")
    add = parser.add_argument
    add("--arch", default="vit_small", help="network")
    add("--images", default=19, type=int, help="photographs")
    add("--imsize", default=224, type=int, help="pixels of retrieval and copy detection")
    add("--repeats", default=3, type=int, help="of which the least counts")
    return parser


def main() -> None:
    args = get_args_parser().parse_args()
    torch.set_num_threads(1)
    found = measure(args)
    for name, sides in found.items():
        (_, ours), (other, theirs) = sides.items()
        print(f"{name}: {ours:.2f} s, {other} {theirs:.2f} s, ratio {ours / theirs:.2f}")
    print(json.dumps({"arguments": vars(args), "torch": torch.__version__, "seconds": found}))


if __name__ == "__main__":
    run_cli(main)
