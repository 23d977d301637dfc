"""Runners: whole training runs, step by step, through ``train_one_epoch`` of main_pretrain.py."""

import argparse
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from main_pretrain import Run, train_one_epoch
from methods.attmask import AttMask
from methods.base import Clock, Method
from methods.dino import DINO
from methods.heads import DINOHead, IBOTHead
from methods.ibot import IBOT
from methods.masked_distillation import patch_temperatures
from methods.masking import MaskedViews, MaskRatio
from methods.multicrop import MultiCropNetwork
from tests.parity import Case
from tests.parity.constants import constants_of_optimizers
from tests.parity.networks import build_vit, shared_state_and_crops
from tests.parity.swin import build_swin
from training.blackbox import BlackBox
from training.consensus import Consensus
from training.monitor import Monitor
from training.optim import build_optimizer
from training.pseudo_labels import PseudoLabels
from utils import World, warmup_scheduler


class Diary:
    """Writes down what the manifests' steps hold, from hooks of the method's contract."""

    def __init__(self, method: Method):
        self.method = method
        self.steps: list[dict] = []
        method.register_forward_pre_hook(self._before)
        method.register_forward_hook(self._after)
        self._clip, method.clip_gradients = method.clip_gradients, self._before_clipping
        self._step, method.after_step = method.after_step, self._after_step

    def _before(self, _method, inputs) -> None:
        self.steps.append({})

    def _after(self, _method, _inputs, output) -> None:
        self.steps[-1] |= {name: value.item() for name, value in output.items()}

    def _before_clipping(self, clip: float, clock: Clock) -> torch.Tensor:
        named = self.method.student.named_parameters()
        self.steps[-1]["grad_norms"] = {name: p.grad.norm().item() for name, p in named if p.grad is not None}
        return self._clip(clip, clock)

    def _after_step(self, clock, gate) -> None:
        self._step(clock, gate)
        self.steps[-1] |= {"lr": clock.lr, "wd": clock.weight_decay, "momentum": clock.momentum}
        for centres in (part for key, part in self.method.checkpoint_parts().items() if key.endswith("_loss")):
            for name, centre in centres.state_dict().items():
                self.steps[-1] |= {name: centre.clone(), f"{name}_norm": centre.norm().item()}

    def column(self, name: str) -> list:
        return [step[name] for step in self.steps]


class DINODiary(Diary):
    def _before(self, _method, inputs) -> None:
        crops = inputs[0]["crops"]
        buffers = {name: b.clone() for name, b in self.method.named_buffers()}  # an extra forward moves batch norm's
        with torch.no_grad():
            student = self.method.student(crops).sum().item()
            teacher = self.method.teacher(crops[: self.method.teacher_views]).sum().item()
            for name, buffer in self.method.named_buffers():
                buffer.copy_(buffers[name])
        self.steps.append({"student_logits_sum": student, "teacher_logits_sum": teacher})


def build_run(p: dict, method: Method, folder: Path, labels: np.ndarray) -> Run:
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
        schedules=method.schedules(argparse.Namespace(**p), niter, batch),
        monitor=monitor,
        consensus=Consensus(world.device),
        blackbox=BlackBox(args, 1, world),
        pseudo_labels=PseudoLabels(labels, world),
    )


def train(
    p: dict, method: Method, pieces: Iterator[dict], labels: np.ndarray | None = None, epochs: int | None = None
) -> list[dict]:
    """All epochs, or the first ``epochs``; returns the averages that each of them logged. ``labels``: of the images of
    all steps, in order.
    """
    with tempfile.TemporaryDirectory() as folder:
        run = build_run(p, method, Path(folder), np.full(1, -1) if labels is None else labels)
        stats = []
        for epoch in range(p["epochs"] if epochs is None else epochs):
            train_one_epoch(run, epoch, pieces)
            run.monitor.note(run.pseudo_labels.end_epoch())
            line = run.monitor.end_epoch(epoch, {})
            stats.append({name.removeprefix("train_"): value for name, value in line.items()})
    return stats


def compare_steps(case: Case, diary: Diary, stats: list[dict]) -> Iterator[tuple]:
    """What cases with the inline outputs ``steps`` and ``epoch_stats`` expect of a run."""
    p = case.params
    yield from constants_of_optimizers(p)
    batch = p["batch_size_per_gpu"] * p["world_size"]
    yield "lr_after_linear_scaling", p["lr"] * batch / 256, p["lr_after_linear_scaling"]
    crops = [case.arrays[name] for name in case.names("in/step0_crop")]
    wanted = p.get("global_crops_number", 2) + p["local_crops_number"]
    yield "crops of the first step", [len(crop) for crop in crops], [p["batch_size_per_gpu"]] * wanted
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
    for label in case.names("out/"):
        name = {"losses": "loss"}.get(label.removeprefix("out/"), label.removeprefix("out/"))
        column = diary.column(name)
        yield label, column[-1] if isinstance(column[0], torch.Tensor) else column, case.arrays[label]
    for side in ("student", "teacher"):
        actual = getattr(diary.method, side).state_dict()
        for name, value in case.state(f"{side}_final").items():
            yield f"{side}_final/{name}", actual[name], value


