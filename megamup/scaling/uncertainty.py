"""Profile-likelihood intervals: of the parameters, of the law, and of one new run.

A law's likelihood region is every parameter vector whose sum of squares S stays within

    S <= S_min * (1 + t² / (n - p)),   t: Student's quantile with n - p degrees of freedom,

and the interval of any quantity is the range it takes over that region (Bates & Watts 1988, Nonlinear
Regression Analysis, ch. 6). Offset and exponent of a small ladder trade against each other along a bent
valley, where the ellipse of the delta method is far too short.

For fixed exponents S is quadratic in the coefficients, so the extremes are known in closed form, on each
face of the constraint that coefficients are >= 0; only the exponents are searched, on a grid. Nothing here
is random.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy.optimize import brentq
from scipy.stats import t as student

from megamup.scaling.fit import Face, Fit, as_inputs, exponents_from_logs, faces, start_grid, weights
from megamup.scaling.laws import FloatArray

LEVEL = 0.95

# The scan finds where the region begins and ends, the fine grid the extremes within it.
SCAN_POINTS = 256
GRID_POINTS = 257

Interval = tuple[float | None, float | None]


@dataclass(frozen=True)
class Prediction:
    """The law at m inputs and the interval that holds one new run there; all (m,), nats per token."""

    loss: FloatArray
    low: FloatArray
    high: FloatArray
    """NaN in `low` and `high` where no degree of freedom is left."""


def no_interval_reason(fit: Fit) -> str | None:
    """Why a fit has no intervals; None where it has."""
    if fit.degrees_of_freedom > 0:
        return None
    count = len(fit.loss)
    return f"{count} points determine {count} parameters and leave none to measure the noise by: add a run"


def parameter_intervals(fit: Fit, level: float = LEVEL) -> dict[str, Interval]:
    """The profile interval of every parameter of the law.

    An end is None where the data set none: where it lies at the end of an exponent's searched range, or, at
    both ends, where the fit has as many parameters as points.
    """
    if fit.degrees_of_freedom <= 0:
        return dict.fromkeys(fit.law.parameters, (None, None))
    region = _likelihood_region(fit, level)
    intervals = {name: _coefficient_interval(region, name) for name in fit.law.coefficients}
    intervals |= {name: _exponent_interval(region) for name in fit.law.exponents}
    return {name: intervals[name] for name in fit.law.parameters}


def predict(fit: Fit, inputs: ArrayLike, level: float = LEVEL) -> Prediction:
    """The prediction interval at `inputs` (m, d) or (m,): it holds the loss of one new run, noise included.

    It is the profile interval of the new run's loss y when y joins the data: the largest y for which some
    parameters keep S + (y - L)² within the region; for a linear law, the textbook's prediction interval.
    """
    loss = fit.at(inputs)
    if fit.degrees_of_freedom <= 0:
        nothing = np.full_like(loss, np.nan)
        return Prediction(loss, nothing, nothing)
    region = _likelihood_region(fit, level)
    terms = fit.law.terms(region.exponents, np.log(as_inputs(inputs)) - fit.log_centre)  # (m of grid, m, k)
    noise = 1 / weights(loss, fit.objective)  # one residual's unit in nats, at each input
    low, high = _extremes(region, terms, noise**2)
    return Prediction(loss, np.minimum(low.min(axis=0), loss), np.maximum(high.max(axis=0), loss))


def covariance(fit: Fit) -> FloatArray | None:
    """Asymptotic covariance s² (JᵀJ)⁻¹, (p, p) in the order of `law.parameters`; None without freedom left.

    For readers of the fit file: no interval here is made from it.
    """
    std = fit.residual_std
    if std is None:
        return None
    law, log_x = fit.law, np.log(fit.inputs)
    factor = law.uncentre(fit.exponents, fit.log_centre)
    w = weights(fit.loss, fit.objective)
    # The Jacobian by (coefficients in x's own unit, exponents): scaled to unit columns before it is inverted.
    own = law.terms(fit.exponents, log_x)
    by_exponent = law.terms_gradient(fit.exponents, log_x) @ (fit.coefficients * factor)
    jacobian = np.column_stack([own, by_exponent.T]) * w[:, np.newaxis]
    scale = np.linalg.norm(jacobian, axis=0)
    if np.any(scale == 0):
        return None
    inverse = np.linalg.pinv(jacobian / scale)
    order = [(law.coefficients + law.exponents).index(name) for name in law.parameters]
    full = std**2 * (inverse @ inverse.T) / np.outer(scale, scale)
    return full[np.ix_(order, order)]


@dataclass(frozen=True)
class _Region:
    """A fit's likelihood region, as a grid of g exponents from one of its ends to the other."""

    fit: Fit
    limit: float
    """The largest S inside."""
    logs: FloatArray
    """(g,), log size of the law's exponent, falling."""
    open_ends: tuple[bool, bool]
    """Whether the region goes on past the searched range, at the first and at the last of `logs`."""

    @property
    def exponents(self) -> FloatArray:
        """(g, 1)"""
        return exponents_from_logs(self.fit.law, self.logs[:, np.newaxis])


