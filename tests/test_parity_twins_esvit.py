"""Twins of EsViT's golden cases: the same format with other numbers, computed from the textbook form."""

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter, ImageOps

from data.preprocess import MEAN, STD
from methods.heads import DINOHead
from tests.parity import find_runner, judge
from tests.twins import agrees, golden, random, randomise, rewrite


def temperatures(p: dict) -> list[float]:
    first, last, warm = p["warmup_teacher_temp"], p["teacher_temp"], p["warmup_teacher_temp_epochs"]
    rising = [first + (last - first) * i / max(1, warm - 1) for i in range(warm)]
    return rising + [last] * (p["epochs"] - warm)


LOSS = {"warmup_teacher_temp": 0.05, "teacher_temp": 0.08, "warmup_teacher_temp_epochs": 2, "epochs": 4}
LOSS |= {"student_temp": 0.2, "center_momentum": 0.7, "epoch_per_step": [0, 3]}


@pytest.mark.parametrize("batch_norm", [False, True])
def test_a_head_of_other_sizes(batch_norm):
    case = golden("esvit", "dino_head_bn" if batch_norm else "dino_head")
    sizes = {"out_dim": 7, "hidden": 5, "bottleneck": 4, "nlayers": 4, "use_bn": batch_norm, "in_dim": 3}
    case.params |= sizes
    state = randomise(DINOHead(3, 7, batch_norm, False, 4, 5, 4)).state_dict()
    state = {n: v.abs() + 0.5 if n.endswith("running_var") else v for n, v in state.items()}
    x, upstream, after = random(6, 3).requires_grad_(), random(6, 7, seed=2), {}
    leaves = {n: v.clone().requires_grad_() for n, v in state.items() if v.is_floating_point() and "running" not in n}

    def forward(training: bool) -> torch.Tensor:
        step, y = 3 if batch_norm else 2, x
        for layer in range(4):
            name = f"mlp.{layer * step}"
            y = y @ leaves[f"{name}.weight"].T + leaves[f"{name}.bias"]
            if layer == 3:
                break
            if batch_norm:
                norm = f"mlp.{layer * step + 1}"
                mean, var = state[f"{norm}.running_mean"], state[f"{norm}.running_var"]
                if training:
                    mean, var = y.mean(0), y.var(0, correction=0)
                    for kind, seen in (("mean", mean), ("var", y.var(0))):
                        buffer = f"{norm}.running_{kind}"
                        after[f"after::{buffer}"] = 0.9 * state[buffer] + 0.1 * seen.detach()
                y = (y - mean) / (var + 1e-5).sqrt() * leaves[f"{norm}.weight"] + leaves[f"{norm}.bias"]
            y = 0.5 * y * (1 + torch.erf(y / math.sqrt(2)))
        v, g = leaves["last_layer.weight_v"], leaves["last_layer.weight_g"]
        return y / y.norm(dim=1, keepdim=True) @ (g * v / v.norm(dim=1, keepdim=True)).T

    outputs = {"y_eval": forward(False), "y_train": forward(True)}
    grads = torch.autograd.grad(outputs["y_train"], [x, *leaves.values()], upstream)
    outputs |= {"x_grad_train": grads[0]}
    outputs |= {f"grad::{name}": grad for name, grad in zip(leaves, grads[1:], strict=True)} | after
    agrees(rewrite(case, {f"w::{n}": v for n, v in state.items()} | {"x": x, "grad_out": upstream}, outputs))


def view_terms(student, teacher, centre, temps, batch, mixes=None):
    """The view loss, pair by pair and image by image."""
    views = len(student) // batch
    logs = torch.log_softmax(student / temps[0], dim=1).unflatten(0, (views, batch))
    probs = torch.softmax((teacher - centre) / temps[1], dim=1).unflatten(0, (2, batch))
    total = 0.0
    for i, v in itertools.product(range(2), range(views)):
        if i != v:
            for b, j in itertools.product(range(batch), range(batch)):
                weight = (b == j) if mixes is None else mixes[v, b, j]
                total = total - weight * (probs[i, b] @ logs[v, j]) / batch
    return total / (2 * (views - 1))