def crop_pieces(case: Case) -> Iterator[dict]:
    p = case.params
    for step in range(p["epochs"] * p["iters_per_epoch"]):
        piece = {"crops": [case.tensor(name) for name in case.names(f"in/step{step}_crop")]}
        masks = [case.tensor(name) for name in case.names(f"in/step{step}_mask")]
        yield with_masks(piece, masks) | numbered(step, piece)


def numbered(step: int, piece: dict) -> dict:
    """What the loader says of a piece: its images, each seen once in the whole run."""
    batch = len(piece["crops"][0])
    return {"indices": step * batch + torch.arange(batch), "bad": [], "first_sample": 0}


def with_masks(piece: dict, masks: list[torch.Tensor]) -> dict:
    """What the loader makes of the masks (batch, rows, columns) of every crop."""
    if not masks:
        return piece
    return piece | MaskedViews.collate([{"masks": list(sample)} for sample in zip(*masks, strict=True)])


# ---------------------------------------------------------------------------------------------------------------------
# Methods from the parameters of a case
# ---------------------------------------------------------------------------------------------------------------------


def dino_trajectory(case: Case) -> Iterator[tuple]:
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
    diary = DINODiary(method)
    stats = train(p, method, crop_pieces(case))
    yield from compare_steps(case, diary, stats)


def masked_networks(backbones: tuple, head: dict, shared: tuple[bool, bool], frozen: bool) -> list[MultiCropNetwork]:
    return [
        MultiCropNetwork(backbone, IBOTHead(backbone.embed_dim, shared_head=own, norm_last_layer=norm, **head))
        for backbone, own, norm in zip(backbones, shared, (frozen, True), strict=True)
    ]


def masked_settings(p: dict) -> dict:
    warmup, epochs = p["warmup_teacher_temp_epochs"], p["epochs"]
    patch_temps = p["warmup_teacher_patch_temp"], p["teacher_patch_temp"]
    return {
        "teacher_temps": warmup_scheduler(p["warmup_teacher_temp"], p["teacher_temp"], warmup, epochs),
        "teacher_patch_temps": patch_temperatures(*patch_temps, warmup, epochs, p.get("pred_start_epoch", 0)),
        "freeze_last_layer": p["freeze_last_layer"],
        "lambda1": p["lambda1"],
        "lambda2": p["lambda2"],
        **{name: p[name] for name in ("student_temp", "center_momentum") if name in p},
    }


def ibot_trajectory(case: Case) -> Iterator[tuple]:
    p = case.params
    build = {"vit": build_vit, "swin": build_swin}[p["backbone"]]
    backbones = tuple(build(p["backbone_cfg"], masked_im_modeling=masked) for masked in (True, False))
    head = {**p["head"], "norm": p["norm_in_head"], "act": p["act_in_head"]}
    shared = p["shared_head"], p["shared_head_teacher"]
    networks = masked_networks(backbones, head, shared, p["norm_last_layer"])
    method = IBOT(*networks, **masked_settings(p), teacher_views=p["global_crops_number"]).to(case.dtype)
    method.student.load_state_dict(case.state("student0"))
    method.teacher.load_state_dict(case.state("teacher0"))
    diary = Diary(method)
    labels = [case.arrays[f"in/step{step}_labels"] for step in range(p["epochs"] * p["iters_per_epoch"])]
    stats = train(p, method, crop_pieces(case), np.concatenate(labels))
    yield from compare_steps(case, diary, stats)


