"""Whether the points can tell a law's parameters apart at all, and which runs to add where they can't.

Three rules, each with one threshold and its reason:

1. Before the fit: at some θ the Jacobian has full rank (`ROUNDING`), and the inputs don't all rise together along one
   line (`SAME_RATIO`). With all runs at D = 20·N the terms A/N^alpha and B/D^beta can change places.
2. At the optimum the Jacobian's condition number stays below what losses in single precision can carry (`SINGLE`).
3. No exponent has a standard error above its own size over a range too short to show its curvature (`NARROW`).

What breaks a rule is refused. A parameter whose 95% interval is open at one side is a warning (`check_fit`): its value
means little by itself, while predictions near the points still hold.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm
from scipy.stats import t as student

from megamup.errors import MegamupError
from megamup.scaling.fit import Data, Fit, check_enough, linearised
from megamup.scaling.laws.base import LOG_COEFFICIENTS, FloatArray, Law

ROUNDING = 1e10
"""Condition number, of unit columns, beyond which a rank is lost to double precision (1e16 less what a Jacobian over
many decades of inputs loses by itself)."""
SINGLE = 1e7
"""The same where losses carry it: they come out of single precision, 6e-8 of their size, so that beyond this the
rounding of one loss moves some combination of the parameters by their own size."""
SAME_RATIO = 1.02
"""Inputs that leave a common line by less are on it: the last batch and whole layers make a ratio vary this much."""
NARROW = 3.0
"""An offset is told from a power by the power's curvature in log x, (alpha·log range)²/8 of the term: for alpha = 0.3
over a factor 3 this is 1.4% of the term and some 0.5% of the loss, the noise of one small run."""
STEP = 4.0
"""A suggested run is this far beyond the points: one step takes an input past `NARROW`."""
GENERIC = 8
"""θ at which a rank is looked for: it is that of all but a null set of them."""
NO_SCALES = {"L", "curve", "step"}
"""Inputs that no run can be asked for at four times their value: losses, which follow from the runs, and places on a
curve. Their ranges aren't judged either, a loss being a power of the scales already."""
TAKES_PART = 0.1
"""Share of a null vector's largest entry below which a parameter has no part in it."""


def check(law: Law, data: Data) -> None:
    """Refuse points from which no fit could tell the law's parameters apart, whatever their losses.

    Raises:
        MegamupError: what the points lack, and runs that would supply it.
    """
    check_enough(law, data.inputs)
    thetas = _generic(law, data)
    jacobians = law.jacobian(thetas, data.log_x)
    lost = _null_parameters(law, jacobians, ROUNDING)
    line = _line(law, data)
    if line is None and not lost:
        return
    apart = f"tell apart {_and(lost)}" if lost else f"tell apart the terms in {_and(law.inputs)}"
    if len(lost) == 1:
        apart = f"determine {lost[0]}"
    if line is None:
        cause, first = _constant(law, data) or f"the {len(data.response)} given", data.inputs[:0]
    else:
        cause, first = line
    raise MegamupError(
        f"points: {cause}; from these the law {law.name} ({law.formula}) can't {apart}: "
        f"{_to_add(law, suggest(law, data, thetas, ROUNDING, first))}"
    )


def check_fit(fit: Fit, noise: float | None = None, level: float = 0.95) -> list[str]:
    """What the points barely determine, in words; empty where nothing is.

    Args:
        noise: standard deviation of one run in the objective's scale (a share of the loss, or nats for `loss`), for a
            fit that has as many parameters as points; default the fit's own. Without either only ranks are judged.

    Raises:
        MegamupError: parameters can't be told apart at the optimum, or the range is too narrow for an exponent.
    """
    _refuse_rank(fit)
    errors = _standard_errors(fit, noise)
    sizes = np.where(_logs(fit.law), 1.0, np.abs(fit.theta))
    _refuse_narrow(fit, errors, sizes)
    # Where the noise is given it is known, not measured.
    dof = fit.degrees_of_freedom
    quantile = norm.ppf((1 + level) / 2) if noise is not None or dof <= 0 else student.ppf((1 + level) / 2, dof)
    half = float(quantile) * errors
    weak = [
        f"the term of {name} to a factor {np.exp(half[i]):.2g}" if logged else f"{name} to ± {half[i]:.2g}"
        for i, (name, logged) in enumerate(zip(fit.law.parameters, _logs(fit.law), strict=True))
        if sizes[i] < half[i] < np.inf
    ]
    if not weak:
        return []
    return [
        f"barely known, at {level:.0%}: {_and(weak)}; their intervals are open at one side, and their values by "
        "themselves mean little: add runs over a wider range, or repeat those at its ends"
    ]


