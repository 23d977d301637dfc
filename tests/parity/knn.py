"""Runners: weighted k-NN."""

import re
from collections.abc import Iterator

import torch

from eval_knn.eval_knn import class_votes, knn_classify, neighbours_in_chunks
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


RUNNERS = {"eval_core/knn_*": weighted_knn}
