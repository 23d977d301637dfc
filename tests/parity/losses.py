"""Runners: the loss between views and its centre, in one process and in several."""

import os
import socket
from collections.abc import Iterator

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from methods.centring import Centres
from methods.distillation import cross_view_loss, teacher_probabilities
from tests.parity import Case
from utils import warmup_scheduler


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


def dino_loss_on_ranks(case: Case) -> Iterator[tuple]:
    p = case.params
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    inputs = {name: case.tensor(name) for name in case.names("in/")}
    context = mp.get_context("spawn")
    queue = context.SimpleQueue()
    mp.spawn(_rank, (p, inputs, temperatures(p), port, queue, case.dtype), nprocs=p["world_size"])
    computed = {}
    for _ in range(p["world_size"]):
        computed.update(queue.get())
    for name in case.names("out/"):
        if name in computed:
            yield name, computed[name], case.arrays[name]
        else:  # an output without a rank: the same on all of them
            for rank in range(p["world_size"]):
                yield f"{name} rank {rank}", computed[f"{name}_rank{rank}"], case.arrays[name]


def _rank(rank: int, p: dict, inputs: dict, temps, port: int, queue, dtype: torch.dtype) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=p["world_size"])
    centre = Centres(p.get("center_momentum", 0.9), center=(1, p["out_dim"])).to(dtype)
    computed = {}
    for step, epoch in enumerate(p["epoch_of_step"]):
        student, teacher = inputs[f"in/student{step}_rank{rank}"], inputs[f"in/teacher{step}_rank{rank}"]
        loss, grad = loss_step(student, teacher, centre, temps[epoch], p.get("student_temp", 0.1))
        computed[f"out/loss{step}_rank{rank}"] = loss.numpy()
        computed[f"out/grad{step}_rank{rank}"] = grad.numpy()
        computed[f"out/center{step}_rank{rank}"] = centre.center.numpy().copy()
    queue.put(computed)
    dist.barrier()
    dist.destroy_process_group()


RUNNERS = {
    "dino/loss_two_ranks": dino_loss_on_ranks,
    "dino/loss_*": dino_loss,
}