def _refuse_rank(fit: Fit) -> None:
    law, free = fit.law, _free(fit)
    if not free:
        return
    singular, vectors = _svd(law.jacobian(fit.theta, fit.data.log_x)[:, free])
    if singular[-1] * SINGLE < singular[0]:
        raise MegamupError(
            f"points: the fit of {law.name} can't tell {_trade(law, free, vectors[-1])} (condition number "
            f"{singular[0] / max(singular[-1], 1e-300):.1e}; expected below {SINGLE:.0e}): "
            f"{_to_add(law, suggest(law, fit.data, fit.theta[np.newaxis], SINGLE))}"
        )


def _refuse_narrow(fit: Fit, errors: FloatArray, sizes: FloatArray) -> None:
    # On a bound (inf), or known less well than that it isn't 0; NaN, where no noise is known, is neither.
    unknown = (errors > sizes) & ~_logs(fit.law)
    narrow = next(_narrow(fit.law, fit.data), None)
    if narrow is not None and unknown.any():
        what, span, rows = narrow
        names = [name for name, out in zip(fit.law.parameters, unknown, strict=True) if out]
        raise MegamupError(
            f"points: {what} spans a factor {span:.3g}; expected {NARROW:g} or more: over this range noise hides "
            f"the curvature that determines {_and(names)}: {_to_add(fit.law, rows)}"
        )


def suggest(law: Law, data: Data, thetas: FloatArray, limit: float, first: FloatArray | None = None) -> FloatArray:
    """The fewest and smallest runs, a factor `STEP` off the points in one input, that restore the rank: (k, d).

    A run of a size N that the points have comes before any other.

    Args:
        thetas: (t, p), where the Jacobian is taken; the best of them counts.
        limit: condition number beyond which a rank is lost.
        first: (j, d), runs that are added in any case.
    """
    d, size = len(law.inputs), _size(law)
    if not _scales(law):
        return np.empty((0, d))
    axes = np.eye(d)[_scales(law)]
    steps = np.log(STEP) * np.concatenate([-axes, axes])
    candidates = np.unique((data.log_x[:, np.newaxis] + steps).reshape(-1, d), axis=0)
    candidates = candidates[np.all(np.isfinite(law.log_value(thetas, candidates)), axis=0)]
    new_size = np.zeros(len(candidates), dtype=bool)
    if "N" in law.inputs:
        sizes = data.log_x[:, law.inputs.index("N")]
        new_size = np.abs(candidates[:, [law.inputs.index("N")]] - sizes).min(axis=1) > 1e-9
    candidates = candidates[np.lexsort((candidates[:, size].sum(axis=1), new_size))]
    added = np.empty((0, d)) if first is None else np.log(first) - data.log_centre
    while len(candidates) and len(added) < len(law.parameters):
        log_x = np.concatenate([data.log_x, added])
        ranks = _ranks(law, log_x, candidates, thetas, limit)
        if ranks.max() <= _rank(law.jacobian(thetas, log_x), limit).max():
            break
        added = np.concatenate([added, candidates[[np.argmax(ranks)]]])  # the first of the best
    return np.exp(added + data.log_centre)


def _rank(jacobian: FloatArray, limit: float) -> FloatArray:
    """Rank of each Jacobian (..., n, p) with unit columns: (...,)."""
    singular = _svd(jacobian)[0]
    return np.asarray((singular * limit > singular[..., :1]).sum(axis=-1))


