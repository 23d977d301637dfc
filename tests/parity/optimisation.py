"""Runners: schedules, parameter groups, clipping, freezing, LARS."""

import re
from collections.abc import Iterator

import numpy as np
import torch

from methods.base import Clock
from methods.dino import DINO
from methods.heads import DINOHead, IBOTHead
from methods.ibot import IBOT
from methods.masked_distillation import patch_temperatures
from methods.multicrop import MultiCropNetwork
from methods.teacher import Follower, start_teacher
from models.swin import SwinTransformer
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


def ibot_schedules(case: Case) -> Iterator[tuple]:
    for name in case.entry["inputs"]:
        a, number = case.value(name), name.removeprefix("args")
        warmup, epochs, start = a["warmup_teacher_temp_epochs"], a["epochs"], a["pred_start_epoch"]
        cls = warmup_scheduler(a["warmup_teacher_temp"], a["teacher_temp"], warmup, epochs)
        patch = patch_temperatures(a["warmup_teacher_patch_temp"], a["teacher_patch_temp"], warmup, epochs, start)
        yield f"out/cls{number}", cls, case.arrays[f"out/cls{number}"]
        yield f"out/patch{number}", patch, case.arrays[f"out/patch{number}"]


def small_dino(vit: dict, head: dict, freeze_last_layer: int = 1) -> DINO:
    networks = [MultiCropNetwork(VisionTransformer(**vit), DINOHead(vit["embed_dim"], **head)) for _ in range(2)]
    return DINO(*networks, teacher_temps=np.full(9, 0.04), freeze_last_layer=freeze_last_layer)


def param_groups(case: Case) -> Iterator[tuple]:
    width = case.params["embed_dim"]
    vit = {"patch_size": 8, "img_size": 16, "embed_dim": width, "depth": case.params["depth"], "num_heads": 1}
    for label in case.outputs():
        head = {key: value == "True" for key, value in (part.split("=") for part in label.split(","))}
        head = {"use_bn": head.pop("use_bn_in_head"), **head}
        head |= {"nlayers": matrices_of_head(case.value(label)["regularized"])}
        method = small_dino(vit, {"out_dim": 4, "hidden_dim": 4, "bottleneck_dim": 4, **head})
        names = {id(p): name for name, p in method.student.named_parameters()}
        decayed, undecayed = ([names[id(p)] for p in group["params"]] for group in method.param_groups())
        yield label, {"regularized": decayed, "not_regularized": undecayed}, case.value(label)


def matrices_of_head(decayed: list[str]) -> int:
    return sum(bool(re.fullmatch(r"head\.mlp(\.\d+)?\.weight", name)) for name in decayed)


def ibot_param_groups(case: Case) -> Iterator[tuple]:
    for label in case.outputs():
        if label == "swin_regularized":
            yield label, swin_decayed(case.value(label)), case.value(label)
            continue
        flags = {key: value == "True" for key, value in (part.split("=") for part in label[4:].split(","))}
        expected = case.value(label)
        depth = 1 + max(int(n.split(".")[2]) for n in expected["regularized"] if n.startswith("backbone.blocks."))
        vit = {"patch_size": 8, "img_size": 16, "embed_dim": 4, "depth": depth, "num_heads": 1}
        vit["init_values"] = 0.1 * any("gamma" in name for name in expected["not_regularized"])
        head = {"out_dim": 4, "patch_out_dim": 4, "hidden_dim": 4, "bottleneck_dim": 4}
        head |= {"shared_head": flags["shared"], "norm_last_layer": flags["norm_last_layer"]}
        head |= {"nlayers": matrices_of_head(expected["regularized"])}
        student, teacher = (
            MultiCropNetwork(VisionTransformer(**vit, masked_im_modeling=masked), IBOTHead(4, **head))
            for masked in (True, False)
        )
        method = IBOT(student, teacher, np.full(9, 0.04), np.full(9, 0.04))
        names = {id(p): name for name, p in method.student.named_parameters()}
        decayed, undecayed = ([names[id(p)] for p in group["params"]] for group in method.param_groups())
        found = {"regularized": decayed, "not_regularized": undecayed}
        yield label, {kind: found[kind] for kind in expected}, expected


