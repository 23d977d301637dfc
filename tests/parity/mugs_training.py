"""Runners: Mugs's schedules, parameter groups, optimisers and trajectories."""

import argparse
import json
import re
from collections.abc import Iterator

import numpy as np
import torch
import torch.nn as nn

from methods.base import Clock
from methods.heads import ContrastiveHead, DINOHead
from methods.local_group import LocalGroupTransformer
from methods.mugs import Mugs, MugsNetwork, to_file
from methods.teacher import temperatures
from tests.parity import Case
from tests.parity.constants import constants_of_optimizers
from tests.parity.mugs import compared, eps_of, memory_of, numbers, part, queue_of
from tests.parity.recorded import stepwise
from tests.parity.trajectories import Diary, numbered, train
from training.optim import build_optimizer, optimizer_step, set_schedules

TEMPERATURES = {"group_warmup_teacher_temp": "wt", "group_teacher_temp": "tt", "group_warmup_teacher_temp_epochs": "we"}


# ---------------------------------------------------------------------------------------------------------------------
# Optimisation
# ---------------------------------------------------------------------------------------------------------------------


def schedules(case: Case) -> Iterator[tuple]:
    p = case.params
    names = {"min_lr": "min_lr", "epochs": "epochs", "lr": "lr"}
    names |= {"warmup_epochs": "warmup", "weight_decay": "wd", "weight_decay_end": "wde", "momentum_teacher": "mom"}
    args = argparse.Namespace(**{ours: p[theirs] for ours, theirs in (names | TEMPERATURES).items()})
    found = Mugs.schedules(args, p["niter"], p["bs"] * p["world"])
    yield "scaled_base_lr", found["lr"].max(), p["scaled_base_lr"]
    columns = {"out.lr": found["lr"], "out.wd": found["weight_decay"], "out.momentum": found["momentum"]}
    yield from compared(case, columns | {"out.teacher_temp": temperatures(args, "group_")})
    for name, preset in p["presets"].items():
        label, batch = f"out.preset.{name}", preset["batch_size_per_gpu"] * preset["world"]
        values = Mugs.schedules(argparse.Namespace(**preset), preset["iters_per_epoch"], batch)
        steps = case.arrays[label][0].astype(int)
        rows = [values[column][steps] for column in ("lr", "weight_decay", "momentum")]
        yield label, np.stack([steps, *rows]), case.arrays[label]
    for label in case.names("out.drop_path."):
        depth, rate = re.search(r"depth(\d+)_rate([\d.]+)$", label).groups()
        network = LocalGroupTransformer(embed_dim=6, num_heads=1, depth=int(depth), drop_path_rate=float(rate))
        yield label, [block.drop_path for block in network.blocks], case.arrays[label]
        yield f"{label}, relation block", network.relation_blocks[0].drop_path, case.arrays[label][0]


def small_mugs(p: dict, norm_last_layer: bool = False, **settings) -> Mugs:
    """A method of the sizes that the cases of groups and trajectories give."""
    networks = []
    for predictor, frozen in ((True, norm_last_layer), (False, True)):
        sizes = {"patch_size": p["patch"], "img_size": p["img"], "embed_dim": p["dim"], "depth": p["depth"]}
        rate = p.get("drop_path_rate", 0.0) if predictor else 0.0
        blocks, ratio = p.get("depth_relation", 1), p.get("mlp_ratio", 4)
        sizes |= {"num_heads": p["heads"], "drop_path_rate": rate, "num_relation_blocks": blocks, "mlp_ratio": ratio}
        use_bn, norm = p.get("use_bn_in_head", False), p.get("norm_before_pred", True)
        own = {"hidden_dim": p["hid"], "predictor_dim": p["pred"], "use_bn": use_bn, "norm_before_pred": norm}
        contrastive = [ContrastiveHead(p["dim"], p["out"], predictor, **own) for _ in range(2)]
        group = {"hidden_dim": p["hid"], "bottleneck_dim": p["bott"], "use_bn": use_bn, "norm_last_layer": frozen}
        head = DINOHead(p["dim"], p["gout"], **group)
        networks.append(MugsNetwork(LocalGroupTransformer(**sizes), *contrastive, head))
    defaults = {"loss_weights": (1, 1, 1), "teacher_temps": np.full(9, 0.04), "queue_sizes": (16, 16)}
    return Mugs(*networks, **defaults | settings)


