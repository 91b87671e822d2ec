"""What each run does to a fit: the law refitted without it, for every run in turn.

Deleting a run and fitting again tells how far one number carries the extrapolation (Cook 1977, Technometrics 19:15;
Belsley, Kuh & Welsch 1980, Regression Diagnostics). For a law that is not linear the refits are made, not approximated;
all are searched at once, from the optimum. Points of one run leave together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import t as student

from megamup.errors import MegamupError
from megamup.scaling.fit import Fit, as_inputs, linearised, problem_of, search
from megamup.scaling.laws.base import FloatArray

OUTLIER_LEVEL = 0.05
"""Chance that any run of a fit that holds is called an outlier (Bonferroni over the runs: Cook & Weisberg 1982)."""
LARGE_COOK = 1.0
"""A deletion that moves θ to the edge of its own 50% region (Cook 1977)."""
LARGE_SHIFT = 1.0
"""A deletion that moves the prediction by its own standard error."""
PIVOTAL = 0.99
"""Leverage at which a run is fitted whatever its loss: some parameter hangs on it alone (Huber 1981, section 7.2)."""
ALONE = 1 - 1e-6
"""Leverage at which a refit without the run isn't determined."""
ROUNDING = 1e-8
"""Share of the response below which residuals are those of losses in single precision, and tell of no run."""


@dataclass(frozen=True)
class Influence:
    """By run, in the order of `runs`; r runs, p parameters, m targets."""

    runs: tuple[int, ...]
    """(r,): their indices in the fit's data."""
    parameter_shifts: FloatArray
    """(r, p): θ with the run less θ without it, in standard errors of the fit (as DFBETAS); NaN for a term that is
    gone, and, as in all that follows, for a run without which the law isn't determined (leverage 1)."""
    prediction_shifts: FloatArray
    """(r, m): the same of the log of the law at each target (as DFFITS)."""
    cook: FloatArray
    """(r,): the change of the fitted values, squared and summed, over p s²."""
    studentised: FloatArray
    """(r,): the run's residual from the law fitted without it, over its standard error by those fits (the externally
    studentised residual); NaN where fewer than two degrees of freedom are left. A run's points count by their mean."""
    leverage: FloatArray
    """(r,): the run's part in the fit of its own points, 0 to 1: largest eigenvalue of its block of the hat matrix."""


def influence(fit: Fit, targets: ArrayLike | None = None) -> Influence:
    """Refit the law without each run.

    Args:
        targets: (m, d) or (m,), the inputs of predictions; default none.

    Raises:
        MegamupError: no more runs than parameters, so that no refit without a run is determined.
    """
    law, data, p = fit.law, fit.data, len(fit.law.parameters)
    runs, index = np.unique(data.runs, return_inverse=True)
    if len(runs) <= p:
        raise MegamupError(
            f"points: {len(runs)} runs determine the {p} parameters of the law {law.name}; expected {p + 1} or more to "
            "see what each does: add a run"
        )
    kept = 1.0 - np.eye(len(runs))[:, index]  # (r, n)
    theta, _ = search(law, data, fit.objective, np.tile(fit.theta, (len(runs), 1)), kept)
    residual, jacobian = linearised(law, data, fit.objective, fit.theta)
    residuals, jacobians = problem_of(law, data, fit.objective)(theta, np.arange(len(runs)))  # (r, n), (r, n, p)
    everyone = np.ones(len(residual))
    floor = ROUNDING * float(np.mean(fit.objective.weights(data.response) * data.response))
    std, inverse = float(_std(residual, everyone, p, floor)), _inverse(jacobian, everyone)
    log_x = np.log(as_inputs([] if targets is None else targets).reshape(-1, len(law.inputs))) - data.log_centre
    relative = law.jacobian(fit.theta, log_x)  # (m, p)
    moved = law.log_value(fit.theta, log_x) - law.log_value(theta, log_x)
    leverage = _leverage(jacobian, index)
    studentised = _studentised(residuals, jacobians, kept, p, floor)
    cook = np.sum((residual - residuals) ** 2, axis=1) / (p * std**2)
    alone = leverage > ALONE
    return Influence(
        runs=tuple(int(run) for run in runs),
        parameter_shifts=_unless(alone, _over(fit.theta - theta, std * np.sqrt(np.diagonal(inverse)))),
        prediction_shifts=_unless(
            alone, _over(moved, std * np.sqrt(np.einsum("mp,pq,mq->m", relative, inverse, relative)))
        ),
        cook=_unless(alone, cook),
        studentised=_unless(alone, studentised),
        leverage=leverage,
    )


