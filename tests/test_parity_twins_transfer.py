"""Twins of golden cases of classification and transfer: the same format with other numbers.

What they expect is computed here, from the textbook form, by torch's optimisers or by timm's schedule.
"""

import math
import random as python_random

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from models.finetuned import FinetunedTransformer
from models.reading import read_backbone
from tests.data.test_labelled import matlab, number
from tests.parity import find_runner, judge
from tests.twins import agrees, as_arrays, golden, random, rewrite, unnoticed


def labels_of(images: int, classes: int, seed: int = 3) -> torch.Tensor:
    return torch.randint(classes, (images,), generator=torch.Generator().manual_seed(seed))


def ridge(x: torch.Tensor, y: torch.Tensor, classes: int, penalty: float) -> tuple[torch.Tensor, float]:
    """Weights (classes, dim) and objective, by torch's L-BFGS."""
    weight = torch.zeros(classes, x.shape[1], dtype=torch.float64, requires_grad=True)
    options = {"max_iter": 2000, "tolerance_grad": 1e-12, "tolerance_change": 0, "line_search_fn": "strong_wolfe"}
    solver = torch.optim.LBFGS([weight], **options)

    def objective() -> torch.Tensor:
        solver.zero_grad()
        value = F.cross_entropy(x @ weight.T, y) + penalty / 2 * weight.square().sum()
        value.backward()
        return value

    solver.step(objective)
    return weight.detach(), float(objective().detach())


def low_shot(dim: int = 6, classes: int = 3) -> tuple[torch.Tensor, ...]:
    x, test = (F.normalize(random(n, dim, seed=n), dim=1) for n in (50, 30))
    return x, labels_of(50, classes), test, labels_of(30, classes, 4)


def test_ridges_of_a_manifest_with_a_table_of_results():
    case = golden("eval_core", "logistic_regression")
    (x, y, test, test_y), lambdas = low_shot(), [0.3, 0.02]
    case.params["lambdas"] = lambdas
    found = [ridge(x, y, 3, value) for value in lambdas]
    results = {
        str(value): {"objective": objective, "accuracy": float(((test @ w.T).argmax(1) == test_y).double().mean())}
        for value, (w, objective) in zip(lambdas, found, strict=True)
    }
    inputs = {"in/train_features": 7 * x, "in/train_labels": y, "in/test_features": test, "in/test_labels": test_y}
    outputs = {f"out/W_{i}": w for i, (w, _) in enumerate(found)}
    agrees(rewrite(case, inputs, outputs, {"results": results}))


@pytest.mark.parametrize(("adjust", "classes"), [(True, 3), (False, 6)])
def test_ridges_that_are_numbered(adjust, classes):
    case = golden("mugs", "logistic_regression")
    (x, y, test, test_y), lambdas = low_shot(classes=classes), [0.5, 2.0]
    case.params |= {"lambdas": lambdas, "adjust_lambd": adjust, "n": 50, "classes": classes}
    arrays = {"in.train_features": x, "in.train_labels": y, "in.test_features": test, "in.test_labels": test_y}
    keys = []
    for i, value in enumerate(lambdas):
        weight, objective = ridge(x, y, classes, value / 50 if adjust else value)
        accuracy = ((test @ weight.T).argmax(1) == test_y).double().mean()
        arrays |= {f"out.W_{i}": weight.T, f"out.objective_{i}": np.array(objective), f"out.acc_{i}": accuracy}
        keys += [{"key": f"out.{kind}_{i}", "meaning": "[d,C]"} for kind in ("W", "objective", "acc")]
    case.entry["outputs"], case.__dict__["arrays"] = keys, as_arrays(arrays)
    agrees(case)


