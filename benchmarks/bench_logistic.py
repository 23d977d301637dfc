"""Many trials of SGD regression as one layer, against torch's own layer and optimiser one after the other.

    python benchmarks/bench_logistic.py [--trials 40] [--classes 10] [--images 4000] [--dim 384] [--epochs 3]

Processor seconds of both, interleaved in one process, and their ratio; and of a second protocol on features that are
kept, the share that is spent in the backbone.
"""

import argparse
import tempfile
import time

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from data.bundled import BundledTiles
from evaluation import cache
from evaluation.cache import FeatureStore, Preparation
from evaluation.features import Feature
from evaluation.knn import knn_classify
from evaluation.linear_heads import Recipe
from evaluation.logistic import ridge_regression
from evaluation.sgd_regression import initial_layer, lagged_factor, orders, sgd_regression
from models import build_backbone
from models.checkpoints import Network
from utils import World


def one_after_the_other(x, y, recipes, start, batch_size: int, epochs: int) -> list[torch.Tensor]:
    """Weights of every trial."""
    found = []
    for recipe in recipes:
        layer = nn.Linear(x.shape[1], len(start[1]))
        layer.weight.data, layer.bias.data = start[0].clone(), start[1].clone()
        solver = torch.optim.SGD(layer.parameters(), recipe.lr, 0.9, weight_decay=recipe.weight_decay)
        for epoch, indices in enumerate(orders(len(x), epochs, 0)):
            solver.param_groups[0]["lr"] = recipe.lr * lagged_factor(epoch, epochs)
            for part in indices.split(batch_size):
                solver.zero_grad()
                F.cross_entropy(layer(x[part]), y[part]).backward()
                solver.step()
        found.append(layer.weight.detach())
    return found


def trials(args: argparse.Namespace) -> None:
    x = F.normalize(torch.randn(args.images, args.dim), dim=1)
    y = torch.randint(args.classes, (args.images,))
    drawn = np.exp(np.random.default_rng(0).uniform(np.log(0.1), np.log(100), args.trials))
    recipes = [Recipe(float(lr), 1e-6) for lr in drawn]
    start, seconds = initial_layer(args.classes, args.dim, 0), np.zeros(2)
    options = {"epochs": args.epochs, "batch_size": args.batch_size}
    for _ in range(args.repeats):
        begun = time.process_time()
        batched = sgd_regression(x, y, recipes, start, orders(len(x), args.epochs, 0), **options)
        seconds[0] += time.process_time() - begun
        begun = time.process_time()
        alone = one_after_the_other(x, y, recipes, start, args.batch_size, args.epochs)
        seconds[1] += time.process_time() - begun
    apart = max(float((a - b).abs().max()) for a, b in zip(batched.weight, alone, strict=True))
    print(f"{args.trials} trials, {args.classes} classes: one layer {seconds[0]:.2f} s, one after the other "
          f"{seconds[1]:.2f} s, ratio {seconds[1] / seconds[0]:.2f}; weights differ by {apart:.1e}")  # fmt: skip


def second_protocol() -> None:
    torch.manual_seed(0)
    network = Network(build_backbone("vit_micro", 8, img_size=32), "vit_micro", {"patch_size": 8}, None)
    world, spent, real = World(0, 1, 0, torch.device("cpu")), [0.0], cache.token_features

    def timed(*arguments):
        begun = time.process_time()
        try:
            return real(*arguments)
        finally:
            spent[0] += time.process_time() - begun

    cache.token_features = timed
    train, test = BundledTiles(split="train"), BundledTiles(split="test")
    labels = [torch.tensor(source.labels) for source in (train, test)]
    with tempfile.TemporaryDirectory() as folder:
        for protocol in ("k-NN", "logistic regression"):
            begun, spent[0] = time.process_time(), 0.0
            options = {"world": world, "num_workers": 0}
            rows = [
                FeatureStore(folder).features(network, source, Preparation(32, 32), [Feature()], **options)[0][0]
                for source in (train, test)
            ]
            if protocol == "k-NN":
                knn_classify(rows[0], labels[0], rows[1], labels[1], [20])
            else:
                ridge_regression(F.normalize(rows[0].double(), dim=1), labels[0], 19, [1e-4])
            whole = time.process_time() - begun
            print(f"{protocol}: {whole:.2f} s, of which {100 * spent[0] / whole:.1f} % in the backbone")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in {"trials": 40, "classes": 10, "images": 4000, "dim": 384, "epochs": 3}.items():
        parser.add_argument(f"--{name}", default=default, type=int)
    parser.add_argument("--batch_size", default=1024, type=int)
    parser.add_argument("--repeats", default=2, type=int)
    args = parser.parse_args()
    torch.manual_seed(0)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    trials(args)
    second_protocol()


if __name__ == "__main__":
    main()
