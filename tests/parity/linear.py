"""Runners: linear heads on given features, and on those of a checkpoint."""

import math
import re
from collections.abc import Iterator

import numpy as np
import torch

from evaluation.features import Feature
from evaluation.linear_heads import (
    ETA,
    MOMENTUM,
    LinearHeads,
    Probe,
    Recipe,
    best_head,
    cosine_factor,
    heads_of,
    rate_at,
    saved_heads,
)
from evaluation.linear_run import SWEEPS
from models.matching import load_tensors
from models.reading import read_backbone
from models.safe_load import load_file
from tests.parity import Case
from tests.parity.networks import build_vit

Batches = list[tuple[torch.Tensor, torch.Tensor]]


def given_batches(case: Case, kind: str) -> Batches:
    count = len(case.names(f"in/{kind}")) // 2
    return [(case.tensor(f"in/{kind}{i}_x"), case.tensor(f"in/{kind}{i}_y")) for i in range(count)]


def train_epoch(probe: Probe, batches: Batches, factor: float) -> torch.Tensor:
    """Mean loss (heads,) over the steps."""
    return torch.stack([probe.train_step([x], y, len(y), factor) for x, y in batches]).mean(dim=0)


def original_meters(probe: Probe, batches: Batches) -> np.ndarray:
    """(3, heads): loss, top-1 and top-5 as the originals average them over batches.

    They round the percentage of every batch to float32 and weight it by the batch's size; the loss they do not weight.
    """
    tested = [(probe.test([x], y)[0].numpy(), len(y)) for x, y in batches]
    losses = np.mean([sums[0] / size for sums, size in tested], axis=0)
    percent = [np.float32(sums[1:]) * np.float32(100) / np.float32(size) for sums, size in tested]
    weighted = sum(p.astype(np.float64) * size for p, (_, size) in zip(percent, tested, strict=True))
    return np.concatenate((losses[None], weighted / sum(size for _, size in tested)))


def stacked_heads(case: Case, prefixes: list[str], recipes: list[Recipe]) -> Probe:
    parts = [
        torch.stack([case.tensor(f"{prefix}/linear.{part}") for prefix in prefixes]) for part in ("weight", "bias")
    ]
    return Probe([LinearHeads(*parts, recipes)])


def linear_probe_training(case: Case) -> Iterator[tuple]:
    p = case.params
    lr = p["lr"] * p["batch_size_per_gpu"] * p["world_size"] / 256
    yield "lr_effective", lr, p["lr_effective"]
    yield "momentum", MOMENTUM, p["momentum"]
    probe = stacked_heads(case, ["classifier0"], [Recipe(lr, p["weight_decay"])])
    train, val = given_batches(case, "train"), given_batches(case, "val")
    for epoch, expected in enumerate(case.value("history")):
        factor = cosine_factor(epoch, p["epochs"])
        (loss,) = train_epoch(probe, train, factor)
        yield f"history {epoch} train loss", loss, expected["train"]["loss"]
        yield f"history {epoch} train lr", lr * factor, expected["train"]["lr"]
        for name, (value,) in zip(("loss", "acc1", "acc5"), original_meters(probe, val), strict=True):
            yield f"history {epoch} val {name}", value, expected["val"][name]
        ((weight, bias, *_),) = probe.tensors()
        yield f"out/weight_epoch{epoch}", weight.clone(), case.arrays[f"out/weight_epoch{epoch}"]
        yield f"out/bias_epoch{epoch}", bias.clone(), case.arrays[f"out/bias_epoch{epoch}"]