def test_ridges_that_are_named_by_their_value():
    case = golden("udi", "logistic_regression")
    (x, y, test, test_y), lambdas = low_shot(), [0.7]
    case.params |= {"lambdas": lambdas, "n": 50, "classes": 3}
    weight, objective = ridge(x, y, 3, 0.7 / 50)
    accuracy = ((test @ weight.T).argmax(1) == test_y).double().mean()
    inputs = {"train": x, "train_labels": y, "test": test, "test_labels": test_y}
    outputs = {"W_0.7": weight, "objective_0.7": np.array(objective), "accuracy_0.7": accuracy}
    agrees(rewrite(case, inputs, outputs))


def test_a_split_with_other_classes_and_another_seed():
    case = golden("unic", "split_trainval")
    labels = np.array([2] * 7 + [0] * 3 + [5] * 11 + [1] * 2)
    share, draws, parts = 0.3, python_random.Random(5), ([], [])
    case.params |= {"per_val": share, "python_random_seed": 5, "total_per_class": {}, "expected_val_per_class": {}}
    for label in (0, 1, 2, 5):
        chosen = np.flatnonzero(labels == label)
        draws.shuffle(chosen)
        held = int(len(chosen) * share)
        if not held:
            held, share = 1, 1 / len(chosen)
        parts[0].extend(chosen[: len(chosen) - held])
        parts[1].extend(chosen[len(chosen) - held :])
        case.params["total_per_class"][str(label)] = len(chosen)
        case.params["expected_val_per_class"][str(label)] = held
    arrays = {"in/labels": labels, "out/train_idx": np.array(parts[0]), "out/val_idx": np.array(parts[1])}
    case.__dict__["arrays"] = arrays
    agrees(case)


def test_sgd_with_another_momentum_and_batch():
    case = golden("unic", "logreg_torch")
    x, y, test, test_y = low_shot()
    order = torch.stack([torch.randperm(50, generator=torch.Generator().manual_seed(i)) for i in range(3)])
    layer = nn.Linear(6, 3, dtype=torch.float64)
    start = [part.detach().clone() for part in layer.parameters()]
    solver = torch.optim.SGD(layer.parameters(), lr=0.9, momentum=0.5, weight_decay=0.01)
    rates = [0.9 * (1 + math.cos(math.pi * max(0, epoch - 1) / 3)) / 2 for epoch in range(3)]
    for rate, indices in zip(rates, order, strict=True):
        solver.param_groups[0]["lr"] = rate
        for part in indices.split(20):
            solver.zero_grad()
            F.cross_entropy(layer(x[part]), y[part]).backward()
            solver.step()
    found = layer(test).argmax(1)
    top1 = 100 * float((found == test_y).double().mean())
    case.params |= {"hp": {"lr": 0.9, "wd": 0.01}, "momentum": 0.5, "epochs": 3, "batch_size": 20, "test_top1": top1}
    arrays = {"in/train_x": 4 * x, "in/train_y": y, "in/test_x": test, "in/test_y": test_y, "in/order": order}
    arrays |= {"in/w0": start[0], "in/b0": start[1], "out/lr_per_epoch": np.array(rates), "out/pred": found}
    case.__dict__["arrays"] = as_arrays(arrays | {"out/w": layer.weight, "out/b": layer.bias})
    agrees(case)


def test_log_odds_of_other_sets():
    case = golden("unic", "log_odds")
    accuracy = {"in1k": 80.0, "dtd": 60.0, "pets": 90.0}
    odds = {name: math.log(value / (100 - value)) for name, value in accuracy.items()}
    means = {"mean_log_odds": (odds["dtd"] + odds["pets"]) / 2, "mean_accuracy": 75.0}
    case.__dict__["arrays"] = {"accuracy": accuracy, "log_odds": odds, **means}
    assert judge(case, find_runner(case)).status == "ok"
    case.arrays["log_odds"]["pets"] += 0.01
    assert judge(case, find_runner(case)).problems


