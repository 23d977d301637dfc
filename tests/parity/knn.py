"""Runners: weighted k-NN."""

import re
from collections.abc import Iterator

import torch

from evaluation.knn import bank_rows, class_votes, knn_classify, mean_accuracies, neighbours_in_chunks
from tests.parity import Case


def weighted_knn(case: Case) -> Iterator[tuple]:
    train, test = case.tensor("in/train_features"), case.tensor("in/test_features")
    train_labels, test_labels = case.tensor("in/train_labels"), case.tensor("in/test_labels")
    temperature, num_classes, ks = (case.params[name] for name in ("temperature", "num_classes", "nb_knn"))
    for label in case.names("out/"):
        k = int(re.search(r"_k(\d+)$", label)[1])
        votes = torch.cat(
            [
                class_votes(similarities, labels, temperature, num_classes)
                for _, similarities, labels in neighbours_in_chunks(train, train_labels, test, k, num_classes)
            ]
        )
        expected = case.arrays[label]
        yield label, votes.argmax(1) if "pred" in label else votes[: expected.shape[0], : expected.shape[1]], expected
    # small enough a working set that both the bank and the queries are read in several pieces
    for working_bytes in (2**28, 2**14):
        accuracies = knn_classify(
            train, train_labels, test, test_labels, ks, temperature, num_classes, working_bytes=working_bytes
        )
        for k, values in case.value("accuracy").items():
            top1, top5 = accuracies[int(k)]
            for name, value in values.items():
                yield f"accuracy k={k} {name} in {working_bytes} bytes", top1 if name == "top1" else top5, value


def low_shot(case: Case) -> Iterator[tuple]:
    train, labels, test, test_labels = knn_tensors(case)
    done: dict[tuple, dict] = {}  # (images per class, k, temperature) -> what its starts gave
    for run in case.entry["outputs"]["runs"]:
        per_class, k = run["subset"], run["nb_knn"]
        temperature = run.get("temperature", case.params.get("temperature"))
        runs = done.setdefault((per_class, k, temperature), {})
        label = f"runs of {per_class} per class, k={k}, T={temperature}"
        if "mean_top1_over_starts" in run:
            yield f"{label}, mean", mean_accuracies(runs)[k][0], run["mean_top1_over_starts"]
            continue
        start = run["subset_starts"]
        rows = bank_rows(labels, per_class, start)
        classes = case.params["num_classes"]
        runs[start] = knn_classify(train[rows], labels[rows], test, test_labels, [k], temperature, classes)
        yield from known_accuracies(f"{label}, from {start}", runs[start][k], run)


def whole_bank(case: Case) -> Iterator[tuple]:
    for run in case.entry["outputs"]["runs"]:
        k, temperature = run["k"], run["T"]
        found = knn_classify(*knn_tensors(case), [k], temperature, case.params["num_classes"])
        yield from known_accuracies(f"runs with k={k}, T={temperature}", found[k], run)


def table_of_results(case: Case) -> Iterator[tuple]:
    """Mugs: rows of k, temperature, top-1, and what top-5 is between where ties leave it open."""
    features = [case.tensor(f"in.{side}_{kind}") for side in ("train", "test") for kind in ("features", "labels")]
    (name,) = case.outputs()
    for k, temperature, top1, low, high in case.arrays[name].tolist():
        ((one, five),) = knn_classify(*features, [int(k)], temperature, case.params["num_classes"]).values()
        yield f"{name} at k={k:g}, T={temperature:g}: top-1", one, top1
        yield f"{name} at k={k:g}, T={temperature:g}: top-5", five, min(max(five, low), high)


def results_by_name(case: Case) -> Iterator[tuple]:
    """UNIC: ``normalisation|k=..|T=..``; a top-5 of less than five neighbours is not recorded."""
    features = [case.tensor(f"in/{side}_{kind}").double() for side in ("train", "test") for kind in ("x", "y")]
    features[1], features[3] = features[1].long(), features[3].long()
    for name, expected in case.params["results"].items():
        norm, k, temperature = re.fullmatch(r"(\w+)\|k=(\d+)\|T=([\d.]+)", name).groups()
        options = ([int(k)], float(temperature), case.params["num_classes_argument"])
        (found,) = knn_classify(*features, *options, cosine=norm == "l2").values()
        for kind, value in zip(("top1", "top5"), found, strict=True):
            if expected[kind] is not None:
                yield f"{name}, {kind}", value, expected[kind]


def knn_tensors(case: Case) -> list[torch.Tensor]:
    return [case.tensor(f"{side}_{kind}") for side in ("train", "test") for kind in ("features", "labels")]


def known_accuracies(label: str, found: tuple[float, float], run: dict) -> Iterator[tuple]:
    """A top-5 that ties left open is not recorded."""
    for name, value in zip(("top1", "top5"), found, strict=True):
        if run[name] is not None:
            yield f"{label}, {name}", value, run[name]


RUNNERS = {
    "eval_core/knn_*": weighted_knn,
    "attmask/lowshot_knn": low_shot,
    "attmask/knn_full": whole_bank,
    "mugs/knn": table_of_results,
    "unic/knn": results_by_name,
}
