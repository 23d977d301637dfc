"""Twins of UNIC's golden cases: the same format with other numbers, computed from the textbook form."""

import math

import numpy as np
import torch
import torch.nn.functional as F

from models.blocks import Block
from models.ladder import Ladder
from tests.twins import agrees, golden, random, randomise, rewrite, stored

KINDS = ("cls", "patch")


def test_a_ladder_of_other_widths_teachers_and_blocks():
    case = golden("unic", "lp_ladder")
    dims = {"zebra": 3, "ape": 4, "cat": 6}
    options = {"hidden_dim": 3, "last_hidden_dim": 8, "which_blocks": [1, 2], "midnorm": True}
    case.params |= {"input_dim": 5, "n_encoder_blocks": 3, "head_dims": dims, "variants": [{"name": "v", **options}]}
    state = randomise(Ladder(5, dims, {1: 3, 2: 8}, midnorm=True)).state_dict()
    tokens = {"cls": random(4, 2, 5), "patch": random(4, 2, 7, 5, seed=3)}
    outputs = {}
    for teacher in dims:
        for kind in KINDS:
            total = 0.0
            for block in (1, 2):
                p = {n: state[f"heads.{teacher}.{kind}.{block}.layers.{n}"] for n in
                     ("0.weight", "0.bias", "1.weight", "1.bias", "3.weight", "3.bias")}  # fmt: skip
                x = tokens[kind][block + 1] @ p["0.weight"].T + p["0.bias"]
                x = F.layer_norm(x, x.shape[-1:], p["1.weight"], p["1.bias"])
                x = 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))
                total = total + x @ p["3.weight"].T + p["3.bias"]
            outputs[f"v/out/{teacher}/{kind}"] = total
    inputs = stored("v/sd", state) | {f"in/x_{kind}": x for kind, x in tokens.items()}
    agrees(rewrite(case, inputs, outputs))


def test_a_loss_of_other_teachers_weights_and_rates():
    case = golden("unic", "loss")
    dims, rate, weights = {"b": 3, "c": 7, "a": 4}, 0.7, (0.3, 0.6)
    names, draws = sorted(dims), np.random.default_rng(1).random((3, 4))
    inputs, metrics, losses, leaves = {"v/in/u": draws}, {}, [], {}
    for seed, name in enumerate(names):
        of_kinds = []
        for kind, shape in (("cls", (4,)), ("patch", (4, 5))):
            y = random(*shape, dims[name], seed=seed).requires_grad_()
            z = random(*shape, dims[name], seed=seed + 9)
            inputs |= {f"in/student/{name}/{kind}": y, f"in/teacher/{name}/{kind}": z}
            cosine = 1 - (y * z).sum(-1) / (y.norm(dim=-1) * z.norm(dim=-1))
            apart = (y - z).abs()
            smooth = torch.where(apart < 1, apart.square() / 2, apart - 0.5).mean(-1)
            terms = [x if kind == "cls" else x.mean(dim=1) for x in (cosine, smooth)]
            both = weights[0] * terms[0] + weights[1] * terms[1]
            for what, value in (("cos_", terms[0]), ("sl1_", terms[1]), ("", both)):
                metrics[f"loss/dist_{kind}_{what}{name}"] = value.mean().item()
            of_kinds.append(both)
            leaves[f"v/out/grad/{name}/{kind}"] = y
        losses.append(sum(of_kinds) / 2)
        metrics[f"loss/dist_{name}"] = losses[-1].mean().item()
    losses = torch.stack(losses)
    kept = torch.from_numpy(draws >= rate).double()
    kept[losses.argmax(dim=0), torch.arange(4)] = 1.0
    total = (losses * kept).sum() / kept.sum()
    gradients = torch.autograd.grad(total, list(leaves.values()))
    metrics |= {f"t_coeff_{name}": (kept[t].sum() / kept.sum()).item() for t, name in enumerate(names)}
    variant = {"name": "v", "teachers": list(dims), "sorted_teachers": names, "t_drop_prob": rate}
    variant |= {"lam_lcos": weights[0], "lam_lsl1": weights[1], "metrics": metrics | {"loss/dist": total.item()}}
    case.params |= {"variants": [variant]}
    outputs = {"v/out/loss": total, "v/out/loss_per_teacher_image": losses, "v/out/keep": kept}
    agrees(rewrite(case, inputs, outputs | dict(zip(leaves, gradients, strict=True))))


