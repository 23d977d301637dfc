"""Intervals hold what they say, and two networks on the same images differ only where they do."""

import numpy as np
import pytest

from evaluation.confidence import compare_paired, interval_of


def test_an_interval_is_that_of_a_bootstrap_over_test_images():
    right = np.arange(400) < 300
    low, high = interval_of(75.0, 400)
    rng = np.random.default_rng(1)
    drawn = [100 * right[rng.integers(0, 400, 400)].mean() for _ in range(3000)]
    assert (low, high) == pytest.approx(tuple(np.percentile(drawn, [2.5, 97.5])), abs=0.5)
    assert interval_of(75.0, 400) == (low, high) and interval_of(75.0, 40_000).low > 74.5
    assert interval_of(100.0, 7) == (100, 100)


def test_the_same_images_show_a_difference_that_two_intervals_hide():
    theirs = np.arange(1000) < 700
    ours = theirs.copy()
    ours[700:715] = True  # 15 more, and none lost
    found = compare_paired(ours, theirs)
    assert interval_of(71.5, 1000).low < 70 and found.difference == pytest.approx(1.5)
    assert found.interval.low > 0 and str(found).endswith("they differ")
    assert (found.only_ours, found.only_theirs) == (15, 0)
    turned = compare_paired(theirs, ours)
    assert turned.difference == -found.difference and turned.interval.high < 0
    same = compare_paired(ours, ours)
    assert same.difference == 0 and "no difference is shown" in str(same)
    with pytest.raises(ValueError):
        compare_paired(ours, ours[:5])
