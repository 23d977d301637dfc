"""Runners: whole training runs, step by step, through ``train_one_epoch`` of main_pretrain.py."""

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from main_pretrain import Run, train_one_epoch
from methods.dino import DINO
from methods.heads import DINOHead
from methods.multicrop import MultiCropNetwork
from tests.parity import Case
from tests.parity.networks import build_vit
from training.blackbox import BlackBox
from training.consensus import Consensus
from training.monitor import Monitor
from training.optim import build_optimizer
from training.pseudo_labels import PseudoLabels
from utils import World, cosine_scheduler, warmup_scheduler


class Diary:
    """Writes down what the manifest's ``steps`` hold, from hooks of the method's contract."""

    def __init__(self, method: DINO):
        self.method = method
        self.steps: list[dict] = []
        method.register_forward_pre_hook(self._before)
        method.register_forward_hook(self._after)
        self._clip, method.clip_gradients = method.clip_gradients, self._before_clipping
        self._step, method.after_step = method.after_step, self._after_step

    def _before(self, _method, inputs) -> None:
        crops = inputs[0]["crops"]
        buffers = {name: b.clone() for name, b in self.method.named_buffers()}  # an extra forward moves batch norm's
        with torch.no_grad():
            student = self.method.student(crops).sum().item()
            teacher = self.method.teacher(crops[: self.method.teacher_views]).sum().item()
            for name, buffer in self.method.named_buffers():
                buffer.copy_(buffers[name])
        self.steps.append({"student_logits_sum": student, "teacher_logits_sum": teacher})

    def _after(self, _method, _inputs, output) -> None:
        self.steps[-1]["loss"] = output["loss"].item()

    def _before_clipping(self, clip: float) -> torch.Tensor:
        named = self.method.student.named_parameters()
        self.steps[-1]["grad_norms"] = {name: p.grad.norm().item() for name, p in named if p.grad is not None}
        return self._clip(clip)

    def _after_step(self, clock, gate) -> None:
        self._step(clock, gate)
        self.steps[-1] |= {
            "center_norm": self.method.centre.center.norm().item(),
            "lr": clock.lr,
            "wd": clock.weight_decay,
            "momentum": clock.momentum,
        }


def dino_method(case: Case) -> DINO:
    p = case.params
    head = {**p["head"], "use_bn": p["use_bn_in_head"]}
    student, teacher = (
        MultiCropNetwork(
            build_vit(p["backbone"], drop_path_rate=rate),
            DINOHead(p["backbone"]["dim"], norm_last_layer=frozen, **head),
        )
        for rate, frozen in ((p["drop_path_rate"], p["norm_last_layer"]), (0.0, True))
    )
    temps = warmup_scheduler(p["warmup_teacher_temp"], p["teacher_temp"], p["warmup_teacher_temp_epochs"], p["epochs"])
    method = DINO(
        student,
        teacher,
        teacher_temps=temps,
        freeze_last_layer=p["freeze_last_layer"],
        student_temp=p["student_temp"],
        center_momentum=p["center_momentum"],
    ).to(case.dtype)
    method.student.load_state_dict(case.state("student0"))
    method.teacher.load_state_dict(case.state("teacher0"))
    return method


def build_run(p: dict, method: DINO, folder: Path) -> Run:
    """The run main_pretrain.py would build from these options."""
    options = {"clip_grad": p["clip_grad"], "seed": 0, "accum_iter": 1, "precision": "fp64", "save_every_minutes": 0}
    limits = {"max_skipped": 1, "max_bad_images": 0.0, "output_dir": str(folder)}
    args = argparse.Namespace(**options, **limits)
    world = World(0, 1, 0, torch.device("cpu"))
    epochs, niter, batch = p["epochs"], p["iters_per_epoch"], p["batch_size_per_gpu"] * p["world_size"]
    monitor = Monitor(folder, epochs, niter, 10, batch, World(1, 2, 0, world.device))  # a rank that does not print
    return Run(
        args=args,
        world=world,
        source=None,
        method=method,
        model=method,
        optimizer=build_optimizer(p["optimizer"], method.param_groups()),
        scaler=None,
        niter=niter,
        global_batch=batch,
        schedules={
            "lr": cosine_scheduler(p["lr"] * batch / 256, p["min_lr"], epochs, niter, p["warmup_epochs"]),
            "weight_decay": cosine_scheduler(p["weight_decay"], p["weight_decay_end"], epochs, niter),
            "momentum": cosine_scheduler(p["momentum_teacher"], 1.0, epochs, niter),
        },
        monitor=monitor,
        consensus=Consensus(world.device),
        blackbox=BlackBox(args, 1, world),
        pseudo_labels=PseudoLabels(np.array([-1]), world),
    )


def pieces(case: Case) -> Iterator[dict]:
    p = case.params
    for step in range(p["epochs"] * p["iters_per_epoch"]):
        crops = [case.tensor(f"in/step{step}_crop{i}") for i in range(len(case.names(f"in/step{step}_crop")))]
        yield {"crops": crops, "indices": torch.zeros(0), "bad": [], "first_sample": 0}


def dino_trajectory(case: Case) -> Iterator[tuple]:
    p = case.params
    method = dino_method(case)
    diary = Diary(method)
    with tempfile.TemporaryDirectory() as folder:
        run = build_run(p, method, Path(folder))
        stream, stats = pieces(case), []
        for epoch in range(p["epochs"]):
            train_one_epoch(run, epoch, stream)
            line = run.monitor.end_epoch(epoch, {})
            stats.append({name: line[f"train_{name}"] for name in ("loss", "lr", "wd")})
    yield "steps, effective learning rate", p["lr"] * run.global_batch / 256, p["lr_after_linear_scaling"]
    for step, expected in enumerate(case.value("steps")):
        for name, value in expected.items():
            if isinstance(value, dict):
                for key, number in value.items():
                    yield f"steps {step} {name} {key}", diary.steps[step][name][key], number
            else:
                yield f"steps {step} {name}", diary.steps[step][name], value
    for epoch, expected in enumerate(case.value("epoch_stats")):
        for name, value in expected.items():
            yield f"epoch_stats {epoch} {name}", stats[epoch][name], value
    for name, key in (("losses", "loss"), ("lr", "lr"), ("wd", "wd"), ("momentum", "momentum")):
        yield f"out/{name}", [step[key] for step in diary.steps], case.arrays[f"out/{name}"]
    yield "out/center", method.centre.center, case.arrays["out/center"]
    for side in ("student", "teacher"):
        actual = getattr(method, side).state_dict()
        for name, value in case.state(f"{side}_final").items():
            yield f"{side}_final/{name}", actual[name], value


RUNNERS = {"dino/trajectory_*": dino_trajectory}
