"""Intervals: profile likelihood by default; the delta method and a bootstrap over runs beside it.

A law's likelihood region is every θ whose objective O stays within

    O(θ) <= O_min + s² t² / 2,   t: Student's quantile, s²: the variance of the objective's pull on one residual,

and the profile interval of any quantity is the range it takes over that region (Bates & Watts 1988, Nonlinear
Regression Analysis, ch. 6; for Huber's loss s² as in Huber 1981, ch. 6.6). Offset, coefficients and exponents of a
small ladder trade against each other along bent valleys, where the ellipse of the delta method is far too short. The
region's edge is found by adding one pseudo-observation of the quantity to the data and moving its value until the
refitted objective reaches the limit; for the loss of a new run that observation is the new run itself, noise included.
Nothing but the bootstrap is random.

Points of one run (its curve) are no independent evidence: where runs have several points, s² is raised by the ratio of
the cluster-robust variance (Liang & Zeger 1986) to the plain one, and runs are counted in place of points.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import norm
from scipy.stats import t as student

from megamup.scaling.fit import Fit, as_inputs, linearised, problem_of, search
from megamup.scaling.laws.base import FloatArray, IntArray, Quantity
from megamup.scaling.solver import minimise

LEVEL = 0.95

Interval = tuple[float | None, float | None]

Targets = Callable[[FloatArray, IntArray], tuple[FloatArray, FloatArray]]
"""(θ (s, p), which target each is for (s,)) -> its value (s,) and gradient by θ (s, p)."""

EXPANSIONS, GROWTH = 24, 1.7
"""The pseudo-observation is moved by up to 1.7^24 = 3e5 standard errors before an end is called open."""
REFINEMENTS = 14
BOOTSTRAP_CHUNK = 500


@dataclass(frozen=True)
class Prediction:
    """The law at m inputs and the interval that holds one new run there; all (m,), in units of the response."""

    loss: FloatArray
    low: FloatArray
    high: FloatArray
    """NaN in `low` and `high` where no degree of freedom is left."""

    def widened(self, factor: float) -> Prediction:
        """Both sides `factor` times as far from the law, in logs."""
        return Prediction(
            self.loss, self.loss * (self.low / self.loss) ** factor, self.loss * (self.high / self.loss) ** factor
        )


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


def predict(fit: Fit, inputs: ArrayLike, level: float = LEVEL) -> Prediction:
    """The prediction interval at `inputs` (m, d) or (m,): it holds the response of one new run, noise included.

    It is the profile interval of the new run's response y when y joins the data; for a linear law, the textbook's
    prediction interval.
    """
    value = fit.at(inputs)
    if no_interval_reason(fit) is not None:
        nothing = np.full_like(value, np.nan)
        return Prediction(value, nothing, nothing)
    targets = _predictions(fit, np.log(as_inputs(inputs)) - fit.data.log_centre)
    noise = noise_std(fit) * (value if fit.objective.scale == "relative" else np.ones_like(value))
    low, high = _profile(fit, targets, len(value), level, noise)
    if fit.objective.scale == "log":
        low, high = np.exp(low), np.exp(high)
    return Prediction(value, np.minimum(np.maximum(low, 0), value), np.maximum(high, value))


def noise_std(fit: Fit) -> float:
    """Standard deviation of one run, in the objective's scale.

    Least squares: that of the residuals. Huber's loss is for residuals with outliers, whose standard deviation says
    nothing of the rest: 1.96 of what is given here hold 95% of the residuals (their conformal quantile).
    """
    residual = np.abs(fit.residuals) * np.sqrt(len(fit.loss) / max(len(fit.loss) - len(fit.law.parameters), 1))
    if fit.objective.delta is None:
        return float(np.sqrt(np.mean(residual**2)))
    rank = min(int(np.ceil(LEVEL * (len(residual) + 1))), len(residual))
    return float(np.sort(residual)[rank - 1] / norm.ppf((1 + LEVEL) / 2))


def parameter_intervals(fit: Fit, level: float = LEVEL) -> dict[str, Interval]:
    """The profile interval of every parameter of the law.

    An end is None where the data set none: where it lies at the end of an exponent's searched range, or, at both
    ends, where the fit has as many parameters as points.
    """
    names = fit.law.parameters
    if no_interval_reason(fit) is not None:
        return dict.fromkeys(names, (None, None))
    functions = [_component(index, logged) for index, logged in enumerate(fit.law.logged)]
    gone = {name for name in fit.diagnostics.at_bound if fit.parameters[name] == 0 and _is_logged(fit, name)}
    known = [index for index, name in enumerate(names) if name not in gone]
    targets = _quantities(fit, [functions[index] for index in known])
    low, high = _profile(fit, targets, len(known), level)
    found: dict[str, Interval] = dict.fromkeys(names, (None, None))
    for i, index in enumerate(known):
        found[names[index]] = _ends(fit, index, float(low[i]), float(high[i]))
    return found


def quantity_intervals(
    fit: Fit, quantities: Mapping[str, Quantity], level: float = LEVEL
) -> dict[str, tuple[float, float | None, float | None]]:
    """(value, low, high) of quantities > 0 that follow from the law's parameters, by profile; see `Law.quantities`."""
    values = quantity_values(fit, quantities)
    found = {name: (value, None, None) for name, value in values.items()}
    known = [name for name, value in values.items() if 0 < value < np.inf]
    if no_interval_reason(fit) is not None or not known:
        return dict(found)
    low, high = _profile(fit, _quantities(fit, [_logarithm(quantities[name]) for name in known]), len(known), level)
    ends: dict[str, tuple[float, float | None, float | None]] = dict(found)
    for i, name in enumerate(known):
        below, above = (float(np.exp(end[i])) if np.isfinite(end[i]) else None for end in (low, high))
        ends[name] = (values[name], below, above)
    return ends