def test_settings_of_a_search_with_fewer_trials():
    """A seed and a range of its own; a first trial that is another is noticed."""
    case = golden("unic", "logreg_sklearn")
    drawn = np.exp(np.random.RandomState(7).uniform(math.log(1e-2), math.log(10), 4))
    x, y, test, test_y = low_shot()
    train, val = torch.arange(35), torch.arange(35, 50)

    def fit(rows: torch.Tensor, c: float) -> tuple[torch.Tensor, torch.Tensor]:
        weight = torch.zeros(3, 6, dtype=torch.float64, requires_grad=True)
        bias = torch.zeros(3, dtype=torch.float64, requires_grad=True)
        options = {"max_iter": 2000, "tolerance_grad": 1e-10, "tolerance_change": 0, "line_search_fn": "strong_wolfe"}
        solver = torch.optim.LBFGS([weight, bias], **options)

        def objective() -> torch.Tensor:
            solver.zero_grad()
            value = F.cross_entropy(x[rows] @ weight.T + bias, y[rows], reduction="sum") * c
            value = value + weight.square().sum() / 2
            value.backward()
            return value

        solver.step(objective)
        return weight.detach(), bias.detach()

    def accuracy(rows: torch.Tensor, c: float, images: torch.Tensor, wanted: torch.Tensor) -> float:
        weight, bias = fit(rows, c)
        return 100 * float(((images @ weight.T + bias).argmax(1) == wanted).double().mean())

    everything, grid = torch.arange(50), np.array([0.1, 3.0])
    found = [accuracy(train, c, x[val], y[val]) for c in drawn]
    best = int(np.argmax(found))
    weight, bias = fit(everything, 2.0)
    classes = (test @ (w_b := fit(everything, drawn[best]))[0].T + w_b[1]).argmax(1)
    per_class = [float((classes[test_y == c] == c).double().mean()) for c in range(3)]
    case.params |= {"C_range": [1e-2, 10], "n_trials": 4, "seed": 7, "best_C": drawn[best], "best_val_acc": found[best]}
    case.params |= {"final_test_top1": 100 * float((classes == test_y).double().mean())}
    case.params |= {"final_mean_per_class_acc": 100 * np.mean(per_class)}
    arrays = {"in/trainval_x": x, "in/trainval_y": y, "in/test_x": test, "in/test_y": test_y, "in/C_grid": grid}
    arrays |= {"in/train_idx": train, "in/val_idx": val, "out/optuna_C": drawn, "out/optuna_val_acc": np.array(found)}
    arrays |= {"out/val_acc_grid": np.array([accuracy(train, c, x[val], y[val]) for c in grid])}
    arrays |= {"out/test_acc_grid": np.array([accuracy(everything, c, test, test_y) for c in grid])}
    arrays |= {"out/C2_coef": weight, "out/C2_intercept": bias, "out/C2_pred": (test @ weight.T + bias).argmax(1)}
    case.__dict__["arrays"] = as_arrays(arrays)
    assert (result := judge(case, find_runner(case))).status == "ok", result.problems
    assert set(unnoticed(case)) <= {"out/test_acc_grid", "out/val_acc_grid", "out/optuna_val_acc"}  # within a sample


def votes(x, y, test, test_y, k: int, temperature: float, classes: int) -> tuple[float, float]:
    """Percent of the test images whose class is first, and among the first five."""
    similar, indices = (test @ x.T).topk(min(k, len(x)))
    total = (F.one_hot(y[indices], classes) * (similar / temperature).exp()[..., None]).sum(1)
    order = total.argsort(dim=1, descending=True, stable=True)
    hits = order == test_y[:, None]
    return 100 * float(hits[:, 0].double().mean()), 100 * float(hits[:, : min(5, k)].any(1).double().mean())


def test_neighbours_of_other_numbers_and_temperatures():
    case = golden("mugs", "knn")
    x, y, test, test_y = low_shot(classes=7)
    case.params["num_classes"] = 7
    rows = [(k, t, *votes(x, y, test, test_y, k, t, 7)) for k, t in ((30, 0.5), (35, 0.1))]
    table = np.array([(*row, row[-1]) for row in rows])
    arrays = {"in.train_features": x, "in.train_labels": y, "in.test_features": test, "in.test_labels": test_y}
    case.__dict__["arrays"] = as_arrays(arrays | {"out.results": table})
    assert (result := judge(case, find_runner(case))).status == "ok", result.problems
    case.arrays["out.results"] = table + np.array([0, 0, 1, 0, 0])
    assert judge(case, find_runner(case)).problems