@pytest.mark.parametrize("mixed", [False, True])
def test_a_view_loss_of_other_crops_prototypes_and_temperatures(mixed):
    case = golden("esvit", "dino_loss_mixup" if mixed else "dino_loss")
    p = LOSS | {"K": 5, "B": 3, "ncrops": 4, "world_size": 1}
    p["teacher_temp_schedule"] = temperatures(p)
    case.params.clear()
    case.params |= p
    centre, inputs, outputs = torch.zeros(1, 5).double(), {}, {}
    for step, epoch in enumerate(p["epoch_per_step"]):
        student, teacher = random(12, 5, seed=step).requires_grad_(), random(6, 5, seed=9 + step)
        inputs |= {f"step{step}_student": student, f"step{step}_teacher": teacher}
        mixes = None
        if mixed:
            mixes = inputs[f"step{step}_targets"] = random(4, 3, 3, seed=20 + step).softmax(dim=1)
        temps = p["student_temp"], p["teacher_temp_schedule"][epoch]
        loss = view_terms(student, teacher, centre, temps, 3, mixes)
        centre = 0.7 * centre + 0.3 * teacher.mean(0)
        (grad,) = torch.autograd.grad(loss, student)
        outputs |= {f"step{step}_loss": loss, f"step{step}_grad": grad, f"step{step}_center": centre}
    agrees(rewrite(case, inputs, outputs))


def region_case(p: dict, start: str = "") -> tuple[dict, dict, dict]:
    """Inputs, outputs but for centres, and the logits that these are moved by, of all steps of a process."""
    batch, n, m, views = p["B"], p["N_global"], p["N_local"], p["ncrops"]
    inputs, outputs, raw, centres = {}, {}, {}, p["centres"]
    counts, temps = [n, n] + [m] * (views - 2), temperatures(p)
    for step, epoch in enumerate(p["epoch_per_step"]):
        name = f"{start}step{step}_"
        rows, seed = batch * sum(counts), 40 * step + len(start)
        shapes = {"s_cls": (views * batch, p["K"]), "s_region": (rows, p["K"]), "s_fea": (rows, p["D"])}
        shapes |= {"t_cls": (2 * batch, p["K"]), "t_region": (2 * batch * n, p["K"]), "t_fea": (2 * batch * n, p["D"])}
        x = {kind: random(*shape, seed=seed + i) for i, (kind, shape) in enumerate(shapes.items())}
        inputs |= {name + kind: value for kind, value in x.items()}
        x["s_cls"].requires_grad_(), x["s_region"].requires_grad_()
        both = p["student_temp"], temps[epoch]
        view = view_terms(x["s_cls"], x["t_cls"], centres[step][0], both, batch)
        logs = torch.log_softmax(x["s_region"] / both[0], dim=1).split([batch * c for c in counts])
        probs = torch.softmax((x["t_region"] - centres[step][1]) / both[1], dim=1).view(2, batch, n, -1)
        theirs = F.normalize(x["t_fea"], dim=1).view(2, batch, n, -1)
        ours, region = F.normalize(x["s_fea"], dim=1).split([batch * c for c in counts]), 0.0
        for i, v in itertools.product(range(2), range(views)):
            if i == v:
                continue
            match = torch.zeros(batch, counts[v], dtype=torch.int64)
            for b, j in itertools.product(range(batch), range(counts[v])):
                match[b, j] = (theirs[i, b] @ ours[v][b * counts[v] + j]).argmax()
                row = logs[v][b * counts[v] + j]
                region = region - (probs[i, b, match[b, j]] @ row) / (batch * counts[v] * 2 * (views - 1))
            outputs[f"{name}match_t{i}_s{v}"] = match
        loss = (view + region) / 2
        grads = torch.autograd.grad(loss, [x["s_cls"], x["s_region"]])
        outputs |= {name + kind: value for kind, value in (("loss", loss), ("view", view), ("region", region))}
        outputs |= {f"{name}grad_s_cls": grads[0], f"{name}grad_s_region": grads[1]}
        raw[step] = x["t_cls"], x["t_region"]
    return inputs, outputs, raw


def moved(centres: list, means: list) -> list:
    return [0.7 * centre + 0.3 * mean for centre, mean in zip(centres, means, strict=True)]


