"""The solver against known parameters, scipy's curve_fit and minimize, and nnls."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from scipy.optimize import curve_fit, minimize, nnls
from scipy.special import huber

from megamup.errors import MegamupError
from megamup.scaling.fit import Data, Fit, fit_law, search, warnings_of
from megamup.scaling.laws.base import FloatArray
from megamup.scaling.laws.loss import CHINCHILLA, power
from megamup.scaling.objective import get_objective
from megamup.scaling.projection import Projected, faces

POWER = power("C")


def ladder(start: float, *, b: float = -0.12, c: float = 1.8, points: int = 6, decades: float = 3) -> FloatArray:
    """(2, points): x and a loss that is 2 above the offset at the smallest x."""
    x = start * np.logspace(0, decades, points)
    return np.stack([x, 2 * (x / start) ** b + c])


def noisy(start: float, seed: int = 0, points: int = 8) -> FloatArray:
    x, loss = ladder(start, points=points)
    return np.stack([x, loss * (1 + 0.003 * np.random.default_rng(seed).standard_normal(points))])


def grid(points: int = 240, noise: float = 0.0, seed: int = 0) -> tuple[FloatArray, FloatArray]:
    """N and D (points, 2) spread as Hoffmann et al.'s runs, and losses by Besiroglu et al.'s parameters."""
    random = np.random.default_rng(seed)
    n = np.exp(random.uniform(np.log(5e7), np.log(1.6e10), points))
    d = np.exp(random.uniform(np.log(1e18), np.log(3e22), points)) / 6 / n
    loss = 1.8172 + 482.01 / n**0.3478 + 2085.43 / d**0.3658
    return np.column_stack([n, d]), loss * np.exp(noise * random.standard_t(3, points))


@pytest.mark.parametrize("start", [1e6, 1e15, 1e24])
@pytest.mark.parametrize("b", [-0.05, -0.34, -1.2])
def test_exact_points_give_back_the_parameters(start: float, b: float) -> None:
    x, loss = ladder(start, b=b)
    fit = fit_law(POWER, x, loss, objective="loss")
    assert fit.parameters["a"] == pytest.approx(2 * start**-b, rel=1e-8)
    assert fit.parameters["b"] == pytest.approx(b, rel=1e-9)
    assert fit.parameters["c"] == pytest.approx(1.8, rel=1e-9)
    assert fit.diagnostics.share_of_starts_at_optimum == 1
    assert warnings_of(fit) == []


def test_agrees_with_curve_fit() -> None:
    # curve_fit gets x near 1 and a start near the answer, which is what it needs to get there.
    x, loss = noisy(1.0)
    start = (2.0, 1.8, -0.1)
    expected, _ = curve_fit(lambda x, a, c, b: a * x**b + c, x, loss, p0=start, xtol=1e-14, ftol=1e-14)
    fit = fit_law(POWER, x, loss, objective="loss")
    assert list(fit.parameters.values()) == pytest.approx(list(expected), rel=1e-5)
    residual = loss - (expected[0] * x ** expected[2] + expected[1])
    assert fit.objective_value <= np.sum(residual**2) * (1 + 1e-12)


def test_relative_objective_agrees_with_weighted_curve_fit() -> None:
    x, loss = noisy(1.0)
    start = (2.0, 1.8, -0.1)
    expected, _ = curve_fit(lambda x, a, c, b: a * x**b + c, x, loss, p0=start, sigma=loss, xtol=1e-14, ftol=1e-14)
    fit = fit_law(POWER, x, loss, objective="relative")
    assert list(fit.parameters.values()) == pytest.approx(list(expected), rel=1e-5)
    assert fit.residual_std == pytest.approx(np.sqrt(np.sum(((fit.fitted - loss) / loss) ** 2) / 5))


@pytest.mark.parametrize("scale", [1e-6, 1e9, 1e24])
def test_unit_of_x_does_not_matter(scale: float) -> None:
    x, loss = noisy(1.0)
    fit, scaled = fit_law(POWER, x, loss, objective="loss"), fit_law(POWER, x * scale, loss, objective="loss")
    assert scaled.parameters["b"] == pytest.approx(fit.parameters["b"], rel=1e-7)
    assert scaled.parameters["c"] == pytest.approx(fit.parameters["c"], rel=1e-7)
    assert scaled.at([1e5 * scale]) == pytest.approx(fit.at([1e5]), rel=1e-9)


def test_gradient_vanishes_and_every_start_arrives() -> None:
    for seed in range(5):
        diagnostics = fit_law(POWER, *noisy(1e15, seed), objective="loss").diagnostics
        assert diagnostics.gradient_norm < 1e-8  # of the residuals' size, which is 0.3% of the losses'
        assert diagnostics.share_of_starts_at_optimum == 1
        assert diagnostics.at_bound == ()


def test_projected_jacobian_is_that_of_finite_differences() -> None:
    x, loss = grid(40, noise=0.01)
    data = Data(x, loss, np.arange(40))
    reduced = Projected(CHINCHILLA, data.log_x, loss, 1 / loss)
    # Inside every face: all terms, without the offset, without a term.
    for exponents in (np.array([0.4, 0.3]), np.array([0.05, 0.04]), np.array([0.9, 2.5])):
        _, jacobian = reduced(exponents[np.newaxis])
        for index, step in enumerate(1e-6 * np.eye(2)):
            ahead, behind = (reduced((exponents + way * step)[np.newaxis])[0][0] for way in (1, -1))
            np.testing.assert_allclose(jacobian[0, :, index], (ahead - behind) / 2e-6, rtol=1e-5, atol=1e-9)


def test_best_face_is_nonnegative_least_squares() -> None:
    random = np.random.default_rng(1)
    for _ in range(50):
        basis, y = random.standard_normal((6, 3)), np.abs(random.standard_normal(6))
        expected, norm = nnls(basis, y)
        if not expected.any():
            continue
        feasible = [face for face in faces(basis, y) if np.all(face.coefficients >= 0)]
        best = min(feasible, key=lambda face: float(face.rss))
        found = np.zeros(3)
        found[list(best.columns)] = best.coefficients
        np.testing.assert_allclose(found, expected, atol=1e-10)
        assert best.rss == pytest.approx(norm**2)


@pytest.mark.parametrize("objective", ["loss", "relative", "log", "huber"])
def test_five_parameters_are_recovered_and_every_start_arrives(objective: str) -> None:
    x, loss = grid()
    fit = fit_law(CHINCHILLA, x, loss, objective=objective, starts=100)
    published = {"E": 1.8172, "A": 482.01, "B": 2085.43, "alpha": 0.3478, "beta": 0.3658}
    assert fit.parameters == pytest.approx(published, rel=1e-8)
    assert fit.diagnostics.share_of_starts_at_optimum >= 0.99
    assert warnings_of(fit) == []


@pytest.mark.parametrize("objective", ["loss", "log", "huber", "huber:0.0001"])
def test_every_start_arrives_where_there_is_noise(objective: str) -> None:
    diagnostics = fit_law(CHINCHILLA, *grid(noise=0.01), objective=objective, starts=100).diagnostics
    assert diagnostics.share_of_starts_at_optimum >= 0.99
    assert diagnostics.gradient_norm < 1e-7


def huber_of(theta: FloatArray, data: Data, delta: float = 1e-3) -> float:
    """Hoffmann et al.'s objective as they write it, with scipy's Huber loss."""
    e, a, b, alpha, beta = theta
    n, d = data.log_x.T
    value = np.logaddexp(np.logaddexp(e, a - alpha * n), b - beta * d)
    return float(np.sum(huber(delta, value - np.log(data.response))))


def test_no_search_by_nelder_mead_from_the_optimum_finds_better() -> None:
    fit = fit_law(CHINCHILLA, *grid(noise=0.01), objective="huber")
    assert fit.objective_value == pytest.approx(huber_of(fit.theta, fit.data), rel=1e-12)
    random = np.random.default_rng(0)
    for _ in range(5):
        start = fit.theta + 0.01 * random.standard_normal(5)
        options = {"maxiter": 20_000, "maxfev": 20_000, "xatol": 1e-12, "fatol": 1e-16}
        found = minimize(huber_of, start, args=(fit.data,), method="Nelder-Mead", options=options)  # type: ignore[call-overload]
        assert fit.objective_value <= found.fun * (1 + 1e-9)


def test_weights_are_repetitions() -> None:
    x, loss = grid(30, noise=0.01)
    data = Data(x, loss, np.arange(30))
    counts = np.random.default_rng(0).integers(0, 3, 30)
    repeated = fit_law(CHINCHILLA, np.repeat(x, counts, axis=0), np.repeat(loss, counts))
    objective = get_objective("log")
    begin = fit_law(CHINCHILLA, x, loss).theta[np.newaxis]
    theta, _ = search(CHINCHILLA, data, objective, begin, counts[np.newaxis].astype(float))
    found = dict(zip(CHINCHILLA.parameters, CHINCHILLA.public(theta[0], data.log_centre), strict=True))
    assert found == pytest.approx(repeated.parameters, rel=1e-6)


def test_loss_that_rises_with_scale_is_at_its_bound_and_says_so() -> None:
    x, loss = ladder(1e6)
    fit = fit_law(POWER, x, loss[::-1], objective="loss")
    assert "a" in fit.diagnostics.at_bound
    assert fit.parameters["a"] == 0
    assert "a lies on its bound 0" in warnings_of(fit)[0]


def test_pure_power_law_puts_the_offset_at_its_bound() -> None:
    x, _ = ladder(1.0)
    fit = fit_law(POWER, x, 3 * x**-0.1 - 0.05)
    assert fit.parameters["c"] == 0
    assert fit.diagnostics.at_bound == ("c",)


def test_a_step_puts_the_exponent_at_its_bound() -> None:
    x, _ = ladder(1e6)
    fit = fit_law(POWER, x, [3.0, 2.0, 2.0, 2.0, 2.0, 2.0])
    assert fit.diagnostics.at_bound == ("b",)
    assert "b lies at the end -3 of its searched range" in warnings_of(fit)[0]


def test_narrow_range_is_ill_conditioned_and_says_so() -> None:
    x, loss = ladder(1e6, decades=0.05)
    assert any("barely told apart" in warning for warning in warnings_of(fit_law(POWER, x, loss)))


def test_too_few_points_say_how_many() -> None:
    x, loss = ladder(1e6, points=2)
    with pytest.raises(MegamupError, match=r"2 given; .* a, c, b and needs at least 3, and 4 for intervals: add 1"):
        fit_law(POWER, x, loss, objective="loss")


def test_points_of_one_size_are_refused() -> None:
    with pytest.raises(MegamupError, match=r"5 given at only 2 different sizes; .* needs 3: add runs at 1 or more"):
        fit_law(POWER, [1e6, 1e6, 1e6, 1e7, 1e7], [3.0, 3.1, 3.0, 2.8, 2.8])


def test_points_that_are_no_positive_numbers_are_refused() -> None:
    with pytest.raises(MegamupError, match="expected finite numbers above 0"):
        fit_law(POWER, [1e6, 1e7, 0.0, 1e9], [3.0, 2.9, 2.8, 2.7])


def test_unknown_objective_is_refused() -> None:
    with pytest.raises(
        MegamupError, match="objective: 'hubris' is unknown; expected one of loss, relative, log, huber"
    ):
        fit_law(POWER, *ladder(1e6), objective="hubris")


def test_a_delta_that_is_no_number_is_refused() -> None:
    with pytest.raises(MegamupError, match="delta is 'small'; expected a number above 0"):
        fit_law(POWER, *ladder(1e6), objective="huber:small")


def chinchilla_of(rows: list[dict[str, object]], objective: str) -> Fit:
    x = np.array([[float(str(row["N"])), float(str(row["D"]))] for row in rows])
    return fit_law(CHINCHILLA, x, [float(str(row["L"])) for row in rows], objective=objective)


def test_gemstones_are_fitted_at_their_true_optimum(published: Path) -> None:
    """Besiroglu et al.'s search (L-BFGS from a grid) finds nothing better than ours, and mostly stops short of it."""
    path = published / "gemstones" / "wandb_df_for_fitting_cool_end.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()]
    rows = [{"N": r["params_active_precise"], "D": r["tokens"], "L": r["final_loss"]} for r in records]
    fit = chinchilla_of(rows, "huber")
    assert fit.diagnostics.share_of_starts_at_optimum >= 0.99
    log_n, log_d = np.log(fit.data.inputs).T

    def objective(p: FloatArray) -> float:
        value = np.logaddexp(np.logaddexp(p[2], p[0] - p[3] * log_n), p[1] - p[4] * log_d)
        return float(np.sum(huber(1e-3, value - np.log(fit.data.response))))

    starts = [
        (a, b, e, alpha, beta) for a in (0, 15) for b in (5, 20) for e in (0,) for alpha in (0, 1) for beta in (0.5,)
    ]
    ends = [minimize(objective, start, method="L-BFGS-B").fun for start in starts]
    assert fit.objective_value <= min(ends) * (1 + 1e-9)
