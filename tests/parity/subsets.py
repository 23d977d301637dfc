"""Runners: which images are kept when every class gives a few."""

from collections.abc import Iterator

import numpy as np

from data.datasets import SubsetSource
from data.source import Source
from tests.parity import Case


class Labels(Source):
    """Labels are all that choosing needs."""

    name = "labels"

    def __init__(self, labels: np.ndarray):
        self.labels = labels
        self.class_names = [str(label) for label in range(labels.max() + 1)]


def small_subsets(case: Case) -> Iterator[tuple]:
    for number, run in enumerate(case.params["runs"]):
        subset = SubsetSource(Labels(np.array(run["targets"])), run["subset"], run["subset_starts"])
        yield f"indices of run {number}", subset.positions, run["indices"]
        yield f"labels of run {number}", subset.labels, run["labels"]


def many_classes(case: Case) -> Iterator[tuple]:
    counts = case.arrays["images_per_class"]
    source = Labels(np.repeat(np.arange(len(counts)), counts))
    for run in case.params["runs"]:
        count, start = run["subset"], run["subset_starts"]
        label = f"idx_{count}_{start}"
        yield label, SubsetSource(source, count, start).positions, case.arrays[label]


RUNNERS = {"attmask/subset_small": small_subsets, "attmask/subset_1000": many_classes}