def param_groups(case: Case) -> Iterator[tuple]:
    for label in case.arrays:
        multiplier = 0.125
        frozen = {"True": True, "False": False}[label.partition("=")[2]]
        method = small_mugs(case.params, frozen, patch_embed_lr_mult=multiplier)
        own = {f"{id(parameter)}": parameter for parameter in method.student.parameters()}
        names = {id(own[number]): name for name, number in to_file(numbered_by_name(method.student)).items()}
        found = []
        for group in method.param_groups():
            scale = {multiplier: "patch_embed_lr_mult"}.get(group.get("lr_multiplier"), group.get("lr_multiplier", 1.0))
            decays = {1.0: True, 0.0: False}[group.get("wd_multiplier", 1.0)]
            members = [names[id(parameter)] for parameter in group["params"]]
            found.append({"name": group["name"], "apply_wd": decays, "lr_mult": scale, "params": members})
        yield label, found, case.arrays[label]


def numbered_by_name(module: nn.Module) -> dict[str, str]:
    return {name: f"{id(parameter)}" for name, parameter in module.named_parameters()}


def tree(parameters: dict[str, torch.Tensor]) -> nn.Module:
    """Modules of modules, with parameters of these names."""
    root = nn.Module()
    for name, value in parameters.items():
        *path, last = name.split(".")
        module = root
        for step in path:
            if not hasattr(module, step):
                module.add_module(step, nn.Module())
            module = getattr(module, step)
        module.register_parameter(last, nn.Parameter(value.clone()))
    return root


def clip_and_optimizers(case: Case) -> Iterator[tuple]:
    p = case.params
    yield from constants_of_optimizers(p)
    sizes = {
        "dim": 4,
        "depth": 1,
        "heads": 1,
        "patch": 2,
        "img": 4,
        "hid": 4,
        "pred": 4,
        "out": 4,
        "gout": 4,
        "bott": 4,
    }
    settings = {"patch_embed_lr_mult": p["patch_embed_lr_mult"], "freeze_last_layer": p["freeze_last_layer"]}
    start = part(case, "in.param")
    for name in {label.split(".")[1] for label in case.outputs()} & {"adamw", "sgd", "lars"}:
        method = small_mugs(sizes, **settings)
        method.student = tree(start)
        own = dict(method.student.named_parameters())
        optimizer, moved = build_optimizer(name, method.param_groups()), {}
        for step, (lr, decay, epoch) in enumerate(zip(p["lr"], p["weight_decay"], p["epoch_of_step"], strict=True)):
            clock = Clock(epoch, step, lr=lr, weight_decay=decay)
            set_schedules(optimizer, clock)
            for parameter, grad in part(case, f"in.step{step}.grad").items():
                own[parameter].grad = grad
            norms = dict(zip(own, method.clip_gradients(p["clip"], clock), strict=True))
            label = f"out.step{step}.norms"
            if label in case.arrays:
                yield f"{label} ({name})", torch.stack([norms[parameter] for parameter in start]), case.arrays[label]
            for label in case.names(f"out.step{step}.clipped."):
                grad = own[label.removeprefix(f"out.step{step}.clipped.")].grad
                yield f"{label} ({name})", grad, case.arrays[label]
            method.after_backward(clock)
            optimizer_step(optimizer, None, None)
            for label in case.names(f"out.{name}.step{step}."):
                parameter = label.removeprefix(f"out.{name}.step{step}.")
                moved.setdefault(parameter, {})[label] = own[parameter].detach().clone()
        for found in moved.values():
            yield from stepwise(case, found)


