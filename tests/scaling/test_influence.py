"""Influence of runs: against the textbook's formulas for a straight line, and against refits one by one."""

from __future__ import annotations

import numpy as np
import pytest

from megamup.errors import MegamupError
from megamup.scaling.fit import Fit, fit_law
from megamup.scaling.influence import flags, influence
from megamup.scaling.laws.base import Exponent, FloatArray, SumOfPowers, Term
from megamup.scaling.laws.loss import CHINCHILLA, OVERTRAINING

LINE = SumOfPowers("line", "L = a·C^b", ("C",), (Term("a", {"C": ("b", 1.0)}),), (Exponent("b", -3.0, 3.0),), "test")
"""In logs a straight line, for which every textbook formula is exact."""


def line_fit(seed: int = 0, n: int = 9, outlier: float = 0.0) -> Fit:
    random = np.random.default_rng(seed)
    x = np.geomspace(1, 1e4, n)
    log_y = 1 - 0.1 * np.log(x) + 0.01 * random.standard_normal(n)
    log_y[2] += outlier
    return fit_law(LINE, x, np.exp(log_y), starts=4)


def chinchilla_runs(n: int, seed: int = 0) -> tuple[FloatArray, FloatArray]:
    random = np.random.default_rng(seed)
    size = 10 ** random.uniform(7, 9, n)
    x = np.stack([size, size * 10 ** random.uniform(0.5, 2.5, n)], axis=1)
    loss = 1.7 + 400 * x[:, 0] ** -0.34 + 410 * x[:, 1] ** -0.28
    return x, loss * (1 + 0.003 * random.standard_normal(n))


def test_a_straight_line_has_the_textbook_s_diagnostics() -> None:
    fit = line_fit()
    found = influence(fit, [1e6])
    n, p = 9, 2
    basis = np.stack([np.ones(n), np.log(fit.inputs[:, 0])], axis=1)
    hat = np.diag(basis @ np.linalg.inv(basis.T @ basis) @ basis.T)
    residual = -fit.residuals  # measured - fitted
    s2 = float(residual @ residual) / (n - p)
    deleted_s2 = ((n - p) * s2 - residual**2 / (1 - hat)) / (n - p - 1)
    np.testing.assert_allclose(found.leverage, hat, rtol=1e-9)
    np.testing.assert_allclose(found.studentised, residual / np.sqrt(deleted_s2 * (1 - hat)), rtol=1e-6)
    np.testing.assert_allclose(found.cook, residual**2 / (p * s2) * hat / (1 - hat) ** 2, rtol=1e-6)
    # The prediction's shift: the change of a line's value at x, over its standard error with all runs.
    target = np.array([1.0, np.log(1e6)])
    inverse = np.linalg.inv(basis.T @ basis)
    change = (basis @ inverse @ target) * residual / (1 - hat)
    expected = change / np.sqrt(s2 * target @ inverse @ target)
    np.testing.assert_allclose(found.prediction_shifts[:, 0], expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("objective", ["log", "loss", "huber:0.003"])
def test_shifts_are_those_of_refits_one_by_one(objective: str) -> None:
    x, loss = chinchilla_runs(24)
    fit = fit_law(CHINCHILLA, x, loss, objective=objective)
    target = np.array([[1e10, 2e11]])
    found = influence(fit, target)
    shifts = []
    for i in range(3):
        refit = fit_law(CHINCHILLA, np.delete(x, i, axis=0), np.delete(loss, i), objective=objective)
        shifts.append(np.log(fit.at(target)[0] / refit.at(target)[0]))
    ratio = np.array(shifts) / found.prediction_shifts[:3, 0]
    np.testing.assert_allclose(ratio, ratio[0], rtol=1e-4)  # one standard error for all
    assert ratio[0] > 0


def test_an_outlier_is_named_and_nothing_else() -> None:
    names = [f"run{i}" for i in range(25)]
    assert flags(influence(line_fit(n=25), [1e6]), names, p=2) == []
    found = flags(influence(line_fit(n=25, outlier=0.1), [1e6]), names, p=2)
    assert len(found) == 1
    assert found[0].startswith("run2: it lies +")
    assert "standard errors off the law of the others: check the run" in found[0]
    assert "without it the whole fit moves (Cook's distance" in found[0]


def test_honest_runs_are_rarely_called_outliers() -> None:
    # Bonferroni: any of the nine in at most 5% of fits; of 200 fits at most 20 (chance 1%) speak.
    spoke = sum(
        any("off the law" in line for line in flags(influence(line_fit(seed)), [str(i) for i in range(9)], p=2))
        for seed in range(200)
    )
    assert 1 <= spoke <= 20


def test_the_only_run_off_the_ratio_is_pivotal() -> None:
    # As Gadre et al. 2024: a and b are told apart by one overtrained run.
    n = np.array([1e7, 8e7, 1.5e8, 4e8, 1e9, 1e7])
    x = np.stack([n, n * np.array([20, 20, 20, 20, 20, 320])], axis=1)
    loss = 1.8 + 166 * n**-0.27 + 367 * (6**0.5 * x[:, 1]) ** -0.27
    loss *= 1 + 0.003 * np.random.default_rng(0).standard_normal(6)
    found = influence(fit_law(OVERTRAINING, x, loss, objective="loss"))
    assert found.leverage[5] == pytest.approx(1)
    assert np.isnan(found.cook[5])
    assert np.all(np.isnan(found.parameter_shifts[5]))
    assert np.all(np.isfinite(found.cook[:5]))
    line = next(line for line in flags(found, list("abcdef"), p=4) if line.startswith("f: "))
    assert "some parameter hangs on it alone (leverage 1.000): repeat it" in line


def test_points_of_one_run_leave_together() -> None:
    x, loss = chinchilla_runs(20)
    doubled = fit_law(CHINCHILLA, np.repeat(x, 2, axis=0), np.repeat(loss, 2), runs=list(np.repeat(range(20), 2)))
    single = fit_law(CHINCHILLA, x, loss)
    two, one = influence(doubled), influence(single)
    assert two.runs == one.runs
    np.testing.assert_allclose(two.leverage, one.leverage, rtol=1e-6)
    # The same refits: cook differs by the noise's degrees of freedom (n - p) alone.
    np.testing.assert_allclose(two.cook, one.cook * (40 - 5) / (20 - 5), rtol=1e-4)


def test_exact_runs_have_no_influence() -> None:
    x = np.geomspace(1, 1e4, 7)
    found = influence(fit_law(LINE, x, 3 * x**-0.1), [1e6])
    assert np.all(np.abs(found.studentised) < 1e-3)
    assert flags(found, list("abcdefg"), p=2) == []


def test_240_points_are_refitted_at_once() -> None:
    x, loss = chinchilla_runs(240)
    loss[17] *= 1.03
    found = influence(fit_law(CHINCHILLA, x, loss), [[1e10, 2e11]])
    assert found.parameter_shifts.shape == (240, 5)
    assert int(np.argmax(np.abs(found.studentised))) == 17
    # Sum of leverages: the number of parameters.
    assert found.leverage.sum() == pytest.approx(5)


def test_as_many_runs_as_parameters_are_refused() -> None:
    fit = fit_law(LINE, [1.0, 10.0], [3.0, 2.5])
    with pytest.raises(MegamupError, match="2 runs determine the 2 parameters of the law line; expected 3 or more"):
        influence(fit)