def linear_multi(case: Case) -> Iterator[tuple]:
    p = case.params
    yield "lrs", SWEEPS["ibot"].lrs, case.value("lrs")
    grid = [list(recipe) for recipe in SWEEPS["ibot"].recipes(lr_only=False)]
    label = next(name for name in case.outputs() if name.startswith("full_grid_first"))
    yield label, grid[: len(case.value(label))], case.value(label)
    yield f"{label}, only rates", [recipe.lr for recipe in SWEEPS["ibot"].recipes(lr_only=True)], case.value("lrs")
    scale = p["batch_size_per_gpu"] * p["world_size"] / 256
    recipes = [Recipe(lr * scale, wd, name) for lr, wd, name in case.value("permutes")]
    probe = stacked_heads(case, [f"head{i}" for i in range(len(recipes))], recipes)
    train, val = given_batches(case, "train"), given_batches(case, "val")
    for epoch in range(p["epochs"]):
        train_epoch(probe, train, cosine_factor(epoch, p["epochs"]))
    for i, (weight, bias, *_) in enumerate(probe.tensors()):
        yield f"out/head{i}_weight", weight, case.arrays[f"out/head{i}_weight"]
        yield f"out/head{i}_bias", bias, case.arrays[f"out/head{i}_bias"]
    names = ("loss{}", "acc{}@1", "acc{}@5")
    found = {
        name.format(i): value
        for name, row in zip(names, original_meters(probe, val), strict=True)
        for i, value in enumerate(row)
    }
    for name, value in case.value("last_val").items():
        yield f"last_val {name}", found[name], value
    example = case.value("selection_example")
    best = best_head(example["accuracies"])
    yield (
        "selection_example",
        {"best_index": best, "best": example["accuracies"][best]},
        {name: example[name] for name in ("best_index", "best")},
    )
    yield "saved_keys", list(saved_heads(probe, 1, p["epochs"])["state_dict"]), case.value("saved_keys")


def many_classifiers(case: Case) -> Iterator[tuple]:
    """Mugs: a head for every entry of a grid, each on its way to a rate that is not scaled with the batch."""
    p, size = case.params, case.params["batch_size"]
    x, y, test_x, test_y = (
        case.tensor(f"in.{side}_{kind}") for side in ("train", "test") for kind in ("features", "labels")
    )
    scale = size * p["world_size"] / 256
    recipes = [Recipe(entry["lr"] * scale, entry["wd"], entry["optim"]) for entry in p["grid"]]
    yield "out.lr_per_epoch, scaled", [r.lr for r in recipes], [entry["scaled_lr"] for entry in p["grid"]], (1e-12, 0.0)
    weight = case.tensor("in.weight_init").to(case.dtype)[None].repeat(len(recipes), 1, 1)
    bias = weight.new_zeros(weight.shape[:2])
    probe = Probe([LinearHeads(weight, bias, recipes, momentum=p["momentum"], floor=p["lr_min"])])
    yield "out.final_weight, eta", ETA, p["lars_eta"]
    x, test_x = x.to(case.dtype), test_x.to(case.dtype)
    val = [(test_x[i : i + size], test_y[i : i + size]) for i in range(0, len(test_x), size)]
    losses, tests, rates = [], [], []
    for epoch, order in enumerate(case.tensor("in.orders")):
        factor = cosine_factor(epoch, p["epochs"])
        rates.append([rate_at(recipe.lr, factor, p["lr_min"]) for recipe in recipes])
        batches = [(x[order[i : i + size]], y[order[i : i + size]]) for i in range(0, len(x), size)]
        losses.append(train_epoch(probe, batches, factor))
        loss, acc1, acc5 = original_meters(probe, val)
        tests.append(np.stack((acc1, acc5, loss), axis=1))
    yield "out.lr_per_epoch", rates, case.arrays["out.lr_per_epoch"]
    yield "out.train_loss", torch.stack(losses), case.arrays["out.train_loss"]
    yield "out.val", np.stack(tests), case.arrays["out.val"]
    yield "out.final_weight", torch.stack([weight for weight, *_ in probe.tensors()]), case.arrays["out.final_weight"]
    yield "out.final_bias", torch.stack([bias for _, bias, *_ in probe.tensors()]), case.arrays["out.final_bias"]
    yield "out.best_index_last_epoch", [best_head(tests[-1][:, 0])], case.arrays["out.best_index_last_epoch"]
    sweep, said = SWEEPS["mugs"], p["sweep"]
    yield "out.sweep_lrs", sweep.lrs, case.arrays["out.sweep_lrs"]
    grid = [list(recipe) for recipe in sweep.recipes(lr_only=False)]
    found = {"n": len(grid), "wds": list(sweep.decays), "optims": list(sweep.optimizers), "last": grid[-1]}
    found["first"] = grid[: len(said["first"])]
    for name, value in found.items():
        yield f"out.sweep_lrs, {name}", [list(v) for v in value] if name == "first" else value, said[name]
    only = sweep.recipes(lr_only=True)
    yield "out.sweep_lrs, only rates", len(only), said["sweep_lr_only"]["n"]
    kinds = {"wds": list({r.weight_decay for r in only}), "optims": list({r.optimizer for r in only})}
    yield "out.sweep_lrs, only one", kinds, {name: said["sweep_lr_only"][name] for name in kinds}