def quantity_values(fit: Fit, quantities: Mapping[str, Quantity]) -> dict[str, float]:
    """Each quantity at the fitted parameters."""
    public = fit.law.public(fit.theta, fit.data.log_centre)
    return {name: float(quantity(public)) for name, quantity in quantities.items()}


def delta_std(fit: Fit, inputs: ArrayLike) -> FloatArray:
    """Standard error of the law itself at `inputs` by the delta method, in the objective's scale: (m,)."""
    targets = _predictions(fit, np.log(as_inputs(inputs)) - fit.data.log_centre)
    m = len(as_inputs(inputs))
    return _delta(fit, targets, m)[1]


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
    curvature = _mean_curvature(fit, residual)
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


def bootstrap(fit: Fit, resamples: int = 1000, seed: int = 0) -> FloatArray:
    """θ (resamples, p) refitted to resampled runs, all points of a run together (Efron & Tibshirani 1993, ch. 9)."""
    random = np.random.default_rng(seed)
    runs, index = np.unique(fit.data.runs, return_inverse=True)
    counts = random.multinomial(len(runs), np.full(len(runs), 1 / len(runs)), size=resamples)
    found = []
    for first in range(0, resamples, BOOTSTRAP_CHUNK):
        weights = counts[first : first + BOOTSTRAP_CHUNK, index].astype(np.float64)  # (b, n)
        begin = np.tile(fit.theta, (len(weights), 1))
        found.append(search(fit.law, fit.data, fit.objective, begin, weights)[0])
    return np.concatenate(found)


def bootstrap_intervals(
    fit: Fit, quantities: Mapping[str, Quantity], resamples: int = 1000, seed: int = 0, level: float = LEVEL
) -> dict[str, tuple[float, float]]:
    """Percentile intervals of quantities over resampled runs; they know no model error and no noise of a new run."""
    public = fit.law.public(bootstrap(fit, resamples, seed), fit.data.log_centre)
    tails = [(1 - level) / 2, (1 + level) / 2]
    ends = {name: np.nanquantile(quantity(public), tails) for name, quantity in quantities.items()}
    return {name: (float(low), float(high)) for name, (low, high) in ends.items()}


# The profile's machinery.


def _predictions(fit: Fit, log_x: FloatArray) -> Targets:
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


def _quantities(fit: Fit, functions: Sequence[Quantity]) -> Targets:
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


