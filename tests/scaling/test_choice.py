"""The law and the objective are chosen by held-out error, the simplest of those that can't be told apart."""

from __future__ import annotations

import numpy as np

from megamup.scaling.choice import CANDIDATES, choose, has_outliers
from megamup.scaling.fit import Data
from megamup.scaling.laws.base import FloatArray
from megamup.scaling.laws.loss import CHINCHILLA, OVERTRAINING


def runs(noise: FloatArray | float = 0.0, alpha: float = 0.34, beta: float = 0.28) -> Data:
    """A grid of 6 sizes by 5 lengths after Hoffmann et al.'s law."""
    n, d = (axis.ravel() for axis in np.meshgrid(np.geomspace(1e7, 1e9, 6), np.geomspace(1e9, 1e11, 5)))
    loss = 1.69 + 406.4 / n**alpha + 410.7 / d**beta
    return Data(np.column_stack([n, d]), loss * np.exp(noise), np.arange(30))


def names(data: Data) -> list[str]:
    return [f"run{i}" for i in range(len(data.response))]


def size(data: Data) -> FloatArray:
    return np.asarray(data.inputs.prod(axis=1))


def gaussian(std: float, seed: int = 0) -> FloatArray:
    return std * np.random.default_rng(seed).standard_normal(30)


def test_without_outliers_least_squares_on_logs_stands() -> None:
    data = runs(gaussian(0.003))
    choice = choose([(CHINCHILLA, data, size(data))], CANDIDATES, names(data))
    assert choice.chosen.objective.name == "log"
    assert [candidate.objective.name for candidate in choice.tried] == list(CANDIDATES)
    assert not has_outliers(CHINCHILLA, data)


def test_with_outliers_huber_is_chosen() -> None:
    noise = gaussian(0.002)
    noise[[3, 11, 17]] += [0.12, 0.15, 0.1]  # diverged or cut short
    data = runs(noise)
    assert has_outliers(CHINCHILLA, data)
    choice = choose([(CHINCHILLA, data, size(data))], CANDIDATES, names(data))
    assert choice.chosen.objective.name == "huber"


def test_the_true_law_wins_where_the_simpler_errs() -> None:
    """With exponents far apart one exponent for both terms can't serve."""
    data = runs(gaussian(0.0005), alpha=0.6, beta=0.2)
    laws = [(law, data, size(data)) for law in (OVERTRAINING, CHINCHILLA)]
    choice = choose(laws, ("log",), names(data))
    assert choice.chosen.law is CHINCHILLA
    assert choice.reason == "least error on held-out larger runs"


def test_the_simpler_law_stands_where_both_serve() -> None:
    data = runs(gaussian(0.002), alpha=0.3, beta=0.3)
    choice = choose([(law, data, size(data)) for law in (CHINCHILLA, OVERTRAINING)], ("log",), names(data))
    assert choice.chosen.law is OVERTRAINING


def test_candidates_are_judged_on_the_same_folds() -> None:
    data = runs(gaussian(0.002))
    choice = choose([(law, data, size(data)) for law in (CHINCHILLA, OVERTRAINING)], CANDIDATES, names(data))
    assert len({frozenset(candidate.errors) for candidate in choice.tried}) == 1


def test_too_few_runs_are_chosen_by_their_residuals() -> None:
    data = runs().take(np.arange(30) % 4 == 0)
    choice = choose([(CHINCHILLA, data, size(data))], CANDIDATES, names(data)[:8])
    assert choice.chosen.objective.name in ("log", "huber")
    one = choose([(CHINCHILLA, data, size(data))], ("huber",), names(data)[:8])
    assert (one.chosen.objective.name, one.reason) == ("huber", "the only one asked for")
