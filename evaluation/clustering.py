"""How well clusters agree with classes: NMI, ARI, Fowlkes-Mallows and the accuracy of the best assignment.

All are computed from a contingency table that keeps only its non-empty cells, so that a million images in thousands of
clusters take less than a second. Formulas and their limits are those of scikit-learn, which the originals call.
"""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Contingency:
    """Counts of the pairs (class, cluster) that occur; classes and clusters are renumbered from 0 in sorted order."""

    classes: np.ndarray  # (cells,)
    clusters: np.ndarray  # (cells,)
    counts: np.ndarray  # (cells,)

    @property
    def class_sizes(self) -> np.ndarray:
        return np.bincount(self.classes, self.counts)

    @property
    def cluster_sizes(self) -> np.ndarray:
        return np.bincount(self.clusters, self.counts)

    def dense(self) -> np.ndarray:
        """(classes, clusters)"""
        table = np.zeros((self.classes.max() + 1, self.clusters.max() + 1))
        table[self.classes, self.clusters] = self.counts
        return table


def contingency(labels: np.ndarray, predictions: np.ndarray) -> Contingency:
    """Any whole numbers, both (images,) with at least one image."""
    if len(labels) != len(predictions) or not len(labels):
        raise ValueError(f"{len(labels)} labels and {len(predictions)} predictions: need as many, and at least one")
    _, labels = np.unique(labels, return_inverse=True)
    names, predictions = np.unique(predictions, return_inverse=True)
    cells, counts = np.unique(labels * len(names) + predictions, return_counts=True)
    return Contingency(cells // len(names), cells % len(names), counts)


def normalized_mutual_information(table: Contingency) -> float:
    """Mutual information over the mean of both entropies; one class in one cluster is agreement, 1."""
    rows, columns, total = table.class_sizes, table.cluster_sizes, table.counts.sum()
    if len(rows) == len(columns) == 1:
        return 1.0
    expected = rows[table.classes] * columns[table.clusters]
    shared = float((table.counts / total * np.log(total * table.counts / expected)).sum())
    entropies = [float(-(sizes / total * np.log(sizes / total)).sum()) for sizes in (rows, columns)]
    return 0.0 if shared < np.finfo(float).eps else shared / (sum(entropies) / 2)


def _pairs(sizes: np.ndarray) -> float:
    """Pairs of images within groups of these sizes."""
    return float((sizes * (sizes - 1) / 2).sum())


def adjusted_rand_index(table: Contingency) -> float:
    """Pairs that are together in both, beyond what chance gives; 1 is agreement, 0 is chance."""
    both, same_class, same_cluster = map(_pairs, (table.counts, table.class_sizes, table.cluster_sizes))
    if both == same_class == same_cluster:
        return 1.0
    expected = same_class * same_cluster / _pairs(table.counts.sum(keepdims=True))
    return (both - expected) / ((same_class + same_cluster) / 2 - expected)


def fowlkes_mallows(table: Contingency) -> float:
    """Geometric mean of precision and recall over pairs of images."""
    both, same_class, same_cluster = map(_pairs, (table.counts, table.class_sizes, table.cluster_sizes))
    return (both / same_class) ** 0.5 * (both / same_cluster) ** 0.5 if both else 0.0


def assignment_accuracy(table: Contingency) -> float:
    """Share of images that the best one-to-one assignment of clusters to classes gets right.

    Where there are more clusters than classes, or fewer, what is left over counts as wrong.
    """
    counts = table.dense()
    counts = counts if counts.shape[0] <= counts.shape[1] else counts.T
    return float(counts[np.arange(len(counts)), best_assignment(-counts)].sum() / table.counts.sum())


def best_assignment(costs: np.ndarray) -> np.ndarray:
    """Columns, one for every row and none twice, at the least total cost; needs no more rows than columns.

    Shortest augmenting paths with prices of rows and columns (Jonker and Volgenant 1987): O(rows * rows * columns).
    Rows that find their cheapest column free take it at once; every other one starts a search (``_augment``).
    """
    rows, columns = costs.shape
    if rows > columns:
        raise ValueError(f"{rows} rows cannot have a column each of {columns}")
    row_prices, column_prices = costs.min(axis=1).astype(float), np.zeros(columns)
    column_of, row_of = np.full(rows, -1), np.full(columns, -1)
    for row, column in enumerate(costs.argmin(axis=1)):
        if row_of[column] < 0:
            column_of[row], row_of[column] = column, row
    for row in np.flatnonzero(column_of < 0):
        _augment(row, costs, row_prices, column_prices, column_of, row_of)
    return column_of


def _augment(row: int, costs, row_prices, column_prices, column_of, row_of) -> None:
    """Give ``row`` a column by the cheapest chain of exchanges (Dijkstra over reduced costs); in place."""
    distance, came_from = np.full(len(row_of), np.inf), np.full(len(row_of), -1)
    open_distance = distance.copy()  # infinite where a column's distance is final
    reached_rows, reached_columns, lowest, current = [row], [], 0.0, row
    closed = np.zeros(len(row_of), bool)
    while True:
        through = lowest + costs[current] - row_prices[current] - column_prices
        better = (through < distance) & ~closed
        distance[better], open_distance[better], came_from[better] = through[better], through[better], current
        lowest = open_distance.min()
        nearest = np.flatnonzero(open_distance == lowest)
        column = int(nearest[row_of[nearest].argmin()])  # one without a row, which is -1, before others
        if row_of[column] < 0:
            break
        closed[column], open_distance[column] = True, np.inf
        current = int(row_of[column])
        reached_rows.append(current)
        reached_columns.append(column)
    slack = lowest - distance[reached_columns]
    row_prices[row] += lowest
    row_prices[reached_rows[1:]] += slack
    column_prices[reached_columns] -= slack
    while True:  # along the path: every row takes the column it was reached from
        giver = came_from[column]
        row_of[column], column_of[giver], column = giver, column, column_of[giver]
        if giver == row:
            return
