"""Randomness that is counted, not consumed.

Every random number of a run is a pure function of a seed and of counters that say what it is for: the epoch, the
sample, the crop, the block. No generator is advanced, so nothing depends on how many workers or processes there are,
on the order in which they work, or on where a run was interrupted.

The mixer is the finaliser of splitmix64 (Steele, Lea, Flood: "Fast splittable pseudorandom number generators", 2014).
"""

import numpy as np

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MUL1 = np.uint64(0xBF58476D1CE4E5B9)
_MUL2 = np.uint64(0x94D049BB133111EB)


def _finalise(x: np.ndarray) -> np.ndarray:
    x = (x ^ (x >> np.uint64(30))) * _MUL1
    x = (x ^ (x >> np.uint64(27))) * _MUL2
    return x ^ (x >> np.uint64(31))


def counted_bits(*key: int | np.ndarray) -> np.ndarray:
    """64 random bits for every key: integers and integer arrays broadcast against each other -> uint64 array."""
    with np.errstate(over="ignore"):
        state = np.zeros((), np.uint64)
        for part in key:
            state = _finalise((state + _GOLDEN) ^ _finalise(np.asarray(part).astype(np.uint64) + _GOLDEN))
        return state


def counted_uniforms(*key: int | np.ndarray) -> np.ndarray:
    """Uniform numbers in [0, 1) for every key, float64, with the shape the key's parts broadcast to."""
    return (counted_bits(*key) >> np.uint64(11)) * 2.0**-53


def counted_seed(*key: int) -> int:
    """A seed in [0, 2**63) for generators that are not ours (torch, random)."""
    return int(counted_bits(*key) >> np.uint64(1))


class Permutation:
    """A random permutation of range(length) that is computed where it is read and never stored.

    A Feistel network is a bijection of [0, 4**bits); walking along its cycle until the value falls below ``length``
    restricts it to a bijection of range(length) (Black and Rogaway, "Ciphers with arbitrary finite domains", 2002).
    Reading n positions costs O(n) time and memory, whatever the length. A network on a few bits reaches some
    permutations more often than others, so short lengths are sorted by random numbers instead.
    """

    ROUNDS = 8
    SHORT = 2**14  # sorting so many takes about a millisecond

    def __init__(self, length: int, *key: int):
        if not 0 < length < 2**62:
            raise ValueError(f"a permutation needs a length in [1, 2**62), got {length}")
        self.length = length
        if length <= self.SHORT:
            self._table = np.argsort(counted_bits(*key, np.arange(length)), kind="stable")
            return
        self._table = None
        self._half_bits = np.uint64(-(-(length - 1).bit_length() // 2))
        self._half_mask = np.uint64((1 << int(self._half_bits)) - 1)
        self._round_keys = counted_bits(*key, np.arange(self.ROUNDS))

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, positions: int | np.ndarray) -> np.ndarray:
        """Images of ``positions`` (any shape, values in [0, length)) as int64 of the same shape.

        Raises IndexError for positions outside.
        """
        positions = np.asarray(positions)
        if positions.size and (positions.min() < 0 or positions.max() >= self.length):
            raise IndexError(f"positions {positions.min()}..{positions.max()} in a permutation of length {self.length}")
        if self._table is not None:
            return self._table[positions]
        values = self._encipher(positions.reshape(-1).astype(np.uint64))
        outside = np.flatnonzero(values >= self.length)
        while outside.size:
            values[outside] = self._encipher(values[outside])
            outside = outside[values[outside] >= self.length]
        return values.astype(np.int64).reshape(positions.shape)

    def _encipher(self, values: np.ndarray) -> np.ndarray:
        left, right = values >> self._half_bits, values & self._half_mask
        for round_key in self._round_keys:
            left, right = right, left ^ (_finalise(right + round_key) & self._half_mask)
        return (left << self._half_bits) | right
