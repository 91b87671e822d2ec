from collections import Counter

import numpy as np
import pytest

from megamup.data.blend import PERIOD, Blend, Chain, interleave, quotas
from megamup.data.tokenizer import Ids
from megamup.errors import MegamupError


class Numbered:
    """A source whose sample i is (number, i, i, ...)."""

    seq_len = 3

    def __init__(self, number: int, length: int) -> None:
        self.number, self.length = number, length

    def __len__(self) -> int:
        return self.length

    def sample(self, index: int) -> Ids:
        return np.array([self.number, index, index, index])

    def n_targets(self, index: int) -> int:
        return self.number


def test_quotas_are_the_nearest_and_add_up() -> None:
    assert quotas([0.7, 0.3]).tolist() == [7, 3]
    assert quotas([5]).tolist() == [1]
    assert quotas([2, 2, 4]).tolist() == [1, 1, 2]
    assert quotas([1, 1, 1]).tolist() == [3334, 3333, 3333]
    generator = np.random.default_rng(0)
    for sources in range(1, 30):
        weights = generator.uniform(0.01, 1, sources)
        counts = quotas(weights.tolist())
        assert PERIOD % counts.sum() == 0
        assert np.abs(counts / counts.sum() - weights / weights.sum()).max() < 1 / PERIOD


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1, 0], "weight 0 of source 1: expected a positive number"),
        ([-1.0], "weight -1.0 of source 0"),
        ([1, float("nan")], "weight nan of source 1"),
        ([1, float("inf")], "weight inf of source 1"),
        ([1, 1e-6], "weight 1e-06 of source 1 is too small: its share is 1e-06"),
    ],
)
def test_weights_that_cannot_be_met(weights: list[float], message: str) -> None:
    with pytest.raises(MegamupError, match=message):
        quotas(weights)


@pytest.mark.parametrize("weights", [[1, 1], [7, 3], [0.9, 0.06, 0.04], [1] * 7, [100, 1, 1, 30]])
def test_shares_are_even_everywhere_and_exact_in_a_period(weights: list[float]) -> None:
    counts = quotas(weights)
    pattern = interleave(counts)
    period = len(pattern)
    taken = np.stack([np.cumsum(pattern == source) for source in range(len(counts))], axis=1)
    ideal = np.arange(1, period + 1)[:, None] * counts / period
    assert taken[-1].tolist() == counts.tolist()
    assert np.abs(taken - ideal).max() <= len(counts) / 2


def test_blend_takes_each_source_in_order_without_gaps() -> None:
    blend = Blend([Numbered(0, 5), Numbered(1, 5), Numbered(2, 5)], [0.5, 0.3, 0.2])
    located = [blend.locate(position) for position in range(95)]
    for source in range(3):
        indices = [index for where, index in located if where == source]
        assert indices == list(range(len(indices)))
    assert Counter(source for source, _ in located[:90]) == {0: 45, 1: 27, 2: 18}
    assert blend.sample(94).tolist() == [located[94][0], *[located[94][1]] * 3]
    assert blend.n_targets(94) == located[94][0]
    assert len(blend) == 15


def test_blend_far_out_costs_nothing() -> None:
    blend = Blend([Numbered(0, 5), Numbered(1, 5)], [0.75, 0.25])
    position = 4 * 10**14
    source, index = blend.locate(position)
    assert index == {0: 3 * 10**14, 1: 10**14}[source]


def test_chain() -> None:
    chain = Chain([Numbered(0, 2), Numbered(1, 3)])
    assert len(chain) == 5
    assert [chain.locate(position) for position in range(7)] == [(0, 0), (0, 1), *[(1, i) for i in range(5)]]
    assert chain.sample(3).tolist() == [1, 1, 1, 1]
    assert chain.n_targets(3) == 1