def probe_of_a_checkpoint(case: Case) -> Iterator[tuple]:
    """AttMask: the whole of eval_linear on the teacher's class tokens of the last blocks."""
    p = case.params
    model = build_vit(p["model"]).to(case.dtype).eval()
    load_tensors(model, *read_backbone(case.folder / p["backbone"].split()[0]))
    with torch.no_grad():
        features = Feature(p["n_last_blocks"])(model, case.tensor("images"))
    labels, size = case.tensor("labels"), p["batch_size"]
    train, val = ([(features[s], labels[s]) for s in said_slices(p[name], size)] for name in ("train_batches", "val"))
    lr = p["lr_arg"] * size / 256
    yield "effective_lr", lr, p["effective_lr"]
    heads = LinearHeads(case.tensor("init_weight")[None], case.tensor("init_bias")[None], [Recipe(lr)])
    probe, saved = Probe([heads]), load_file(case.folder / case.extra_files[0])
    best = -math.inf
    for line in case.entry["outputs"]["log"]:
        factor = cosine_factor(line["epoch"], p["epochs"])
        (loss,) = train_epoch(probe, train, factor)
        ((test_loss,), (acc1,), (acc5,)) = original_meters(probe, val)
        found = {"train_loss": loss, "lr_used": lr * factor, "acc1": acc1, "acc5": acc5, "test_loss": test_loss}
        for name, value in found.items():
            yield f"log {line['epoch']} {name}", value, line[name], case.tolerance  # accuracies need no wider one
        if acc1 >= best:
            best, ours = acc1, saved_heads(probe, line["epoch"] + 1, p["epochs"])
            ours = {name: value.clone() for name, value in ours["state_dict"].items()} | {"epoch": ours["epoch"]}
    ((weight, bias, *_),) = probe.tensors()
    yield "final_weight", weight, case.arrays["final_weight"]
    yield "final_bias", bias, case.arrays["final_bias"]
    file = saved_heads(probe, p["epochs"], p["epochs"])
    yield "checkpoint_teacher_linear.pth keys", [*file, "best_acc"], list(saved)
    yield "checkpoint_teacher_linear.pth epoch", ours["epoch"], saved["epoch"]
    yield "checkpoint_teacher_linear.pth best_acc", best, saved["best_acc"], case.tolerance
    for name, tensor in saved["state_dict"].items():
        yield f"checkpoint_teacher_linear.pth {name}", ours[name], tensor
    for name, value in saved["scheduler"].items():
        if name in file["scheduler"]:
            yield f"checkpoint_teacher_linear.pth scheduler {name}", file["scheduler"][name], value
    ((weight, bias),) = heads_of(saved)
    yield "checkpoint_teacher_linear.pth classes", [len(weight), len(bias)], [p["num_labels"]] * 2


def said_slices(text: str, size: int) -> list[slice]:
    """``images[0:bs], images[bs:2bs]`` with batches of ``size``."""
    ends = re.findall(r"images\[(\w*):(\w*)\]", text)
    return [slice(*(said_index(end, size) if end else None for end in pair)) for pair in ends]


def said_index(end: str, size: int) -> int:
    return int(end.removesuffix("bs") or 1) * (size if end.endswith("bs") else 1)


RUNNERS = {
    "eval_core/linear_probe_training": linear_probe_training,
    "eval_core/linear_multi": linear_multi,
    "mugs/linear_multi_classifier": many_classifiers,
    "attmask/linear_probe": probe_of_a_checkpoint,
}
