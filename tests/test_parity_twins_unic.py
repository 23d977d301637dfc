"""Twins of UNIC's golden cases: the same format with other numbers, computed from the textbook form."""

import math

import numpy as np
import torch
import torch.nn.functional as F

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