def test_neighbours_of_features_as_they_are():
    case = golden("unic", "knn")
    x, y, test, test_y = low_shot(classes=7)
    x, test = x * torch.linspace(1, 2, 50, dtype=torch.float64)[:, None], 1.5 * test
    case.params |= {"num_classes_argument": 9, "results": {}}
    for norm, k in (("none", 6), ("l2", 3), ("l2", 40)):
        parts = (x, test) if norm == "none" else (F.normalize(x, dim=1), F.normalize(test, dim=1))
        top1, top5 = votes(parts[0], y, parts[1], test_y, k, 0.3, 9)
        case.params["results"][f"{norm}|k={k}|T=0.3"] = {"top1": top1, "top5": top5 if k >= 5 else None}
    arrays = {"in/train_x": x, "in/train_y": y, "in/test_x": test, "in/test_y": test_y}
    case.__dict__["arrays"] = as_arrays(arrays)
    assert (result := judge(case, find_runner(case))).status == "ok", result.problems
    case.params["results"]["none|k=6|T=0.3"]["top1"] += 1
    assert judge(case, find_runner(case)).problems


def test_a_grid_of_heads_with_another_floor():
    case = golden("mugs", "linear_multi_classifier")
    x, y, test, test_y = low_shot(classes=6)
    grid = [{"lr": lr, "wd": wd, "optim": "sgd", "scaled_lr": lr * 20 / 256} for lr in (0.5, 5.0) for wd in (0, 0.01)]
    case.params |= {"batch_size": 10, "world_size": 2, "epochs": 2, "lr_min": 0.02, "grid": grid}
    grid = [entry | {"scaled_lr": entry["lr"] * 20 / 256} for entry in grid]
    orders = torch.stack([torch.randperm(50, generator=torch.Generator().manual_seed(i)) for i in range(2)])
    start = (random(6, 6, seed=9) / 10).half()
    layers, solvers, schedules = [], [], []
    for entry in grid:
        layer = nn.Linear(6, 6, dtype=torch.float64)
        layer.weight.data, layer.bias.data = start.double(), torch.zeros(6, dtype=torch.float64)
        layers.append(layer)
        solvers.append(torch.optim.SGD(layer.parameters(), entry["scaled_lr"], 0.9, weight_decay=entry["wd"]))
        schedules.append(torch.optim.lr_scheduler.CosineAnnealingLR(solvers[-1], 2, eta_min=0.02))
    rates, losses, tests = [], [], []
    for order in orders:
        rates.append([solver.param_groups[0]["lr"] for solver in solvers])
        epoch = []
        for part in order.split(10):
            step = []
            for layer, solver in zip(layers, solvers, strict=True):
                solver.zero_grad()
                loss = F.cross_entropy(layer(x[part]), y[part])
                loss.backward()
                solver.step()
                step.append(loss.item())
            epoch.append(step)
        for schedule in schedules:
            schedule.step()
        losses.append(np.mean(epoch, axis=0))
        table = []
        for layer in layers:
            logits = layer(test).detach()
            first = (logits.argmax(1) == test_y).double().mean()
            five = (logits.topk(5).indices == test_y[:, None]).any(1).double().mean()
            table.append([100 * first, 100 * five, F.cross_entropy(logits, test_y)])
        tests.append(table)
    best = max(range(4), key=lambda head: (float(tests[-1][head][0]), head))
    arrays = {"in.train_features": x, "in.train_labels": y, "in.test_features": test, "in.test_labels": test_y}
    arrays |= {"in.orders": orders, "in.weight_init": start, "out.lr_per_epoch": np.array(rates)}
    arrays |= {
        "out.train_loss": np.array(losses),
        "out.val": np.array(tests),
        "out.best_index_last_epoch": np.array([best]),
    }
    arrays |= {"out.final_weight": torch.stack([layer.weight for layer in layers])}
    arrays |= {"out.final_bias": torch.stack([layer.bias for layer in layers])}
    sweep = [digit * ten for ten in (1e-4, 1e-3, 1e-2, 1e-1) for digit in range(1, 10)]
    case.__dict__["arrays"] = as_arrays(arrays | {"out.sweep_lrs": np.array(sweep)})
    agrees(case)


