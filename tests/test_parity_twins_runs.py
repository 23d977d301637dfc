"""Twins of whole runs: other networks, sizes, crops and rates, computed by the plain formulation of each method."""

import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

from methods.base import Clock, Method
from methods.esvit import names_in_files
from tests.parity.esvit import trajectory_method
from tests.parity.swin import hash_images, hash_weights
from tests.twins import agrees, golden, rewrite


def cosine(start: float, end: float, steps: int) -> list[float]:
    return [end + (start - end) * (1 + math.cos(math.pi * i / steps)) / 2 for i in range(steps)]


def warmed(peak: float, least: float, warm: int, steps: int) -> list[float]:
    return [peak * i / max(1, warm - 1) for i in range(warm)] + cosine(peak, least, steps - warm)


@pytest.fixture
def plain(monkeypatch):
    """The plain formulations in double precision, which they leave where methods compute in single."""
    from plain import esvit, mugs, textbook, unic

    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    return {"esvit": esvit, "mugs": mugs, "unic": unic, "textbook": textbook}


def run(method: Method, forward, batches: list, rates: dict, p: dict, update) -> list[dict]:
    """AdamW, one loop over parameters: the norms of gradients before they are clipped, and the loss, of every step."""
    groups = [{**group, "weight_decay": 0.0} for group in method.param_groups()]
    optimizer, steps = torch.optim.AdamW(groups, lr=0.0, foreach=False, fused=False), []
    for step, batch in enumerate(batches):
        clock = Clock(step // p["niter"], step, momentum=rates["momentum"][step], global_batch=p["batch"])
        for group in optimizer.param_groups:
            group["lr"] = rates["lr"][step] * group.get("lr_multiplier", 1.0)
            group["weight_decay"] = rates["wd"][step] * group.get("wd_multiplier", 1.0)
        optimizer.zero_grad()
        loss = forward(method, batch, clock)
        loss.backward()
        named = method.student.named_parameters()
        norms = {name: x.grad.norm().item() for name, x in named if x.grad is not None}
        update(method, optimizer, p["clip_grad"], clock)
        steps.append({"loss": loss.item(), "norms": norms})
    return steps


def decay_and_rates(p: dict) -> dict:
    steps, warm = p["epochs"] * p["niter"], p["warmup_epochs"] * p["niter"]
    rates = {"lr": warmed(p["lr"] * p["batch"] * p["world_size"] / 256, p["min_lr"], warm, steps)}
    rates["wd"] = cosine(p["weight_decay"], p["weight_decay_end"], steps)
    return rates | {"momentum": cosine(p["momentum_teacher"], 1.0, steps)}


SWIN = {"img_size": 24, "patch_size": 2, "embed_dim": 6, "depths": [2, 1, 1], "num_heads": [1, 3, 2], "window_size": 3}
ESVIT = {  # what is changed beside sizes of heads and rates
    "swin_view": {"arch_config": SWIN | {"mlp_ratio": 3.0}, "global_size": 24, "local_size": 16, "n_local": 1},
    "swin_view_region": {"arch_config": SWIN | {"mlp_ratio": 1.0}, "global_size": 24, "local_size": 12, "n_local": 3},
    "cvt_view_region": {"global_size": 64, "local_size": 32, "n_local": 1},
    "vil_view_region": {"global_size": 32, "local_size": 16, "n_local": 0},
}


@pytest.mark.parametrize("name", ESVIT)
def test_a_run_of_esvit_with_other_networks_crops_and_rates(name, plain):
    case = golden("esvit", f"trajectory_{name}")
    p = case.params
    p.update(ESVIT[name], batch=3, epochs=3, steps_per_epoch=1, clip_grad=0.7, freeze_last_layer=2, lr=0.3, min_lr=0.01)
    p.update(warmup_epochs=2, weight_decay=0.1, weight_decay_end=0.2, momentum_teacher=0.8, student_temp=0.2)
    p.update(head_config={"out_dim": 9, "hidden": 7, "bottleneck": 5}, warmup_teacher_temp=0.05, teacher_temp=0.09)
    p.update(warmup_teacher_temp_epochs=2, world_size=2, center_momentum=0.6, norm_last_layer=not p["norm_last_layer"])
    p["crops"] = "hash images: iteration it, crop v has seed 31 + 9*it + v, shape (3,3,S,S) with S = ..."
    method = trajectory_method(p, torch.float64).train()
    weights = hash_weights(method.student.state_dict(), 50)
    for network in (method.student, method.teacher):
        network.load_state_dict(weights)

    def in_files(named: dict) -> dict:
        return names_in_files(named, method.file_prefix)

    inputs = {f"w::{n}": v.clone() for n, v in in_files(weights).items()}
    sizes, rates = [p["global_size"]] * 2 + [p["local_size"]] * p["n_local"], decay_and_rates(p | {"niter": 1})
    method.teacher_temps, method.student_temp, method.centres.momentum = [0.05, 0.09, 0.09], 0.2, 0.6
    images = [[hash_images(31 + 9 * it + v, 3, 3, s, s) for v, s in enumerate(sizes)] for it in range(3)]

    def forward(method, crops, clock):
        with torch.no_grad():
            theirs = method.teacher.regions(crops[:2], None, None)
        ours = method.student.regions(crops, None, None)
        if p["dense"]:
            return plain["esvit"].heads_and_loss(method, ours, theirs, clock)
        logits = [
            plain["textbook"].head(net.head, x[0]) for net, x in ((method.student, ours), (method.teacher, theirs))
        ]
        temps = 0.2, method.teacher_temps[clock.epoch]
        loss = plain["textbook"].cross_view_loss(*logits, method.centres.center, temps, len(crops))
        plain["textbook"].move(method.centres.center, logits[1].detach(), 0.6)
        return loss

    steps = run(method, forward, images, rates, p | {"niter": 1}, plain["textbook"].update)
    trained = in_files(dict(method.student.named_parameters()))
    undecayed = [n for n, x in trained.items() if x.requires_grad and (x.ndim == 1 or n.endswith(".bias"))]
    p["group0_regularised"] = [n for n, x in trained.items() if x.requires_grad and n not in undecayed]
    p["group1_not_regularised"] = undecayed
    p["grad_norm_names"] = list(in_files(steps[0]["norms"]))
    outputs = rates | {"losses": [step["loss"] for step in steps]}
    outputs["grad_norms"] = np.array([list(step["norms"].values()) for step in steps])
    for side in ("student", "teacher"):
        state = {n: v.double() for n, v in in_files(getattr(method, side).state_dict()).items()}
        p["tensor_names"] = list(state)
        outputs[f"{side}_sum_l2"] = np.array([[v.sum().item(), v.norm().item()] for v in state.values()])
        outputs |= {f"{side}::{n}": state[n] for n in list(state)[:9:4]}
    outputs |= {f"loss::{n}": v for n, v in method.centres.state_dict().items()}
    case.params.pop("weights", None)
    twin = rewrite(case, inputs, outputs)
    twin.entry["outputs"] = [{"key": name} for name in outputs]
    agrees(twin)