@pytest.mark.parametrize("sizes", [(1, 3, 9, 1), (2, 2, 4, 1), (2, 3, 4, 4)])
def test_a_region_loss_of_other_crops_and_tokens(sizes):
    """One image; no local crops; local crops with as many tokens as the global ones."""
    case, names = golden("esvit", "ddino_loss"), ("B", "ncrops", "N_global", "N_local")
    p = LOSS | dict(zip(names, sizes, strict=True)) | {"K": 6, "D": 5, "world_size": 1}
    p["teacher_temp_schedule"] = temperatures(p)
    centres = [[torch.zeros(1, 6).double()] * 2]
    _, _, raw = region_case(p | {"centres": centres * 2})
    for step in raw:
        centres.append(moved(centres[-1], [logits.mean(0) for logits in raw[step]]))
    inputs, outputs, _ = region_case(p | {"centres": centres})
    for step in raw:
        outputs |= {f"step{step}_center": centres[step + 1][0], f"step{step}_center_grid": centres[step + 1][1]}
    case.params.clear()
    case.params |= p
    agrees(rewrite(case, inputs, outputs))


def test_a_region_loss_on_two_other_processes():
    case = golden("esvit", "ddino_loss_two_ranks")
    p = LOSS | {"B": 2, "ncrops": 3, "N_global": 4, "N_local": 1, "K": 6, "D": 5, "world_size": 2}
    starts = [f"rank{rank}_" for rank in range(2)]
    centres = [[torch.zeros(1, 6).double()] * 2]
    seeds = [dict(p, D=5 + rank) for rank in range(2)]  # other numbers on each
    raws = [region_case(q | {"centres": centres * 2}, start)[2] for q, start in zip(seeds, starts, strict=True)]
    for step in raws[0]:
        means = [(a.mean(0) + b.mean(0)) / 2 for a, b in zip(raws[0][step], raws[1][step], strict=True)]
        centres.append(moved(centres[-1], means))
    inputs, outputs = {}, {}
    for q, start in zip(seeds, starts, strict=True):
        x, y, _ = region_case(q | {"centres": centres}, start)
        kept = ("loss", "grad_s_cls", "grad_s_region")
        inputs, outputs = inputs | x, outputs | {n: v for n, v in y.items() if n.split("_", 2)[2] in kept}
        for step, of_step in enumerate(centres[1:]):
            outputs |= {f"{start}step{step}_center": of_step[0], f"{start}step{step}_center_grid": of_step[1]}
    case.params.clear()
    case.params |= p
    result = judge(rewrite(case, inputs, outputs), find_runner(case))  # once, since processes take their time
    assert result.status == "ok", result.problems


def test_schedules_of_other_lengths():
    case = golden("esvit", "schedules")
    p = {"epochs": 4, "niter": 3, "warmup": 1, "lr": 0.02, "bs": 16, "world": 2, "min_lr": 1e-4}
    p |= {"wd": 0.1, "wd_end": 0.3, "mom": 0.9, "wtt": 0.03, "tt": 0.09, "wte": 3}
    case.params.clear()
    case.params["other"] = p
    peak = 0.02 * 32 / 256

    def cosine(first, last, n):
        return [last + (first - last) * (1 + math.cos(math.pi * k / n)) / 2 for k in range(n)]

    outputs = {"other_lr": [0, peak / 2, peak, *cosine(peak, 1e-4, 9)], "other_wd": cosine(0.1, 0.3, 12)}
    outputs |= {"other_momentum": cosine(0.9, 1.0, 12), "other_teacher_temp": [0.03, 0.06, 0.09, 0.09]}
    agrees(rewrite(case, {}, {name: np.array(values) for name, values in outputs.items()}))


def test_a_vote_of_other_neighbours_classes_and_temperature():
    case = golden("esvit", "weighted_knn")
    case.params |= {"n_train": 30, "n_test": 12, "dim": 4, "classes": 6, "T": 0.2, "ks": [3, 7]}
    train, test = random(30, 4), random(12, 4, seed=1)
    labels, truth = torch.arange(30) % 6, torch.arange(12) % 6
    near, outputs = F.normalize(test, dim=1) @ F.normalize(train, dim=1).T, {}
    for k in (3, 7):
        scores = torch.zeros(12, 6).double()
        for row in range(12):
            for column in near[row].argsort(descending=True)[:k]:
                scores[row, labels[column]] += math.exp(near[row, column] / 0.2)
        order = scores.argsort(dim=1, descending=True, stable=True)
        right = [100 * sum(t in o[:n] for t, o in zip(truth, order, strict=True)) / 12 for n in (1, min(5, k))]
        outputs |= {f"top1_top5_k{k}": np.array(right), f"scores_k{k}": scores, f"pred_k{k}": order[:, 0]}
    inputs = {"train_features": train, "test_features": test, "train_labels": labels, "test_labels": truth}
    agrees(rewrite(case, inputs, outputs))


