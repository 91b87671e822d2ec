"""Profile intervals against a constrained search by scipy, the textbook's, and simulation."""

import numpy as np
import pytest
from scipy.optimize import curve_fit, minimize
from scipy.stats import binom
from scipy.stats import t as student

from megamup.errors import MegamupError
from megamup.scaling.fit import Fit, fit_law
from megamup.scaling.laws.base import FloatArray
from megamup.scaling.laws.loss import CHINCHILLA, power
from megamup.scaling.uncertainty import (
    bootstrap,
    covariance,
    no_interval_reason,
    noise_std,
    parameter_intervals,
    predict,
    quantity_intervals,
)

POWER = power("C")
TRUE_B, TRUE_C, NOISE = -0.15, 1.7, 0.003
X = np.logspace(0, 3, 6)


def true_loss(x: FloatArray) -> FloatArray:
    return np.asarray(2 * x**TRUE_B + TRUE_C)


def noisy_fit(seed: int, x: FloatArray = X, starts: int = 4) -> Fit:
    random = np.random.default_rng(seed)
    return fit_law(
        POWER, x, true_loss(x) * (1 + NOISE * random.standard_normal(len(x))), starts=starts, objective="loss"
    )


def region_limit(fit: Fit) -> float:
    """The sum of squares at the edge of the 95% region, by its definition."""
    dof = fit.degrees_of_freedom
    return float(fit.objective_value * (1 + student.ppf(0.975, dof) ** 2 / dof))


def searched_extreme(fit: Fit, index: int, sign: float) -> float:
    """The least (sign 1) or largest (sign -1) value of a parameter within the region, by SLSQP."""
    x, loss, limit = fit.inputs[:, 0], fit.loss, region_limit(fit)

    def quantity(p: FloatArray) -> float:
        return float(sign * p[index])

    def room(p: FloatArray) -> float:
        return float(1 - np.sum((p[0] * x ** p[2] + p[1] - loss) ** 2) / limit)

    # SLSQP stops short from some starts: the farthest of four.
    random = np.random.default_rng(0)
    best = quantity(np.array(list(fit.parameters.values())))
    for _ in range(4):
        found = minimize(
            quantity,
            np.array(list(fit.parameters.values())) * (1 + 1e-3 * random.standard_normal(3)),
            method="SLSQP",
            bounds=[(0, None), (0, None), (-3, -0.005)],
            constraints={"type": "ineq", "fun": room},
            options={"ftol": 1e-14, "maxiter": 2000},
        )
        if room(found.x) > -1e-6:
            best = min(best, float(found.fun))
    return sign * best


def refitted_rss(x: FloatArray, loss: FloatArray, start: list[float]) -> float:
    """The least sum of squares of the power law, by curve_fit."""
    parameters, _ = curve_fit(lambda x, a, c, b: a * x**b + c, x, loss, p0=start, xtol=1e-14, ftol=1e-14)
    a, c, b = parameters
    return float(np.sum((a * x**b + c - loss) ** 2))


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_parameter_intervals_are_the_extremes_over_the_region(seed: int) -> None:
    fit = noisy_fit(seed)
    for index, (low, high) in enumerate(parameter_intervals(fit).values()):
        assert low == pytest.approx(searched_extreme(fit, index, 1), rel=2e-4)
        assert high == pytest.approx(searched_extreme(fit, index, -1), rel=2e-4)


@pytest.mark.parametrize("target", [30.0, 1e4, 1e6])
def test_a_new_run_at_the_end_of_its_interval_takes_the_refit_to_the_edge_of_the_region(
    target: float,
) -> None:
    fit = noisy_fit(3)
    prediction = predict(fit, [target])
    for end in (prediction.low[0], prediction.high[0]):
        x, loss = np.append(fit.inputs[:, 0], target), np.append(fit.loss, end)
        assert refitted_rss(x, loss, list(fit.parameters.values())) == pytest.approx(region_limit(fit), rel=1e-4)