def swin_decayed(expected: list[str]) -> list[str]:
    """Names of the decayed parameters of a Swin with the stages and blocks that the expected names have."""
    found = {tuple(map(int, name.split(".")[1:4:2])) for name in expected if ".blocks." in name}
    stages = 1 + max(stage for stage, _ in found)
    depths = [sum(stage == s for s, _ in found) for stage in range(stages)]
    sizes = {"img_size": 32, "embed_dim": 4, "depths": depths, "num_heads": [1] * stages, "window_size": 4}
    networks = [
        MultiCropNetwork(SwinTransformer(**sizes, masked_im_modeling=masked), IBOTHead(4 * 2 ** (stages - 1), 4))
        for masked in (True, False)
    ]
    method = IBOT(*networks, np.full(9, 0.04), np.full(9, 0.04))
    names = {id(p): name for name, p in method.student.backbone.named_parameters()}
    return [names[id(p)] for p in method.param_groups()[0]["params"] if id(p) in names]


def teacher_init(case: Case) -> Iterator[tuple]:
    state = case.state("student")
    sizes = head_sizes({name: tensor.shape for name, tensor in state.items()})
    in_dim = next(tensor for name, tensor in state.items() if name.startswith("mlp.")).shape[1]
    student, teacher = (
        IBOTHead(in_dim, **sizes, **case.params[side]).to(case.dtype) for side in ("student", "teacher")
    )
    student.load_state_dict(state)
    start_teacher(teacher, student)
    for name, value in teacher.state_dict().items():
        yield f"teacher_after/{name}", value, case.arrays[f"teacher_after/{name}"]
    followed = {id(ours) for ours, _ in Follower(teacher, student).pairs}
    names = sorted(name for name, p in teacher.named_parameters() if id(p) in followed)
    yield "common_names", names, case.value("common_names")


def head_sizes(shapes: dict[str, torch.Size], prefix: str = "") -> dict[str, int]:
    """Sizes of a projection head by the shapes of its parameters."""
    matrix = re.compile(rf"{re.escape(prefix)}mlp(\.\d+)?\.weight")
    layers = [shape for name, shape in shapes.items() if matrix.fullmatch(name) and len(shape) == 2]
    out_dim, bottleneck = shapes[f"{prefix}last_layer.weight_v"]
    sizes = {"out_dim": out_dim, "bottleneck_dim": bottleneck, "hidden_dim": layers[0][0], "nlayers": len(layers)}
    return {name: int(size) for name, size in sizes.items()}


def clip_and_freeze(case: Case) -> Iterator[tuple]:
    grads = {name.removeprefix("in/grad/"): case.tensor(name) for name in case.names("in/grad/")}
    method = _dino_with_parameters({name: grad.shape for name, grad in grads.items()}).to(case.dtype)
    params = dict(method.student.named_parameters())
    for name, grad in grads.items():
        params[name].grad = grad.clone()
    norms = dict(zip(params, method.clip_gradients(case.params["clip"], Clock(0, 0)).tolist(), strict=True))
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
    vit = {"patch_size": patch, "img_size": side * patch, "embed_dim": width, "depth": depth, "num_heads": 1}
    method = small_dino(vit, head_sizes(shapes, "head.") | {"norm_last_layer": False})
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
    "ibot/schedules": ibot_schedules,
    "ibot/param_groups": ibot_param_groups,
    "ibot/teacher_init_from_student": teacher_init,
    "dino/schedules": schedules,
    "dino/param_groups": param_groups,
    "dino/clip_and_freeze": clip_and_freeze,
    "dino/lars": lars,
}
