"""Runners: EsViT's losses, schedules and whole runs."""

import argparse
import re
from collections.abc import Iterator

import torch
import torch.nn as nn

from methods.base import Clock
from methods.esvit import TEACHER_VIEWS, EsViT, RegionNetwork, names_in_files, names_of_ours
from methods.heads import DINOHead, WeightNormLinear
from methods.regions import match_regions, tokens_of_crops
from methods.teacher import temperatures
from models import build_backbone
from tests.parity import Case
from tests.parity.losses import on_ranks
from tests.parity.staged import build_cvt, build_vil
from tests.parity.swin import build_swin, hash_images, hash_weights, stored_weights
from tests.parity.trajectories import Diary, numbered, train

# ---- losses ---------------------------------------------------------------------------------------------------------


class GivenLogits(nn.Module):
    """A head that answers with given logits: with the unit vectors as prototypes a bottleneck vector is its logits."""

    def __init__(self, prototypes: int):
        super().__init__()
        self.last_layer = WeightNormLinear(prototypes, prototypes, train_norm=False)
        self.last_layer.weight_v.data = torch.eye(prototypes)
        self.rows: torch.Tensor

    def bottleneck(self, x: torch.Tensor) -> torch.Tensor:
        assert len(x) == len(self.rows)
        return self.rows

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last_layer(self.bottleneck(x))


def given_method(p: dict, dense: bool, dtype: torch.dtype) -> EsViT:
    networks = [RegionNetwork(nn.Identity(), *(GivenLogits(p["K"]) for _ in range(1 + dense))) for _ in range(2)]
    method = EsViT(
        *networks,
        teacher_temps=temperatures(argparse.Namespace(**p)),
        student_temp=p["student_temp"],
        center_momentum=p["center_momentum"],
    )
    return method.to(dtype)


def region_tokens(p: dict, s_fea: torch.Tensor, t_fea: torch.Tensor) -> tuple[list, list]:
    """Features of all student crops and of the teacher's views -> (samples, tokens, dim) of every size of crops."""
    batch, n = p["B"], p["N_global"]
    rows = TEACHER_VIEWS * batch * n
    groups = [s_fea[:rows].unflatten(0, (-1, n))]
    groups += [s_fea[rows:].unflatten(0, (-1, p["N_local"]))] if len(s_fea) > rows else []
    return groups, [t_fea.unflatten(0, (-1, n))]


def region_step(p: dict, method: EsViT, read, epoch: int) -> dict[str, torch.Tensor]:
    """``read``: a name of the manifest's inputs -> the tensor."""
    leaves = {kind: read(f"s_{kind}").clone().requires_grad_() for kind in ("cls", "region", "fea")}
    for network, rows in ((method.student, leaves), (method.teacher, {k: read(f"t_{k}") for k in ("cls", "region")})):
        network.head.rows, network.head_dense.rows = rows["cls"], rows["region"]
    student, teacher = region_tokens(p, leaves["fea"], read("t_fea"))
    vectors = [torch.zeros(count * p["B"], 1) for count in (p["ncrops"], TEACHER_VIEWS)]
    found = method.losses((vectors[0], student), (vectors[1], teacher), Clock(epoch, 0))
    found["loss"].backward()
    method.after_step(Clock(epoch, 0), None)
    assert leaves["fea"].grad is None
    return {
        **{name: value.detach() for name, value in found.items()},
        **{f"grad_s_{kind}": leaves[kind].grad for kind in ("cls", "region")},
        **{name: getattr(method.centres, name).clone() for name in ("center", "center_grid")},
    }


def ddino_loss(case: Case) -> Iterator[tuple]:
    p = case.params
    method = given_method(p, dense=True, dtype=case.dtype)
    yield "teacher_temp_schedule", method.teacher_temps, p["teacher_temp_schedule"]
    for step, epoch in enumerate(p["epoch_per_step"]):

        def read(name: str, step: int = step) -> torch.Tensor:
            return case.tensor(f"step{step}_{name}")

        computed = region_step(p, method, read, epoch)
        sides = region_tokens(p, read("s_fea"), read("t_fea"))
        sources = match_regions(*(tokens_of_crops(groups, p["B"]) for groups in sides))
        for label in case.names(f"step{step}_"):
            name = label.removeprefix(f"step{step}_")
            if name.startswith("match_"):
                view, crop = map(int, re.fullmatch(r"match_t(\d+)_s(\d+)", name).groups())
                others = [other for other in range(TEACHER_VIEWS) if other != crop]
                value = (sources[crop][:, others.index(view)] % p["N_global"]).unflatten(0, (p["B"], -1))
            elif name in computed:
                value = computed[name]
            else:
                continue
            yield label, value, case.arrays[label]


