"""Several sources as one: blended by weight for training, one after the other for evaluation."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate

import numpy as np
import numpy.typing as npt

from megamup.data.samples import SampleSource
from megamup.data.tokenizer import Ids
from megamup.errors import MegamupError

PERIOD = 10_000


def quotas(weights: Sequence[float], period: int = PERIOD) -> npt.NDArray[np.int64]:
    """Samples of each source in a period: weights rounded by largest remainder, on the shortest period.

    Returns:
        Shape (sources,), each >= 1; they add up to the period or to a divisor of it.

    Raises:
        MegamupError: a weight isn't positive and finite, or too small to get one sample in a period.
    """
    for position, weight in enumerate(weights):
        if not (math.isfinite(weight) and weight > 0):
            raise MegamupError(f"weight {weight} of source {position}: expected a positive number")
    shares = np.asarray(weights, dtype=np.float64) / math.fsum(weights) * period
    counts = np.floor(shares).astype(np.int64)
    by_remainder = np.argsort(counts - shares, kind="stable")
    counts[by_remainder[: period - counts.sum()]] += 1
    if counts.min() == 0:
        position = int(np.argmin(counts))
        raise MegamupError(
            f"weight {weights[position]} of source {position} is too small: its share is "
            f"{shares[position] / period:.2g}, less than one sample in {period:,}; raise it or leave it out"
        )
    return counts // int(np.gcd.reduce(counts))


def interleave(counts: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Which source comes at each place of a period, each spread as evenly as possible. Shape (period,).

    The j-th of a source's q samples is due at (j + 1/2) / q of the period; the earliest due comes next, the
    earlier source among equals.
    """
    sources = np.repeat(np.arange(len(counts)), counts)
    due = np.concatenate([(np.arange(count) + 0.5) / count for count in counts])
    return sources[np.argsort(due, kind="stable")]


class Blend:
    """A stream of samples from several sources, with exact shares in every period.

    Position p of the stream is a pure O(1) function of p: no state, the same on every rank and after a
    restart.

    Raises:
        MegamupError: see `quotas`.
    """

    def __init__(self, sources: Sequence[SampleSource], weights: Sequence[float]) -> None:
        self.sources = list(sources)
        self.seq_len = sources[0].seq_len
        self.quotas = quotas(weights)
        self._pattern = interleave(self.quotas)  # (period,)
        self._rank = np.empty_like(self._pattern)  # (period,) how often its source came before in the period
        for source, count in enumerate(self.quotas):
            self._rank[self._pattern == source] = np.arange(count)

    def __len__(self) -> int:
        """Samples of all sources together."""
        return sum(map(len, self.sources))

    def locate(self, position: int) -> tuple[int, int]:
        """(source, index in that source) at `position` of the stream."""
        periods, place = divmod(position, len(self._pattern))
        source = int(self._pattern[place])
        return source, periods * int(self.quotas[source]) + int(self._rank[place])

    def sample(self, index: int) -> Ids:
        source, index = self.locate(index)
        return self.sources[source].sample(index)

    def n_targets(self, index: int) -> int:
        source, index = self.locate(index)
        return self.sources[source].n_targets(index)


class Chain:
    """Sources one after the other, each once; past the end comes the last source's padding."""

    def __init__(self, sources: Sequence[SampleSource]) -> None:
        self.sources = list(sources)
        self.seq_len = sources[0].seq_len
        self._starts = list(accumulate(map(len, sources), initial=0))

    def __len__(self) -> int:
        return self._starts[-1]

    def locate(self, position: int) -> tuple[int, int]:
        """(source, index in that source) at `position`."""
        source = min(bisect_right(self._starts, position), len(self.sources)) - 1
        return source, position - self._starts[source]

    def sample(self, index: int) -> Ids:
        source, index = self.locate(index)
        return self.sources[source].sample(index)

    def n_targets(self, index: int) -> int:
        source, index = self.locate(index)
        return self.sources[source].n_targets(index)
