"""Profile-likelihood intervals: the range that a quantity takes over the likelihood region of a law.

The region is every θ whose objective O stays within

    O(θ) <= O_min + s² t² / 2,   t: Student's quantile, s²: the variance of the objective's pull on one residual

(Bates & Watts 1988, Nonlinear Regression Analysis, ch. 6; for Huber's loss s² as in Huber 1981, ch. 6.6). Offset,
coefficients and exponents of a small ladder trade against each other along bent valleys, where the ellipse of the
delta method is far too short. The region's edge is found by adding one pseudo-observation of the quantity to the data
and moving its value until the refitted objective reaches the limit; for the loss of a new run that observation is the
new run itself, noise included. Nothing here is random.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.stats import t as student

from megamup.scaling.delta import Targets, degrees_of_freedom, delta, mean_curvature
from megamup.scaling.fit import Fit, problem_of
from megamup.scaling.laws.base import FloatArray, IntArray
from megamup.scaling.solver import minimise

EXPANSIONS, GROWTH = 24, 1.7
"""The pseudo-observation is moved by up to 1.7^24 = 3e5 standard errors before an end is called open."""
REFINEMENTS = 14


def profile(
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
        value, std, effect = delta(fit, targets, count)
        quantile = float(student.ppf((1 + level) / 2, degrees_of_freedom(fit)))
        residual = fit.residuals
        dof = max(len(residual) - len(fit.law.parameters), 1)
        pull = float(np.sum(fit.objective.psi(residual) ** 2)) / dof
        variance = pull / mean_curvature(fit, residual) * effect
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
