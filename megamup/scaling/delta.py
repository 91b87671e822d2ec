"""The delta method, and what every interval rests on: noise, freedom, the variance of the objective's pull.

Points of one run (its curve) are no independent evidence: where runs have several points, variances are raised by the
ratio of the cluster-robust one (Liang & Zeger 1986) to the plain one, and runs are counted in place of points.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import norm

from megamup.scaling.fit import Fit, as_inputs, linearised
from megamup.scaling.laws.base import FloatArray, IntArray, Quantity

LEVEL = 0.95

OUTLIER = 6.0
"""A residual beyond so many robust standard deviations is no Gaussian's: one in a billion."""

FEWEST = 15
"""Points below which a median of residuals is too uncertain to call one an outlier."""

Targets = Callable[[FloatArray, IntArray], tuple[FloatArray, FloatArray]]
"""(θ (s, p), which target each is for (s,)) -> its value (s,) and gradient by θ (s, p)."""


def degrees_of_freedom(fit: Fit) -> int:
    """Independent runs less parameters."""
    return len(np.unique(fit.data.runs)) - len(fit.law.parameters)


def no_interval_reason(fit: Fit) -> str | None:
    """Why a fit has no intervals; None where it has."""
    if degrees_of_freedom(fit) > 0:
        return None
    count, unit = len(np.unique(fit.data.runs)), "points"
    if count < len(fit.loss):
        unit = "runs"
    return (
        f"{count} {unit} determine {len(fit.law.parameters)} parameters and leave none to measure the noise by: "
        "add a run"
    )


def outliers(fit: Fit) -> NDArray[np.bool_]:
    """Points (n,) beyond `OUTLIER` robust standard deviations of the fit, under Huber's loss; none under least squares.

    Huber's loss is for them: they hardly move the law, and aren't counted as noise. The backtest does count them: a run
    that a law fitted to all points calls an outlier may be one where the law bends. Points that the fit interpolates
    say nothing of how large residuals are, and are left out of the median; of few points none can be called an outlier.
    """
    size = np.abs(fit.residuals)
    own = np.sort(size)[len(fit.law.parameters) :]
    if fit.objective.delta is None or len(size) < FEWEST or len(own) < len(fit.law.parameters) + 1:
        return np.zeros(len(size), dtype=bool)
    return np.asarray(size > OUTLIER * 1.4826 * max(float(np.median(own)), 1e-9))


def noise_std(fit: Fit) -> float:
    """Standard deviation of one run that is no outlier, in the objective's scale.

    Least squares: that of the residuals. Under Huber's loss, whose residuals have long tails: 1.96 of what is given
    hold 95% of the residuals (their conformal quantile).
    """
    size = np.abs(fit.residuals)[~outliers(fit)]
    size = size * np.sqrt(len(size) / max(len(size) - len(fit.law.parameters), 1))
    if fit.objective.delta is None:
        return float(np.sqrt(np.mean(size**2)))
    rank = min(int(np.ceil(LEVEL * (len(size) + 1))), len(size))
    return float(np.sort(size)[rank - 1] / norm.ppf((1 + LEVEL) / 2))


def delta_std(fit: Fit, inputs: ArrayLike) -> FloatArray:
    """Standard error of the law itself at `inputs` by the delta method, in the objective's scale: (m,)."""
    targets = predictions_of(fit, np.log(as_inputs(inputs)) - fit.data.log_centre)
    m = len(as_inputs(inputs))
    return delta(fit, targets, m)[1]


def covariance(fit: Fit) -> FloatArray | None:
    """Asymptotic covariance of the published parameters (p, p); None without freedom left or for a term that is gone.

    For readers of the fit file: no interval here is made from it.
    """
    inner = theta_covariance(fit)
    if inner is None:
        return None
    gradient = _differences(lambda theta: fit.law.public(theta, fit.data.log_centre), fit.theta)  # (p of θ, p)
    full: FloatArray = gradient.T @ inner @ gradient
    return full if np.all(np.isfinite(full)) else None