def _ranks(law: Law, log_x: FloatArray, candidates: FloatArray, thetas: FloatArray, limit: float) -> FloatArray:
    """Rank of the Jacobian at `log_x` (n, d) with each of the candidates (m, d) added, at the best θ: (m,)."""
    # (t, min(n, p), p): all that singular values need
    r = np.asarray(np.linalg.qr(law.jacobian(thetas, log_x), mode="r"))
    rows = law.jacobian(thetas, candidates)  # (t, m, p)
    all_r = np.broadcast_to(r[:, np.newaxis], (*rows.shape[:2], *r.shape[1:]))
    return np.asarray(_rank(np.concatenate([all_r, rows[:, :, np.newaxis]], axis=2), limit).max(axis=0))


def _generic(law: Law, data: Data) -> FloatArray:
    """θ (t, p) from the law's own starts, which spread over its range."""
    unit = np.random.default_rng(0).uniform(0.1, 0.9, (GENERIC, len(law.parameters)))
    return law.starts(data.log_x, np.log(data.response), unit)


def _svd(jacobian: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Singular values, falling, and right singular vectors (rows) of the Jacobian (..., n, p) with unit columns."""
    lengths = np.linalg.norm(jacobian, axis=-2, keepdims=True)
    unit = np.divide(jacobian, lengths, out=np.zeros_like(jacobian), where=lengths > 0)
    short = max(jacobian.shape[-1] - jacobian.shape[-2], 0)
    padded = np.concatenate([unit, np.zeros((*unit.shape[:-2], short, unit.shape[-1]))], axis=-2)
    _, singular, vectors = np.linalg.svd(padded, full_matrices=False)
    return singular, vectors


def _null_parameters(law: Law, jacobians: FloatArray, limit: float) -> list[str]:
    """Parameters that take part in what no θ of `jacobians` (t, n, p) can tell apart; empty at full rank."""
    rank = _rank(jacobians, limit)
    best = int(np.argmax(rank))
    null = np.abs(_svd(jacobians[best])[1][rank[best] :])
    if not len(null):
        return []
    part = np.any(null > TAKES_PART * null.max(axis=1, keepdims=True), axis=0)
    return [name for name, takes in zip(law.parameters, part, strict=True) if takes]


def _constant(law: Law, data: Data) -> str | None:
    """The inputs that have one value only, in words."""
    same = np.ptp(data.log_x, axis=0) < np.log(SAME_RATIO)
    found = [f"{key} = {data.inputs[0, j]:.3g}" for j, key in enumerate(law.inputs) if same[j]]
    return f"all {len(data.response)} points have {_and(found)}" if found else None


def _on_line(log_x: FloatArray) -> tuple[bool, float]:
    """Whether two or more inputs vary (n, d) and all that do rise along one line; and the last one's slope on it."""
    varying = log_x[:, np.ptp(log_x, axis=0) >= np.log(SAME_RATIO)]
    if varying.shape[1] < 2:
        return False, 0.0
    centred = varying - varying.mean(axis=0)
    direction = np.linalg.svd(centred, full_matrices=False)[2][0]
    off = centred - np.outer(centred @ direction, direction)
    together = bool(np.all(direction > 0) or np.all(direction < 0))
    return together and bool(np.ptp(off, axis=0).max() < np.log(SAME_RATIO)), float(direction[-1] / direction[0])


def _line(law: Law, data: Data) -> tuple[str, FloatArray] | None:
    """The line that all points lie on, in words, and two runs (2, d) beside it; None where they don't."""
    varying = [j for j in _scales(law) if np.ptp(data.log_x[:, j]) >= np.log(SAME_RATIO)]
    if len(varying) < 2:
        return None
    centred = data.log_x[:, varying] - data.log_x[:, varying].mean(axis=0)
    direction = np.linalg.svd(centred, full_matrices=False)[2][0]
    off = np.ptp(centred - np.outer(centred @ direction, direction), axis=0)
    # Where one falls as the other rises (runs of one budget) terms that fall in each can't change places.
    if off.max() >= np.log(SAME_RATIO) or not (np.all(direction > 0) or np.all(direction < 0)):
        return None
    i, j, slope = varying[0], varying[-1], direction[-1] / direction[0]
    ratio = float(np.exp(np.mean(np.log(data.inputs[:, j] / data.inputs[:, i]))))
    words = f"have {law.inputs[j]}/{law.inputs[i]} = {ratio:.3g}"
    if abs(slope - 1) > 0.02:
        words = f"lie on one line, {law.inputs[j]} rising as {law.inputs[i]}^{slope:.3g}"
    return f"all {len(data.response)} points {words}", _both_sides(law, data, j, 1.0)


def _both_sides(law: Law, data: Data, j: int, span: float) -> FloatArray:
    """The smallest run with input j at `STEP` below its own and `STEP`·span above: (2, d)."""
    rows = np.tile(data.inputs[np.argmin(data.log_x[:, _size(law)].sum(axis=1))], (2, 1))
    rows[:, j] *= np.array([1 / STEP, STEP * span])
    return rows


def _narrow(law: Law, data: Data) -> Iterator[tuple[str, float, FloatArray]]:
    """Inputs, and ratios of two, that span less than `NARROW`: name, span, and runs (k, d) that widen it."""
    for j in _scales(law):
        span = float(np.exp(np.ptp(data.log_x[:, j])))
        if span < NARROW:
            yield law.inputs[j], span, _both_sides(law, data, j, span)
    for i, j in itertools.combinations(_scales(law), 2):
        span = float(np.exp(np.ptp(data.log_x[:, j] - data.log_x[:, i])))
        if span < NARROW:
            yield f"{law.inputs[j]}/{law.inputs[i]}", span, _both_sides(law, data, j, 1.0)


def _scales(law: Law) -> list[int]:
    """Columns of the inputs that a run can be given."""
    return [j for j, key in enumerate(law.inputs) if key not in NO_SCALES]


def _size(law: Law) -> list[int]:
    """Columns whose product orders runs by their cost: N and D where the law has both, else all."""
    both = [j for j, key in enumerate(law.inputs) if key in ("N", "D")]
    return both if len(both) == 2 else list(range(len(law.inputs)))


def _logs(law: Law) -> NDArray[np.bool_]:
    """Which of θ (p,) are logs of what the law prints."""
    return np.asarray(law.bounds[0] == LOG_COEFFICIENTS[0])


def _free(fit: Fit) -> list[int]:
    """Parameters that aren't on a bound and have an effect at the points."""
    lengths = np.linalg.norm(fit.law.jacobian(fit.theta, fit.data.log_x), axis=0)
    names = fit.law.parameters
    return [i for i, length in enumerate(lengths) if names[i] not in fit.diagnostics.at_bound and length > 1e-9]


def _standard_errors(fit: Fit, noise: float | None) -> FloatArray:
    """Of each of θ (p,), by the delta method; NaN where no noise is known, inf for what is on a bound."""
    std = fit.residual_std if noise is None else noise
    free = _free(fit)
    errors = np.full(len(fit.theta), np.inf)
    _, jacobian = linearised(fit.law, fit.data, fit.objective, fit.theta)
    columns = jacobian[:, free]
    lengths = np.linalg.norm(columns, axis=0)
    inverse = np.linalg.pinv(columns / lengths)
    errors[free] = np.nan if std is None else std * np.linalg.norm(inverse, axis=1) / lengths
    return errors


def _trade(law: Law, free: Sequence[int], vector: FloatArray) -> str:
    """A null vector of the free parameters in words."""
    large = np.abs(vector) > TAKES_PART * np.abs(vector).max()
    lead = np.sign(vector[np.argmax(np.abs(vector))])
    names = [law.parameters[i] for i in free]
    up = [name for name, value, part in zip(names, vector, large, strict=True) if part and value * lead > 0]
    down = [name for name, value, part in zip(names, vector, large, strict=True) if part and value * lead < 0]
    return f"a rise of {_and(up)}" + (f" from a fall of {_and(down)}" if down else " from none")


def _to_add(law: Law, rows: FloatArray) -> str:
    """Runs (k, d) to add, in words."""
    if "curve" in law.inputs:
        return "add runs with other schedules, or log the loss more often"
    if not len(rows):
        return f"add points of other {_and(law.inputs)}"
    runs = [",".join(f"{key}={value:.3g}" for key, value in zip(law.inputs, row, strict=True)) for row in rows]
    return f"add runs such as {_and(runs)}"


def _and(names: Sequence[str]) -> str:
    """a, b and c."""
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1] if names else ""]))