def test_many_points_give_the_textbook_intervals() -> None:
    # With much data the region is an ellipse: profile, delta method and t-quantile agree.
    x = np.logspace(0, 6, 400)
    fit = noisy_fit(0, x)
    matrix = covariance(fit)
    assert matrix is not None
    quantile = student.ppf(0.975, fit.degrees_of_freedom)
    for (low, high), value, variance in zip(
        parameter_intervals(fit).values(), fit.parameters.values(), np.diag(matrix), strict=True
    ):
        half = quantile * np.sqrt(variance)
        assert low == pytest.approx(value - half, abs=0.03 * half)
        assert high == pytest.approx(value + half, abs=0.03 * half)
    p = fit.parameters
    gradient = np.array([1e3 ** p["b"], 1.0, p["a"] * 1e3 ** p["b"] * np.log(1e3)])
    assert fit.residual_std is not None
    half = quantile * np.sqrt(gradient @ matrix @ gradient + fit.residual_std**2)
    prediction = predict(fit, [1e3])
    assert prediction.high[0] - prediction.loss[0] == pytest.approx(half, rel=0.01)
    assert prediction.loss[0] - prediction.low[0] == pytest.approx(half, rel=0.01)


def test_prediction_intervals_hold_a_new_run_as_often_as_they_say() -> None:
    repeats, target = 200, 1e4
    truth = float(true_loss(np.array([target]))[0])
    random = np.random.default_rng(7)
    held = 0
    for seed in range(repeats):
        prediction = predict(noisy_fit(seed, starts=3), [target])
        held += bool(prediction.low[0] <= truth * (1 + NOISE * random.standard_normal()) <= prediction.high[0])
    assert 0.90 <= held / repeats <= 0.99
    # And not by luck: 95% itself is within what 200 repeats can tell.
    assert 0.001 < binom.cdf(held, repeats, 0.95) < 0.999


def test_parameter_intervals_hold_the_truth_as_often_as_they_say() -> None:
    repeats = 60
    truth = {"a": 2.0, "b": TRUE_B, "c": TRUE_C}
    held = dict.fromkeys(truth, 0)
    for seed in range(repeats):
        for name, (low, high) in parameter_intervals(noisy_fit(seed, starts=3)).items():
            held[name] += (low is None or low <= truth[name]) and (high is None or truth[name] <= high)
    assert all(0.90 <= count / repeats <= 0.99 for count in held.values()), held


def test_band_falls_with_x_and_widens_beyond_the_runs() -> None:
    x = np.geomspace(1, 1e8, 60)
    prediction = predict(noisy_fit(4), x)
    assert np.all(np.diff(prediction.high) <= 0)
    assert np.all(np.diff(prediction.low) <= 0)
    assert np.all((prediction.low < prediction.loss) & (prediction.loss < prediction.high))
    width = (prediction.high - prediction.low)[x > X.max()]
    assert np.all(np.diff(width) > 0)


def test_intervals_do_not_depend_on_the_unit_of_x() -> None:
    fit = noisy_fit(5)
    scaled = fit_law(POWER, fit.inputs * 1e24, fit.loss, objective="loss")
    for name in ("b", "c"):
        assert parameter_intervals(scaled)[name] == pytest.approx(parameter_intervals(fit)[name], rel=1e-6)
    assert predict(scaled, [1e28]).high == pytest.approx(predict(fit, [1e4]).high, rel=1e-8)


def test_offset_interval_ends_at_zero() -> None:
    # Over less than a decade an offset of 0 fits as well as any.
    x = np.logspace(0, 0.7, 6)
    low, high = parameter_intervals(noisy_fit(0, x))["c"]
    assert low == 0
    assert high is None or high < true_loss(x).max()


def test_exact_points_have_intervals_of_no_width() -> None:
    fit = fit_law(POWER, X, true_loss(X), objective="loss")
    for name, (low, high) in parameter_intervals(fit).items():
        assert low == pytest.approx(fit.parameters[name], rel=1e-8)
        assert high == pytest.approx(fit.parameters[name], rel=1e-8)


def test_as_many_points_as_parameters_have_no_intervals() -> None:
    fit = noisy_fit(0, X[::2])
    assert parameter_intervals(fit) == dict.fromkeys("abc", (None, None))
    assert np.isnan(predict(fit, [1e4]).low[0])
    assert covariance(fit) is None
    assert no_interval_reason(fit) == (
        "3 points determine 3 parameters and leave none to measure the noise by: add a run"
    )