def _delta(fit: Fit, targets: Targets, count: int) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Value, standard error and design effect (cluster-robust over plain variance, at least 1) of each target."""
    theta = np.tile(fit.theta, (count, 1))
    value, gradient = targets(theta, np.arange(count))
    residual, jacobian = linearised(fit.law, fit.data, fit.objective, fit.theta)
    lengths = np.maximum(np.linalg.norm(jacobian, axis=0), 1e-300)
    inverse = np.linalg.pinv(jacobian / lengths)  # (p, n)
    spread = (gradient / lengths) @ inverse  # (count, n): the target's change by each residual
    psi = fit.objective.psi(residual) / _mean_curvature(fit, residual)
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


def _mean_curvature(fit: Fit, residual: FloatArray) -> float:
    """Mean ρ'' of the residuals: 1 for least squares; for Huber's loss the share within delta, at least one point."""
    return max(float(np.mean(fit.objective.curvature(residual))), 1 / len(residual))


def _profile(
    fit: Fit, targets: Targets, count: int, level: float, noise: FloatArray | None = None
) -> tuple[FloatArray, FloatArray]:
    """Both ends of each target's profile interval, (count,) each; -inf and inf where an end is open.

    Args:
        noise: (count,), standard deviation of an observation of the target; then it is the observation that is
            bounded, not the target.
    """
    edge = _Edge.of(fit, targets, count, level, noise)
    inside = np.tile(edge.value, 2)  # both sides: low first
    inside_theta = np.tile(fit.theta, (2 * count, 1))
    inside_excess = np.full(2 * count, -1.0)
    sign = np.repeat([-1.0, 1.0], count)
    reach = np.tile(edge.reach, 2)
    outside, outside_excess = inside.copy(), np.full(2 * count, np.nan)
    pending = np.arange(2 * count)
    for expansion in range(EXPANSIONS):
        v = np.tile(edge.value, 2)[pending] + sign[pending] * reach[pending] * GROWTH**expansion
        excess, theta = edge.excess(pending % count, v, inside_theta[pending])
        beyond = excess >= 0
        outside[pending[beyond]], outside_excess[pending[beyond]] = v[beyond], excess[beyond]
        within = pending[~beyond]
        inside[within], inside_excess[within], inside_theta[within] = v[~beyond], excess[~beyond], theta[~beyond]
        pending = within
        if not pending.size:
            break
    closed = np.flatnonzero(np.isfinite(outside_excess))
    ends = np.where(sign < 0, -np.inf, np.inf)
    ends[closed] = _refine(edge, closed, inside, inside_excess, inside_theta, outside, outside_excess)
    return ends[:count], ends[count:]


def _refine(
    edge: _Edge,
    which: IntArray,
    inside: FloatArray,
    inside_excess: FloatArray,
    inside_theta: FloatArray,
    outside: FloatArray,
    outside_excess: FloatArray,
) -> FloatArray:
    """Regula falsi (Illinois) between a value inside the region and one outside; the ends' targets (len(which),)."""
    a, fa, theta = inside[which].copy(), inside_excess[which].copy(), inside_theta[which].copy()
    b, fb = outside[which].copy(), outside_excess[which].copy()
    for _ in range(REFINEMENTS):
        share = np.clip(fa / (fa - fb), 0.02, 0.98)
        v = a + share * (b - a)
        excess, found = edge.excess(which % edge.count, v, theta)
        beyond = excess >= 0
        a, fa = np.where(beyond, a, v), np.where(beyond, fa / 2, excess)
        b, fb = np.where(beyond, v, b), np.where(beyond, excess, fb / 2)
        theta = np.where(beyond[:, np.newaxis], theta, found)
        if np.all(np.abs(excess) < 1e-6):
            break
    return edge.reported(which % edge.count, v, found)