def ddino_loss_on_rank(rank: int, p: dict, inputs: dict, dtype: torch.dtype) -> dict:
    method = given_method(p, dense=True, dtype=dtype)
    computed = {}
    for step, epoch in enumerate(p["epoch_per_step"]):
        start = f"rank{rank}_step{step}_"
        found = region_step(p, method, lambda name, start=start: inputs[start + name], epoch)
        computed |= {start + name: value for name, value in found.items()}
    return computed


def dino_loss(case: Case) -> Iterator[tuple]:
    """The view task alone; with ``targets``, of mixed images: row i says what teacher image i takes of each."""
    p = case.params
    method = given_method(p, dense=False, dtype=case.dtype)
    yield "teacher_temp_schedule", method.teacher_temps, p["teacher_temp_schedule"]
    for step, epoch in enumerate(p["epoch_per_step"]):
        student = case.tensor(f"step{step}_student").requires_grad_()
        method.student.head.rows, method.teacher.head.rows = student, case.tensor(f"step{step}_teacher")
        targets = f"step{step}_targets"
        mixes = case.tensor(targets).transpose(1, 2) if targets in case.arrays else None
        found = method.view_losses(
            torch.zeros(len(student), 1), torch.zeros(TEACHER_VIEWS * p["B"], 1), mixes, Clock(epoch, 0)
        )
        found["loss"].backward()
        method.after_step(Clock(epoch, 0), None)
        yield f"step{step}_loss", found["loss"], case.arrays[f"step{step}_loss"]
        yield f"step{step}_grad", student.grad, case.arrays[f"step{step}_grad"]
        yield f"step{step}_center", method.centres.center.clone(), case.arrays[f"step{step}_center"]


# ---- heads and schedules --------------------------------------------------------------------------------------------


def projection_head(case: Case) -> Iterator[tuple]:
    p = case.params
    module = DINOHead(
        p["in_dim"],
        p["out_dim"],
        use_bn=p["use_bn"],
        norm_last_layer=False,
        nlayers=p["nlayers"],
        hidden_dim=p["hidden"],
        bottleneck_dim=p["bottleneck"],
    ).to(case.dtype)
    module.load_state_dict(stored_weights(case))
    x = case.tensor("x").requires_grad_()
    yield "y_eval", module.eval()(x), case.arrays["y_eval"]
    y = module.train()(x)
    y.backward(case.tensor("grad_out"))
    yield "y_train", y, case.arrays["y_train"]
    yield "x_grad_train", x.grad, case.arrays["x_grad_train"]
    for label in case.names("grad::"):
        yield label, module.get_parameter(label.removeprefix("grad::")).grad, case.arrays[label]
    for label in case.names("after::"):
        yield label, module.get_buffer(label.removeprefix("after::")), case.arrays[label]


def options_of(p: dict) -> argparse.Namespace:
    """The manifest's short names of a schedule's options -> ours."""
    names = {
        "lr": "lr",
        "min_lr": "min_lr",
        "epochs": "epochs",
        "warmup": "warmup_epochs",
        "wd": "weight_decay",
        "wd_end": "weight_decay_end",
        "mom": "momentum_teacher",
        "wtt": "warmup_teacher_temp",
        "tt": "teacher_temp",
        "wte": "warmup_teacher_temp_epochs",
    }
    return argparse.Namespace(**{ours: p[theirs] for theirs, ours in names.items()})


def schedules(case: Case) -> Iterator[tuple]:
    for name, p in case.params.items():
        args = options_of(p)
        found = EsViT.schedules(args, p["niter"], p["bs"] * p["world"])
        found = {"lr": found["lr"], "wd": found["weight_decay"], "momentum": found["momentum"]}
        for kind, values in (found | {"teacher_temp": temperatures(args)}).items():
            yield f"{name}_{kind}", values, case.arrays[f"{name}_{kind}"]


# ---- whole runs -----------------------------------------------------------------------------------------------------

BACKBONES = {  # a key of arch_config, which kinds of networks further below do not have -> what builds the network
    "embed_dim": build_swin,
    "DIM_EMBED": build_cvt,
    "mode": build_vil,
    "arch": lambda config: build_backbone(config["arch"]),
}


def trajectory_method(p: dict, dtype: torch.dtype) -> EsViT:
    config, sizes = p["arch_config"], p["head_config"]
    build = next(build for key, build in BACKBONES.items() if key in config)
    networks = []
    for frozen in (p["norm_last_layer"], True):
        backbone = build(config)
        head_sizes = {"hidden_dim": sizes["hidden"], "bottleneck_dim": sizes["bottleneck"], "norm_last_layer": frozen}
        head_sizes |= {name: sizes[name] for name in ("nlayers", "use_bn") if name in sizes}
        heads = [DINOHead(backbone.embed_dim, sizes["out_dim"], **head_sizes) for _ in range(1 + p["dense"])]
        networks.append(RegionNetwork(backbone, *heads))
    temps = temperatures(argparse.Namespace(**p))
    prefix = "backbone.backbone." if build is BACKBONES["arch"] else ""
    more = {name: p[name] for name in ("student_temp", "center_momentum") if name in p}
    return EsViT(*networks, temps, p["freeze_last_layer"], **more, file_prefix=prefix).to(dtype)