def test_relative_objective_scales_the_noise_with_the_loss() -> None:
    x = np.logspace(0, 6, 60)
    loss = noisy_fit(0, x).loss
    prediction = predict(fit_law(POWER, x, loss, objective="relative"), [1.0, 1e6])
    share = (prediction.high - prediction.low) / prediction.loss / 2
    assert share == pytest.approx([2 * NOISE, 2 * NOISE], rel=0.25)


def spread_runs(points: int = 240) -> Fit:
    """The Chinchilla law on runs spread as Hoffmann et al.'s, with 1% noise."""
    random = np.random.default_rng(0)
    n = np.exp(random.uniform(np.log(5e7), np.log(1.6e10), points))
    d = np.exp(random.uniform(np.log(1e18), np.log(3e22), points)) / 6 / n
    loss = (1.8172 + 482.01 / n**0.3478 + 2085.43 / d**0.3658) * np.exp(0.01 * random.standard_normal(points))
    return fit_law(CHINCHILLA, np.column_stack([n, d]), loss, starts=4)


@pytest.mark.parametrize("method", ["delta", "bootstrap"])
def test_methods_agree_where_the_region_is_an_ellipse(method: str) -> None:
    fit = spread_runs()
    profile, other = parameter_intervals(fit), parameter_intervals(fit, method=method)
    for name in fit.law.parameters:
        (low, high), (other_low, other_high) = profile[name], other[name]
        assert low is not None
        assert high is not None
        assert other_low == pytest.approx(low, abs=0.25 * (high - low))
        assert other_high == pytest.approx(high, abs=0.25 * (high - low))
    target = [(7e10, 1.4e12)]
    expected, found = predict(fit, target), predict(fit, target, method=method)
    assert found.high - found.low == pytest.approx(expected.high - expected.low, rel=0.15)
    quantities = fit.law.quantities({"C": 1e23})
    for (value, low, high), (same, below, above) in zip(
        quantity_intervals(fit, quantities).values(),
        quantity_intervals(fit, quantities, method=method).values(),
        strict=True,
    ):
        assert value == same
        ends = np.array([low, high, below, above], dtype=np.float64)
        assert np.log(ends[3] / ends[2]) == pytest.approx(np.log(ends[1] / ends[0]), rel=0.25)


def test_bootstrap_is_of_runs_and_repeats_with_its_seed() -> None:
    fit = spread_runs(40)
    curves = fit_law(
        CHINCHILLA, np.repeat(fit.inputs, 5, axis=0), np.repeat(fit.loss, 5), runs=np.repeat(np.arange(40), 5).tolist()
    )
    np.testing.assert_array_equal(bootstrap(fit, 20, seed=1), bootstrap(fit, 20, seed=1))
    # Five equal points of each run are no more evidence than one.
    np.testing.assert_allclose(bootstrap(curves, 20, seed=1), bootstrap(fit, 20, seed=1), rtol=1e-4, atol=1e-4)


def test_points_of_one_curve_are_no_independent_evidence() -> None:
    """With every run given five times the interval is that of the runs, not one that is √5 times shorter."""
    fit = noisy_fit(0, np.logspace(0, 3, 12))
    runs = np.repeat(np.arange(12), 5)
    curves = fit_law(
        POWER, np.repeat(fit.inputs, 5, axis=0), np.repeat(fit.loss, 5), objective="loss", runs=runs.tolist()
    )
    one, five = predict(fit, [1e4]), predict(curves, [1e4])
    assert five.high - five.low == pytest.approx(one.high - one.low, rel=0.25)


def test_an_unknown_method_is_refused() -> None:
    with pytest.raises(MegamupError, match="--intervals: 'jackknife' is unknown; expected one of profile, delta"):
        predict(noisy_fit(0), [1e4], method="jackknife")


def test_outliers_do_not_widen_the_interval_of_a_new_run_under_huber() -> None:
    fit = spread_runs()
    loss = fit.loss.copy()
    loss[:5] *= 1.3
    spoiled = fit_law(CHINCHILLA, fit.inputs, loss, objective="huber", starts=4)
    clean = fit_law(CHINCHILLA, fit.inputs, fit.loss, objective="huber", starts=4)
    assert noise_std(spoiled) == pytest.approx(noise_std(clean), rel=0.15)
    assert noise_std(clean) == pytest.approx(0.01, rel=0.15)
