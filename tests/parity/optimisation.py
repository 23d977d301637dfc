"""Runners: schedules, parameter groups, clipping, freezing, LARS."""

from collections.abc import Iterator

import numpy as np
import torch

from methods.base import Clock
from methods.dino import DINO
from methods.heads import DINOHead
from methods.multicrop import MultiCropNetwork
from models.vit import VisionTransformer
from tests.parity import Case
from training.optim import LARS
from utils import cosine_scheduler, warmup_scheduler


def schedules(case: Case) -> Iterator[tuple]:
    for name in case.entry["inputs"]:
        if name.startswith("args"):
            label = f"out/schedule{name.removeprefix('args')}"
            yield label, cosine_scheduler(**case.value(name)), case.arrays[label]
        elif name.startswith("temp_args"):
            label = f"out/temp{name.removeprefix('temp_args')}"
            a = case.value(name)
            temps = warmup_scheduler(
                a["warmup_teacher_temp"], a["teacher_temp"], a["warmup_teacher_temp_epochs"], a["nepochs"]
            )
            yield label, temps, case.arrays[label]


def small_dino(vit: dict, head: dict, freeze_last_layer: int = 1) -> DINO:
    networks = [MultiCropNetwork(VisionTransformer(**vit), DINOHead(vit["embed_dim"], **head)) for _ in range(2)]
    return DINO(*networks, teacher_temps=np.full(9, 0.04), freeze_last_layer=freeze_last_layer)


def param_groups(case: Case) -> Iterator[tuple]:
    width = case.params["embed_dim"]
    vit = {"patch_size": 8, "img_size": 16, "embed_dim": width, "depth": case.params["depth"], "num_heads": 1}
    for label in case.outputs():
        head = {key: value == "True" for key, value in (part.split("=") for part in label.split(","))}
        head = {"use_bn": head.pop("use_bn_in_head"), **head}
        method = small_dino(vit, {"out_dim": 4, "hidden_dim": 4, "bottleneck_dim": 4, **head})
        names = {id(p): name for name, p in method.student.named_parameters()}
        decayed, undecayed = ([names[id(p)] for p in group["params"]] for group in method.param_groups())
        yield label, {"regularized": decayed, "not_regularized": undecayed}, case.value(label)


def clip_and_freeze(case: Case) -> Iterator[tuple]:
    grads = {name.removeprefix("in/grad/"): case.tensor(name) for name in case.names("in/grad/")}
    method = _dino_with_parameters({name: grad.shape for name, grad in grads.items()}).to(case.dtype)
    params = dict(method.student.named_parameters())
    for name, grad in grads.items():
        params[name].grad = grad.clone()
    norms = dict(zip(params, method.clip_gradients(case.params["clip"]).tolist(), strict=True))
    for name, norm in case.value("norms").items():
        yield f"norms {name}", norms[name], norm
    for name in case.names("out/clipped/"):
        yield name, params[name.removeprefix("out/clipped/")].grad, case.arrays[name]
    for label in case.outputs():
        if label.startswith("grad_is_none_epoch"):
            epoch, freeze = (int(part) for part in label.removeprefix("grad_is_none_epoch").split("_freeze"))
            method.freeze_last_layer = freeze
            method.after_backward(Clock(epoch=epoch, iteration=0))
            yield label, [name for name, p in params.items() if p.grad is None], case.value(label)


def _dino_with_parameters(shapes: dict[str, torch.Size]) -> DINO:
    """A DINO whose student has parameters of these names and shapes."""
    width, _, patch, _ = shapes["backbone.patch_embed.proj.weight"]
    depth = len({name.split(".")[2] for name in shapes if name.startswith("backbone.blocks.")})
    side = round((shapes["backbone.pos_embed"][1] - 1) ** 0.5)
    out_dim, bottleneck = shapes["head.last_layer.weight_v"]
    vit = {"patch_size": patch, "img_size": side * patch, "embed_dim": width, "depth": depth, "num_heads": 1}
    head = {"out_dim": out_dim, "bottleneck_dim": bottleneck, "hidden_dim": shapes["head.mlp.0.weight"][0]}
    method = small_dino(vit, {**head, "norm_last_layer": False})
    assert {name: p.shape for name, p in method.student.named_parameters()} == shapes
    return method


def lars(case: Case) -> Iterator[tuple]:
    p = case.params
    params = [torch.nn.Parameter(case.tensor(f"in/p{i}")) for i in range(len(case.names("in/p")))]
    optimizer = LARS(params, weight_decay=p["weight_decay"], momentum=p["momentum"], eta=p["eta"])
    for step, lr in enumerate(p["lr"]):
        optimizer.param_groups[0]["lr"] = lr
        for i, parameter in enumerate(params):
            parameter.grad = case.tensor(f"in/g{step}_{i}")
        optimizer.step()
        for i, parameter in enumerate(params):
            yield f"out/p{step}_{i}", parameter, case.arrays[f"out/p{step}_{i}"]


RUNNERS = {
    "dino/schedules": schedules,
    "dino/param_groups": param_groups,
    "dino/clip_and_freeze": clip_and_freeze,
    "dino/lars": lars,
}