def repeated(n: int, world: int, rank: int, epoch: int) -> list[int]:
    """The original's sampler, index by index."""
    order = torch.randperm(n, generator=torch.Generator().manual_seed(epoch)).tolist()
    order = [index for index in order for _ in range(3)]
    order += order[: math.ceil(n * 3 / world) * world - len(order)]
    return order[rank::world][: n // 256 * 256 // world]


def rates_of(epochs: int, lr: float, min_lr: float, warmup_lr: float, warmup: int) -> list[float]:
    """timm's own schedule, moved on after every epoch with its number."""
    from timm.scheduler import CosineLRScheduler

    solver = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=lr)
    options = {"t_initial": epochs, "lr_min": min_lr, "warmup_t": warmup, "warmup_lr_init": warmup_lr}
    schedule, found = CosineLRScheduler(solver, **options), []
    for epoch in range(epochs):
        found.append(solver.param_groups[0]["lr"])
        schedule.step(epoch)
    return found


def test_repeated_augmentation_of_other_sizes():
    case = golden("eval_core", "repeated_augment_sampler")
    given = [{"n": 515, "world": 3, "rank": 2, "epoch": 1}, {"n": 901, "world": 1, "rank": 0, "epoch": 7}]
    outputs = {f"out/indices{i}": np.array(repeated(**arguments)) for i, arguments in enumerate(given)}
    case.entry["inputs"] = {f"args{i}": {"value": arguments} for i, arguments in enumerate(given)}
    agrees(rewrite(case, {}, outputs))
    case, run = golden("attmask", "ra_sampler"), {"len": 700, "replicas": 5, "rank": 4, "epoch": 2}
    found = repeated(700, 5, 4, 2)
    case.params["runs"] = [
        run | {"len_sampler": len(found), "indices_first_64": found[:64], "sum": sum(found)},
    ]
    agrees(case)


def test_rates_of_other_runs():
    case = golden("attmask", "ft_lr")
    run = {"epochs": 9, "lr_arg": 0.02, "batch_size": 32, "world_size": 4, "warmup_epochs": 2, "warmup_lr": 1e-4}
    found = rates_of(9, 0.005, 1e-3, 1e-4, 2)
    run |= {"min_lr": 1e-3, "scaled_lr": 0.005, "lr_used_first_5_epochs": found[:5], "lr_used_every_4": found[::4]}
    case.params["runs"] = [run | {"lr_used_last": found[-1]}]
    assert (result := judge(case, find_runner(case))).status == "ok", result.problems
    run["lr_used_every_4"][1] *= 1.01
    assert judge(case, find_runner(case)).problems


def head_and_logits(kept: int, in_dim=5, hidden=7, bottleneck=4, out=9, classes=3) -> tuple:
    """State dict, features, logits: layer by layer."""
    widths = [in_dim, hidden, hidden, bottleneck][: kept + 1]
    x, state = random(4, in_dim, seed=kept), {}
    value = x
    for i in range(kept):
        weight, bias = random(widths[i + 1], widths[i], seed=10 + i), random(widths[i + 1], seed=20 + i)
        state |= {f"mlp.{2 * i}.weight": weight, f"mlp.{2 * i}.bias": bias}
        value = value @ weight.T + bias
        value = F.gelu(value) if i < 2 else value
    if kept == 3:
        g, v = random(out, 1, seed=31), random(out, bottleneck, seed=32)
        state |= {"last_layer.weight_g": g, "last_layer.weight_v": v}
        value = F.normalize(value, dim=1) @ (g * F.normalize(v, dim=1)).T
    weight, bias = random(classes, value.shape[1], seed=41), random(classes, seed=42)
    return state | {"cls_head.weight": weight, "cls_head.bias": bias}, x, value @ weight.T + bias