@dataclass(frozen=True)
class _Edge:
    """The limit of a likelihood region, and how far a pseudo-observation takes the refitted objective beyond it."""

    fit: Fit
    targets: Targets
    count: int
    value: FloatArray
    """(count,): each target at the optimum."""
    reach: FloatArray
    """(count,): where its end would be if the region were an ellipse, in terms of the pseudo-observation."""
    precision: FloatArray
    """(count,): curvature of the pseudo-observation's parabola."""
    room: FloatArray
    """(count,): how much the objective may rise."""
    noisy: bool

    @staticmethod
    def of(fit: Fit, targets: Targets, count: int, level: float, noise: FloatArray | None) -> _Edge:
        value, std, effect = _delta(fit, targets, count)
        quantile = float(student.ppf((1 + level) / 2, degrees_of_freedom(fit)))
        residual = fit.residuals
        dof = max(len(residual) - len(fit.law.parameters), 1)
        pull = float(np.sum(fit.objective.psi(residual) ** 2)) / dof
        variance = pull / _mean_curvature(fit, residual) * effect
        # Points that lie on the law exactly leave the variance to rounding: 1e-14 of the response.
        scale = float(np.mean((fit.objective.weights(fit.loss) * fit.loss) ** 2))
        variance = np.maximum(variance, 1e-28 * scale)
        std = np.maximum(std, 1e-14 * (np.abs(value) + 1e-300))
        room = variance * quantile**2 / 2
        if noise is None:
            return _Edge(fit, targets, count, value, 2 * quantile * std, variance / std**2, room, False)
        own = np.maximum(noise, 1e-14 * np.abs(value))
        # In the new run's own noise, not raised by the design effect of curves.
        reach = quantile * np.sqrt(std**2 + own**2)
        return _Edge(fit, targets, count, value, reach, variance / own**2, room, True)

    def excess(self, which: IntArray, v: FloatArray, start: FloatArray) -> tuple[FloatArray, FloatArray]:
        """How far the refit with pseudo-observations `v` (s,) lies beyond the region, near linear in v, and its θ.

        0 at the edge, -1 at the optimum.
        """
        fit, shrink = self.fit, 1e-9  # so small that Huber's loss of it is a parabola
        problem = problem_of(fit.law, fit.data, fit.objective)

        def augmented(theta: FloatArray, active: IntArray) -> tuple[FloatArray, FloatArray]:
            residual, jacobian = problem(theta, active)
            value, gradient = self.targets(theta, which[active])
            unit = np.sqrt(self.precision[which[active]]) * shrink
            own = (unit * (value - v[active]))[:, np.newaxis]
            own_gradient = (unit[:, np.newaxis] * gradient)[:, np.newaxis]
            return np.concatenate([residual, own], axis=1), np.concatenate([jacobian, own_gradient], axis=1)

        weights = np.ones((1, len(fit.loss) + 1))
        weights[0, -1] = 1 / shrink**2
        ends = minimise(augmented, start, fit.law.bounds, fit.objective, weights)
        cost = ends.cost
        if not self.noisy:
            value, _ = self.targets(ends.theta, which)
            cost = cost - self.precision[which] * (value - v) ** 2 / 2
        least = float(np.sum(fit.objective.rho(fit.residuals)))
        rise = np.maximum(cost - least, 0) / self.room[which]
        return np.sqrt(rise) - 1, ends.theta

    def reported(self, which: IntArray, v: FloatArray, theta: FloatArray) -> FloatArray:
        """What the end of the interval is: the observation, or the target of the refit."""
        return v if self.noisy else self.targets(theta, which)[0]


def _component(index: int, logged: bool) -> Quantity:
    def one(public: FloatArray) -> FloatArray:
        return np.asarray(np.log(public[..., index]) if logged else public[..., index])

    return one


def _logarithm(quantity: Quantity) -> Quantity:
    return lambda public: np.asarray(np.log(quantity(public)))


def _is_logged(fit: Fit, name: str) -> bool:
    return fit.law.logged[fit.law.parameters.index(name)]


def _ends(fit: Fit, index: int, low: float, high: float) -> Interval:
    """Ends as reported: in the parameter's own unit, None where open, 0 where a constant may vanish."""
    name = fit.law.parameters[index]
    value = fit.parameters[name]
    if fit.law.logged[index]:
        low, high = float(np.exp(low)), float(np.exp(high))
        return (min(low, value) if low > 0 else None, max(high, value) if np.isfinite(high) else None)
    if np.isneginf(low) and fit.law.may_vanish(name):
        low = 0.0
    return (min(low, value) if np.isfinite(low) else None, max(high, value) if np.isfinite(high) else None)
