"""Runners: UNIC's ladder, standardisation, loss, groups, schedules, trajectories and checkpoints."""

import argparse
import json
import re
from collections.abc import Iterator

import torch
import torch.nn as nn

from methods.base import Clock
from methods.ladder import hidden_widths, ladder_options
from methods.standardise import Standardisation
from methods.unic import UNIC, Student, distances, keep_teachers, mean_of_kept, optimiser_options, token_losses
from methods.unic_files import student_from_file, student_to_file
from models.ladder import KINDS, Ladder, ladder_arguments
from models.layouts.names import below
from models.layouts.shapes import vit_arguments
from models.reading import read_backbone
from models.safe_load import load_file
from models.teacher_space import EPS, teacher_space
from models.vit import VisionTransformer
from tests.parity import Case
from tests.parity.losses import on_ranks
from tests.parity.trajectories import Diary, numbered, train
from training.checkpointing import unwrapped


class GivenTeacher(nn.Module):
    """A teacher of any widths and heads: what ``models/teachers.py`` makes of published ones."""

    def __init__(self, name: str, network: nn.Module):
        super().__init__()
        self.name, self.network, self.dim = name, network, network.embed_dim

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        tokens = self.network.forward_features(images)
        return tokens[:, 0], tokens[:, self.network.num_prefix_tokens :]


# ---------------------------------------------------------------------------------------------------------------------
# The parts
# ---------------------------------------------------------------------------------------------------------------------


def lp_ladder(case: Case) -> Iterator[tuple]:
    p = case.params
    tokens = [case.tensor(f"in/x_{kind}")[1:] for kind in KINDS]  # the first are what enters the first block
    blocks = [torch.cat((cls[:, None], patch), dim=1) for cls, patch in zip(*tokens, strict=True)]
    for variant in p["variants"]:
        name = variant["name"]
        options = ladder_options(str({key: value for key, value in variant.items() if key != "name"}))
        norms = {key: options[key] for key in ("prenorm", "midnorm", "std")}
        hidden = hidden_widths(options, p["n_encoder_blocks"])
        ladder = Ladder(p["input_dim"], p["head_dims"], hidden, **norms).to(case.dtype)
        state = case.state(f"{name}/sd")
        yield f"{name} names in order", list(ladder.state_dict()), list(state)
        norm = next((m for m in ladder.modules() if isinstance(m, nn.LayerNorm)), None)
        yield f"{name} eps", norm.eps if norm else p["layernorm_eps"], p["layernorm_eps"]
        for source, made in (("options", ladder), ("shapes", Ladder(**ladder_arguments(state)).to(case.dtype))):
            made.load_state_dict(state)
            outputs = made(blocks)
            for label in case.names(f"{name}/out/"):
                teacher, kind = label.split("/")[2:]
                yield f"{label} widths from {source}", outputs[teacher][KINDS.index(kind)], case.arrays[label]


def standardise(case: Case) -> Iterator[tuple]:
    p = case.params
    statistics = Standardisation({"t": case.arrays["in/cls"].shape[-1]}).to(case.dtype)
    yield "eps", EPS, p["eps"]
    yield "init_mean", statistics.mean.unique().tolist(), [p["init_mean"]]
    yield "init_std", statistics.std.unique().tolist(), [p["init_std"]]
    given = [case.tensor(f"in/{kind}") for kind in KINDS]
    found = {}
    for features, momentum in zip(zip(*given, strict=True), case.arrays["in/momentum"], strict=True):
        step(found, statistics, {"t": features}, float(momentum))
    first, last = ({"t": tuple(x[at] for x in given)} for at in (0, -1))
    fresh = Standardisation({"t": given[0].shape[-1]}).to(case.dtype)
    fresh.collect(fresh(first))
    fresh.commit(1.0, None)
    own_stds = [fresh.to_file(fresh.state_dict())["t"][kind]["std"] for kind in KINDS]  # to which eps was added
    alone = [y * (std + EPS) / std for y, std in zip(fresh(first)["t"], own_stds, strict=True)]
    for kind, later, own in zip(KINDS, statistics(last)["t"], alone, strict=True):
        for name in ("y", "mean_after", "std_after"):
            label = f"out/{kind}/{name}"
            yield label, torch.stack(found[f"{kind}/{name}"]), case.arrays[label]
        for name, value in (("y_eval_momentum0", later), ("y_no_ema", own)):
            if f"out/{kind}/{name}" in case.arrays:
                yield f"out/{kind}/{name}", value, case.arrays[f"out/{kind}/{name}"]
    if "in/two_ranks" not in case.arrays:
        return
    for label, *values in on_ranks(standardise_on_rank)(two_ranks_of(case)):
        yield re.sub(r"/y_(rank\d+)$", r"/\1_y", label), *values