def _likelihood_region(fit: Fit, level: float) -> _Region:
    """The region of a law of one exponent, its outermost ends found by scan and bisection."""
    quantile = float(student.ppf((1 + level) / 2, fit.degrees_of_freedom))
    limit = fit.objective_value * (1 + quantile**2 / fit.degrees_of_freedom)
    # Points that lie on the law exactly leave S_min to rounding: 1e-14 of the losses.
    limit += 1e-28 * float(np.sum((weights(fit.loss, fit.objective) * fit.loss) ** 2))

    def excess(log: float) -> float:
        return float(_best_rss(fit, np.array([log]))[0]) - limit

    scan = start_grid(fit.law, SCAN_POINTS)[:, 0]
    best = float(np.log(np.abs(fit.exponents[0])))
    inside = np.append(scan[_best_rss(fit, scan) <= limit], best)
    above, below = scan[scan > inside.max()], scan[scan < inside.min()]
    last = float(brentq(excess, inside.max(), above[0])) if above.size else float(inside.max())
    first = float(brentq(excess, below[-1], inside.min())) if below.size else float(inside.min())
    # Denser towards the ends, where extremes grow as the root of the distance from the end.
    spread = np.cos(np.linspace(0, np.pi, GRID_POINTS))
    logs = np.sort(np.append((last + first) / 2 + spread * (last - first) / 2, best))[::-1]
    return _Region(fit, limit, logs, (not above.size, not below.size))


def _faces_at(fit: Fit, logs: FloatArray) -> list[Face]:
    """Least squares on every face at each of the exponents `logs` (g,)."""
    exponents = exponents_from_logs(fit.law, logs[:, np.newaxis])
    w = weights(fit.loss, fit.objective)
    basis = fit.law.terms(exponents, np.log(fit.inputs) - fit.log_centre) * w[:, np.newaxis]  # (g, n, k)
    return list(faces(basis, w * fit.loss))


def _best_rss(fit: Fit, logs: FloatArray) -> FloatArray:
    """S at each of the exponents `logs` (g,), at the best coefficients >= 0."""
    feasible = [np.where(np.all(face.coefficients >= 0, axis=-1), face.rss, np.inf) for face in _faces_at(fit, logs)]
    best: FloatArray = np.min(feasible, axis=0)
    return best


def _extremes(region: _Region, direction: FloatArray, slack: FloatArray) -> tuple[FloatArray, FloatArray]:
    """The range of direction·coefficients + e over the coefficients >= 0 and e with S + e²/slack <= limit.

    Args:
        direction: (g or 1, m, k), for each exponent of the grid and each of m quantities.
        slack: (m,), 0 where there is no e.

    Returns:
        low, high: (g, m); inf and -inf where an exponent has no coefficients inside the region.
    """
    shape = (len(region.logs), direction.shape[1])
    low, high = np.full(shape, np.inf), np.full(shape, -np.inf)
    for face in _faces_at(region.fit, region.logs):
        v = np.broadcast_to(direction[..., face.columns], (*shape, len(face.columns)))
        z = np.linalg.solve(face.r.swapaxes(1, 2), v.swapaxes(1, 2))  # R⁻ᵀ v: (g, f, m)
        spread = np.sum(z**2, axis=1) + slack  # vᵀ(BᵀB)⁻¹v + slack: (g, m)
        room = np.maximum(region.limit - face.rss, 0)[:, np.newaxis]
        centre = np.einsum("gmf,gf->gm", v, face.coefficients)
        reach = np.sqrt(room * spread)
        # Where the extreme is taken: the coefficients move by (BᵀB)⁻¹v from the face's optimum.
        step = np.sqrt(np.divide(room, spread, out=np.zeros(shape), where=spread > 0))
        moved = np.linalg.solve(face.r, z) * step[:, np.newaxis]  # (g, f, m)
        optimum = face.coefficients[..., np.newaxis]
        inside = (face.rss <= region.limit)[:, np.newaxis]
        low = np.minimum(low, np.where(inside & np.all(optimum - moved >= 0, axis=1), centre - reach, np.inf))
        high = np.maximum(high, np.where(inside & np.all(optimum + moved >= 0, axis=1), centre + reach, -np.inf))
    return low, high


def _exponent_interval(region: _Region) -> Interval:
    ends = region.exponents[[0, -1], 0]
    shown = [None if is_open else float(end) for end, is_open in zip(ends, region.open_ends, strict=True)]
    return (shown[0], shown[1]) if ends[0] <= ends[1] else (shown[1], shown[0])


def _coefficient_interval(region: _Region, name: str) -> Interval:
    law = region.fit.law
    index = law.coefficients.index(name)
    direction = np.eye(len(law.coefficients))[np.newaxis, [index]]
    low, high = (end[:, 0] for end in _extremes(region, direction, np.zeros(1)))
    own_unit = law.uncentre(region.exponents, region.fit.log_centre)[:, index]
    estimate = region.fit.parameters[name]
    lowest, highest = int(np.argmin(low * own_unit)), int(np.argmax(high * own_unit))
    return (
        # 0 is where a coefficient ends, whatever the exponent.
        None if _is_open(region, lowest) and low[lowest] > 0 else min(float((low * own_unit)[lowest]), estimate),
        None if _is_open(region, highest) else max(float((high * own_unit)[highest]), estimate),
    )


def _is_open(region: _Region, index: int) -> bool:
    """Whether an extreme at this place of the grid lies at an end that only the searched range set."""
    return (index == 0 and region.open_ends[0]) or (index == len(region.logs) - 1 and region.open_ends[1])
