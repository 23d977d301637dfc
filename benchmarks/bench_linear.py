"""Linear heads: many side by side against as many by themselves, and against the pass through the network they share.

    python benchmarks/bench_linear.py                      ImageNet's classes, class tokens of a ViT-S/16, 45 heads
    python benchmarks/bench_linear.py --heads 20 --classes 19 --dim 512 --batch 32

By themselves means iBOT's form: a linear layer, a cross-entropy with autograd, an optimiser for every head. Both sides
take the same steps, in turn, and must end with the same weights. On a processor its own seconds are counted, which
others beside do not change. Decoding, which heads share as well, is left out.
"""

import statistics
import time
from collections.abc import Callable

import torch
import torch.nn as nn
import torch.nn.functional as F

from evaluation.linear_heads import LinearHeads, Probe, Recipe, initial_heads
from models import build_backbone
from utils import Parser, keep_large_blocks, run_cli


def separate_heads(weight: torch.Tensor, bias: torch.Tensor, recipes: list[Recipe]) -> tuple[list, Callable]:
    """The layers of heads that know nothing of each other, and the function that takes a step of all of them."""
    layers, optimizers = [], []
    for w, b, recipe in zip(weight, bias, recipes, strict=True):
        layer = nn.Linear(w.shape[1], w.shape[0], device=w.device)
        layer.load_state_dict({"weight": w, "bias": b})
        layers.append(layer)
        optimizers.append(torch.optim.SGD(layer.parameters(), lr=recipe.lr, momentum=0.9))

    def step(features: torch.Tensor, labels: torch.Tensor) -> None:
        for layer, optimizer in zip(layers, optimizers, strict=True):
            loss = F.cross_entropy(layer(features), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return layers, step


def timed(function: Callable, device: str) -> float:
    clock = time.process_time if device == "cpu" else time.perf_counter
    start = clock()
    function()
    if device != "cpu":
        torch.cuda.synchronize()
    return clock() - start


def main() -> None:
    parser = Parser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--heads", default=45, type=int)
    add("--classes", default=1000, type=int)
    add("--dim", default=1536, type=int, help="width of the feature: four class tokens of a ViT-S")
    add("--batch", default=128, type=int)
    add("--steps", default=5, type=int)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    keep_large_blocks()
    recipes = [Recipe(0.01 * (i + 1)) for i in range(args.heads)]
    weight, bias = (t.to(args.device) for t in initial_heads(args.heads, args.classes, args.dim))
    layers, apart = separate_heads(weight, bias, recipes)
    one = Probe([LinearHeads(weight[:1].clone(), bias[:1].clone(), recipes[:1])])
    probe = Probe([LinearHeads(weight, bias, recipes)])
    backbone = build_backbone("vit_small").to(args.device).eval()
    images = torch.randn(args.batch, 3, 224, 224, device=args.device)
    seconds: dict[str, list[float]] = {"apart": [], "together": [], "one": [], "network": []}
    for step in range(args.steps + 1):
        features = torch.randn(args.batch, args.dim, device=args.device)
        labels = torch.randint(args.classes, (args.batch,), device=args.device)
        seconds["apart"].append(timed(lambda: apart(features, labels), args.device))  # noqa: B023
        with torch.no_grad():
            for name, heads in (("together", probe), ("one", one)):
                step_ = lambda heads=heads: heads.train_step([features], labels, args.batch, 1.0)  # noqa: B023, E731
                seconds[name].append(timed(step_, args.device))
            if step in (1, 2):
                seconds["network"].append(timed(lambda: backbone.get_intermediate_layers(images, 4), args.device))
    for layer, (w, *_) in zip(layers, probe.tensors(), strict=True):
        torch.testing.assert_close(w, layer.weight.data, rtol=1e-3, atol=1e-4)
    del seconds["apart"][0], seconds["together"][0], seconds["one"][0]
    times = {name: 1e3 * statistics.median(values) for name, values in seconds.items()}
    print(f"{args.heads} heads, {args.classes} classes, features of {args.dim}, {args.batch} images, {args.device}")
    print(f"heads by themselves   {times['apart']:9.1f} ms")
    print(f"heads side by side    {times['together']:9.1f} ms   {times['apart'] / times['together']:.2f} times sooner")
    print(f"one head              {times['one']:9.1f} ms")
    step = {name: times["network"] + times[name] for name in ("together", "one")}
    print(
        f"a step with its network: {args.heads} heads {step['together'] / step['one']:.3f} times one head (target 1.5)"
    )
    print(
        f"ViT-S/16, 4 blocks    {times['network']:9.1f} ms   {times['network'] / times['together']:.1f} times the heads"
    )


if __name__ == "__main__":
    run_cli(main)