# ---------------------------------------------------------------------------------------------------------------------
# The whole
# ---------------------------------------------------------------------------------------------------------------------

PARTS = {"loss_instance": "instance-sup.", "loss_local_group": "local-group-sup.", "loss_group": "group-sup."}
POINTERS = (("instance-sup.", "queue_ptr"), ("local-group-sup.", "queue_ptr"))
POINTERS += tuple((f"{side}_mem", "block.queue_ptr") for side in ("student", "teacher"))


class MugsDiary(Diary):
    """Also sums of all tensors under the original's names, and where pointers stand."""

    def _after_step(self, clock, gate) -> None:
        super()._after_step(clock, gate)
        parts = {key: part.state_dict() for key, part in self.method.checkpoint_parts().items()}
        self.steps[-1] |= {f"{side}_sum_norm": sums(parts[side]) for side in ("student", "teacher")}
        self.steps[-1] |= {"center": parts["group-sup."]["center"][0].clone()}
        self.steps[-1]["pointers"] = torch.cat([parts[key][name] for key, name in POINTERS])


def sums(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {
        name: torch.stack((value.sum(), value.norm())) for name, value in state.items() if value.is_floating_point()
    }


def golden_method(case: Case, p: dict) -> Mugs:
    args = argparse.Namespace(epochs=p["epochs"], **{ours: p[theirs] for ours, theirs in TEMPERATURES.items()})
    method = small_mugs(
        p,
        p["norm_last_layer"],
        loss_weights=p["loss_weights"],
        teacher_temps=temperatures(args, "group_"),
        student_temp=p["group_student_temp"],
        contrast_temps=(p["T"], p["T"]),
        queue_sizes=(p["Kq"], p["Kq"]),
        top_n=p["topn"],
        freeze_last_layer=p["freeze"],
        patch_embed_lr_mult=p["pe_mult"],
        center_momentum=p["center_momentum"],
    ).to(case.dtype)
    parts = method.checkpoint_parts()
    student = part(case, "sd.student")
    for side in ("student", "teacher"):
        own = getattr(method, side)
        parts[side].load_state_dict({name: student[name] for name in to_file(own.state_dict())})
        method.memories[side] = memory_of(case, part(case, f"in.mem_init.{side}"))
    for key, queue in (("instance-sup.", "instance-sup"), ("local-group-sup.", "local-group-sup")):
        method.queues[queue] = queue_of(case.tensor(f"in.queue_init.{key}"))
    return method


def options_of(p: dict) -> dict:
    names = {"clip_grad": "clip", "iters_per_epoch": "niter", "batch_size_per_gpu": "bs_nominal"}
    names |= {"warmup_epochs": "warmup", "weight_decay": "wd", "weight_decay_end": "wde", "momentum_teacher": "mom"}
    options = {ours: p[theirs] for ours, theirs in names.items()}
    return options | {name: p[name] for name in ("epochs", "lr", "min_lr", "optimizer", "world_size")}


def pieces(case: Case, steps: int) -> Iterator[dict]:
    for step in range(steps):
        crops = [case.tensor(f"in.step{step}.crop{i}") for i in numbers(case, rf"in\.step{step}\.crop(\d+)$")]
        piece = {"crops": crops, "weak": case.tensor(f"in.step{step}.weak").bool()}
        yield piece | numbered(step, piece)


def trajectory(case: Case) -> Iterator[tuple]:
    p = case.params
    method = golden_method(case, p)
    diary = MugsDiary(method)
    steps = p["train_epochs"] * p["niter"]
    stats = train(options_of(p), method, pieces(case, steps), epochs=p["train_epochs"])
    columns = ("loss", *PARTS.values(), "lr", "wd")
    found = {"out.epoch_stats": [[epoch[name] for name in columns] for epoch in stats]}
    yield from constants_of_run(p, method)
    for name, column in (("lr_per_step", "lr"), ("wd_per_step", "wd"), ("momentum_per_step", "momentum")):
        yield name, diary.column(column), p[name]
    names = {name: p[f"{name}_tensor_order"] for name in ("student", "teacher") if f"{name}_tensor_order" in p}
    names.setdefault("teacher", [name for name in names["student"] if "predictor" not in name])
    columns = {label: loss for label, loss in ({"loss_total": "loss"} | PARTS).items() if loss in diary.steps[0]}
    found |= {f"out.{label}": diary.column(loss) for label, loss in columns.items()}
    for side, order in names.items():
        of_steps = [torch.stack([step[f"{side}_sum_norm"][name] for name in order]) for step in diary.steps]
        found[f"out.{side}_sum_norm"] = torch.stack(of_steps)
    own = [to_file(step["grad_norms"]) for step in diary.steps]
    found["out.grad_norms"] = [[step.get(name, 0.0) for name in names["student"]] for step in own]
    found |= {f"out.{name}": torch.stack(diary.column(name)) for name in ("pointers", "center")}
    yield from compared(case, found)
    parts = {key: part.state_dict() for key, part in method.checkpoint_parts().items()}
    for label in case.names("out.final_"):
        yield label, final(parts, label), case.arrays[label]


def final(parts: dict[str, dict], label: str) -> torch.Tensor:
    """``out.final_student.<name>``, ``out.final_queue_local_group`` or ``out.final_teacher_mem_q``."""
    kind, _, name = label.removeprefix("out.final_").partition(".")
    if name:
        return parts[kind][name]
    if kind.startswith("queue_"):
        return parts[f"{kind.removeprefix('queue_').replace('_', '-')}-sup."]["queue"]
    memory, _, row = kind.rpartition("_")
    return parts[memory][f"block.queue_{row}"]


def constants_of_run(p: dict, method: Mugs) -> Iterator[tuple]:
    lr = p["lr"] * p["bs_nominal"] * p["world_size"] / 256
    yield "scaled_base_lr", lr, p["scaled_base_lr"]
    yield "teacher_temp_schedule", method.teacher_temps, p["teacher_temp_schedule"]
    yield "ln_eps", *eps_of(method, p)
    yield "loss_weights", [float(weight) for weight in method.weights.values()], [w for w in p["loss_weights"] if w]


def trajectory_variants(case: Case) -> Iterator[tuple]:
    """From the start and with the crops of another case."""
    entries = json.loads((case.folder / "manifest.json").read_text())["cases"]
    (entry,) = (entry for entry in entries if entry["name"] == case.params["uses_inputs_of"])
    base = Case(case.folder, case.method, entry)
    for variant, changes in case.params["variants"].items():
        ours = {"clip_grad": "clip", "freeze_last_layer": "freeze"}
        p = base.params | {ours.get(name, name): value for name, value in changes.items()}
        method, epochs = golden_method(base, p), changes["epochs_run"]
        diary = MugsDiary(method)
        stats = train(options_of(p), method, pieces(base, epochs * p["niter"]), epochs=epochs)
        label = f"out.{variant}"
        found = {f"{label}.epoch_loss_total": [epoch["loss"] for epoch in stats]}
        found |= {f"{label}.{name}": diary.column(loss) for name, loss in PARTS.items() if loss in diary.steps[0]}
        order = p["student_tensor_order"]
        for side, names in (("student", order), ("teacher", [n for n in order if "predictor" not in n])):
            sums_now = diary.steps[-1][f"{side}_sum_norm"]
            found[f"{label}.{side}_sum_norm"] = torch.stack([sums_now[name] for name in names])
        yield from compared(case, found)


RUNNERS = {
    "mugs/schedules": schedules,
    "mugs/param_groups": param_groups,
    "mugs/clip_and_optimizers": clip_and_optimizers,
    "mugs/trajectory": trajectory,
    "mugs/trajectory_variants": trajectory_variants,
}