def test_a_linear_head_of_other_classes_and_rates():
    case = golden("esvit", "linear_probe")
    case.params |= {"dim": 4, "labels": 7, "batch": 8, "epochs": 2, "iters": 2, "lr": 0.8, "world_size": 2}
    x, y = [random(8, 4, seed=i) for i in range(2)], [torch.arange(8) % 7, (torch.arange(8) * 3) % 7]
    weight, bias = random(7, 4, seed=9).requires_grad_(), torch.zeros(7).double().requires_grad_()
    inputs = (
        {"weight0": weight.detach().clone()} | {f"x{i}": x[i] for i in range(2)} | {f"y{i}": y[i] for i in range(2)}
    )
    lr, moments, losses, rates = 0.8 * 16 / 256, [torch.zeros(7, 4).double(), torch.zeros(7).double()], [], []
    for epoch in range(2):
        rates.append(lr * (1 + math.cos(math.pi * epoch / 2)) / 2)
        of_epoch = []
        for i in range(2):
            loss = F.cross_entropy(x[i] @ weight.T + bias, y[i])
            of_epoch.append(loss.item())
            for n, (p, g) in enumerate(zip((weight, bias), torch.autograd.grad(loss, (weight, bias)), strict=True)):
                moments[n] = 0.9 * moments[n] + g
                p.data -= rates[-1] * moments[n]
        losses.append(sum(of_epoch) / 2)
    logits = [a @ weight.T + bias for a in x]
    found = [sum(F.cross_entropy(a, b).item() for a, b in zip(logits, y, strict=True)) / 2]
    for n in (1, 5):
        ranked = torch.cat(logits).argsort(dim=1, descending=True)
        found.append(100 * sum(t in o[:n] for t, o in zip(torch.cat(y), ranked, strict=True)) / 16)
    outputs = {
        "lr_per_epoch": np.array(rates),
        "train_loss_per_epoch": np.array(losses),
        "weight": weight,
        "bias": bias,
    }
    agrees(rewrite(case, inputs, outputs | {"val_loss_acc1_acc5": np.array(found)}))


def test_a_picture_of_another_formula_and_sizes():
    case = golden("esvit", "eval_preprocess")
    aug = {"box_top_left_height_width": [5, 9, 60, 40], "out": 48, "hflip": True, "blur_radius": 0.8}
    formula = "u[i,j,c] = uint8(clip((i*3+j*5+c*40) % 200 + 20*sin(i/5)*cos(j/(3+c)), 0, 255)), truncation towards zero"
    case.params.update(height=90, width=101, formula=formula, aug=aug | {"solarize_threshold": 128})
    case.entry["tests"] = "Resize(64, bicubic) of the shorter side, CenterCrop 48, ToTensor, ImageNet normalisation"
    picture = np.zeros((90, 101, 3))
    for i, j, c in itertools.product(range(90), range(101), range(3)):
        picture[i, j, c] = (i * 3 + j * 5 + c * 40) % 200 + 20 * math.sin(i / 5) * math.cos(j / (3 + c))
    picture = np.clip(picture, 0, 255).astype(np.uint8)
    image = Image.fromarray(picture)
    resized = image.resize((int(101 * 64 / 90), 64), Image.Resampling.BICUBIC)
    left = round((resized.width - 48) / 2)
    made = image.crop((9, 5, 49, 65)).resize((48, 48), Image.Resampling.BICUBIC)
    made = made.transpose(Image.Transpose.FLIP_LEFT_RIGHT).filter(ImageFilter.GaussianBlur(0.8))
    outputs = {}
    for start, seen in (("", resized.crop((left, 8, left + 48, 56))), ("aug_", ImageOps.solarize(made))):
        pixels = ((np.asarray(seen) / 255 - MEAN) / STD).transpose(2, 0, 1)
        moments = np.stack([pixels.mean((1, 2)), pixels.std((1, 2), ddof=1)], axis=1)
        outputs |= {f"{start}sub": pixels[:, ::6, ::6], f"{start}mean_std": moments}
    words = {"sub": "every 6th row and column", "aug_sub": "every 6th row and column"}
    agrees(rewrite(case, {"u8_first_rows": picture[:2]}, outputs, words=words))
