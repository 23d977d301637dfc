"""Runners: DeiT's recipe for transfer and few labels: order of the images, rates, steps, heads cut open, Flowers."""

import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from data.labelled_files import flowers
from data.repeated import RepeatedOrder, images_used
from evaluation.deit import distilled, lagged_rates
from evaluation.finetune_steps import Stepper, soft_cross_entropy, weight_average
from models.adapt import load_to_finetune
from models.finetuned import CutHead, FinetunedTransformer, decay_groups, layer_decay_groups
from models.reading import read_backbone
from tests.parity import Case
from utils import cosine_scheduler


def seen_by(images: int, epoch: int, world: int, rank: int) -> np.ndarray:
    """What a process sees of the order of all processes that the training goes by."""
    return RepeatedOrder(images, epoch)[rank + world * np.arange(images_used(images) // world)]


def sampler_of_arguments(case: Case) -> Iterator[tuple]:
    for label in case.names("out/indices"):
        given = case.value(f"args{label.removeprefix('out/indices')}")
        yield label, seen_by(given["n"], given["epoch"], given["world"], given["rank"]), case.arrays[label]


def sampler_of_runs(case: Case) -> Iterator[tuple]:
    for run in case.params["runs"]:
        found = seen_by(run["len"], run["epoch"], run["replicas"], run["rank"])
        where = f"of {run['len']}, rank {run['rank']} of {run['replicas']}, epoch {run['epoch']}"
        yield f"sum {where}", int(found.sum()), run["sum"]
        yield f"sum {where}, how many", len(found), run["len_sampler"]
        yield f"indices_first_64 {where}", found[: len(run["indices_first_64"])], run["indices_first_64"]


def rates_of_runs(case: Case) -> Iterator[tuple]:
    for run in case.params["runs"]:
        lr = run["lr_arg"] * run["batch_size"] * run["world_size"] / 512
        where = f"{run['epochs']} epochs at {run['lr_arg']:g}"
        yield f"{where}, scaled_lr", lr, run["scaled_lr"]
        rates = lagged_rates(lr, *(run[name] for name in ("epochs", "warmup_epochs", "warmup_lr", "min_lr")))
        for name, expected in run.items():
            if part := re.fullmatch(r"lr_used_(?:first_(\d+)_epochs|every_(\d+)|(last))", name):
                first, every, last = part.groups()
                found = rates[-1] if last else rates[: int(first)] if first else rates[:: int(every)]
                yield f"{where}, {name}", found, expected


def flowers_split(case: Case) -> Iterator[tuple]:
    first, last = (int(n) for n in re.findall(r"image_(\d+)\.jpg", case.params["jpg_files"]))
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for path in (case.folder / case.files[0]).iterdir():
            shutil.copy(path, root)
        (root / "jpg").mkdir()
        for number in range(first, last + 1):
            (root / "jpg" / f"image_{number:05}.jpg").touch()
        for split, expected in case.entry["outputs"].items():
            listing = flowers(root, {"train": "trainval"}.get(split, split))
            samples = [[Path(name).name, label] for name, label in zip(listing.names, listing.labels, strict=True)]
            yield f"{split} samples", samples, expected["samples"]
            yield f"{split} nb_classes", len(set(listing.labels)), expected["nb_classes"]


def steps(case: Case) -> Iterator[tuple]:
    """AttMask: steps of fine-tuning a checkpoint's network, and an average of its weights that follows them."""
    p, hyper, shape = case.params, case.params["hyper"], case.params["model"]
    batches = [(case.tensor(f"images_{i}"), case.tensor(f"targets_{i}")) for i in range(len(case.names("images_")))]
    arguments = {"patch_size": shape["patch"], "embed_dim": shape["dim"], "depth": shape["depth"]}
    arguments |= {"num_heads": shape["heads"], "mlp_ratio": shape["mlp_ratio"], "img_size": shape["img"]}
    model = FinetunedTransformer(hyper["classes"], init_scale=1.0, drop_path_rate=p["drop_path"], **arguments)
    model = model.to(case.dtype).train()
    name, key = p["backbone_init"].split()
    state, info = read_backbone(case.folder / name, key)
    load_to_finetune(model, state, info)
    model.head.load_state_dict({part: case.tensor(f"head_{part}") for part in ("weight", "bias")})
    groups = decay_groups(model, max(group["weight_decay"] for group in p["groups"]))
    found = [{"weight_decay": g["weight_decay"], "params": g["names"]} for g in groups]
    yield "loss_per_step, groups", [sorted(g["params"]) for g in found], [sorted(g["params"]) for g in p["groups"]]
    yield "loss_per_step, decays", *([g["weight_decay"] for g in side] for side in (found, p["groups"]))
    lr = hyper["lr"] * hyper["bs"] / 512
    yield "lr_per_step, scaled", lr, p["scaled_lr"]
    rates = lagged_rates(lr, hyper["epochs"], hyper["warmup_epochs"], p["warmup_lr"], p["min_lr"])
    stepper = Stepper(model, groups)
    average = weight_average(model, hyper["ema"])
    losses, used = [], []
    for number, (images, targets) in enumerate(batches):
        used.append(rates[number // hyper["iters"]])
        loss = soft_cross_entropy(model(images), targets)
        losses.append(loss.item())
        stepper.backward(loss)
        stepper.step(used[-1], max(group["weight_decay"] for group in groups))
        average.update(model)
    outputs, near = case.entry["outputs"], case.tolerance_of("tensors")
    yield "loss_per_step", losses, outputs["loss_per_step"]
    yield "lr_per_step", used, outputs["lr_per_step"]
    for prefix, state in (("final", model.state_dict()), ("ema", average.module.state_dict())):
        for label in case.names(f"{prefix}/"):
            yield label, state[label.removeprefix(f"{prefix}/")], case.arrays[label], near


def cut_head(state: dict[str, torch.Tensor], dtype: torch.dtype) -> CutHead:
    """The head of a state dict's shapes, filled with it."""
    kept = sum(bool(re.fullmatch(r"mlp\.\d+\.weight", name)) for name in state)
    hidden, in_dim = state["mlp.0.weight"].shape
    widths = {"hidden_dim": hidden}
    if "last_layer.weight_v" in state:
        widths["out_dim"], widths["bottleneck_dim"] = state["last_layer.weight_v"].shape
    head = CutHead(in_dim, len(state["cls_head.weight"]), kept, **widths).to(dtype)
    head.load_state_dict(state)
    return head


@torch.no_grad()
def heads(case: Case) -> Iterator[tuple]:
    """iBOT: ``layer<k>/*`` on ``in/x<k>``."""
    for label in case.names("out/logits"):
        k = label.removeprefix("out/logits")
        yield label, cut_head(case.state(f"layer{k}"), case.dtype)(case.tensor(f"in/x{k}")), case.arrays[label]


@torch.no_grad()
def heads_and_distillation(case: Case) -> Iterator[tuple]:
    for label in case.names("out.layer"):
        prefix = f"sd.{label.split('.')[1]}."
        state = {name.removeprefix(prefix): case.tensor(name) for name in case.names(prefix)}
        yield label, cut_head(state, case.dtype)(case.tensor("in.x")), case.arrays[label]
    tensors = [case.tensor(f"in.{name}") for name in ("logits", "soft_labels", "logits_kd", "teacher_logits")]
    said = {output["key"]: output["meaning"] for output in case.entry["outputs"]}
    for label in case.names("out.distill_"):
        kind, alpha, tau = re.search(r"distillation_type=(\w+), alpha ([\d.]+), tau ([\d.]+)", said[label]).groups()
        yield label, distilled(*tensors, kind, float(alpha), float(tau)), case.arrays[label]


@torch.no_grad()
def semi_and_transfer(case: Case) -> Iterator[tuple]:
    """UDI: heads, rates and the order of the images in one case."""
    for label in case.outputs():
        if found := re.fullmatch(r"(head\d+)/y", label):
            head = cut_head(case.state(f"{found[1]}/sd"), case.dtype)
            yield label, head(case.tensor(f"{found[1]}/x")), case.arrays[label]
        elif label.startswith("lr_used/"):
            epochs, lr, min_lr, warmup_lr, warmup_epochs, _ = case.params["lr_grids"][label.partition("/")[2]]
            yield label, lagged_rates(lr, epochs, warmup_epochs, warmup_lr, min_lr), case.arrays[label]
        else:
            n, world, rank, epoch = map(int, re.fullmatch(r"ra/n(\d+)_w(\d+)_r(\d+)_e(\d+)", label).groups())
            yield label, seen_by(n, epoch, world, rank), case.arrays[label]


def tables(case: Case) -> Iterator[tuple]:
    """Mugs: groups of layers, both schedules, and the order of the images."""
    shape, near = case.params["vit"], case.tolerance_of("floats")
    arguments = {"patch_size": shape["patch"], "img_size": shape["img"], "use_mean_pooling": not case.arrays["use_cls"]}
    arguments |= {name: shape[name] for name in ("embed_dim", "depth", "num_heads")}
    model = FinetunedTransformer(shape["num_classes"], **arguments)
    groups = layer_decay_groups(model, case.arrays["layer_decay"], case.arrays["weight_decay"])
    by_name = {name: (g["lr_scale"], g["weight_decay"]) for g in groups for name in g["names"]}
    expected = [(name, g) for g in case.arrays["groups"] for name in g["params"]]
    yield "groups, names", sorted(by_name), sorted(name for name, _ in expected)
    for name, group in expected:
        yield f"groups, {name}", by_name[name], (group["lr_scale"], group["weight_decay"]), near
    yield "groups, values", sorted({g["lr_scale"] for g in groups}), case.arrays["values"], near
    for name, c in case.arrays["cosine"].items():
        warmup = {"warmup_epochs": c["warmup_epochs"], "warmup_steps": c.get("warmup_steps", -1)}
        yield (
            f"cosine {name}",
            cosine_scheduler(c["base"], c["final"], c["epochs"], c["niter"], **warmup),
            c["values"],
            near,
        )
    for name, c in case.arrays["epoch_cosine_semi_transfer"].items():
        lr = c["lr_flag"] * c["batch_size"] * c["world"] / 512
        yield f"epoch_cosine_semi_transfer {name}, scaled", lr, c["scaled_lr"], near
        rates = lagged_rates(lr, c["epochs"], c["warmup_epochs"], c["warmup_lr"], c["min_lr"])
        found = [rates[epoch] for epoch in c["epoch_index"]]
        yield f"epoch_cosine_semi_transfer {name}", found, c["lr_used_during_epoch"], near
    for number, run in enumerate(case.arrays["repeated_aug_sampler"]):
        found = seen_by(run["dataset_len"], run["epoch"], run["world"], run["rank"])
        parts = {"first": found[: len(run["first"])], "last": found[-len(run["last"]) :], "sum": int(found.sum())}
        for part, value in (parts | {"num_selected": len(found)}).items():
            yield f"repeated_aug_sampler {number}, {part}", value, run[part]


RUNNERS = {
    "eval_core/repeated_augment_sampler": sampler_of_arguments,
    "eval_core/semi_supervised_head": heads,
    "attmask/ra_sampler": sampler_of_runs,
    "attmask/ft_lr": rates_of_runs,
    "attmask/finetune": steps,
    "attmask/flowers_split": flowers_split,
    "mugs/finetune_semi_transfer_tables": tables,
    "mugs/semi_class_head": heads_and_distillation,
    "udi/semi_transfer": semi_and_transfer,
}