def step(found: dict[str, list], statistics: Standardisation, features: dict[str, tuple], momentum: float) -> None:
    standardised = statistics(features)
    statistics.collect(standardised)
    statistics.commit(momentum, None)
    stored = statistics.to_file(statistics.state_dict())["t"]
    for kind, y in zip(KINDS, standardised["t"], strict=True):
        for name, value in (("y", y), ("mean_after", stored[kind]["mean"]), ("std_after", stored[kind]["std"])):
            found.setdefault(f"{kind}/{name}", []).append(value)


def two_ranks_of(case: Case) -> Case:
    """The part of the case that is about two processes, as a case of its own, with ranks at the end of names."""
    part = Case(case.folder, case.method, case.entry)
    part.params = {"world_size": len(case.arrays["in/two_ranks"])}
    names = ("in/two_ranks", "in/momentum", *case.names("out/two_ranks/"))
    part.arrays = {re.sub(r"/(rank\d+)_y$", r"/y_\1", name): case.arrays[name] for name in names}
    return part


def standardise_on_rank(rank: int, params: dict, inputs: dict, dtype: torch.dtype) -> dict:
    features = inputs["in/two_ranks"][rank]
    statistics = Standardisation({"t": features.shape[-1]}).to(dtype)
    found: dict[str, list] = {}
    for patches, momentum in zip(features, inputs["in/momentum"].tolist(), strict=True):
        step(found, statistics, {"t": (patches[:, 0], patches)}, momentum)
    return {
        f"out/two_ranks/{name.removeprefix('patch/')}": torch.stack(found[name]) for name in found if "patch" in name
    }


def loss(case: Case) -> Iterator[tuple]:
    for variant in case.params["variants"]:
        v, names = variant["name"], variant["sorted_teachers"]
        yield f"{v} sorted_teachers", sorted(variant["teachers"]), names

        def pairs(side: str, names=names) -> dict[str, tuple]:
            return {name: tuple(case.tensor(f"in/{side}/{name}/{kind}") for kind in KINDS) for name in names}

        student, teacher = pairs("student"), pairs("teacher")
        leaves = {
            f"{name}/{kind}": x.requires_grad_() for name in names for kind, x in zip(KINDS, student[name], strict=True)
        }
        losses = token_losses(student, teacher, (variant["lam_lcos"], variant["lam_lsl1"]))
        of_pairs = losses.mean(dim=1)
        kept = keep_teachers(of_pairs.detach(), variant["t_drop_prob"], case.arrays[f"{v}/in/u"])
        total = mean_of_kept(of_pairs, kept)
        total.backward()
        yield f"{v}/out/loss", total, case.arrays[f"{v}/out/loss"]
        yield f"{v}/out/loss_per_teacher_image", of_pairs, case.arrays[f"{v}/out/loss_per_teacher_image"]
        yield f"{v}/out/keep", kept, case.arrays[f"{v}/out/keep"]
        for label in case.names(f"{v}/out/grad/"):
            yield label, leaves[label.removeprefix(f"{v}/out/grad/")].grad, case.arrays[label]
        metrics = metrics_of(names, losses.mean(dim=2), kept.mean(dim=1)) | {"loss/dist": total}
        for t in names:
            for kind, y, z in zip(KINDS, student[t], teacher[t], strict=True):
                for distance, value in zip(("cos", "sl1"), distances(y, z).mean(dim=1), strict=True):
                    metrics[f"loss/dist_{kind}_{distance}_{t}"] = value
        for name, value in variant["metrics"].items():
            yield f"{v} metrics {name}", metrics[name], value


