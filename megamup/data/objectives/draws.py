"""Random numbers that are functions of (key, sample, place): the same on every rank, in any order, after a restart."""

from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt

from megamup.data.permutation import Indices, mix

Bits = npt.NDArray[np.uint64]
GOLDEN = np.uint64(0x9E3779B97F4A7C15)
"""The step of SplitMix64 (Steele, Lea and Flood 2014): 2^64 over the golden ratio, made odd."""


class Draws:
    """Independent uniform bits for each sample, purpose and place: SplitMix64 streams that start at hashes.

    NumPy's generators have a state to set up for every sample, and streams that may change between versions.

    Args:
        key: equal keys give equal numbers.
    """

    def __init__(self, key: str) -> None:
        self._key = key

    def bits(self, purpose: str, samples: Indices, n: int = 1) -> Bits:
        """64 random bits each. Shape (samples, n)."""
        digest = hashlib.blake2b(f"{self._key} {purpose}".encode(), digest_size=8).digest()
        start = np.uint64(int.from_bytes(digest, "little"))
        states = mix(mix(samples.astype(np.uint64) + start) ^ start)
        return mix(states[:, None] + GOLDEN * np.arange(1, n + 1, dtype=np.uint64))

    def uniform(self, purpose: str, samples: Indices, n: int = 1) -> npt.NDArray[np.float64]:
        """Numbers in [0, 1). Shape (samples, n)."""
        return (self.bits(purpose, samples, n) >> np.uint64(11)).astype(np.float64) * 2.0**-53

    def below(self, purpose: str, samples: Indices, bound: int, n: int = 1) -> Indices:
        """Integers in range(bound), each as likely up to bound / 2^64. Shape (samples, n)."""
        return (self.bits(purpose, samples, n) % np.uint64(bound)).astype(np.int64)
