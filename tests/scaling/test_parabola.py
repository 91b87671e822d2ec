"""The vertex of a parabola against numpy's polyfit and against simulated noise."""

import numpy as np
import pytest

from megamup.scaling.parabola import fit_parabola

X = np.geomspace(1e7, 1e9, 7)


def losses(vertex: float = 1.3e8) -> np.ndarray:
    return np.asarray(3.0 + 0.05 * (np.log(X) - np.log(vertex)) ** 2)


def test_the_vertex_is_found() -> None:
    parabola = fit_parabola(X, losses())
    assert parabola.vertex == pytest.approx(1.3e8)
    assert parabola.value == pytest.approx(3.0)
    assert parabola.curvature == pytest.approx(0.05)
    assert parabola.fault == ""
    np.testing.assert_allclose(parabola.at(X), losses())


def test_agrees_with_polyfit() -> None:
    noisy = losses() + 0.01 * np.random.default_rng(0).standard_normal(7)
    a, b, _ = np.polyfit(np.log(X), noisy, 2)
    assert np.log(fit_parabola(X, noisy).vertex) == pytest.approx(-b / (2 * a), rel=1e-9)


def test_standard_error_is_the_spread_of_simulated_vertices() -> None:
    random, found, promised = np.random.default_rng(0), [], []
    for _ in range(2000):
        parabola = fit_parabola(X, losses() + 0.005 * random.standard_normal(7))
        assert parabola.vertex_log_std is not None
        found.append(np.log(parabola.vertex))
        promised.append(parabola.vertex_log_std**2)
    assert np.std(found) == pytest.approx(np.sqrt(np.mean(promised)), rel=0.05)


def test_three_points_leave_no_standard_error() -> None:
    assert fit_parabola(X[2:5], losses()[2:5]).vertex_log_std is None


def test_what_is_no_optimum_says_why() -> None:
    assert "outside those tried" in fit_parabola(X, losses(5e9)).fault
    assert "don't curve upwards" in fit_parabola(X, -losses()).fault
    assert "don't curve upwards" in fit_parabola(X, 3 - 0.1 * np.log(X)).fault
    assert "2 different values of the 3 that a parabola takes" in fit_parabola(X[[0, 1, 1]], losses()[:3]).fault


def test_a_window_keeps_to_the_neighbours_of_the_best() -> None:
    steep = losses() + np.where(X > 5e8, 2.0, 0.0)  # runs that diverged
    assert fit_parabola(X, steep, window=5).vertex == pytest.approx(1.3e8)
    assert fit_parabola(X, steep).vertex < 1e8
