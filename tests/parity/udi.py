"""Runners: UDI's sampling, its wiring of crops, levels and centre, and whole runs."""

from collections.abc import Iterator

import numpy as np
import torch

from methods.base import Clock
from methods.heads import DINOHead
from methods.srs import SampledBackbone
from methods.udi import UDI, UDINetwork, teacher_places
from models.vit import VisionTransformer
from tests.parity import Case
from tests.parity.constants import constants_of_optimizers
from tests.parity.losses import on_ranks
from tests.parity.trajectories import Diary, train
from tests.parity.udi_networks import sparse
from utils import cosine_scheduler, warmup_scheduler


def sampled_places(source: torch.Tensor, target: torch.Tensor, local: torch.Tensor | None) -> dict:
    """What the loader makes of dense maps: source and target (2, batch, s, patches), local (2 * crops, batch, s_l,
    patches), ordered l0 -> g1, l0 -> g0, l1 -> g1, ...
    """
    index, weight, _ = sparse(target)
    there = source.sum(dim=-1) > 0
    batch = {
        "source": source.argmax(dim=-1).transpose(0, 1),
        "target_index": index.transpose(0, 1),
        "target_weight": weight.transpose(0, 1),
        "points": there.flatten().nonzero().flatten(),
    }
    if local is not None and len(local):
        index, weight, there = sparse(local.unflatten(0, (-1, 2)))  # (crops, 2, batch, s_l, 4)
        batch["local_index"], batch["local_weight"] = (x.permute(2, 0, 1, 3, 4) for x in (index, weight))
        batch["local_points"] = there.flatten().nonzero().flatten()
    return batch


def build_network(p: dict, classes: int = 2, patch: bool = True, frozen: bool = True) -> UDINetwork:
    vit = VisionTransformer(
        patch_size=p["patch_size"],
        embed_dim=p["embed_dim"],
        depth=p["depth"],
        num_heads=p["num_heads"],
        img_size=p["img_size"],
        num_class_tokens=classes,
    )
    sizes = {"out_dim": p["out_dim"], "hidden_dim": p["head_hidden"], "bottleneck_dim": p["head_bottleneck"]}
    head = DINOHead(p["embed_dim"], norm_last_layer=frozen, **sizes)
    return UDINetwork(SampledBackbone(vit, patch, p.get("srs_heads")), head, classes + patch)


def load_network(network: UDINetwork, case: Case, prefix: str) -> None:
    """The cases leave out the further names of the head."""
    state = case.state(prefix)
    for name in list(state):
        for level in range(1, len(network.head)):
            if name.startswith("head.0."):
                state[name.replace("head.0.", f"head.{level}.", 1)] = state[name]
    network.load_state_dict(state)


def multicrop_forward(case: Case) -> Iterator[tuple]:
    p = case.params
    student, teacher = (build_network(p).to(case.dtype) for _ in range(2))
    load_network(student, case, "student")
    load_network(teacher, case, "teacher")
    crops = [case.tensor(name) for name in case.names("crop")]
    maps = {side: [case.tensor(name) for name in case.names(f"{side}_map")] for side in ("src", "tgt")}
    batch = {"crops": crops}
    batch |= sampled_places(torch.stack(maps["src"][:2]), torch.stack(maps["tgt"][:2]), torch.stack(maps["tgt"][2:]))
    method = UDI(student, teacher, np.full(1, 0.04)).to(case.dtype)
    load_network(method.teacher, case, "teacher")
    head, rows = student.head[0].last_layer, 2 * len(crops[0])
    vectors = method.student_vectors(batch, Clock(0, 0))
    for name, label in (("cls", "cls"), ("cls+", "clsp")):
        yield f"s_{label}_g", head(vectors[name][:rows]), case.arrays[f"s_{label}_g"]
        yield f"s_{label}_l", head(vectors[name][rows:]), case.arrays[f"s_{label}_l"]
    mask = torch.stack(maps["src"][:2]).sum(-1).flatten(0, 1)
    yield "s_mask_g", mask, case.arrays["s_mask_g"]
    expected = case.tensor("s_patch_g").flatten(0, 1)[batch["points"]]
    yield "s_patch_g, valid places", head(vectors["patch"]), expected
    bottleneck, last = method.teacher.head[0].bottleneck, method.teacher.head[0].last_layer
    classes, patches = method.teacher.backbone.backbone.forward_with_patches((crops[1], crops[0]))
    yield "t_cls", last(bottleneck(classes[:, 0])), case.arrays["t_cls"]
    index, weight, points = teacher_places(batch)
    logits = last(bottleneck(method.teacher.backbone.sample(patches, index, weight, points)))
    count = len(batch["points"])
    yield "t_patch_g, valid places", logits[:count], case.tensor("t_patch_g").flatten(0, 1)[batch["points"]]
    yield "t_patch_l, valid places", logits[count:], case.tensor("t_patch_l").flatten(0, 2)[batch["local_points"]]
    sums = weight.sum(-1)
    s = batch["source"].shape[-1]
    yield "t_mask_g", sums[:, :s], case.arrays["t_mask_g"], (1e-6, 1e-6)
    local = sums[:, s:].unflatten(1, (p["local_crops_number"], -1)).transpose(0, 1)
    yield "t_mask_l", local, case.arrays["t_mask_l"], (1e-6, 1e-6)


