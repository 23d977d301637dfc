"""Runners: fine-tuning with layer-wise learning rates."""

from collections.abc import Iterator

import numpy as np
import torch

from evaluation.finetune_steps import Stepper, soft_cross_entropy
from models.adapt import resize_positions
from models.finetuned import FinetunedSwin, FinetunedTransformer, layer_decay_groups
from models.layouts.shapes import vit_arguments
from tests.parity import Case
from utils import cosine_scheduler

HEADS = 3  # of every network in these cases; only tables of relative positions show it


def network(state: dict[str, torch.Tensor], img_size: int, **options) -> FinetunedTransformer:
    """The network a state dict belongs to, in its precision."""
    side = img_size // state["patch_embed.proj.weight"].shape[-1]
    relative = any("relative_position_bias_table" in name for name in state)
    positions = torch.zeros(1, 1 + side**2, state["cls_token"].shape[-1])
    shape = vit_arguments({"pos_embed": positions} | state)
    heads = next((t.shape[1] for name, t in state.items() if name.endswith("bias_table")), HEADS)
    model = FinetunedTransformer(
        len(state["head.weight"]), "pos_embed" in state, relative, num_heads=heads, **shape | {"img_size": img_size}
    )
    model = model.to(state["cls_token"].dtype).eval()
    model.load_state_dict(state)
    return model


def forward(case: Case) -> Iterator[tuple]:
    images, state = case.tensor("in/x"), case.state("state")
    model = network(state, images.shape[-1])
    yield "out/logits, names", list(model.state_dict()), list(state)
    with torch.no_grad():
        yield "out/logits", model(images), case.arrays["out/logits"]
        yield "out/features", model.pooled(images), case.arrays["out/features"]
    for name, index in state.items():
        if name.endswith("relative_position_index"):
            fresh = FinetunedTransformer(2, False, True, patch_size=8, embed_dim=24, depth=2, num_heads=3, img_size=32)
            yield f"out/logits, {name}", fresh.state_dict()[name], index


def groups_of(model: torch.nn.Module, layer_decay: float, weight_decay: float) -> dict[str, list[float]]:
    groups = layer_decay_groups(model, layer_decay, weight_decay)
    return {name: [group["lr_scale"], group["weight_decay"]] for group in groups for name in group["names"]}


def layer_groups(case: Case) -> Iterator[tuple]:
    vit, swin = case.value("vit"), case.value("swin")
    depth = 1 + max(int(name.split(".")[1]) for name in vit if name.startswith("blocks."))
    networks = {
        "vit": FinetunedTransformer(5, patch_size=8, embed_dim=12, depth=depth, num_heads=3, img_size=16),
        "swin": FinetunedSwin(5, embed_dim=12, depths=stages(swin), num_heads=(3,) * len(stages(swin)), img_size=32),
    }
    for kind, model in networks.items():
        found = groups_of(model, 0.65, 0.05)
        expected = case.value(kind)
        yield f"{kind} names", sorted(found), sorted(expected)
        for name, values in expected.items():
            yield f"{kind} {name}", found[name], values
        yield f"{kind}_values", sorted({scale for scale, _ in found.values()}), case.value(f"{kind}_values")


def stages(names: dict) -> tuple[int, ...]:
    blocks = {tuple(name.split(".")[1:4:2]) for name in names if ".blocks." in name}
    return tuple(sum(int(s) == stage for s, _ in blocks) for stage in range(1 + max(int(s) for s, _ in blocks)))


def schedule_and_positions(case: Case) -> Iterator[tuple]:
    for name in case.names("out/schedule"):
        arguments = case.value(f"args{name.removeprefix('out/schedule')}")
        yield name, cosine_scheduler(**arguments), case.arrays[name]
    (source,) = case.names("in/pos_embed")
    for name in case.names("out/pos_embed"):
        side = int(name.rpartition("x")[2])
        yield name, resize_positions(case.tensor(source), 1, side), case.arrays[name]


