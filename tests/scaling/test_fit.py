"""The solver against known parameters, scipy's curve_fit and nnls."""

import numpy as np
import pytest
from scipy.optimize import curve_fit, nnls

from megamup.errors import MegamupError
from megamup.scaling.fit import _Reduced, best_face, fit_law, warnings_of
from megamup.scaling.laws import POWER, FloatArray


def ladder(start: float, *, b: float = -0.12, c: float = 1.8, points: int = 6, decades: float = 3) -> FloatArray:
    """(2, points): x and a loss that is 2 above the offset at the smallest x."""
    x = start * np.logspace(0, decades, points)
    return np.stack([x, 2 * (x / start) ** b + c])


def noisy(start: float, seed: int = 0, points: int = 8) -> FloatArray:
    x, loss = ladder(start, points=points)
    return np.stack([x, loss * (1 + 0.003 * np.random.default_rng(seed).standard_normal(points))])


@pytest.mark.parametrize("start", [1e6, 1e15, 1e24])
@pytest.mark.parametrize("b", [-0.05, -0.34, -1.2])
def test_exact_points_give_back_the_parameters(start: float, b: float) -> None:
    x, loss = ladder(start, b=b)
    fit = fit_law(POWER, x, loss)
    assert fit.parameters["a"] == pytest.approx(2 * start**-b, rel=1e-8)
    assert fit.parameters["b"] == pytest.approx(b, rel=1e-9)
    assert fit.parameters["c"] == pytest.approx(1.8, rel=1e-9)
    assert fit.diagnostics.share_of_starts_at_optimum == 1
    assert warnings_of(fit) == []


def test_agrees_with_curve_fit() -> None:
    # curve_fit gets x near 1 and a start near the answer, which is what it needs to get there.
    x, loss = noisy(1.0)
    start = (2.0, -0.1, 1.8)
    expected, _ = curve_fit(lambda x, a, b, c: a * x**b + c, x, loss, p0=start, xtol=1e-14, ftol=1e-14)
    fit = fit_law(POWER, x, loss)
    assert list(fit.parameters.values()) == pytest.approx(list(expected), rel=1e-5)
    residual = loss - (expected[0] * x ** expected[1] + expected[2])
    assert fit.objective_value <= np.sum(residual**2) * (1 + 1e-12)


def test_relative_objective_agrees_with_weighted_curve_fit() -> None:
    x, loss = noisy(1.0)
    start = (2.0, -0.1, 1.8)
    expected, _ = curve_fit(lambda x, a, b, c: a * x**b + c, x, loss, p0=start, sigma=loss, xtol=1e-14, ftol=1e-14)
    fit = fit_law(POWER, x, loss, objective="relative")
    assert list(fit.parameters.values()) == pytest.approx(list(expected), rel=1e-5)
    assert fit.residual_std == pytest.approx(np.sqrt(np.sum(((fit.fitted - loss) / loss) ** 2) / 5))


@pytest.mark.parametrize("scale", [1e-6, 1e9, 1e24])
def test_unit_of_x_does_not_matter(scale: float) -> None:
    x, loss = noisy(1.0)
    fit, scaled = fit_law(POWER, x, loss), fit_law(POWER, x * scale, loss)
    assert scaled.parameters["b"] == pytest.approx(fit.parameters["b"], rel=1e-7)
    assert scaled.parameters["c"] == pytest.approx(fit.parameters["c"], rel=1e-7)
    assert scaled.at([1e5 * scale]) == pytest.approx(fit.at([1e5]), rel=1e-9)


def test_gradient_vanishes_and_every_start_arrives() -> None:
    for seed in range(5):
        diagnostics = fit_law(POWER, *noisy(1e15, seed)).diagnostics
        assert diagnostics.gradient_norm < 1e-10
        assert diagnostics.share_of_starts_at_optimum == 1
        assert diagnostics.at_bound == ()


def test_reduced_jacobian_is_that_of_finite_differences() -> None:
    x, loss = noisy(1.0)
    reduced = _Reduced(POWER, np.log(x)[:, np.newaxis], loss, np.ones_like(loss))
    logs, step = np.array([-1.7]), np.array([1e-6])
    difference = (reduced.residual(logs + step) - reduced.residual(logs - step)) / (2 * step)
    np.testing.assert_allclose(reduced.jacobian(logs)[:, 0], difference, rtol=1e-6, atol=1e-9)


def test_best_face_is_nonnegative_least_squares() -> None:
    random = np.random.default_rng(1)
    for _ in range(50):
        basis, y = random.standard_normal((6, 3)), np.abs(random.standard_normal(6))
        expected, norm = nnls(basis, y)
        if not expected.any():
            continue
        face = best_face(basis, y)
        found = np.zeros(3)
        found[list(face.columns)] = face.coefficients
        np.testing.assert_allclose(found, expected, atol=1e-10)
        assert face.rss == pytest.approx(norm**2)


def test_loss_that_rises_with_scale_is_at_its_bound_and_says_so() -> None:
    x, loss = ladder(1e6)
    fit = fit_law(POWER, x, loss[::-1])
    assert fit.diagnostics.at_bound[0] == "a"
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
    with pytest.raises(MegamupError, match=r"2 given; .* a, b, c and needs at least 3, and 4 for intervals: add 1"):
        fit_law(POWER, x, loss)


def test_points_of_one_size_are_refused() -> None:
    with pytest.raises(MegamupError, match=r"5 given at only 2 different sizes; .* needs 3: add runs at 1 or more"):
        fit_law(POWER, [1e6, 1e6, 1e6, 1e7, 1e7], [3.0, 3.1, 3.0, 2.8, 2.8])


def test_points_that_are_no_positive_numbers_are_refused() -> None:
    with pytest.raises(MegamupError, match="expected finite numbers above 0"):
        fit_law(POWER, [1e6, 1e7, 0.0, 1e9], [3.0, 2.9, 2.8, 2.7])


def test_unknown_objective_is_refused() -> None:
    with pytest.raises(MegamupError, match="objective: 'huber' is unknown; expected one of loss, relative"):
        fit_law(POWER, *ladder(1e6), objective="huber")