def metrics_of(names: list[str], losses: torch.Tensor, kept: torch.Tensor) -> dict[str, torch.Tensor]:
    """What the original logs, from the mean losses (teachers, kinds) and the shares of images that keep a teacher."""
    found = {}
    for t, means, share in zip(names, losses, kept, strict=True):
        found |= {f"loss/dist_{kind}_{t}": value for kind, value in zip(KINDS, means, strict=True)}
        found |= {f"loss/dist_{t}": means.mean(), f"t_coeff_{t}": share / kept.sum()}
    return found


def schedules(case: Case) -> Iterator[tuple]:
    for v in case.params["variants"]:
        options = {
            "lr": v["peak_lr"],
            "weight_decay": 0.0,
            "weight_decay_end": None,
            "tnorm_ema_momentum_start": v["momentum_start"],
            "tnorm_ema_momentum_end": v["momentum_end"],
            **{name: v[name] for name in ("min_lr", "epochs", "warmup_epochs")},
        }
        found = UNIC.schedules(argparse.Namespace(**options), v["iters_per_epoch"], 256)
        yield f"{v['name']}/lr", found["lr"], case.arrays[f"{v['name']}/lr"]
        yield f"{v['name']}/tnorm_momentum", found["momentum"], case.arrays[f"{v['name']}/tnorm_momentum"]


# ---------------------------------------------------------------------------------------------------------------------
# The whole
# ---------------------------------------------------------------------------------------------------------------------


def param_groups(case: Case) -> Iterator[tuple]:
    p = case.params
    sizes = {"patch_size": p["patch"], "img_size": p["img"], "depth": p["depth"], "num_heads": p["heads"]}
    encoder = VisionTransformer(embed_dim=p["dim"], masked_im_modeling=True, **sizes)
    heads = sorted({name.split(".")[2] for name in case.arrays["groups"] if name.startswith("lp.")})
    small = {"patch_size": p["patch"], "img_size": p["img"], "depth": 1, "num_heads": 1}
    teachers = [
        GivenTeacher(n, VisionTransformer(embed_dim=w, **small)) for n, w in zip(heads, p["other"], strict=True)
    ]
    lp = Ladder(p["dim"], {t.name: t.dim for t in teachers}, hidden_widths(ladder_options("{}"), p["depth"]))
    method = UNIC(Student(encoder, lp), teachers)
    images = {"crops": [torch.randn(p["B"], 3, p["img"], p["img"])]}
    method(images, Clock(0, 0, global_batch=p["B"]))["loss"].backward()

    names = {id(tensor): name for name, tensor in student_to_file(dict(method.student.named_parameters())).items()}
    decayed, undecayed = ([names[id(tensor)] for tensor in group["params"]] for group in method.param_groups())
    yield "groups", dict.fromkeys(decayed, "decay") | dict.fromkeys(undecayed, "no_decay"), case.arrays["groups"]
    for kind, own in (("decay", decayed), ("no_decay", undecayed)):
        yield f"groups {kind} in order", own, [name for name, group in case.arrays["groups"].items() if group == kind]
    unmoved = [name for tensor, name in ((t, names[id(t)]) for t in method.student.parameters()) if tensor.grad is None]
    yield "parameters_without_gradient", unmoved, case.arrays["parameters_without_gradient"]
    rates = [block.drop_path for block in VisionTransformer(depth=12, drop_path_rate=0.1).blocks]
    yield "dpr_0p1_depth12", rates, case.arrays["dpr_0p1_depth12"]
    last = VisionTransformer(depth=24, embed_dim=24, drop_path_rate=0.1).blocks[-1].drop_path
    yield "dpr_0p1_depth24_last", last, case.arrays["dpr_0p1_depth24_last"]


class UNICDiary(Diary):
    """Also the statistics and the gradients that the optimiser saw, under the original's names."""

    def _after_step(self, clock, gate) -> None:
        named = student_to_file(dict(self.method.student.named_parameters()))
        self.steps[-1]["grads"] = {name: p.grad for name, p in named.items()}
        super()._after_step(clock, gate)