def flags(found: Influence, names: Sequence[str], p: int) -> list[str]:
    """The runs that stand out, in words.

    Args:
        names: of the runs, in the order of `found.runs`.
        p: number of the law's parameters.
    """
    dof = len(names) - 1 - p
    limit = float(student.ppf(1 - OUTLIER_LEVEL / 2 / len(names), dof)) if dof > 0 else np.inf
    shift = np.abs(np.nan_to_num(found.prediction_shifts)).max(axis=1, initial=0.0)
    words = []
    for i, name in enumerate(names):
        own = []
        if found.leverage[i] > PIVOTAL:
            own.append(f"some parameter hangs on it alone (leverage {found.leverage[i]:.3f}): repeat it")
        if abs(found.studentised[i]) > limit:
            own.append(f"it lies {found.studentised[i]:+.1f} standard errors off the law of the others: check the run")
        if shift[i] > LARGE_SHIFT:
            own.append(f"without it the prediction moves by {shift[i]:.1f} standard errors")
        if found.cook[i] > LARGE_COOK:
            own.append(f"without it the whole fit moves (Cook's distance {found.cook[i]:.1f})")
        if own:
            words.append(f"{name}: {'; '.join(own)}")
    return words


def _studentised(residuals: FloatArray, jacobians: FloatArray, kept: FloatArray, p: int, floor: float) -> FloatArray:
    """(r,), from the residuals (r, n) and Jacobians (r, n, p) of the refits.

    The residual of a point that took no part has the variance s²(1 + h), h = jᵀ(JᵀJ)⁻¹j of the others; for a linear
    law this is the residual of the fit over its own s_(i) √(1 - h).
    """
    out = (1 - kept) / np.sum(1 - kept, axis=1, keepdims=True)  # (r, n): the mean of the run's points
    own = np.sum(out * residuals, axis=1)
    rows = np.einsum("rn,rnp->rp", out, jacobians)
    h = np.einsum("rp,rpq,rq->r", rows, _inverse(jacobians, kept), rows)
    return np.asarray(-own / (_std(residuals, kept, p, floor) * np.sqrt(1 + h)))  # above the law is positive


def _std(residuals: FloatArray, kept: FloatArray, p: int, floor: float) -> FloatArray:
    """Noise (...,) of the points that took part, NaN without freedom left."""
    dof = np.sum(kept, axis=-1) - p
    total = np.sum(kept * residuals**2, axis=-1)
    return np.maximum(np.sqrt(_over(total, np.maximum(dof, 0))), floor)


def _inverse(jacobian: FloatArray, kept: FloatArray) -> FloatArray:
    """(JᵀJ)⁻¹ (..., p, p) of the points that took part, by a pseudo-inverse at unit columns."""
    used = jacobian * kept[..., np.newaxis]
    lengths = np.linalg.norm(used, axis=-2, keepdims=True)
    lengths = np.where(lengths > 0, lengths, 1.0)
    inverse = np.linalg.pinv(used / lengths) / lengths.swapaxes(-1, -2)  # (..., p, n)
    return np.asarray(inverse @ inverse.swapaxes(-1, -2))


def _leverage(jacobian: FloatArray, index: NDArray[np.intp]) -> FloatArray:
    """Largest eigenvalue of each run's block QᵢQᵢᵀ of the hat matrix, from QᵢᵀQᵢ, which shares it: (r,)."""
    lengths = np.linalg.norm(jacobian, axis=0)
    q = np.linalg.qr(jacobian / np.where(lengths > 0, lengths, 1.0))[0]  # (n, p)
    blocks = np.zeros((int(index.max()) + 1, q.shape[1], q.shape[1]))
    np.add.at(blocks, index, q[:, :, np.newaxis] * q[:, np.newaxis])
    return np.asarray(np.linalg.eigvalsh(blocks)[:, -1])


def _unless(out: NDArray[np.bool_], value: FloatArray) -> FloatArray:
    """The rows of `value` (r, ...), NaN where `out` (r,)."""
    return np.where(out.reshape(-1, *[1] * (value.ndim - 1)), np.nan, value)


def _over(value: FloatArray, scale: FloatArray) -> FloatArray:
    """value / scale, NaN where the scale is 0."""
    value, scale = np.broadcast_arrays(value, scale)
    return np.asarray(np.divide(value, scale, out=np.full(value.shape, np.nan), where=scale != 0))