def theta_covariance(fit: Fit) -> FloatArray | None:
    """Asymptotic covariance of θ, (p, p): s²/ρ'' (JᵀJ)⁻¹, cluster-robust where runs have several points."""
    if no_interval_reason(fit) is not None:
        return None
    residual, jacobian = linearised(fit.law, fit.data, fit.objective, fit.theta)
    lengths = np.linalg.norm(jacobian, axis=0)
    if np.any(lengths == 0):
        return None
    unit = jacobian / lengths
    inverse = np.linalg.pinv(unit)  # (p, n)
    curvature = mean_curvature(fit, residual)
    psi = fit.objective.psi(residual) / curvature
    n, p = jacobian.shape
    plain: FloatArray = float(np.sum(psi**2)) / max(n - p, 1) * (inverse @ inverse.T) / np.outer(lengths, lengths)
    runs, index = np.unique(fit.data.runs, return_inverse=True)
    if len(runs) == n:
        return plain
    by_run = np.zeros((len(runs), p))
    np.add.at(by_run, index, (inverse * psi).T)
    robust: FloatArray = by_run.T @ by_run * len(runs) / (len(runs) - p) / np.outer(lengths, lengths)
    return robust


def delta(fit: Fit, targets: Targets, count: int) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Value, standard error and design effect (cluster-robust over plain variance, at least 1) of each target."""
    theta = np.tile(fit.theta, (count, 1))
    value, gradient = targets(theta, np.arange(count))
    residual, jacobian = linearised(fit.law, fit.data, fit.objective, fit.theta)
    lengths = np.maximum(np.linalg.norm(jacobian, axis=0), 1e-300)
    inverse = np.linalg.pinv(jacobian / lengths)  # (p, n)
    spread = (gradient / lengths) @ inverse  # (count, n): the target's change by each residual
    psi = fit.objective.psi(residual) / mean_curvature(fit, residual)
    n, p = jacobian.shape
    plain = float(np.sum(psi**2)) / max(n - p, 1) * np.sum(spread**2, axis=1)
    runs, index = np.unique(fit.data.runs, return_inverse=True)
    effect = np.ones(count)
    if len(runs) < n and len(runs) > p:
        by_run = np.zeros((len(runs), count))
        np.add.at(by_run, index, (spread * psi).T)
        robust = np.sum(by_run**2, axis=0) * len(runs) / (len(runs) - p)
        effect = np.maximum(1.0, robust / np.maximum(plain, 1e-300))
    return value, np.sqrt(plain * effect), effect


def mean_curvature(fit: Fit, residual: FloatArray) -> float:
    """Mean ρ'' of the residuals: 1 for least squares; for Huber's loss the share within delta, at least one point."""
    return max(float(np.mean(fit.objective.curvature(residual))), 1 / len(residual))


def predictions_of(fit: Fit, log_x: FloatArray) -> Targets:
    """The law at each of `log_x` (m, d), in the objective's scale (logs, or the response itself)."""

    def targets(theta: FloatArray, which: IntArray) -> tuple[FloatArray, FloatArray]:
        rows = np.arange(len(theta))
        log_value = fit.law.log_value(theta, log_x)[rows, which]
        gradient = fit.law.jacobian(theta, log_x)[rows, which]
        if fit.objective.scale == "log":
            return log_value, gradient
        value = np.exp(log_value)
        return value, gradient * value[:, np.newaxis]

    return targets


def quantities_of(fit: Fit, functions: Sequence[Quantity]) -> Targets:
    """Functions of the published parameters, with their gradient by θ from central differences."""

    def targets(theta: FloatArray, which: IntArray) -> tuple[FloatArray, FloatArray]:
        value, gradient = np.empty(len(theta)), np.empty_like(theta)
        for index in np.unique(which):
            take = which == index

            def one(inner: FloatArray, function: Quantity = functions[index]) -> FloatArray:
                return function(fit.law.public(inner, fit.data.log_centre))

            value[take] = one(theta[take])
            gradient[take] = np.moveaxis(_differences(one, theta[take]), 0, -1)
        return value, gradient

    return targets


def _differences(function: Callable[[FloatArray], FloatArray], theta: FloatArray) -> FloatArray:
    """Central differences by each of θ (..., p): (p, *shape of the function's value)."""
    step = 1e-5
    shifts = step * np.eye(theta.shape[-1])
    return np.stack([(function(theta + shift) - function(theta - shift)) / (2 * step) for shift in shifts])