def trajectory(case: Case) -> Iterator[tuple]:
    a = case.params["args"]
    p = a | {"weight_decay": a["wd"], "weight_decay_end": None, "optimizer": "adamw"}
    p |= {name: case.params[name] for name in ("world_size", "iters_per_epoch")}
    method = golden_method(case, a).to(case.dtype)
    method.student.load_state_dict(student_from_file(case.state("sd")))
    given = case.arrays["in/u"]
    method.uniforms = lambda clock, batch: given[clock.iteration]
    diary = UNICDiary(method)
    pieces = (
        {"crops": [images]} | numbered(s, {"crops": [images]}) for s, images in enumerate(case.tensor("in/images"))
    )
    train(p, method, pieces)

    yield "lr, a loss's step", diary.column("lr"), case.arrays["in/lr"]
    yield "tnorm_momentum, a loss's step", diary.column("momentum"), case.arrays["in/tnorm_momentum"]
    if "out/loss" in case.arrays:
        yield "out/loss", diary.column("loss"), case.arrays["out/loss"]
    parts = {key: part.state_dict() for key, part in method.checkpoint_parts().items()}
    for label in case.names("out/stats/"):
        teacher, kind, name = label.split("/")[2:]
        yield label, parts["teacher_ft_stats"][teacher][kind][name], case.arrays[label]
    for label in case.names("out/student/"):
        yield label, parts["model"][label.removeprefix("out/student/")], case.arrays[label]
    student = case.tolerance_of("student")
    for name, sums in case.arrays.get("final_student", {}).items():
        found = parts["model"][name]
        yield f"final_student {name}", [found.sum(), found.norm()], [sums["sum"], sums["l2"]], student
    for at, (seen, expected) in enumerate(of_steps(case, diary, "grads_seen_by_optimizer")):
        yield f"grads_seen_by_optimizer {at}", sorted(seen["grads"]), sorted(expected)
        for name, sums in expected.items():
            grad, label = seen["grads"][name], f"grads_seen_by_optimizer {at} {name}"
            if sums is None or grad is None:
                yield label, grad, sums
            else:
                yield label, [grad.sum(), grad.norm()], [sums["sum"], sums["l2"]], student
    for at, (seen, expected) in enumerate(of_steps(case, diary, "metrics")):
        losses = torch.tensor([[seen[f"loss/{kind}_{t}"] for kind in KINDS] for t in method.names], dtype=case.dtype)
        kept = torch.tensor([seen[f"kept/{t}"] for t in method.names], dtype=case.dtype)
        found = metrics_of(method.names, losses, kept) | {"loss/dist": seen["loss"]}
        found |= {"lr": seen["lr"], "wd": seen["wd"], "tnorm_ema_momentum": seen["momentum"]}
        for name in expected:
            if "_cos_" not in name and "_sl1_" not in name:  # of these the case of the loss has the sum's parts
                yield f"metrics {at} loss {name}", found[name], expected[name]


def of_steps(case: Case, diary: UNICDiary, name: str) -> Iterator[tuple[dict, dict]]:
    """What was seen at every step and what is recorded of it, where the case has that."""
    return zip(diary.steps, case.arrays[name], strict=True) if name in case.arrays else iter(())


def golden_method(case: Case, a: dict) -> UNIC:
    sizes = {"patch_size": a["patch_size"], "img_size": a["image_size"], "drop_path_rate": a["drop_path_rate"]}
    encoder = VisionTransformer(masked_im_modeling=True, **sizes, **case.params["student_arch"])
    cases = json.loads((case.folder / "manifest.json").read_text())["cases"]
    heads = next(entry["parameters"]["dims"] for entry in cases if entry["name"] == "teachers")
    teachers = []
    for name in a["teachers"]:
        state, _ = read_backbone(case.folder / case.params["teacher_files"][name])
        network = VisionTransformer(**vit_arguments(state), num_heads=heads[name.split("_")[0]]["num_heads"])
        network.load_state_dict({key: value for key, value in state.items() if not key.startswith("head.")})
        teachers.append(GivenTeacher(name, network))
    ladder = ladder_options(a["lp_args"])
    lp = Ladder(encoder.embed_dim, {t.name: t.dim for t in teachers}, hidden_widths(ladder, encoder.depth))
    weights, adamw = (a["lam_lcos"], a["lam_lsl1"]), optimiser_options(a["optim_args"])
    return UNIC(Student(encoder, lp), teachers, t_drop_prob=a["t_drop_prob"], weights=weights, adamw=adamw)


