"""Runners: logistic regression on given features, and t-ReX's protocol of choosing its settings."""

import importlib.metadata
import re
from collections.abc import Iterator

import torch
import torch.nn.functional as F

from evaluation.linear_heads import Recipe
from evaluation.logistic import ridge_regression
from evaluation.search import Drawn, Range, Tpe, best_trial
from evaluation.sgd_regression import lagged_factor, predictions, sgd_regression
from evaluation.transfer import (
    lbfgs_classifier,
    log_odds,
    mean_per_class_accuracy,
    normalised,
    over_sets,
    searched,
    split_trainval,
    top1,
)
from tests.parity import Case


def ridge(case: Case) -> Iterator[tuple]:
    """Features are unit vectors; a manifest says whether its penalties are divided by the number of images."""
    names = {side: next(n for n in case.arrays if n.endswith((side, f"{side}_features"))) for side in ("train", "test")}
    train, test = (F.normalize(case.tensor(name), dim=1) for name in names.values())
    labels, test_labels = (
        case.tensor(next(n for n in case.arrays if n.endswith(f"{side}_labels"))) for side in ("train", "test")
    )
    classes, given = 1 + int(max(labels.max(), test_labels.max())), case.params["lambdas"]
    classes = case.params.get("classes", classes)
    divided = case.params.get("adjust_lambd", "adjust_lambd on" in case.params.get("objective", ""))
    penalties = [value / len(train) if divided else value for value in given]
    solution = ridge_regression(train, labels, classes, penalties)
    accuracies = (solution.predictions(test) == test_labels).double().mean(dim=1)
    for number, value in enumerate(given):
        found = {"objective": solution.objective[number], "accuracy": accuracies[number]}
        for label, expected in of_penalty(case, number, value):
            kind = re.search(r"W|objective|acc", label)[0]
            if kind == "W":
                weight = solution.weight[number]
                yield label, weight.T if "[d,C]" in str(case.entry["outputs"]) else weight, expected
            else:
                yield label, found[{"acc": "accuracy"}.get(kind, kind)], expected


def of_penalty(case: Case, number: int, value: float) -> Iterator[tuple]:
    """(label, expected) of the ``number``-th penalty: arrays that its number or its value ends, and the manifest's."""
    for name in case.arrays:
        if re.fullmatch(rf"(?:out[./])?(?:W|objective|acc|accuracy)_(?:{number}|{re.escape(str(value))})", name):
            yield name, case.arrays[name]
    outputs = case.entry["outputs"]
    if isinstance(outputs, dict) and "value" in outputs.get("results", {}):
        for kind, expected in outputs["results"]["value"][str(value)].items():
            yield f"results {kind} at {value}", expected


def split(case: Case) -> Iterator[tuple]:
    p, labels = case.params, case.arrays["in/labels"]
    train, val = split_trainval(labels, p["per_val"], p["python_random_seed"])
    yield "out/train_idx", train, case.arrays["out/train_idx"]
    yield "out/val_idx", val, case.arrays["out/val_idx"]
    for label, count in p["expected_val_per_class"].items():
        yield f"out/val_idx of class {label}", int((labels[val] == int(label)).sum()), count
        total = p["total_per_class"][label]
        yield f"out/train_idx of class {label}", int((labels[train] == int(label)).sum()), total - count


def trex_lbfgs(case: Case) -> Iterator[tuple]:
    p, arrays = case.params, case.arrays
    x, test = (case.tensor(f"in/{side}_x") for side in ("trainval", "test"))
    y, test_y, train, val = (case.tensor(f"in/{n}") for n in ("trainval_y", "test_y", "train_idx", "val_idx"))
    x, test = normalised(x, test, p["features_norm"])
    classify = lbfgs_classifier(1 + int(max(y.max(), test_y.max())))
    grid = [{"C": c} for c in arrays["in/C_grid"].tolist()]
    yield "out/val_acc_grid", top1(classify(x[train], y[train], grid, x[val]), y[val]), arrays["out/val_acc_grid"]
    yield "out/test_acc_grid", top1(classify(x, y, grid, test), test_y), arrays["out/test_acc_grid"]
    for c in sorted({int(name[5 : name.index("_")]) for name in case.names("out/C")}):
        fit = ridge_regression(x.double(), y, len(arrays[f"out/C{c}_coef"]), [1 / (c * len(x))], intercept=True)
        near = case.tolerance_of("coef")  # the manifest's word for what this fit found
        yield f"out/C{c}_coef", fit.weight[0], arrays[f"out/C{c}_coef"], near
        yield f"out/C{c}_intercept", fit.bias[0], arrays[f"out/C{c}_intercept"], near
        yield f"out/C{c}_pred", fit.predictions(test.double())[0], arrays[f"out/C{c}_pred"]
    yield from trex_search(case, classify, (x, y), (arrays["in/train_idx"], arrays["in/val_idx"]), (test, test_y))