def crops_of(p: dict, step: int) -> list[torch.Tensor]:
    """``hash images: iteration it, crop v has seed 600 + 100*it + v, shape (2,3,S,S) ...``."""
    base, per_step = map(int, re.search(r"seed (\d+) \+ (\d+)\*it \+ v", p["crops"]).groups())
    batch, channels = map(int, re.search(r"shape \((\d+), ?(\d+), ?S, ?S\)", p["crops"]).groups())
    sizes = [p["global_size"]] * TEACHER_VIEWS + [p.get("local_size")] * p["n_local"]
    return [hash_images(base + per_step * step + v, batch, channels, size, size) for v, size in enumerate(sizes)]


def trajectory(case: Case) -> Iterator[tuple]:
    p = case.params | {"iters_per_epoch": case.params["steps_per_epoch"], "batch_size_per_gpu": case.params["batch"]}
    method = trajectory_method(p, case.dtype)
    student = method.student
    student.load_state_dict(names_of_ours(weights_of(case, names_in_files(student.state_dict(), method.file_prefix))))
    method.teacher.load_state_dict(student.state_dict())
    yield "drop_path_rate", p["drop_path_rate"], 0.0  # which no draws are stored for
    yield from groups_of(method, p)
    steps = p["epochs"] * p["iters_per_epoch"]
    pieces = ({"crops": [crop.to(case.dtype) for crop in crops_of(p, step)]} for step in range(steps))
    diary = Diary(method)
    train(p, method, (piece | numbered(step, piece) for step, piece in enumerate(pieces)))

    def norms(step: int) -> dict:
        return names_in_files(diary.steps[step]["grad_norms"], method.file_prefix)

    for name, column in (("lr", "lr"), ("wd", "wd"), ("momentum", "momentum"), ("losses", "loss")):
        if name in case.arrays:
            yield name, diary.column(column), case.arrays[name]
    if "view_region" in case.arrays:
        pairs = [[step["view"], step["region"]] for step in diary.steps]
        yield "view_region", pairs, case.arrays["view_region"], case.tolerance_of("losses")
    of_sums, of_tensors = case.tolerance_of("sum of L2 norm"), case.tolerance_of("full tensor")
    table = [[norms(step).get(name, 0.0) for name in p["grad_norm_names"]] for step in range(steps)]
    for step, expected in enumerate(case.arrays.get("grad_norms", ())):
        for name, found, norm in zip(p["grad_norm_names"], table[step], expected, strict=True):
            yield f"grad_norms {step} {name}", found, norm, (0.0, of_sums.atol * max(1.0, norm))
    parts = method.checkpoint_parts()
    for side in ("student", "teacher"):
        state = {name: value.double() for name, value in parts[side].state_dict().items()}
        yield f"{side}_sum_l2 names", list(state), p["tensor_names"]
        rows = case.arrays.get(f"{side}_sum_l2")
        for name, expected in () if rows is None else zip(p["tensor_names"], rows, strict=True):
            found = torch.stack((state[name].sum(), state[name].norm()))
            yield f"{side}_sum_l2 {name}", found, expected, (0.0, of_sums.atol * max(1.0, expected[1]))
        for label in case.names(f"{side}::"):
            yield label, state[label.removeprefix(f"{side}::")], case.arrays[label], of_tensors
    for label in case.names("loss::"):
        yield label, parts["dino_loss"].state_dict()[label.removeprefix("loss::")], case.arrays[label], of_tensors


def weights_of(case: Case, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What the run begins with, under the names of files: stored, or by the manifest's rule; integers as built."""
    if case.names("w::"):
        return state | stored_weights(case)
    return hash_weights(state, int(re.search(r"seed (\d+)\+t", case.params["weights"])[1]))


def groups_of(method: EsViT, p: dict) -> Iterator[tuple]:
    """Which tensors are weight-decayed, in the order of the optimiser."""
    named = {id(parameter): name for name, parameter in method.student.named_parameters()}
    decayed, rest = (
        list(names_in_files({named[id(parameter)]: None for parameter in group["params"]}, method.file_prefix))
        for group in method.param_groups()
    )
    yield "group0_regularised", decayed, p["group0_regularised"]
    yield "group1_not_regularised", rest, p["group1_not_regularised"]


RUNNERS = {
    "esvit/ddino_loss_two_ranks": on_ranks(ddino_loss_on_rank),
    "esvit/ddino_loss": ddino_loss,
    "esvit/dino_loss*": dino_loss,
    "esvit/dino_head*": projection_head,
    "esvit/schedules": schedules,
    "esvit/trajectory_*": trajectory,
}
