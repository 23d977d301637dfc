"""Runners: fine-tuning with layer-wise learning rates."""

import re
from collections.abc import Callable, Iterator

import numpy as np
import torch

from evaluation.finetune_steps import Stepper, soft_cross_entropy
from models.adapt import resize_positions
from models.finetuned import FinetunedSwin, FinetunedTransformer, layer_decay_groups
from models.layouts.shapes import vit_arguments
from tests.parity import Case, compare
from utils import cosine_scheduler


def build(state: dict[str, torch.Tensor], img_size: int, heads: int) -> FinetunedTransformer:
    """A fresh network of the shapes of a state dict, in its precision."""
    side = img_size // state["patch_embed.proj.weight"].shape[-1]
    relative = any("relative_position_bias_table" in name for name in state)
    positions = torch.zeros(1, 1 + side**2, state["cls_token"].shape[-1])
    shape = vit_arguments({"pos_embed": positions} | state) | {"img_size": img_size}
    model = FinetunedTransformer(len(state["head.weight"]), "pos_embed" in state, relative, num_heads=heads, **shape)
    return model.to(state["cls_token"].dtype).eval()


def network(
    case: Case, state: dict[str, torch.Tensor], img_size: int, output: Callable, expected: np.ndarray
) -> FinetunedTransformer:
    """The network a state dict belongs to.

    No shape shows the number of heads but that of a table of relative positions. Where the manifest does not say it
    either, it is the divisor of the width with which ``output`` of the network comes closest to what is expected.
    """
    width = state["cls_token"].shape[-1]
    tables = [tensor.shape[1] for name, tensor in state.items() if name.endswith("bias_table")]
    said = [case.params[name] for name in ("heads", "num_heads") if name in case.params]
    models = []
    for heads in (tables + said)[:1] or [n for n in range(1, width + 1) if width % n == 0]:
        model = build(state, img_size, heads)
        model.load_state_dict(state)
        with torch.no_grad():
            models.append((compare(output(model), expected, 0.0, 0.0)[0], len(models), model))
    return min(models)[2]


def forward(case: Case) -> Iterator[tuple]:
    images, state = case.tensor("in/x"), case.state("state")
    model = network(case, state, images.shape[-1], lambda model: model(images), case.arrays["out/logits"])
    yield "out/logits, names", list(model.state_dict()), list(state)
    with torch.no_grad():
        yield "out/logits", model(images), case.arrays["out/logits"]
        yield "out/features", model.pooled(images), case.arrays["out/features"]
    fresh = build(state, images.shape[-1], model.blocks[0].attn.num_heads).state_dict()
    for name, index in state.items():
        if name.endswith("relative_position_index"):
            yield f"out/logits, {name}", fresh[name], index


def groups_of(model: torch.nn.Module, layer_decay: float, weight_decay: float) -> dict[str, list[float]]:
    groups = layer_decay_groups(model, layer_decay, weight_decay)
    return {name: [group["lr_scale"], group["weight_decay"]] for group in groups for name in group["names"]}


def layer_groups(case: Case) -> Iterator[tuple]:
    """The networks are known by the names of their parameters alone, the two decays by the words beside these."""
    for kind, build_kind in (("vit", vit_of_names), ("swin", swin_of_names)):
        expected = case.value(kind)
        decays = (
            re.search(rf"\b{name} ?= ?([\d.]+\d)", case.meaning(kind) or case.meaning("vit"))[1]
            for name in ("layer_decay", "weight_decay")
        )
        found = groups_of(build_kind(expected), *map(float, decays))
        yield f"{kind} names", sorted(found), sorted(expected)
        for name, values in expected.items():
            yield f"{kind} {name}", found[name], values
        yield f"{kind}_values", sorted({scale for scale, _ in found.values()}), case.value(f"{kind}_values")


def vit_of_names(names: dict) -> FinetunedTransformer:
    depth = 1 + max(int(name.split(".")[1]) for name in names if name.startswith("blocks."))
    relative = any(name.endswith("relative_position_bias_table") for name in names)
    sizes = {"patch_size": 8, "embed_dim": 4, "depth": depth, "num_heads": 1, "img_size": 16}
    sizes |= {"init_values": 0.1 * any("gamma" in name for name in names)}
    sizes |= {"qkv_bias": "blocks.0.attn.qkv.bias" in names, "use_mean_pooling": "fc_norm.weight" in names}
    return FinetunedTransformer(2, "pos_embed" in names, relative, **sizes)


def swin_of_names(names: dict) -> FinetunedSwin:
    depths = stages(names)
    return FinetunedSwin(2, embed_dim=4, depths=depths, num_heads=(1,) * len(depths), img_size=32, window_size=4)


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
    batches = [
        (case.tensor(name), case.tensor(f"{name.removesuffix('_x')}_target"))
        for name in case.names("in/micro")
        if name.endswith("_x")
    ]
    losses = case.arrays["out/micro_losses"]
    first = first_loss(batches)
    model = network(case, case.state("state0"), batches[0][0].shape[-1], first, losses[0]).train()
    lr = cosine_scheduler(p["lr"], p["min_lr"], p["epochs"], p["steps_per_epoch"], p["warmup_epochs"])
    yield "out/lr_schedule", lr, case.arrays["out/lr_schedule"]
    wd = np.full(len(lr), p["weight_decay"])
    stepper = Stepper(
        model, layer_decay_groups(model, p["layer_decay"], p["weight_decay"]), p["betas"], p["eps"], p["clip_grad"]
    )
    yield "out/micro_losses", train(model, stepper, batches, p["update_freq"], lr, wd), losses
    for name, tensor in model.state_dict().items():
        yield f"state_final/{name}", tensor, case.arrays[f"state_final/{name}"]


def first_loss(batches: list[tuple]) -> Callable:
    images, targets = batches[0]
    return lambda model: soft_cross_entropy(model(images), targets)


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
        label = f"{kind}/logits"
        model = network(case, state, p["img"], lambda model: model(images), case.arrays[label])
        with torch.no_grad():
            yield label, model(images), case.arrays[label]
        groups = layer_decay_groups(model, p["layer_decay"], p["wd"])
        found = [
            {"weight_decay": g["weight_decay"], "lr_scale": g["lr_scale"], "layer_params": g["names"]} for g in groups
        ]
        yield f"{label}, groups", [g["layer_params"] for g in found], [g["layer_params"] for g in expected]
        for ours, theirs in zip(found, expected, strict=True):
            for name in ("weight_decay", "lr_scale"):
                yield f"{label}, {name}", ours[name], theirs[name]
    lr = cosine_scheduler(p["lr"], p["min_lr"], p["epochs"], p["niter"], p["warmup"])
    wd = cosine_scheduler(p["wd"], p["wd_end"], p["epochs"], p["niter"])
    yield "lr_schedule", lr, case.arrays["lr_schedule"]
    yield "wd_schedule", wd, case.arrays["wd_schedule"]
    label = "lr_schedule_warmup_steps"
    steps = p["niter"] + int(re.search(r"niter ?\+ ?(\d+)", case.meaning(label))[1])
    longer = cosine_scheduler(p["lr"], p["min_lr"], p["epochs"], p["niter"], p["warmup"], warmup_steps=steps)
    yield label, longer, case.arrays[label]
    batches = [(case.tensor(f"train/x{i}"), case.tensor(f"train/y{i}")) for i in range(p["micro"])]
    expected = case.arrays["train/losses"][0]
    model = network(case, case.state("train/init"), p["img"], first_loss(batches), expected).train()
    stepper = Stepper(model, layer_decay_groups(model, p["layer_decay"], p["wd"]))
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
