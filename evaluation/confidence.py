"""How sure an accuracy is: intervals from a bootstrap over test images, and two networks compared on the same images.

Most tables of this field differ by less than their noise. Resampling the test images with replacement makes an accuracy
a binomial share, and the difference of two networks on the same images a multinomial one (Efron and Tibshirani 1993,
chapter 13); so the draws are made of counts, and cost the same for any number of images.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

DRAWS, LEVEL = 10_000, 95  # per cent
_SEED = 0x95


class Interval(NamedTuple):
    """In percent."""

    low: float
    high: float

    def __str__(self) -> str:
        return f"95 %: {self.low:.2f} to {self.high:.2f}"


def _between(draws: np.ndarray) -> Interval:
    tail = (100 - LEVEL) / 2
    return Interval(*(float(value) for value in np.percentile(draws, [tail, 100 - tail])))


def interval_of(percent: float, images: int, seed: int = 0) -> Interval:
    """Of an accuracy over so many test images."""
    right = round(percent * images / 100)
    return _between(np.random.default_rng((_SEED, seed)).binomial(images, right / images, DRAWS) * (100 / images))


class Comparison(NamedTuple):
    """Ours minus theirs, in percent of the images, and images that only one of them gets right."""

    difference: float
    interval: Interval
    only_ours: int
    only_theirs: int

    def __str__(self) -> str:
        differs = "no difference is shown" if self.interval.low <= 0 <= self.interval.high else "they differ"
        return (
            f"{self.difference:+.2f} ({self.interval}; {self.only_ours} images only here, {self.only_theirs} only "
            f"there): {differs}"
        )


def compare_paired(ours: Sequence[bool], theirs: Sequence[bool], seed: int = 0) -> Comparison:
    """Two classifiers on the same test images, of which each gets some right."""
    ours, theirs = np.asarray(ours, bool), np.asarray(theirs, bool)
    if len(ours) != len(theirs) or not len(ours):
        raise ValueError(f"{len(ours)} and {len(theirs)} images cannot be compared one by one")
    counts = np.array([(ours & ~theirs).sum(), (theirs & ~ours).sum(), (ours == theirs).sum()])
    drawn = np.random.default_rng((_SEED, seed)).multinomial(len(ours), counts / len(ours), DRAWS)
    scale = 100 / len(ours)
    found = _between((drawn[:, 0] - drawn[:, 1]) * scale)
    return Comparison(float(counts[0] - counts[1]) * scale, found, int(counts[0]), int(counts[1]))