def trex_search(case: Case, classify, trainval, split, test) -> Iterator[tuple]:
    """The accuracy at every C that optuna tried, its first draws, and a search of our own as the manifest allows it."""
    p, (features, labels), (train, val) = case.params, trainval, split
    tried, sample = case.arrays["out/optuna_C"], 100 / len(val)
    found = top1(
        classify(features[train], labels[train], [{"C": c} for c in tried.tolist()], features[val]), labels[val]
    )
    yield "out/optuna_val_acc", found, case.arrays["out/optuna_val_acc"], (0.0, sample + 1e-3)
    yield "out/optuna_C, trials", len(tried), p["n_trials"]
    yield "out/optuna_C, the best", tried[best_trial(case.arrays["out/optuna_val_acc"])], p["best_C"], (1e-12, 0.0)
    ranges = {"C": Range(*p["C_range"])}
    startup = min(10, p["n_trials"])
    drawn = [setting["C"] for setting in Drawn(ranges, p["seed"]).ask(startup)]
    yield f"out/optuna_C, the first {startup}", drawn, tried[:startup], (1e-12, 0.0)
    if installed("optuna") == p["versions"]["optuna"]:
        exact = searched(classify, Tpe(ranges, p["seed"]), p["n_trials"], 1, trainval, split, test[0])
        yield "out/optuna_C, one after the other", [trial["C"] for trial in exact.trials], tried, (1e-12, 0.0)
    ours = searched(classify, Drawn(ranges, p["seed"]), p["n_trials"], p["n_trials"], trainval, split, test[0])
    yield "out/optuna_val_acc, best", ours.val_top1, p["best_val_acc"], (0.0, sample + 1e-3)
    yield "final_test_top1", float(top1(ours.predictions, test[1])), p["final_test_top1"], (0.0, 2.0)
    (chosen,) = classify(features, labels, [{"C": p["best_C"]}], test[0])
    yield "final_test_top1 at the best C", float(top1(chosen, test[1])), p["final_test_top1"], (0.0, 2.0)
    one = 100 / int(torch.bincount(test[1]).min())
    yield "final_mean_per_class_acc", mean_per_class_accuracy(chosen, test[1]), p["final_mean_per_class_acc"], (0, one)


def installed(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def trex_sgd(case: Case) -> Iterator[tuple]:
    p = case.params
    train, test = normalised(case.tensor("in/train_x"), case.tensor("in/test_x"), p["features_norm"].split()[0])
    order, labels = case.tensor("in/order"), case.tensor("in/test_y")
    alone, *beside = (
        sgd_regression(
            train,
            case.tensor("in/train_y"),
            [Recipe(lr, p["hp"]["wd"]) for lr in rates],
            (case.tensor("in/w0"), case.tensor("in/b0")),
            order,
            epochs=p["epochs"],
            batch_size=p["batch_size"],
            momentum=p["momentum"],
        )
        for rates in ([p["hp"]["lr"]], [1.0, p["hp"]["lr"], 1e30])
    )
    for number, heads in [(0, alone), (1, *beside)]:
        where = ", beside two others" * number
        yield f"out/w{where}", heads.weight[number], case.arrays["out/w"]
        yield f"out/b{where}", heads.bias[number], case.arrays["out/b"]
        found = predictions(heads, test)[number]
        yield f"out/pred{where}", found, case.arrays["out/pred"]
        yield f"out/pred, test_top1{where}", float(top1(found, labels)), p["test_top1"], (1e-9, 0.0)
    rates = [p["hp"]["lr"] * lagged_factor(epoch, p["epochs"]) for epoch in range(p["epochs"])]
    yield "out/lr_per_epoch", rates, case.arrays["out/lr_per_epoch"]


def odds(case: Case) -> Iterator[tuple]:
    accuracies = case.arrays["accuracy"]
    means = over_sets(accuracies)
    for name, expected in case.arrays["log_odds"].items():
        yield f"log_odds {name}", log_odds(accuracies[name]), expected
        yield f"accuracy of {name}, as log-odds", log_odds(accuracies[name]), expected
    for name in ("mean_log_odds", "mean_accuracy"):
        yield name, means[name], case.arrays[name]


RUNNERS = {
    "*/logistic_regression": ridge,
    "unic/split_trainval": split,
    "unic/logreg_sklearn": trex_lbfgs,
    "unic/logreg_torch": trex_sgd,
    "unic/log_odds": odds,
}