def attmask_trajectory(case: Case) -> Iterator[tuple]:
    hyper, model = case.params["hyper"], case.params["model"]
    optimizer = case.params["optimizer"].split()[0].lower()
    p = hyper | {"batch_size_per_gpu": hyper["batch_size"], "world_size": case.params["world_size"]}
    p |= {"optimizer": optimizer}
    state, crops = shared_state_and_crops(case)
    method = attmask_method(model, p, injected="drawn at random" in case.entry["inputs"]["mask_step<s>"]).to(case.dtype)
    method.student.load_state_dict(state)
    method.teacher.load_state_dict({name: value for name, value in state.items() if "masked_embed" not in name})
    shown: list[dict[str, torch.Tensor]] = []
    watch_masks(case, method, shown)
    diary = Diary(method)
    classes = int(re.fullmatch(r"arange\(B\) ?% ?(\d+)", case.params["labels"])[1])
    labels = np.tile(np.arange(hyper["batch_size"]) % classes, hyper["epochs"] * hyper["iters_per_epoch"])
    stats = train(p, method, attmask_pieces(case, crops, hyper), labels)

    for name, column in (("lr_schedule", "lr"), ("wd_schedule", "wd"), ("momentum_schedule", "momentum")):
        if name in case.params:
            yield name, diary.column(column), case.params[name]
    for name in ("teacher_temp", "teacher_patch_temp"):
        if name in case.params:
            yield name, getattr(method, f"{name}s"), case.params[name]
    yield from constants_of_optimizers(model)
    tensors = case.tolerance_of("final tensors")
    for name in ("loss", "cls", "patch"):
        yield name, diary.column(name), case.entry["outputs"][name]
    for step, step_masks in enumerate(shown):
        yield f"mask_step{step}", step_masks["masks"], case.arrays[f"mask_step{step}"], (0, 0)
        yield f"center_cls_step{step}", diary.steps[step]["center"], case.arrays[f"center_cls_step{step}"], tensors
        yield f"center_patch_step{step}", diary.steps[step]["center2"], case.arrays[f"center_patch_step{step}"], tensors
        if f"cls_attention_step{step}" in case.arrays:
            expected = case.arrays[f"cls_attention_step{step}"]
            yield f"cls_attention_step{step}", step_masks["attention"], expected, tensors
        for name, norm in case.entry["outputs"]["grad_norms_before_clip"][step].items():
            label = f"grad_norms_before_clip {step} {name}"
            yield label, diary.steps[step]["grad_norms"].get(name, 0.0), norm, tensors
    for side, sums in case.entry["outputs"]["final_sum_and_l2"].items():
        actual = getattr(method, side).state_dict()
        for name, (total, norm) in sums.items():
            found = [actual[name].sum(), actual[name].norm()]
            yield f"final_sum_and_l2 {side} {name}", torch.stack(found), [total, norm], tensors
        for name, value in case.state(f"final_{side}").items():
            yield f"final_{side}/{name}", actual[name], value, tensors
    for epoch, expected in enumerate(case.entry["outputs"]["epoch_stats"]):
        for name, value in expected.items():
            tolerance = (0, 1e-6) if name == "acc" else case.tolerance  # the original averages it in single precision
            yield f"epoch_stats {epoch} {name}", stats[epoch][name], value, tolerance


def attmask_method(model: dict, p: dict, injected: bool) -> AttMask:
    backbones = tuple(build_vit(model, masked_im_modeling=masked) for masked in (True, False))
    names = ("out_dim", "patch_out_dim", "act", "nlayers")
    head = {name: model[name] for name in names}
    head |= {"hidden_dim": model["hidden"], "bottleneck_dim": model["bottleneck"]}
    shared = model["shared_head"], model["shared_head_teacher"]
    return AttMask(
        *masked_networks(backbones, head, shared, model["norm_last_layer"]),
        **masked_settings(p),
        teacher_views=p["ng"],
        pred_shape="block" if injected else p["pred_shape"],  # masks from the loader are taken as they are
        ratio=MaskRatio([p["pred_ratio"]], [p["pred_ratio_var"]]),
        masking_prob=p["masking_prob"],
        show_max=p["show_max"],
    )


def watch_masks(case: Case, method: AttMask, shown: list[dict[str, torch.Tensor]]) -> None:
    """Keep every step's attention and masks; where the case brings the draws of the gate, they are used."""
    choose, uniforms = method.choose_masks, method.uniforms

    def watching(batch, clock, attention):
        masks, masked = choose(batch, clock, attention)
        shown.append({"masks": masks.flatten(1), "attention": attention})
        return masks, masked

    def given(clock, purpose, batch, count):
        name = f"u_step{clock.iteration}"
        gate = name in case.arrays and count == 1
        return case.arrays[name][:, None] if gate else uniforms(clock, purpose, batch, count)

    method.choose_masks, method.uniforms = watching, given


def attmask_pieces(case: Case, crops: Case, hyper: dict) -> Iterator[dict]:
    side = case.params["model"]["img"] // case.params["model"]["patch"]
    for step in range(hyper["epochs"] * hyper["iters_per_epoch"]):
        views = [crops.tensor(name) for name in crops.names(f"step{step}_crop")]
        masks = case.tensor(f"mask_step{step}").unflatten(1, (side, side)).chunk(hyper["ng"])
        yield with_masks({"crops": views}, masks) | numbered(step, {"crops": views})


RUNNERS = {
    "dino/trajectory_*": dino_trajectory,
    "ibot/trajectory_*": ibot_trajectory,
    "attmask/traj_*": attmask_trajectory,
}