def checkpoint(case: Case) -> Iterator[tuple]:
    """Both files: the encoder as evaluations read it, the ladder and the statistics as the method does."""
    for name in case.extra_files:
        file = load_file(case.folder / name)
        state, _ = read_backbone(case.folder / name)
        encoder = VisionTransformer(**vit_arguments(state), num_heads=case.params["student_arch"]["num_heads"])
        own = {key: value for key, value in state.items() if not key.startswith(("lp.", "masked_embed"))}
        encoder.load_state_dict(own)
        encoder = encoder.to(case.dtype).eval()
        yield f"epoch of {name}", file["epoch"], case.params["epoch"]
        with torch.no_grad():
            for size in case.params["image_sizes"]:
                allowed = case.tolerance_of("native" if f"in/image_{size}" == case.names("in/")[0] else "bigger")
                images = case.tensor(f"in/image_{size}")
                tokens = encoder.forward_features(images)
                side = size // case.params["patch_size"]
                patches = tokens[:, encoder.num_prefix_tokens :]
                found = {"cls": tokens[:, 0], "patch_avg": patches.mean(dim=1)}
                found["seg_last_map"] = patches.transpose(1, 2).unflatten(2, (side, side))
                for label in case.names(f"out/{size}/"):
                    yield f"{label} of {name}", found[label.split("/")[-1]], case.arrays[label], allowed
            yield from ladder_of_checkpoint(case, name, file, encoder)


def ladder_of_checkpoint(case: Case, name: str, file: dict, encoder: VisionTransformer) -> Iterator[tuple]:
    p, model = case.params, unwrapped(file["model"])
    arguments = ladder_arguments(below(model, "lp."))
    widths = {"hidden": p["lp_hidden_dim"], "last": p["lp_last_hidden_dim"]}
    yield f"teachers of {name}", sorted(arguments["heads"]), p["teachers"]
    expected = {b: widths["last" if b == encoder.depth - 1 else "hidden"] for b in range(encoder.depth)}
    yield f"widths of {name}", arguments["hidden"], expected
    encoder_with_mask = VisionTransformer(
        **vit_arguments(encoder.state_dict()), num_heads=p["student_arch"]["num_heads"], masked_im_modeling=True
    )
    student = Student(encoder_with_mask, Ladder(**arguments)).to(case.dtype)
    student.load_state_dict(student_from_file(model))
    yield f"names of {name}", list(student_to_file(student.state_dict())), list(model)
    statistics = Standardisation(arguments["heads"]).to(case.dtype)
    stored = file["teacher_ft_stats"]
    statistics.load_state_dict(statistics.from_file(stored))
    again = statistics.to_file(statistics.state_dict())
    for teacher, kinds in stored.items():
        for kind, values in kinds.items():
            for key, value in values.items():
                yield f"statistics of {name} {teacher} {kind} {key}", again[teacher][kind][key], value
    images = case.tensor(f"in/image_{p['image_sizes'][0]}")
    projected = student.lp(student.encoder.forward_blocks(images), student.encoder.num_prefix_tokens)
    for label in case.names("out/lp"):
        teacher, kind = label.split("/")[-2:]
        value = projected[teacher][KINDS.index(kind)]
        if "unstandardised" in label:
            space = teacher_space(student.encoder, below(student.state_dict(), "lp."), stored, teacher)
            space.to(case.dtype)
            tokens, alone = space.forward_features(images), space(images)
            value = {"cls": tokens[:, 0], "patch": tokens[:, 1:]}[kind]
            if kind == "cls":
                yield f"{label} of {name}, alone", alone, case.arrays[label], case.tolerance_of("native")
        yield f"{label} of {name}", value, case.arrays[label], case.tolerance_of("native")


RUNNERS = {
    "unic/lp_ladder": lp_ladder,
    "unic/standardise": standardise,
    "unic/loss": loss,
    "unic/schedules": schedules,
    "unic/param_groups": param_groups,
    "unic/trajectory*": trajectory,
    "unic/checkpoint": checkpoint,
}
