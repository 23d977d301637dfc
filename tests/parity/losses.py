"""Runners: the loss between views and its centre, in one process and in several."""

import os
import re
import socket
import tempfile
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from methods.centring import Centres
from methods.distillation import cross_view_loss, masked_patch_loss, teacher_probabilities
from methods.masked_distillation import patch_temperatures
from tests.parity import Case
from utils import leave_world, warmup_scheduler


def temperatures(p: dict):
    names = ("warmup_teacher_temp", "teacher_temp", "warmup_teacher_temp_epochs", "nepochs")
    return warmup_scheduler(*(p[name] for name in names))


def loss_step(student: torch.Tensor, teacher: torch.Tensor, centre: Centres, temp: float, student_temp: float) -> tuple:
    """Loss and gradient for given logits: with the unit vectors as prototypes, a student's vector is its logits."""
    student = student.clone().requires_grad_()
    centre.collect(center=teacher)
    probs = teacher_probabilities(teacher, centre.center, temp).unflatten(0, (2, -1))
    loss = cross_view_loss(student, torch.eye(student.shape[1], dtype=student.dtype), probs, student_temp)
    loss.backward()
    centre.commit(None)
    return loss.detach(), student.grad


def dino_loss(case: Case) -> Iterator[tuple]:
    p = case.params
    temps = temperatures(p)
    if "out/teacher_temp_schedule" in case.arrays:
        yield "out/teacher_temp_schedule", temps, case.arrays["out/teacher_temp_schedule"]
    centre = Centres(p["center_momentum"], center=(1, p["out_dim"])).to(case.dtype)
    centre.center.copy_(case.tensor("in/center0"))
    for step, epoch in enumerate(p["epoch_of_step"]):
        student, teacher = case.tensor(f"in/student{step}"), case.tensor(f"in/teacher{step}")
        loss, grad = loss_step(student, teacher, centre, temps[epoch], p["student_temp"])
        yield f"out/loss{step}", loss, case.arrays[f"out/loss{step}"]
        yield f"out/grad{step}", grad, case.arrays[f"out/grad{step}"]
        yield f"out/center{step}", centre.center, case.arrays[f"out/center{step}"]


def dino_loss_on_rank(rank: int, p: dict, inputs: dict, dtype: torch.dtype) -> dict:
    temps = temperatures(p)
    centre = Centres(p.get("center_momentum", 0.9), center=(1, p["out_dim"])).to(dtype)
    computed = {}
    for step, epoch in enumerate(p["epoch_of_step"]):
        student, teacher = inputs[f"in/student{step}_rank{rank}"], inputs[f"in/teacher{step}_rank{rank}"]
        loss, grad = loss_step(student, teacher, centre, temps[epoch], p.get("student_temp", 0.1))
        computed |= {f"out/loss{step}": loss, f"out/grad{step}": grad, f"out/center{step}": centre.center.clone()}
    return computed


# ---------------------------------------------------------------------------------------------------------------------
# Class tokens and hidden patches
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class MaskedStep:
    """Logits of a step, of class tokens and patches of the global crops and class tokens of the local ones, if any."""

    student: torch.Tensor
    student_patch: torch.Tensor
    student_local: torch.Tensor | None
    teacher: torch.Tensor
    teacher_patch: torch.Tensor
    masks: torch.Tensor


def masked_centres(p: dict, shapes: tuple, dtype: torch.dtype) -> tuple[Centres, Centres]:
    """Centres of class tokens and of patches, each with a momentum of its own; 0.9 unless the case says otherwise."""
    return (
        Centres(p.get("center_momentum", 0.9), center=(1, shapes[0])).to(dtype),
        Centres(p.get("center_momentum2", 0.9), center2=(1, 1, shapes[1])).to(dtype),
    )


def masked_step(step: MaskedStep, centres: tuple, temps: tuple, views: int, p: dict) -> dict[str, torch.Tensor]:
    """Both losses and the gradients of all logits; lambda1 and lambda2 are 1 unless the case says otherwise."""
    centre, patch_centre = centres
    leaves = [
        t.clone().requires_grad_() for t in (step.student, step.student_patch, step.student_local) if t is not None
    ]
    student, patch, *local = leaves
    centre.collect(center=step.teacher)
    patch_centre.collect(center2=step.teacher_patch.mean(dim=1))
    masked = step.masks.flatten().nonzero().flatten()
    probs = teacher_probabilities(step.teacher, centre.center, temps[0]).unflatten(0, (views, -1))
    patch_probs = teacher_probabilities(step.teacher_patch.flatten(0, 1)[masked], patch_centre.center2[0], temps[1])
    eyes = [torch.eye(logits.shape[-1], dtype=logits.dtype) for logits in (student, patch)]
    temp = p.get("student_temp", 0.1)
    cls = p.get("lambda1", 1.0) * cross_view_loss(torch.cat((student, *local)), eyes[0], probs, temp)
    hidden = patch.flatten(0, 1).index_select(0, masked)
    lost = p.get("lambda2", 1.0) * masked_patch_loss(hidden, eyes[1], patch_probs, step.masks, masked, temp)
    (cls + lost).backward()
    centre.commit(None)
    patch_centre.commit(None)
    return {
        "loss": (cls + lost).detach(),
        "cls": cls.detach(),
        "patch": lost.detach(),
        "grad_cls": student.grad,
        "grad_patch": patch.grad,
        "grad_local": local[0].grad if local else None,
        "center": centre.center.clone(),
        "center2_": patch_centre.center2.clone(),
    }


def patch_temps(p: dict):
    return patch_temperatures(
        p["warmup_teacher_temp2"],
        p["teacher_temp2"],
        p["warmup_teacher_temp_epochs"],
        p["nepochs"],
        p["mim_start_epoch"],
    )