def criterion(p: dict) -> dict:
    """What a case says of the loss."""
    return {name: p[name] for name in ("alpha", "student_temp", "center_momentum") if name in p}


class Levels:
    """A UDI method whose vectors are logits: its prototypes are the unit vectors."""

    def __init__(self, p: dict, dtype: torch.dtype, classes: int, patch: bool):
        k = p["out_dim"]
        sizes = {"patch_size": 4, "img_size": 8, "embed_dim": 4, "depth": 1, "num_heads": 1, "srs_heads": 1}
        sizes |= {"out_dim": k, "head_hidden": 4, "head_bottleneck": k}
        networks = [build_network(sizes, classes, patch) for _ in range(2)]
        temps = p.get("teacher_temp_schedule", [0.04])
        self.method = UDI(*networks, temps, patch, **criterion(p)).to(dtype)
        for network in networks:
            network.head[0].last_layer.weight_v.data = torch.eye(k, dtype=dtype)
            network.head[0].last_layer.weight_g.data = torch.ones(k, 1, dtype=dtype)

    def targets(self, read, epoch: int) -> tuple[dict, dict]:
        """Targets of a step's teacher logits; ``read(name)`` gives an array of the case or None."""
        t_cls, t_patch, t_local = read("t_cls"), read("t_patch_g"), read("t_patch_l")
        batch, z, weights = {}, None, None
        if t_patch is not None:
            mask = read("s_mask") if read("s_mask") is not None else (read("t_mask_g") > 0).to(t_cls.dtype)
            size = len(t_cls) // 2
            batch["points"] = mask.flatten().nonzero().flatten()
            batch["source"] = torch.zeros(size, 2, mask.shape[1])
            z = [t_patch.flatten(0, 1)[batch["points"]]]
            weights = [read("t_mask_g").flatten()[batch["points"]]]
            if t_local is not None:
                crops, _, count, _ = t_local.shape
                batch["local_index"] = torch.zeros(size, crops, 2, count, 4)
                batch["local_points"] = read("t_mask_l").flatten().nonzero().flatten()
                z.append(t_local.flatten(0, 2)[batch["local_points"]])
                weights.append(read("t_mask_l").flatten()[batch["local_points"]])
            z, weights = torch.cat(z), torch.cat(weights)
        self.blends = self.method.target_vectors(t_cls, z, weights, batch)[0]
        return self.method.targets_of(t_cls, z, weights, batch, Clock(epoch, 0)), batch


def centre_on_rank(rank: int, p: dict, inputs: dict, dtype: torch.dtype) -> dict:
    levels = Levels(p, dtype, 2, True)
    computed = {}
    for step in dict.fromkeys(name.split("/")[0] for name in inputs):
        levels.targets(
            lambda name, step=step: inputs[f"{step}/{name}"][rank] if f"{step}/{name}" in inputs else None, 0
        )
        levels.method.centres.commit(None)
        computed[f"{step}/center_after"] = levels.method.centres.center.clone()
    return computed


def udi_loss(case: Case) -> Iterator[tuple]:
    p = case.params
    levels = Levels(p, case.dtype, p["number_cls_token"], p["include_patch"])
    for step, epoch in enumerate(p["epoch_of_step"]):

        def read(name, step=step):
            return case.tensor(f"step{step}/{name}") if f"step{step}/{name}" in case.arrays else None

        targets, batch = levels.targets(read, epoch)
        names = ("s_cls_g", "s_cls_l", "s_clsp_g", "s_clsp_l", "s_patch_g")
        leaves = {name: read(name).clone().requires_grad_() for name in names if read(name) is not None}
        vectors = {"cls": torch.cat([leaves[n] for n in names[:2] if n in leaves])}
        if "s_clsp_g" in leaves:
            vectors["cls+"] = torch.cat([leaves[n] for n in names[2:4] if n in leaves])
        if "s_patch_g" in leaves:
            vectors["patch"] = leaves["s_patch_g"].flatten(0, 1).index_select(0, batch["points"])
        found = levels.method.losses(vectors, targets, p["local_crops_number"])
        found["loss"].backward()
        levels.method.centres.commit(None)
        ours = {
            "loss": "loss",
            "g_cls": "g_cl",
            "l_cls": "l_cl",
            "g_clsp": "g_mcl",
            "l_clsp": "l_mcl",
            "g_patch": "g_pch",
        }
        for name in case.names(f"step{step}/"):
            short = name.split("/")[1]
            if short in ours:
                yield name, found[ours[short]], case.arrays[name]
            elif short.startswith("grad_"):
                yield name, leaves[short.removeprefix("grad_")].grad, case.arrays[name]
            elif short.startswith("pstar_"):
                blend = levels.blends[{"pstar_g": "cls+", "pstar_l": "local"}[short]]
                if short == "pstar_l":  # the case has (crops * batch, 2, K)
                    blend = blend.view(p["local_crops_number"], 2, -1, p["out_dim"]).transpose(1, 2).flatten(0, 1)
                yield name, blend, case.arrays[name]
            elif short == "center_after":
                yield name, levels.method.centres.center, case.arrays[name]


