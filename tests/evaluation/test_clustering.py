"""Measures of clusters against numbers worked out by hand, and the assignment against trying everything."""

import itertools
import math
import time

import numpy as np
import pytest

from evaluation.clustering import (
    adjusted_rand_index,
    assignment_accuracy,
    best_assignment,
    contingency,
    fowlkes_mallows,
    normalized_mutual_information,
)

MEASURES = (normalized_mutual_information, adjusted_rand_index, fowlkes_mallows, assignment_accuracy)


def measured(labels, predictions) -> list[float]:
    table = contingency(np.array(labels), np.array(predictions))
    return [measure(table) for measure in MEASURES]


def test_the_table_holds_only_what_occurs():
    table = contingency(np.array([7, 7, -2, 7]), np.array([900, 900, 900, 5]))
    assert table.dense().tolist() == [[0, 1], [1, 2]]  # classes -2 and 7, clusters 5 and 900
    assert len(table.counts) == 3
    assert (table.class_sizes.tolist(), table.cluster_sizes.tolist()) == ([1, 3], [1, 3])


def test_numbers_worked_out_by_hand():
    """Classes of 2 and 2; clusters of 3 and 1. Pairs: 1 together in both, 2 in a class, 3 in a cluster, 6 in all."""
    nmi, ari, fmi, acc = measured([0, 0, 1, 1], [0, 0, 0, 1])
    shared = 0.5 * math.log(4 / 3) + 0.25 * math.log(2 / 3) + 0.25 * math.log(2)
    entropies = math.log(2), 0.75 * math.log(4 / 3) + 0.25 * math.log(4)
    assert nmi == pytest.approx(shared / (sum(entropies) / 2), abs=1e-12)
    assert ari == pytest.approx((1 - 2 * 3 / 6) / ((2 + 3) / 2 - 1), abs=1e-12)
    assert fmi == pytest.approx(1 / math.sqrt(6), abs=1e-12)
    assert acc == 0.75


@pytest.mark.parametrize(
    ("labels", "predictions", "expected"),
    [
        ([0, 1, 1, 2], [5, 3, 3, 9], [1, 1, 1, 1]),  # the same under other names
        ([4, 4, 4], [1, 1, 1], [1, 1, 1, 1]),  # one of each
        ([3], [8], [1, 1, 0, 1]),  # a single image has no pairs
        ([0, 1, 2], [4, 5, 6], [1, 1, 0, 1]),  # every image by itself
        ([0, 0, 1, 1], [7, 7, 7, 7], [0, 0, math.sqrt(1 / 3), 0.5]),  # one cluster says nothing
        ([0, 0, 1, 1], [0, 1, 0, 1], [0, -0.5, 0, 0.5]),  # independent
        ([0, 0, 0, 0], [0, 1, 2, 3], [0, 0, 0, 0.25]),  # clusters left over count as wrong
    ],
)
def test_limits(labels, predictions, expected):
    assert measured(labels, predictions) == pytest.approx(expected, abs=1e-12)


def test_classes_and_clusters_may_change_places():
    labels, predictions = np.random.default_rng(0).integers(0, (5, 9), (60, 2)).T
    assert measured(labels, predictions) == pytest.approx(measured(predictions, labels), abs=1e-12)


@pytest.mark.parametrize(("labels", "predictions"), [([], []), ([1, 2], [1])])
def test_what_cannot_be_compared_is_an_error(labels, predictions):
    with pytest.raises(ValueError, match="need as many, and at least one"):
        measured(labels, predictions)


@pytest.mark.parametrize("shape", [(1, 1), (4, 4), (6, 6), (3, 7), (1, 5)])
@pytest.mark.parametrize("kind", ["real", "ties", "negative"])
def test_the_assignment_is_the_best_of_all(shape, kind):
    rng = np.random.default_rng(sum(shape))
    for _ in range(20):
        costs = {
            "real": rng.random(shape),
            "ties": rng.integers(0, 3, shape).astype(float),
            "negative": -rng.integers(0, 9, shape).astype(float),
        }[kind]
        columns = best_assignment(costs)
        assert len(set(columns.tolist())) == shape[0]
        best = min(costs[range(shape[0]), p].sum() for p in itertools.permutations(range(shape[1]), shape[0]))
        assert costs[np.arange(shape[0]), columns].sum() == pytest.approx(best, abs=1e-12)


def test_more_rows_than_columns_are_an_error():
    with pytest.raises(ValueError, match="3 rows cannot have a column each of 2"):
        best_assignment(np.zeros((3, 2)))


def test_a_thousand_classes_are_assigned_quickly():
    rng = np.random.default_rng(0)
    hidden = rng.permutation(1000)
    costs = rng.random((1000, 1000)) + 1
    costs[np.arange(1000), hidden] = 0.5
    began = time.process_time()
    assert best_assignment(costs).tolist() == hidden.tolist()
    best_assignment(rng.random((1000, 1000)))
    assert time.process_time() - began < 5
