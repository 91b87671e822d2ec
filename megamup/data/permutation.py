"""A pseudo-random order of n things that is computed, not stored."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from functools import lru_cache

import numpy as np
import numpy.typing as npt

Indices = npt.NDArray[np.int64]
"""Positions, samples or tokens, by number. Shape (n,)."""

ROUNDS = 8  # even; for a handful of things not every order is equally likely, which no corpus is
BLOCK = 4096
"""Positions."""


class Permutation:
    """A pseudo-random bijection of range(n) that computes any of its values by itself: O(1) time and memory a value.

    The generalised Feistel cipher with cycle walking of Black and Rogaway, "Ciphers with Arbitrary Finite Domains"
    (CT-RSA 2002): indices are pairs (left, right) in a x b, with ab >= n as small as sqrt(n) allows. Each round adds a
    hash of one half to the other. A value that falls outside range(n) is permuted again until it is inside.

    Args:
        n: at least 1, less than 2^62.
        key: equal keys give equal permutations.
    """

    def __init__(self, n: int, key: str) -> None:
        self.n = n
        self._a = math.isqrt(n - 1) + 1
        self._b = math.ceil(n / self._a)
        digest = hashlib.blake2b(key.encode(), digest_size=8 * ROUNDS).digest()
        self._keys = np.frombuffer(digest, dtype="<u8").astype(np.uint64)

    def __call__(self, indices: Indices) -> Indices:
        """Where `indices`, each in range(n), go. Shape (indices,)."""
        values = self._encipher(indices.astype(np.uint64))
        while len(outside := np.flatnonzero(values >= self.n)):
            values[outside] = self._encipher(values[outside])
        return values.astype(np.int64)

    def _encipher(self, values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
        modulus, other = np.uint64(self._a), np.uint64(self._b)
        right, left = np.divmod(values, modulus)
        for key in self._keys:
            moved = left + mix(right ^ key) % modulus
            left, right = right, np.minimum(moved, moved - modulus)  # below zero wraps to a large number
            modulus, other = other, modulus
        return right * np.uint64(self._a) + left


class InBlocks:
    """A function of positions, computed for `BLOCK` of them at a time and remembered.

    A run asks for some positions after others, and NumPy takes as long for a few of them as for a thousand.

    Args:
        function: of positions (n,) to two arrays of that shape.
    """

    def __init__(self, function: Callable[[Indices], tuple[Indices, Indices]]) -> None:
        self._function = function
        self._block = lru_cache(maxsize=4)(self._compute)

    def _compute(self, block: int) -> tuple[Indices, Indices]:
        return self._function(np.arange(block * BLOCK, (block + 1) * BLOCK))

    def __call__(self, positions: Indices) -> tuple[Indices, Indices]:
        blocks = positions // BLOCK
        if len(positions) and (blocks == blocks[0]).all():
            found, places = self._block(int(blocks[0])), positions - blocks[0] * BLOCK
            return found[0][places], found[1][places]
        one, other = np.empty_like(positions), np.empty_like(positions)
        for block in sorted(set(blocks.tolist())):
            here = blocks == block
            places = positions[here] - block * BLOCK
            found = self._block(block)
            one[here], other[here] = found[0][places], found[1][places]
        return one, other


def mix(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """The finaliser of SplitMix64 (Steele, Lea and Flood 2014), in place: every input bit changes every output bit."""
    x ^= x >> np.uint64(30)
    x *= np.uint64(0xBF58476D1CE4E5B9)
    x ^= x >> np.uint64(27)
    x *= np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    return x