def test_schedules_of_other_lengths():
    case = golden("unic", "schedules")
    v = {"name": "v", "peak_lr": 0.01, "min_lr": 0.001, "epochs": 5, "iters_per_epoch": 3, "warmup_epochs": 2}
    v |= {"momentum_start": 0.9, "momentum_end": 0.2}
    warm = [0.01 * i / 5 for i in range(6)]
    fall = [0.001 + 0.009 * (1 + math.cos(math.pi * i / 9)) / 2 for i in range(9)]
    momentum = [0.2 + 0.7 * (1 + math.cos(math.pi * i / 15)) / 2 for i in range(15)]
    case.params |= {"variants": [v]}
    agrees(rewrite(case, {}, {"v/lr": np.array(warm + fall), "v/tnorm_momentum": np.array(momentum)}))


def block_of(state: dict, x: torch.Tensor, heads: int, kept: list) -> torch.Tensor:
    """A block as it is written, of which ``kept`` says how much of each branch (batch,) an image has."""
    for branch, share in zip(("attn", "mlp"), kept, strict=True):
        norm = f"norm{1 + (branch == 'mlp')}"
        y = F.layer_norm(x, x.shape[-1:], state[f"{norm}.weight"], state[f"{norm}.bias"], 1e-6)
        if branch == "attn":
            q, k, v = (y @ state["attn.qkv.weight"].T + state["attn.qkv.bias"]).chunk(3, dim=-1)
            q, k, v = (z.unflatten(-1, (heads, -1)).transpose(1, 2) for z in (q, k, v))
            y = ((q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])).softmax(dim=-1) @ v).transpose(1, 2).flatten(2)
            y = y @ state["attn.proj.weight"].T + state["attn.proj.bias"]
        else:
            y = F.gelu(y @ state["mlp.fc1.weight"].T + state["mlp.fc1.bias"])
            y = y @ state["mlp.fc2.weight"].T + state["mlp.fc2.bias"]
        x = x + share[:, None, None] * y
    return x


def test_stochastic_depth_of_other_rates_widths_and_batches():
    case, inputs, outputs = golden("unic", "stochastic_depth"), {}, {}
    case.params |= {"dim": 6, "heads": 3, "subset_rates": [0.5, 0.25, 0.4], "persample_rate": 0.05, "batch": 4}
    for seed, kind in enumerate(("subset0", "subset1", "subset2", "persample")):
        state = randomise(Block(6, 3, mlp_ratio=2), seed=seed).state_dict()
        x, kept = random(4, 5, 6, seed=seed), []
        for branch, name in enumerate(("attn", "ffn")):
            if kind == "persample":
                keeps = np.array([0.0, 1.0, 1.0, 0.0] if branch else [1.0, 0.0, 1.0, 1.0])
                inputs[f"{kind}/in/keep_{name}"] = keeps
                kept.append(torch.from_numpy(keeps) / 0.95)
            else:
                order = torch.randperm(4, generator=torch.Generator().manual_seed(5 * seed + branch))
                count = max(1, int(4 * (1 - case.params["subset_rates"][seed])))
                inputs[f"{kind}/in/perm_{name}"] = order
                kept.append(torch.zeros(4).double().index_fill(0, order[:count], 4 / count))
        inputs |= stored(f"{kind}/sd", state) | {f"{kind}/in/x": x}
        outputs[f"{kind}/out/y"] = block_of(state, x, 3, kept)
    agrees(rewrite(case, inputs, outputs))


def test_standardisation_of_other_widths_steps_and_momenta_in_one_process():
    case = golden("unic", "standardise")
    momenta, inputs, outputs = [1.0, 0.3, 0.6], {}, {}
    for seed, (kind, shape) in enumerate((("cls", (3, 7, 4)), ("patch", (3, 7, 2, 4)))):
        x = inputs[f"in/{kind}"] = random(*shape, seed=seed) * 2 + 1
        mean, std, found = torch.zeros(4).double(), torch.ones(4).double(), {"y": [], "mean_after": [], "std_after": []}
        for features, momentum in zip(x, momenta, strict=True):
            found["y"].append((features - mean) / (std + 1e-6))
            rows = features.reshape(-1, 4)
            mean = (1 - momentum) * mean + momentum * rows.mean(dim=0)
            std = (1 - momentum) * std + momentum * (rows.std(dim=0) + 1e-6)
            found["mean_after"].append(mean.view((1,) * (x.ndim - 2) + (4,)))
            found["std_after"].append(std.view((1,) * (x.ndim - 2) + (4,)))
        outputs |= {f"out/{kind}/{name}": torch.stack(values) for name, values in found.items()}
        if kind == "cls":
            outputs["out/cls/y_eval_momentum0"] = (x[-1] - mean) / (std + 1e-6)
            outputs["out/cls/y_no_ema"] = (x[0] - x[0].mean(dim=0)) / (x[0].std(dim=0) + 1e-6)
    case.params["steps"] = 3
    agrees(rewrite(case, inputs | {"in/momentum": np.array(momenta)}, outputs))
