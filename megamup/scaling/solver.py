"""Damped Newton's method on sums of ρ(residual), for a whole batch of starts or resamples at once.

Levenberg (1944) and Marquardt (1963) with Nielsen's damping; for Huber's loss the curvature is its own second
derivative (residuals beyond delta have none) and the damping is measured by the parabola that majorizes it, so that
steps are Newton's near the optimum and those of reweighted least squares far from it. First-order methods on this
objective, L-BFGS among them, stop along its valleys and report success: it is nearly flat there, with kinks at delta.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from megamup.scaling.laws.base import FloatArray, IntArray
from megamup.scaling.objective import Objective

Problem = Callable[[FloatArray, IntArray], tuple[FloatArray, FloatArray]]
"""(θ (s, p), which of the batch each is for (s,)) -> residuals (s, n) and their derivative (s, n, p)."""

MAX_ITERATIONS = 300
# A step of this share of a parameter's scale changes nothing that is printed.
STEP_TOLERANCE = 1e-13
# What a step can still win, as a share of the objective: below rounding.
GAIN_TOLERANCE = 1e-15
LARGEST_DAMPING = 1e16


@dataclass(frozen=True)
class Ends:
    """Where the searches of a batch ended."""

    theta: FloatArray
    """(s, p)"""
    cost: FloatArray
    """(s,): Σ ρ"""


def minimise(
    problem: Problem,
    starts: FloatArray,
    bounds: tuple[FloatArray, FloatArray],
    objective: Objective,
    weights: FloatArray | None = None,
    max_iterations: int = MAX_ITERATIONS,
) -> Ends:
    """Follow every start (s, p) to a minimum of Σ_i weights_i ρ(residual_i) within the bounds.

    Args:
        weights: (s, n) or (1, n), how often each residual counts; default once.
    """
    low, high = bounds
    theta = np.clip(starts, low, high)
    s = len(theta)
    everyone = np.arange(s)
    cost, gradient, hessian, scale = _expand(problem, theta, everyone, objective, weights)
    damping, growth = np.full(s, 1e-3), np.full(s, 2.0)
    active = np.isfinite(cost)
    for _ in range(max_iterations):
        which = everyone[active]
        if not which.size:
            break
        here = theta[which]
        step = _step(here, gradient[which], hessian[which], scale[which], damping[which], low, high)
        moved = np.clip(here + step, low, high)
        step = moved - here
        promised = -np.einsum("sp,sp->s", gradient[which], step) - 0.5 * np.einsum(
            "sp,spq,sq->s", step, hessian[which], step
        )
        new_cost, new_gradient, new_hessian, new_scale = _expand(problem, moved, which, objective, weights)
        better = new_cost < cost[which]  # False for NaN
        gain = np.where(better, cost[which] - new_cost, 0) / np.maximum(promised, 1e-30 + 1e-12 * cost[which])
        small = np.all(np.abs(step) <= STEP_TOLERANCE * (np.abs(here) + 1), axis=1)
        # A step that a bound has cut short may promise a loss: it is tried, and shortened by damping.
        done = small | (np.abs(promised) <= GAIN_TOLERANCE * cost[which]) | (damping[which] > LARGEST_DAMPING)
        up = which[better]
        theta[up], cost[up] = moved[better], new_cost[better]
        gradient[up], hessian[up], scale[up] = new_gradient[better], new_hessian[better], new_scale[better]
        damping[up] *= np.maximum(1 / 5, 1 - (2 * np.minimum(gain[better], 1.2) - 1) ** 3)
        growth[up] = 2.0
        down = which[~better]
        damping[down] *= growth[down]
        growth[down] *= 2
        active[which[done]] = False
    return Ends(theta, cost)


def _expand(
    problem: Problem, theta: FloatArray, which: IntArray, objective: Objective, weights: FloatArray | None
) -> tuple[FloatArray, FloatArray, FloatArray, FloatArray]:
    """Cost (s,), gradient (s, p), curvature (s, p, p) and the damping's scale (s, p) at θ."""
    with np.errstate(all="ignore"):  # an overflow far from the optimum is a cost that no step accepts
        r, jacobian = problem(theta, which)
        w = np.ones((1, 1)) if weights is None else (weights if len(weights) == 1 else weights[which])
        cost = np.sum(w * objective.rho(r), axis=1)
        turned = jacobian.swapaxes(1, 2)  # (s, p, n)
        gradient = np.einsum("spn,sn->sp", turned, w * objective.psi(r))
        hessian = (turned * (w * objective.curvature(r))[:, np.newaxis]) @ jacobian
        scale = np.einsum("snp,snp,sn->sp", jacobian, jacobian, w * objective.majorizer(r))
    broken = ~(np.isfinite(cost) & np.all(np.isfinite(gradient), axis=1) & np.all(np.isfinite(hessian), axis=(1, 2)))
    cost = np.where(broken, np.inf, cost)
    return cost, gradient, hessian, scale


def _step(
    theta: FloatArray,
    gradient: FloatArray,
    hessian: FloatArray,
    scale: FloatArray,
    damping: FloatArray,
    low: FloatArray,
    high: FloatArray,
) -> FloatArray:
    """The damped Newton step (s, p) of the parameters that no bound holds."""
    held = ((theta <= low) & (gradient > 0)) | ((theta >= high) & (gradient < 0)) | (scale <= 0)
    unit = np.sqrt(np.where(held, 1, scale))  # columns to unit length: parameters in their own units
    free = (~held).astype(np.float64)
    g = gradient / unit * free
    h = hessian / unit[:, :, np.newaxis] / unit[:, np.newaxis, :] * free[:, :, np.newaxis] * free[:, np.newaxis, :]
    p = theta.shape[1]
    diagonal = np.where(held, 1.0, np.maximum(damping, 1e-15)[:, np.newaxis])
    h = h + diagonal[:, :, np.newaxis] * np.eye(p)
    step: FloatArray = -np.linalg.solve(h, g[..., np.newaxis])[..., 0] / unit
    return np.where(np.isfinite(step), step, 0.0)