def steps(case: Case) -> Iterator[tuple]:
    p = case.params
    images = case.tensor("in/micro0_x")
    model = network(case.state("state0"), images.shape[-1]).train()
    lr = cosine_scheduler(p["lr"], p["min_lr"], p["epochs"], p["steps_per_epoch"], p["warmup_epochs"])
    yield "out/lr_schedule", lr, case.arrays["out/lr_schedule"]
    wd = np.full(len(lr), p["weight_decay"])
    stepper = Stepper(
        model, layer_decay_groups(model, p["layer_decay"], p["weight_decay"]), p["betas"], p["eps"], p["clip_grad"]
    )
    batches = [(case.tensor(f"in/micro{i}_x"), case.tensor(f"in/micro{i}_target")) for i in range(len(lr))]
    yield "out/micro_losses", train(model, stepper, batches, p["update_freq"], lr, wd), case.arrays["out/micro_losses"]
    for name, tensor in model.state_dict().items():
        yield f"state_final/{name}", tensor, case.arrays[f"state_final/{name}"]


def train(model, stepper: Stepper, batches: list[tuple], update_freq: int, lr: np.ndarray, wd: np.ndarray) -> list:
    """Loss of every piece."""
    losses = []
    for number, (images, targets) in enumerate(batches):
        step, piece = divmod(number, update_freq)
        loss = soft_cross_entropy(model(images), targets)
        losses.append(loss.item())
        stepper.backward(loss / update_freq)
        if piece == update_freq - 1:
            stepper.step(lr[step], wd[step])
    return losses


def udi(case: Case) -> Iterator[tuple]:
    p, images = case.params, case.tensor("x")
    for kind, expected in p["groups"].items():
        state = case.state(f"{kind}/sd")
        model = network(state, p["img"])
        with torch.no_grad():
            yield f"{kind}/logits", model(images), case.arrays[f"{kind}/logits"]
        groups = layer_decay_groups(model, p["layer_decay"], p["wd"])
        found = [
            {"weight_decay": g["weight_decay"], "lr_scale": g["lr_scale"], "layer_params": g["names"]} for g in groups
        ]
        yield f"{kind}/logits, groups", [g["layer_params"] for g in found], [g["layer_params"] for g in expected]
        for ours, theirs in zip(found, expected, strict=True):
            for name in ("weight_decay", "lr_scale"):
                yield f"{kind}/logits, {name}", ours[name], theirs[name]
    lr = cosine_scheduler(p["lr"], p["min_lr"], p["epochs"], p["niter"], p["warmup"])
    wd = cosine_scheduler(p["wd"], p["wd_end"], p["epochs"], p["niter"])
    yield "lr_schedule", lr, case.arrays["lr_schedule"]
    yield "wd_schedule", wd, case.arrays["wd_schedule"]
    longer = cosine_scheduler(p["lr"], p["min_lr"], p["epochs"], p["niter"], p["warmup"], warmup_steps=p["niter"] + 1)
    yield "lr_schedule_warmup_steps", longer, case.arrays["lr_schedule_warmup_steps"]
    model = network(case.state("train/init"), p["img"]).train()
    stepper = Stepper(model, layer_decay_groups(model, p["layer_decay"], p["wd"]))
    batches = [(case.tensor(f"train/x{i}"), case.tensor(f"train/y{i}")) for i in range(p["micro"])]
    yield "train/losses", train(model, stepper, batches, p["update_freq"], lr, wd), case.arrays["train/losses"]
    final = model.state_dict()
    norms = torch.stack([torch.stack((final[n].sum(), final[n].norm())) for n in p["train_names"]])
    yield "train/final_norms", norms, case.arrays["train/final_norms"]
    yield (
        "pos_embed_resized",
        resize_positions(case.tensor("pos_embed_ckpt"), 1, p["pe_dst"]),
        case.arrays["pos_embed_resized"],
    )


RUNNERS = {
    "eval_core/finetune_vit_*": forward,
    "eval_core/layer_decay_groups": layer_groups,
    "eval_core/finetune_schedule_and_posembed": schedule_and_positions,
    "eval_core/finetune_training": steps,
    "udi/finetune": udi,
}
