import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pytest

from megamup.data.blend import Blend, Chain, exact_weights
from megamup.data.collate import collate
from megamup.data.permutation import Indices
from megamup.data.samples import Row
from megamup.errors import MegamupError

BOUND = 3.3599 / 2  # half the sum of the reciprocals of Fibonacci's numbers
FIBONACCI = [1, 1, 2, 3, 5, 8, 13, 21, 34, 55, 89, 144]


class Numbered:
    """A source whose sample i is (number, i, i, i)."""

    seq_len = 3

    def __init__(self, number: int, length: int) -> None:
        self.number, self.length = number, length

    def __len__(self) -> int:
        return self.length

    def read(self, indices: Indices, rows: Sequence[Row]) -> None:
        for index, row in zip(indices, rows, strict=True):
            row[:] = [self.number, index, index, index]

    def n_targets(self, indices: Indices) -> Indices:
        return np.full_like(indices, self.number)


def blend_of(weights: Sequence[float]) -> Blend:
    return Blend([Numbered(number, 5) for number in range(len(weights))], weights)


def largest_deviation(weights: Sequence[float], n: int) -> float:
    """Of any source's count from its share, over all prefixes of n samples."""
    which, _ = blend_of(weights).locate(np.arange(n))
    taken: npt.NDArray[np.int64] = np.cumsum(which[:, None] == np.arange(len(weights)), axis=0)
    ideal = np.arange(1, n + 1)[:, None] * (np.array(weights) / math.fsum(weights))
    return float(np.abs(taken - ideal).max())


@pytest.mark.parametrize(
    "weights",
    [
        [1.0],
        [1, 1],
        [7, 3],
        [0.9, 0.06, 0.04],
        [1] * 7,
        [100, 1, 1, 30],
        [1, 1e-4],
        FIBONACCI,
        [math.pi, math.e, math.sqrt(2), 1 / 3],
    ],
)
def test_shares_are_met_in_every_prefix(weights: list[float]) -> None:
    assert largest_deviation(weights, 3_000) < BOUND


def test_shares_are_met_for_random_weights() -> None:
    generator = np.random.default_rng(0)
    worst = 0.0
    for sources in range(2, 40):
        weights = np.exp(generator.normal(0, 2, sources)).tolist()
        worst = max(worst, largest_deviation(weights, 1_000))
    assert 0.8 < worst < BOUND


def test_two_sources_are_as_even_as_can_be() -> None:
    assert largest_deviation([0.7, 0.3], 1000) <= 0.5 + 1e-9


@pytest.mark.parametrize("weights", [[0.7, 0.2, 0.1], [5, 1e-9], [1 / 3, 0.123456789012345, 2]])
def test_shares_are_exact_far_out(weights: list[float]) -> None:
    """No period and no rounding of weights: after 10^15 samples the counts are still the shares, up to the bound."""
    exact, n = exact_weights(weights), 10**15
    counts = blend_of(weights).consumed(n)
    assert sum(counts) == n
    for count, weight in zip(counts, exact, strict=True):
        assert abs(count * sum(exact) - n * weight) <= BOUND * sum(exact)


def test_each_source_comes_in_order_without_gaps() -> None:
    blend = blend_of([0.5, 0.3, 0.2])
    which, indices = blend.locate(np.arange(950))
    for source in range(3):
        here = indices[which == source]
        assert here.tolist() == list(range(len(here)))
    for n in (0, 1, 17, 950):
        assert blend.consumed(n) == np.bincount(which[:n], minlength=3).tolist()
    assert len(blend) == 15


def test_any_positions_in_any_order() -> None:
    blend = blend_of([3, 2, 2])
    which, indices = blend.locate(np.arange(1000))
    places = np.array([999, 0, 5, 5, 400])
    assert [found.tolist() for found in blend.locate(places)] == [which[places].tolist(), indices[places].tolist()]
    assert [found.tolist() for found in blend.locate(np.empty(0, np.int64))] == [[], []]


def test_the_blend_stays_what_it_was() -> None:
    """Runs that began with another order could not be resumed."""
    which, indices = blend_of([3, 2, 1.5]).locate(np.array([0, 1, 2, 3, 4, 5, 6, 7, 10**12]))
    assert which.tolist() == [1, 0, 2, 0, 1, 0, 2, 0, 0]
    assert indices.tolist() == [0, 0, 0, 1, 1, 2, 1, 3, 461538461538]


def test_a_blend_reads_from_its_sources() -> None:
    blend = blend_of([3, 2, 2])
    which, indices = blend.locate(np.arange(20))
    batch = collate(blend, np.arange(20))
    assert batch.window.tolist() == [[w, i, i, i] for w, i in zip(which.tolist(), indices.tolist(), strict=True)]
    assert batch.n_targets.tolist() == [blend.seq_len] * len(which)  # samples to train on are whole


def test_weights_are_the_decimals_that_were_written() -> None:
    assert exact_weights([0.1, 0.2, 1e-6, 3]) == [100_000, 200_000, 1, 3_000_000]


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1, 0], "weight 0 of source 1: expected a positive number"),
        ([-1.0], "weight -1.0 of source 0"),
        ([1, float("nan")], "weight nan of source 1"),
        ([1, float("inf")], "weight inf of source 1"),
    ],
)
def test_weights_that_cannot_be_met(weights: list[float], message: str) -> None:
    with pytest.raises(MegamupError, match=message):
        blend_of(weights)


def test_chain() -> None:
    chain = Chain([Numbered(0, 2), Numbered(1, 3)])
    assert len(chain) == 5
    which, indices = chain.locate(np.arange(7))
    assert (which.tolist(), indices.tolist()) == ([0, 0, 1, 1, 1, 1, 1], [0, 1, 0, 1, 2, 3, 4])
    batch = collate(chain, np.array([3, 0]))
    assert batch.window.tolist() == [[1, 1, -1, -1], [0, -1, -1, -1]]  # but for what counts, and what it is read from
    assert batch.n_targets.tolist() == [1, 0]
    assert Chain([Numbered(4, 2)]).locate(np.arange(3))[0].tolist() == [0, 0, 0]
