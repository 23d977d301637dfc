"""Runners: agreement of clusters with classes."""

from collections.abc import Iterator

import numpy as np

from evaluation.clustering import (
    adjusted_rand_index,
    assignment_accuracy,
    contingency,
    fowlkes_mallows,
    normalized_mutual_information,
)
from tests.parity import Case

MEASURES = {
    "nmi": normalized_mutual_information,
    "ari": adjusted_rand_index,
    "fmi": fowlkes_mallows,
    "acc": assignment_accuracy,
}


def measures(labels: np.ndarray, predictions: np.ndarray, expected: dict, name: str) -> Iterator[tuple]:
    table = contingency(labels, predictions)
    for measure, value in expected.items():
        if value != -1:  # not computed, where there are not as many clusters as classes
            yield name.format(measure), MEASURES[measure](table), value


def cluster_measures(case: Case) -> Iterator[tuple]:
    for run in case.entry["outputs"]:
        labels, predictions = (case.arrays[f"in/{side}_{run}"] for side in ("labels", "pred"))
        yield from measures(labels, predictions, case.value(run), f"{run} {{}}")


def cluster_measures_in_manifest(case: Case) -> Iterator[tuple]:
    for number, run in enumerate(case.params["runs"]):
        expected = {name: run[name] for name in MEASURES}
        yield from measures(np.array(run["labels"]), np.array(run["pred"]), expected, f"{{}} of run {number}")


RUNNERS = {"eval_core/clustering_metrics": cluster_measures, "attmask/unsup_cls": cluster_measures_in_manifest}
