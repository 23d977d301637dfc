from itertools import pairwise

import numpy as np
import pytest

from randomness import Permutation, counted_bits, counted_seed, counted_uniforms

SHORT = Permutation.SHORT
LENGTHS = [*range(1, 40), 63, 64, 65, 1000, SHORT - 1, SHORT, SHORT + 1, 2**15 + 3, 65536, 100_003]


def chi_square(counts: np.ndarray) -> float:
    """Standardised: about normal with mean 0 and deviation 1 when the counts are of equally likely outcomes."""
    expected = counts.sum() / counts.size
    freedom = counts.size - 1
    return (((counts - expected) ** 2 / expected).sum() - freedom) / np.sqrt(2 * freedom)


@pytest.mark.parametrize("length", LENGTHS)
def test_a_permutation_reaches_every_position_once(length):
    order = Permutation(length, 3, 1)[np.arange(length)]
    assert order.dtype == np.int64
    assert np.array_equal(np.sort(order), np.arange(length))


@pytest.mark.parametrize("length", [5, 1000, 50_000])
def test_a_permutation_is_the_same_in_any_chunks_and_shapes(length):
    order = Permutation(length, 7, 2)
    whole = order[np.arange(length)]
    parts = np.array_split(np.random.default_rng(0).permutation(length), 3)
    assert all(np.array_equal(order[part], whole[part]) for part in parts)
    assert np.array_equal(order[np.arange(4).reshape(2, 2)], whole[:4].reshape(2, 2))
    assert order[3].shape == () and order[3] == whole[3]
    assert order[np.arange(0)].shape == (0,)


def binned(values: np.ndarray, count: int) -> np.ndarray:
    """How many of ``values``, out of range(count), fall into each of at most 20 about equal bins."""
    bins = count if count < 100 else 20
    return np.bincount(values * bins // count, minlength=bins)


@pytest.mark.parametrize("length", [4, 5, 17, 50, 20_000])
def test_first_positions_are_uniform_over_seeds_and_independent_of_each_other(length):
    order = np.array([Permutation(length, seed, 0)[np.arange(3)] for seed in range(3000)])
    for position in range(3):
        assert abs(chi_square(binned(order[:, position], length))) < 4
    assert abs(chi_square(binned((order[:, 1] - order[:, 0]) % length - 1, length - 1))) < 4


def test_every_order_of_a_few_images_is_equally_likely():
    orders = [tuple(Permutation(4, seed, 0)[np.arange(4)]) for seed in range(12_000)]
    counts = np.unique(orders, axis=0, return_counts=True)[1]
    assert len(counts) == 24
    assert abs(chi_square(counts)) < 4


@pytest.mark.parametrize("length", [1000, 30_000])
def test_orders_of_different_epochs_are_unrelated(length):
    positions = np.arange(length)
    orders = [Permutation(length, 0, epoch)[positions] for epoch in range(20)]
    correlations = [np.corrcoef(a, b)[0, 1] for a, b in pairwise(orders)]
    assert max(map(abs, correlations)) < 5 / np.sqrt(length)
    assert abs(np.corrcoef(orders[0], positions)[0, 1]) < 5 / np.sqrt(length)


def test_reading_a_billion_long_order_needs_only_what_is_read():
    order = Permutation(10**9, 0, 0)
    images = order[np.arange(500_000_000, 500_001_000)]
    assert len(np.unique(images)) == 1000
    assert images.min() < 10**8 < 9 * 10**8 < images.max()


@pytest.mark.parametrize("position", [-1, 10, [0, 10]])
def test_a_position_outside_is_an_error(position):
    with pytest.raises(IndexError):
        Permutation(10, 0)[position]


@pytest.mark.parametrize("length", [0, -3, 2**62])
def test_an_impossible_length_is_an_error(length):
    with pytest.raises(ValueError):
        Permutation(length, 0)


def test_uniform_numbers_are_uniform_and_depend_on_every_part_of_the_key():
    uniforms = counted_uniforms(1, np.arange(200)[:, None], np.arange(300))
    assert uniforms.shape == (200, 300)
    assert uniforms.min() >= 0 and uniforms.max() < 1
    assert abs(chi_square(np.histogram(uniforms, bins=100, range=(0, 1))[0])) < 4
    assert abs(np.corrcoef(uniforms[:-1].ravel(), uniforms[1:].ravel())[0, 1]) < 0.02
    assert abs(np.corrcoef(uniforms[:, :-1].ravel(), uniforms[:, 1:].ravel())[0, 1]) < 0.02
    assert len(np.unique(uniforms)) == uniforms.size
    assert counted_bits(1, 2) != counted_bits(2, 1)


def test_numbers_of_a_key_do_not_depend_on_what_is_asked_with_it():
    many = counted_uniforms(5, np.arange(10)[:, None], np.arange(7))
    assert counted_uniforms(5, 3, 4) == many[3, 4]
    assert np.array_equal(counted_uniforms(5, 3, np.arange(7)), many[3])


def test_seeds_for_other_generators_fit_in_63_bits():
    seeds = {counted_seed(0, index) for index in range(1000)}
    assert len(seeds) == 1000
    assert all(isinstance(seed, int) and 0 <= seed < 2**63 for seed in seeds)