def trajectory(case: Case) -> Iterator[tuple]:
    p = case.params
    student, teacher = (build_network(p, p["ncls"], p["patch"], frozen) for frozen in (p["norm_last_layer"], True))
    temps = warmup_scheduler(p["wtt"], p["tt"], p["wtte"], p["epochs"])
    method = UDI(student, teacher, temps, p["patch"], freeze_last_layer=p["freeze"], **criterion(p)).to(case.dtype)
    load_network(method.student, case, "init")
    load_network(method.teacher, case, "init")
    names = {"clip_grad": "clip_grad", "iters_per_epoch": "niter", "batch_size_per_gpu": "B", "warmup_epochs": "warmup"}
    names |= {"weight_decay": "wd", "weight_decay_end": "wd_end", "momentum_teacher": "mom", "optimizer": "opt"}
    options = {ours: p[theirs] for ours, theirs in names.items()}
    options |= {name: p[name] for name in ("epochs", "lr", "min_lr")} | {"world_size": 1}
    diary = Diary(method)
    yield from constants_of_optimizers(p)
    yield "lr_scaled", options["lr"] * p["B"] * options["world_size"] / 256, p["lr_scaled"]
    stats = train(options, method, trajectory_pieces(case))
    for name in ("lr", "wd", "momentum", "loss"):
        yield name, diary.column(name), case.arrays[name]
    yield "teacher_temp", temps, case.arrays["teacher_temp"]
    g = ["g_cl", *(["g_mcl"] if p["ncls"] == 2 else []), *(["g_pch"] if p["patch"] else [])]
    columns = {"components_g": g, "components_l": ["l_cl", "l_mcl"][: p["ncls"]]}
    for label, parts in columns.items():
        yield label, np.array([[step[part] for part in parts] for step in diary.steps]), case.arrays[label]
    yield "center", torch.stack(diary.column("centering.center")), case.arrays["center"]
    if "grad_norms" in case.arrays:
        found = [[step["grad_norms"].get(name, 0.0) for name in p["grad_norm_names"]] for step in diary.steps]
        yield "grad_norms", np.array(found), case.arrays["grad_norms"]
    for side in ("student", "teacher"):
        state = getattr(method, side).state_dict()
        sums = torch.stack([torch.stack((state[name].sum(), state[name].norm())) for name in p["final_names"]])
        yield f"{side}_final_norms", sums, case.arrays[f"{side}_final_norms"]
        for name in case.names(f"{side}_final/"):
            yield name, state[name.removeprefix(f"{side}_final/")], case.arrays[name]
    for epoch, expected in enumerate(p["epoch_stats"]):
        for name, value in expected.items():
            yield f"loss, epoch {epoch} {name}", stats[epoch][name], value


def trajectory_pieces(case: Case) -> Iterator[dict]:
    p = case.params
    for step in range(p["epochs"] * p["niter"]):
        piece = {"crops": [case.tensor(name) for name in case.names(f"step{step}/crop")]}
        if p["patch"]:
            names = ("src_maps_g", "tgt_maps_g", "tgt_maps_l")
            maps = [
                case.tensor(f"step{step}/{name}") if f"step{step}/{name}" in case.arrays else None for name in names
            ]
            piece |= sampled_places(*maps)
        yield piece | {"indices": torch.zeros(0), "bad": [], "first_sample": 0}


def schedules(case: Case) -> Iterator[tuple]:
    for name, p in case.params.items():
        number, epochs, niter = name.removeprefix("grid"), p["epochs"], p["niter"]
        lr = p["lr"] * p["bs"] * p["world"] / 256
        found = {
            "lr": cosine_scheduler(lr, p["min_lr"], epochs, niter, p["warmup"]),
            "wd": cosine_scheduler(p["wd"], p["wd_end"], epochs, niter),
            "mom": cosine_scheduler(p["mom"], 1.0, epochs, niter),
            "temp": warmup_scheduler(p["wtt"], p["tt"], p["wtte"], epochs),
        }
        for label, values in found.items():
            yield f"{label}{number}", values, case.arrays[f"{label}{number}"]


RUNNERS = {
    "udi/schedules": schedules,
    "udi/center_two_ranks": on_ranks(centre_on_rank),
    "udi/multicrop_forward": multicrop_forward,
    "udi/loss_*": udi_loss,
    "udi/trajectory_*": trajectory,
}
