"""The rolling-origin backtest: what it predicts from what, and that widened intervals hold."""

from __future__ import annotations

import math

import numpy as np
import pytest

from megamup.scaling.backtest import Backtest, Trial, backtest
from megamup.scaling.fit import Data, fit_law
from megamup.scaling.laws.base import FloatArray
from megamup.scaling.laws.loss import CHINCHILLA, power
from megamup.scaling.objective import get_objective
from megamup.scaling.uncertainty import predict

POWER = power("C")
LOG = get_objective("log")


def ladder(
    points: int = 10, *, noise: float = 0.002, bend: float = 0.0, seed: int = 0
) -> tuple[FloatArray, FloatArray]:
    """C over 4 decades and a loss of 2·C^-0.15 + 1.7, that bends away by `bend` a squared decade."""
    x = np.logspace(0, 4, points)
    loss = (2 * x**-0.15 + 1.7) * np.exp(bend * np.log10(x) ** 2)
    return x, loss * np.exp(noise * np.random.default_rng(seed).standard_normal(points))


def run(x: FloatArray, loss: FloatArray, runs: list[int] | None = None) -> Backtest:
    data = Data(x.reshape(-1, 1), loss, np.arange(len(x)) if runs is None else np.array(runs))
    return backtest(POWER, data, LOG, x, [f"run{i}" for i in range(len(x))])


def test_every_larger_run_is_predicted_from_at_least_half_of_the_smaller() -> None:
    x, loss = ladder()
    found = run(x, loss)
    assert found.folds == 5
    assert sorted({trial.fitted for trial in found.trials}) == [5, 6, 7, 8, 9]
    assert len(found.trials) == 5 + 4 + 3 + 2 + 1
    for trial in found.trials:
        below = x[: trial.fitted]
        fit = fit_law(POWER, below, loss[: trial.fitted])
        row = int(trial.run.removeprefix("run"))
        assert row >= trial.fitted
        assert trial.next_rung == (row == trial.fitted)
        assert trial.predicted == pytest.approx(fit.at([x[row]])[0], rel=1e-9)
        assert trial.distance == pytest.approx(x[row] / below[-1])
        prediction = predict(fit, [x[row]])
        assert (trial.low, trial.high) == pytest.approx((prediction.low[0], prediction.high[0]), rel=1e-6)


def test_runs_of_one_size_are_not_predicted_from_each_other() -> None:
    x, loss = ladder(12)
    found = run(np.repeat(x[:6], 2), loss)
    assert all(trial.fitted % 2 == 0 for trial in found.trials)


def test_points_of_a_run_are_held_out_together() -> None:
    x, loss = ladder(20)
    owner = [i // 2 for i in range(20)]
    found = run(x, loss, owner)
    for trial in found.trials:
        assert trial.fitted % 2 == 0


def trial(error: float, half: float, *, distance: float = 2.0, fitted: int = 5, next_rung: bool = True) -> Trial:
    """A prediction of 2 that is off by `error` in logs, with an interval of ± `half` in logs."""
    ends = (2 * math.exp(-half), 2 * math.exp(half))
    return Trial("r", fitted, distance, 2.0, 2 * math.exp(-error), *ends, next_rung=next_rung)


def test_inflation_is_the_conformal_quantile_of_what_was_needed() -> None:
    needed = np.linspace(0.1, 3.0, 39)
    found = Backtest(tuple(trial(0.01 * value, 0.01) for value in needed), 5)
    # The 38th of 39: ceil(0.95·40).
    assert found.inflation == pytest.approx(needed[37])
    assert found.held == pytest.approx(np.mean(needed <= 1))
    few = Backtest((trial(0.02, 0.01), trial(-0.03, 0.01)), 2)
    assert few.inflation == pytest.approx(3)
    assert Backtest((trial(0.001, 0.01),), 1).inflation == 1
    assert Backtest((), 0).inflation == 1


def test_a_law_that_bends_is_found_out_and_its_intervals_hold() -> None:
    """All trials err to one side; the fit's own interval misses a larger run, the widened one holds it."""
    x, loss = ladder(16, noise=0.0005, bend=0.012)
    found = run(x[:12], loss[:12])
    assert found.inflation > 1
    words = " ".join(found.warnings())
    assert "bias grows with distance: predictions lie below" in words
    assert "outside their 95% interval" in words
    prediction = predict(fit_law(POWER, x[:12], loss[:12]), x[13:14])
    assert not prediction.low[0] <= loss[13] <= prediction.high[0]
    wide = prediction.widened(found.inflation)
    assert wide.low[0] <= loss[13] <= wide.high[0]


def test_a_law_that_holds_is_not_said_to_bend() -> None:
    found = [run(*ladder(14, seed=seed)) for seed in range(12)]
    assert sum(one.drifts for one in found) <= 2
    assert np.median([one.inflation for one in found]) < 1.5


def test_too_few_runs_say_so() -> None:
    x, loss = ladder(4)
    found = run(x, loss)
    assert (found.folds, found.rms_error, found.held, found.inflation) == (0, None, None, 1.0)
    assert found.warnings()[0].startswith("no backtest: too few runs")


def test_a_cut_below_which_an_input_does_not_vary_is_left_out() -> None:
    n = np.repeat([1e6, 1e7], 8)
    d = np.tile(np.logspace(8, 9, 8), 2)
    loss = 1.7 + 100 / n**0.3 + 300 / d**0.3
    data = Data(np.column_stack([n, d]), loss, np.arange(16))
    found = backtest(CHINCHILLA, data, LOG, n * d, [str(i) for i in range(16)])
    # The eight smallest runs are all of one N.
    assert {trial.fitted for trial in found.trials}.isdisjoint(range(9))
    assert found.folds > 0