def test_heads_of_other_widths():
    case, inputs, outputs = golden("eval_core", "semi_supervised_head"), {}, {}
    for kept in (3, 1):
        state, x, logits = head_and_logits(kept, hidden=11 + kept)
        inputs |= {f"layer{kept}/{name}": tensor for name, tensor in state.items()} | {f"in/x{kept}": x}
        outputs[f"out/logits{kept}"] = logits
    agrees(rewrite(case, inputs, outputs))


def test_heads_and_distillation_of_other_strengths():
    case, arrays = golden("mugs", "semi_class_head"), {}
    state, x, logits = head_and_logits(2)
    arrays |= {f"sd.layer2.{name}": tensor for name, tensor in state.items()} | {"in.x": x, "out.layer2.logits": logits}
    ours, student, teacher = (random(4, 3, seed=50 + i) for i in range(3))
    targets = random(4, 3, seed=60).softmax(1)
    arrays |= {"in.logits": ours, "in.logits_kd": student, "in.teacher_logits": teacher, "in.soft_labels": targets}
    base = -(targets * ours.log_softmax(1)).sum(1).mean()
    p = (teacher / 3).softmax(1)
    soft = 9 * (p * (p.log() - (student / 3).log_softmax(1))).sum() / 12
    hard = -student.log_softmax(1)[range(4), teacher.argmax(1)].mean()
    arrays |= {"out.distill_soft": 0.25 * base + 0.75 * soft, "out.distill_hard": 0.25 * base + 0.75 * hard}
    said = {"out.layer2.logits": "class logits"}
    said |= {f"out.distill_{k}": f"distillation_type={k}, alpha 0.75, tau 3.0" for k in ("soft", "hard")}
    case.entry["outputs"] = [{"key": key, "meaning": meaning} for key, meaning in said.items()]
    case.__dict__["arrays"] = as_arrays(arrays)
    agrees(case)


def test_udis_case_of_other_grids():
    case = golden("udi", "semi_transfer")
    state, x, logits = head_and_logits(3)
    inputs = {f"head3/sd/{name}": tensor for name, tensor in state.items()} | {"head3/x": x}
    case.params["lr_grids"] = {"mine": [8, 0.01, 1e-3, 1e-4, 3, 0.1], "cold": [5, 0.01, 0.0, 1e-4, 0, 0.1]}
    outputs = {"head3/y": logits, "ra/n513_w2_r1_e4": np.array(repeated(513, 2, 1, 4))}
    outputs |= {f"lr_used/{n}": np.array(rates_of(*g[:5])) for n, g in case.params["lr_grids"].items()}
    agrees(rewrite(case, inputs, outputs))


def test_tables_of_other_runs():
    case = golden("mugs", "finetune_semi_transfer_tables")
    found = repeated(600, 4, 1, 9)
    rates = rates_of(7, 0.01, 1e-3, 1e-4, 2)
    run = {"lr_flag": 0.02, "batch_size": 64, "world": 4, "epochs": 7, "min_lr": 1e-3, "warmup_lr": 1e-4}
    run |= {"warmup_epochs": 2, "scaled_lr": 0.01, "epoch_index": [0, 3, 6]}
    tables = {
        "epoch_cosine_semi_transfer": {"mine": run | {"lr_used_during_epoch": [rates[0], rates[3], rates[6]]}},
        "repeated_aug_sampler": [
            {"dataset_len": 600, "world": 4, "rank": 1, "epoch": 9, "num_selected": len(found), "first": found[:5]}
            | {"last": found[-3:], "sum": sum(found)}
        ],
    }
    case.__dict__["arrays"] = dict(case.arrays) | tables
    assert (result := judge(case, find_runner(case))).status == "ok", result.problems
    tables["epoch_cosine_semi_transfer"]["mine"]["lr_used_during_epoch"][2] *= 1.01
    assert judge(case, find_runner(case)).problems


