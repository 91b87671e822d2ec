import hashlib
import math
import struct
from collections import Counter

import numpy as np
import pytest

from megamup.data.permutation import BLOCK, InBlocks, Indices, Permutation

MASK = (1 << 64) - 1


def by_definition(n: int, key: str, index: int) -> int:
    """The cipher one value at a time, with Python's integers."""
    keys = struct.unpack("<8Q", hashlib.blake2b(key.encode(), digest_size=64).digest())
    a = math.isqrt(n - 1) + 1
    b = math.ceil(n / a)
    while True:
        right, left = divmod(index, a)
        modulus, other = a, b
        for round_key in keys:
            x = right ^ round_key
            x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
            x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
            left, right = right, (left + (x ^ (x >> 31))) % modulus
            modulus, other = other, modulus
        index = right * a + left
        if index < n:
            return index


@pytest.mark.parametrize("n", [1, 2, 3, 10, 624, 10**6 + 3, 2**31 - 1, 10**12 + 39, 2**40, 2**61 + 1])
def test_arrays_give_what_the_definition_says(n: int) -> None:
    indices = np.unique(np.random.default_rng(0).integers(n, size=300))
    values = Permutation(n, "key")(indices)
    assert values.dtype == np.int64
    assert values.tolist() == [by_definition(n, "key", index) for index in indices.tolist()]


def test_it_is_a_bijection() -> None:
    for n in range(1, 600):
        assert sorted(Permutation(n, "key")(np.arange(n)).tolist()) == list(range(n))
    n = 1_000_003
    assert np.bincount(Permutation(n, "key")(np.arange(n))).max() == 1


def test_indices_stay_as_they_were() -> None:
    indices = np.arange(100)
    Permutation(100, "key")(indices)
    assert (indices == np.arange(100)).all()
    assert Permutation(100, "key")(np.empty(0, np.int64)).shape == (0,)


@pytest.mark.parametrize("n", [2**31 - 1, 10**12 + 39, 2**40])
def test_large_permutations_are_uniform(n: int) -> None:
    """Neighbours land anywhere: their values, and the steps between them, are uniform on [0, n)."""
    values = Permutation(n, "key")(np.arange(20_000))
    for numbers in (values, np.diff(values) % n):
        counts = np.bincount(numbers * 100 // n, minlength=100)
        assert ((counts - len(numbers) / 100) ** 2).sum() / (len(numbers) / 100) < 149  # chi2, 99 degrees: p = 0.001


def test_permutations_of_few_things_all_occur() -> None:
    counts = Counter(tuple(Permutation(4, f"{key}")(np.arange(4)).tolist()) for key in range(2400))
    assert len(counts) == 24
    assert min(counts.values()) > 50
    assert max(counts.values()) < 150


def test_it_stays_what_it_was() -> None:
    """Runs that began with another order could not be resumed."""
    assert Permutation(100, "key")(np.array([0, 1, 2, 99])).tolist() == [63, 88, 80, 66]
    assert Permutation(10**12, "key")(np.array([0, 10**11])).tolist() == [39045978313, 655315563784]


def test_in_blocks_is_the_function_itself() -> None:
    """Whatever is asked for in one call, and however often a block is computed."""
    calls: list[int] = []

    def function(positions: Indices) -> tuple[Indices, Indices]:
        calls.append(len(positions))
        return positions**2, -positions

    remembered = InBlocks(function)
    rng = np.random.default_rng(0)
    for positions in (np.arange(10), np.arange(BLOCK - 3, BLOCK + 3), rng.integers(0, 20 * BLOCK, 1000), np.arange(0)):
        squares, negatives = remembered(positions)
        assert squares.tolist() == (positions**2).tolist()
        assert negatives.tolist() == (-positions).tolist()
    calls.clear()
    for step in range(100):
        remembered(np.arange(8) + 8 * step)
    assert len(calls) <= 1