def ibot_step(read: Callable[[str], torch.Tensor], names: Collection[str], step: int, ending: str) -> MaskedStep:
    crops = sorted(name for name in names if name.startswith(f"in/mask{step}_crop") and name.endswith(ending))
    local = f"in/student_local_cls{step}{ending}"
    return MaskedStep(
        *(read(f"in/student_{kind}{step}{ending}") for kind in ("cls", "patch")),
        read(local) if local in names else None,
        *(read(f"in/teacher_{kind}{step}{ending}") for kind in ("cls", "patch")),
        torch.cat([read(name) for name in crops]).flatten(1),
    )


def ibot_loss(case: Case) -> Iterator[tuple]:
    p = case.params
    temps = temperatures(p), patch_temps(p)
    yield "out/temp_cls", temps[0], case.arrays["out/temp_cls"]
    yield "out/temp_patch", temps[1], case.arrays["out/temp_patch"]
    centres = masked_centres(p, (p["out_dim"], p["patch_out_dim"]), case.dtype)
    centres[0].center.copy_(case.tensor("in/center0"))
    centres[1].center2.copy_(case.tensor("in/center2_0"))
    for step, epoch in enumerate(p["epoch_of_step"]):
        logits = ibot_step(case.tensor, case.arrays, step, "")
        computed = masked_step(logits, centres, (temps[0][epoch], temps[1][epoch]), p["global_crops"], p)
        for name, value in computed.items():
            if f"out/{name}{step}" in case.arrays:
                yield f"out/{name}{step}", value, case.arrays[f"out/{name}{step}"]


def ibot_loss_on_rank(rank: int, p: dict, inputs: dict, dtype: torch.dtype) -> dict:
    first, final, warmup, epochs = (float(number) for number in re.findall(r"[\d.]+", p["temps"]))
    temps = warmup_scheduler(first, final, int(warmup), int(epochs))
    centres = masked_centres(p, (p["out_dim"], p["patch_out_dim"]), dtype)
    computed = {}
    for step, epoch in enumerate(p["epoch_of_step"]):
        logits = ibot_step(inputs.__getitem__, inputs, step, f"_rank{rank}")
        found = masked_step(logits, centres, (temps[epoch],) * 2, p["global_crops"], p)
        computed |= {f"out/{name}{step}": value for name, value in found.items() if value is not None}
    return computed


def attmask_loss(case: Case) -> Iterator[tuple]:
    p = case.params
    centres = masked_centres(p, (p["K"], p["K"]), case.dtype)
    for step, expected in enumerate(case.entry["outputs"]["per_step"]):
        names = ("student_cls", "student_patch", "student_local_cls", "teacher_cls", "teacher_patch", "mask")
        there = [f"step{step}_{name}" for name in names]
        logits = MaskedStep(*(case.tensor(name) if name in case.arrays else None for name in there))
        temps = p["teacher_temp_schedule"][step], p["teacher_patch_temp_schedule"][step]
        computed = masked_step(logits, centres, temps, p["ng"], p)
        for name, value in expected.items():
            yield f"per_step {step} {name}", computed[name], value
        # gradients are differences of numbers near 1, so that double precision leaves them an error of 1e-17
        rounding = case.tolerance.rtol, 1e-15
        for ours, theirs in (("cls", "cls"), ("patch", "patch"), ("local", "local_cls")):
            label = f"step{step}_grad_student_{theirs}"
            if label in case.arrays:
                yield label, computed[f"grad_{ours}"], case.arrays[label], rounding
        yield f"step{step}_center", computed["center"], case.arrays[f"step{step}_center"]
        yield f"step{step}_center2", computed["center2_"], case.arrays[f"step{step}_center2"]


# ---------------------------------------------------------------------------------------------------------------------
# Several processes
# ---------------------------------------------------------------------------------------------------------------------


def on_ranks(compute: Callable) -> Callable[[Case], Iterator[tuple]]:
    """A runner of ``compute(rank, params, inputs, dtype) -> {output without rank: value}`` in processes of its own."""

    def runner(case: Case) -> Iterator[tuple]:
        p = case.params
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        inputs = {name: case.tensor(name) for name in case.names("in/") or case.arrays}
        computed = {}
        with tempfile.TemporaryDirectory() as folder:  # of any size, where a pipe that nobody reads yet fills up
            mp.spawn(_rank, (compute, p, inputs, port, folder, case.dtype), nprocs=p["world_size"])
            for path in Path(folder).iterdir():
                with np.load(path, allow_pickle=False) as file:
                    computed |= dict(file)
        for name in case.names("out/") or case.outputs():
            if name in computed:
                yield name, computed[name], case.arrays[name]
            else:  # an output without a rank: the same on all of them
                for rank in range(p["world_size"]):
                    yield f"{name} rank {rank}", computed[f"{name}_rank{rank}"], case.arrays[name]

    return runner


def _rank(rank: int, compute: Callable, p: dict, inputs: dict, port: int, folder: str, dtype: torch.dtype) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=p["world_size"])
    computed = compute(rank, p, inputs, dtype)
    own = {name: name if name.startswith(f"rank{rank}_") else f"{name}_rank{rank}" for name in computed}
    np.savez(Path(folder) / f"{rank}.npz", **{own[name]: value.numpy() for name, value in computed.items()})
    dist.barrier()
    leave_world()


RUNNERS = {
    "dino/loss_two_ranks": on_ranks(dino_loss_on_rank),
    "dino/loss_*": dino_loss,
    "ibot/loss_two_ranks": on_ranks(ibot_loss_on_rank),
    "ibot/loss_*": ibot_loss,
    "attmask/loss": attmask_loss,
}