def test_flowers_of_another_size(tmp_path):
    case = golden("attmask", "flowers_split")
    (tmp_path / "flowers").mkdir()
    matlab(tmp_path / "flowers/imagelabels.mat", number([3, 1, 3, 2, 1], "labels"))
    parts = {"trnid": [5, 2], "valid": [1], "tstid": [4, 3]}
    matlab(tmp_path / "flowers/setid.mat", *(number(ids, name) for name, ids in parts.items()))
    case.folder, case.params["jpg_files"] = tmp_path, "image_00011.jpg .. image_00015.jpg"
    train = [["image_00015.jpg", 0], ["image_00012.jpg", 0], ["image_00011.jpg", 2]]
    test = [["image_00014.jpg", 1], ["image_00013.jpg", 2]]
    samples = {"train": {"nb_classes": 2, "samples": train}, "test": {"nb_classes": 2, "samples": test}}
    case.entry["outputs"] = samples
    agrees(case)


def test_steps_with_other_rates_decay_and_average():
    case = golden("attmask", "finetune")
    case.params |= {
        "hyper": {"lr": 0.4, "bs": 3, "epochs": 4, "warmup_epochs": 2, "iters": 1, "classes": 4, "ema": 0.5}
    }
    case.params |= {"scaled_lr": 0.4 * 3 / 512, "warmup_lr": 1e-4, "min_lr": 1e-3}
    shape, batches = (
        case.params["model"],
        [(random(3, 3, 32, 32, seed=i), random(3, 4, seed=i).softmax(1)) for i in range(4)],
    )
    arguments = {"patch_size": shape["patch"], "embed_dim": shape["dim"], "depth": shape["depth"]}
    arguments |= {"num_heads": shape["heads"], "img_size": shape["img"]}
    model = FinetunedTransformer(4, init_scale=1.0, **arguments).double()
    state, _ = read_backbone(case.folder / "checkpoint_plain.pth", "teacher")
    head = {"head.weight": random(4, shape["dim"], seed=7), "head.bias": random(4, seed=8)}
    model.load_state_dict({n: t for n, t in state.items() if n in model.state_dict()} | head)
    plain = [p for n, p in model.named_parameters() if p.ndim == 1 or n.endswith("bias")]
    decayed = [p for n, p in model.named_parameters() if not (p.ndim == 1 or n.endswith("bias"))]
    for group, decay in zip(case.params["groups"], (0.0, 0.2), strict=True):
        group["weight_decay"] = decay
    groups = [{"params": plain, "weight_decay": 0.0}, {"params": decayed, "weight_decay": 0.2}]
    solver, losses = torch.optim.AdamW(groups, lr=0.0), []
    rates = rates_of(4, 0.4 * 3 / 512, 1e-3, 1e-4, 2)
    average = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for rate, (images, targets) in zip(rates, batches, strict=True):
        solver.zero_grad()
        loss = -(targets * model(images).log_softmax(1)).sum(1).mean()
        loss.backward()
        for group in solver.param_groups:
            group["lr"] = rate
        solver.step()
        losses.append(loss.item())
        average = {name: 0.5 * average[name] + 0.5 * tensor for name, tensor in model.state_dict().items()}
    arrays = {f"images_{i}": images for i, (images, _) in enumerate(batches)}
    arrays |= {f"targets_{i}": targets for i, (_, targets) in enumerate(batches)}
    arrays |= {"head_weight": head["head.weight"], "head_bias": head["head.bias"]}
    arrays |= {f"final/{name}": tensor for name, tensor in model.state_dict().items()}
    arrays |= {"ema/norm.bias": average["norm.bias"], "ema/head.weight": average["head.weight"]}
    case.entry["outputs"] |= {"loss_per_step": losses, "lr_per_step": rates}
    case.__dict__["arrays"] = as_arrays(arrays)
    agrees(case)
