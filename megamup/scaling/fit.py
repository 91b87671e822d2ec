"""The one solver: least squares on a separable law by variable projection from many starts.

For fixed exponents a law is linear in its coefficients, so they are eliminated: what is searched is the
residual of the best nonnegative coefficients as a function of the exponents alone (Golub & Pereyra 1973,
SIAM J. Numer. Anal. 10:413). One dimension is left of the power law's three, and the valley between offset
and exponent, along which joint searches stop early and report success, is gone.
"""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy.optimize import least_squares

from megamup.errors import MegamupError
from megamup.scaling.laws import FloatArray, Law

OBJECTIVES = {
    "loss": "least squares on the loss",
    "relative": "least squares on (fitted - measured) / measured, to first order the logarithm of the loss",
}
STARTS = 24

# Beyond these a result is reported with a warning. 1e4: rounding of the losses in the fourth digit moves the
# parameters by their own size. 1e-7: least squares stops near 1e-10 where it converges.
MAX_CONDITION_NUMBER = 1e4
MAX_GRADIENT_NORM = 1e-7
MIN_SHARE_OF_STARTS = 0.5

# An exponent within 0.1% of an end of its searched range has been stopped by it.
BOUND_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Diagnostics:
    """How far the optimum found can be believed."""

    share_of_starts_at_optimum: float
    """Share of the starts whose search ended at the best objective found."""
    gradient_norm: float
    """Of the objective by the log of each free parameter, over the sum of squared losses: 0 at an optimum."""
    condition_number: float
    """Of the Jacobian with columns of unit norm: how nearly the effects of parameters cancel each other."""
    at_bound: tuple[str, ...]
    """Parameters on their bound: a coefficient at 0, an exponent at an end of its searched range."""


@dataclass(frozen=True)
class Fit:
    """A law fitted to n points; `coefficients` are those of centred inputs (x over its geometric mean)."""

    law: Law
    objective: str
    inputs: FloatArray
    """(n, d), as given."""
    loss: FloatArray
    """(n,), nats per token."""
    exponents: FloatArray
    """(q,)"""
    coefficients: FloatArray
    """(k,)"""
    diagnostics: Diagnostics

    @property
    def log_centre(self) -> FloatArray:
        """Log of the geometric mean of each input: (d,)."""
        centre: FloatArray = np.log(self.inputs).mean(axis=0)
        return centre

    @property
    def parameters(self) -> dict[str, float]:
        """The law's parameters, in the units of x and the loss as given."""
        own = self.coefficients * self.law.uncentre(self.exponents, self.log_centre)
        values = dict(zip(self.law.coefficients + self.law.exponents, [*own, *self.exponents], strict=True))
        return {name: float(values[name]) for name in self.law.parameters}

    @property
    def fitted(self) -> FloatArray:
        """The law at the fitted points: (n,)."""
        return self.at(self.inputs)

    @property
    def objective_value(self) -> float:
        """Sum of squared (weighted) residuals."""
        return float(np.sum((weights(self.loss, self.objective) * (self.fitted - self.loss)) ** 2))

    @property
    def degrees_of_freedom(self) -> int:
        """Points less parameters."""
        return len(self.loss) - len(self.law.parameters)

    @property
    def residual_std(self) -> float | None:
        """Noise of one run: nats (relative objective: share of the loss); None without freedom left."""
        dof = self.degrees_of_freedom
        return math.sqrt(self.objective_value / dof) if dof > 0 else None

    def at(self, inputs: ArrayLike) -> FloatArray:
        """The law at `inputs` (m, d), or (m,) for a law of one input: the loss (m,) in nats per token."""
        log_x = np.log(as_inputs(inputs)) - self.log_centre
        return self.law.terms(self.exponents, log_x) @ self.coefficients


@dataclass(frozen=True)
class Face:
    """Least squares on a subset of the coefficients, the others at 0; leading axes: a batch of exponents."""

    columns: tuple[int, ...]
    coefficients: FloatArray
    """(..., f): the optimum on this face."""
    rss: FloatArray
    """(...,): residual sum of squares there."""
    q: FloatArray
    """(..., n, f): orthonormal columns of the face's basis B = QR."""
    r: FloatArray
    """(..., f, f)"""


def fit_law(law: Law, inputs: ArrayLike, loss: ArrayLike, *, objective: str = "loss", starts: int = STARTS) -> Fit:
    """Fit `law` to points, from `starts` spread over the exponents' range; the best end is kept.

    Args:
        inputs: (n, d), or (n,) for a law of one input; above 0, in any unit.
        loss: (n,), above 0, nats per token.
        objective: a key of `OBJECTIVES`.

    Raises:
        MegamupError: fewer points, or fewer different inputs, than the law has parameters; a value not
            above 0.
    """
    x, y = as_inputs(inputs), np.asarray(loss, dtype=np.float64)
    if not (np.all(x > 0) and np.all(y > 0) and np.all(np.isfinite(x)) and np.all(np.isfinite(y))):
        raise MegamupError(f"points: inputs {x.tolist()}, losses {y.tolist()}; expected finite numbers above 0")
    _check_enough(law, x)
    w = weights(y, objective)
    log_x = np.log(x) - np.mean(np.log(x), axis=0)
    reduced = _Reduced(law, log_x, y * w, w)
    ends = [
        least_squares(reduced.residual, start, jac=reduced.jacobian, bounds=reduced.bounds, **_TOLERANCES)
        for start in start_grid(law, starts)
    ]
    least = min(float(end.cost) for end in ends)
    # Equal to rounding: relative where there is noise, to the size of the losses where the fit is exact.
    tolerance = 1e-10 * least + 1e-20 * float(np.sum((y * w) ** 2))
    at_optimum = [end for end in ends if end.cost <= least + tolerance]
    # The objective is flat to rounding around its optimum; its gradient still tells which end is nearest.
    best = min(at_optimum, key=lambda end: float(end.optimality))
    share = len(at_optimum) / len(ends)
    exponents = reduced.exponents(best.x)
    coefficients = np.zeros(len(law.coefficients))
    face = best_face(law.terms(exponents, log_x) * w[:, np.newaxis], y * w)
    coefficients[list(face.columns)] = face.coefficients
    return Fit(law, objective, x, y, exponents, coefficients, _diagnose(reduced, exponents, coefficients, share))


def warnings_of(fit: Fit) -> list[str]:
    """What is doubtful about a fit, in words; empty where nothing is."""
    diagnostics, found = fit.diagnostics, []
    found += [_bound_warning(fit, name) for name in diagnostics.at_bound]
    if diagnostics.condition_number > MAX_CONDITION_NUMBER:
        found.append(
            f"the parameters are barely told apart (condition number {diagnostics.condition_number:.1e}): "
            "their values mean little one by one; add runs over a wider range"
        )
    if diagnostics.gradient_norm > MAX_GRADIENT_NORM:
        found.append(f"the search stopped short of an optimum (gradient norm {diagnostics.gradient_norm:.1e})")
    if diagnostics.share_of_starts_at_optimum < MIN_SHARE_OF_STARTS:
        found.append(
            f"only {diagnostics.share_of_starts_at_optimum:.0%} of the starts reached the optimum: the "
            "objective has several valleys"
        )
    return found


def weights(loss: FloatArray, objective: str) -> FloatArray:
    """What each residual is multiplied by: (n,).

    Raises:
        MegamupError: `objective` is unknown.
    """
    if objective not in OBJECTIVES:
        raise MegamupError(f"objective: {objective!r} is unknown; expected one of {', '.join(OBJECTIVES)}")
    return 1 / loss if objective == "relative" else np.ones_like(loss)


def as_inputs(inputs: ArrayLike) -> FloatArray:
    """`inputs` as floats of shape (n, d)."""
    array = np.asarray(inputs, dtype=np.float64)
    return array.reshape(-1, 1) if array.ndim == 1 else array


def start_grid(law: Law, count: int) -> FloatArray:
    """About `count` log sizes of the exponents (m, q), evenly spread over their range."""
    low, high = _log_bounds(law)
    per_axis = max(2, round(count ** (1 / len(law.exponents))))
    axes = [np.linspace(start, end, per_axis) for start, end in zip(low, high, strict=True)]
    return np.array(list(itertools.product(*axes)))


def exponents_from_logs(law: Law, logs: FloatArray) -> FloatArray:
    """Exponents (..., q) from the log of their size, which is what is searched."""
    signs = np.sign([low for low, _ in law.exponent_bounds])
    return signs * np.exp(logs)


def faces(basis: FloatArray, y: FloatArray) -> Iterator[Face]:
    """Least squares of `y` (n,) on every non-empty subset of the k columns of `basis` (..., n, k).

    With nonnegative coefficients the optimum is the best feasible one of these 2^k - 1; k is 3 at most.
    """
    k = basis.shape[-1]
    for size in range(k, 0, -1):
        for columns in itertools.combinations(range(k), size):
            q, r = np.linalg.qr(basis[..., columns])
            projected = np.einsum("...nf,n->...f", q, y)
            coefficients = np.linalg.solve(r, projected[..., np.newaxis])[..., 0]
            residual = y - np.einsum("...nf,...f->...n", q, projected)
            yield Face(columns, coefficients, np.sum(residual**2, axis=-1), q, r)


def best_face(basis: FloatArray, y: FloatArray) -> Face:
    """Nonnegative least squares on one `basis` (n, k): the best face whose coefficients are all >= 0."""
    feasible = []
    for face in faces(basis, y):
        if np.all(face.coefficients >= 0):
            if len(face.columns) == basis.shape[-1]:
                return face  # the free optimum, which no constraint can better
            feasible.append(face)
    return min(feasible, key=lambda face: float(face.rss))


# Far below scipy's 1e-8: a ladder has few points, and an early stop shows in the extrapolated loss. A stop on
# the objective (ftol) comes early by nature, as it is flat there.
_TOLERANCES: dict[str, Any] = {"ftol": None, "xtol": 1e-12, "gtol": 1e-15, "max_nfev": 200}


@dataclass(frozen=True)
class _Reduced:
    """The residual as a function of the exponents alone, at their best coefficients."""

    law: Law
    log_x: FloatArray
    y: FloatArray
    w: FloatArray

    @property
    def bounds(self) -> tuple[FloatArray, FloatArray]:
        low, high = _log_bounds(self.law)
        margin = 1e-9  # scipy wants starts strictly inside
        return low - margin, high + margin

    def exponents(self, logs: FloatArray) -> FloatArray:
        low, high = _log_bounds(self.law)
        return exponents_from_logs(self.law, np.clip(logs, low, high))

    def basis(self, logs: FloatArray) -> FloatArray:
        return self.law.terms(self.exponents(logs), self.log_x) * self.w[:, np.newaxis]

    def residual(self, logs: FloatArray) -> FloatArray:
        basis = self.basis(logs)
        face = best_face(basis, self.y)
        return basis[:, face.columns] @ face.coefficients - self.y

    def jacobian(self, logs: FloatArray) -> FloatArray:
        """d residual / d log size, (n, q): P dB β - (B⁺)ᵀ dBᵀ r (Golub & Pereyra 1973, eq. 4.9).

        B is the basis, dB its derivative, P the projection off its columns, β the coefficients, r the
        residual.
        """
        exponents = self.exponents(logs)
        basis = self.basis(logs)
        face = best_face(basis, self.y)
        columns = list(face.columns)
        residual = basis[:, columns] @ face.coefficients - self.y
        # d exponent / d log size = exponent
        gradient = self.law.terms_gradient(exponents, self.log_x) * exponents[:, np.newaxis, np.newaxis]
        derivative = gradient[..., columns] * self.w[:, np.newaxis]  # (q, n, f)
        along = derivative @ face.coefficients  # (q, n)
        along -= (along @ face.q) @ face.q.T
        turned = np.einsum("qnf,n->qf", derivative, residual)
        pseudo_inverse = np.linalg.solve(face.r, face.q.T)  # (f, n)
        jacobian: FloatArray = (along - turned @ pseudo_inverse).T
        return jacobian


def _log_bounds(law: Law) -> tuple[FloatArray, FloatArray]:
    sizes = np.sort(np.log(np.abs(np.array(law.exponent_bounds))), axis=1)
    return sizes[:, 0], sizes[:, 1]


def _check_enough(law: Law, inputs: FloatArray) -> None:
    needed, points = len(law.parameters), len(inputs)
    if points < needed:
        raise MegamupError(
            f"points: {points} given; the law {law.name} has the {needed} parameters "
            f"{', '.join(law.parameters)} and needs at least {needed}, and {needed + 1} for intervals: "
            f"add {needed - points} or more, best smaller and larger than those given"
        )
    different = len(np.unique(inputs, axis=0))
    if different < needed:
        raise MegamupError(
            f"points: {points} given at only {different} different sizes; the law {law.name} needs {needed}: "
            f"add runs at {needed - different} or more other sizes"
        )


def _diagnose(reduced: _Reduced, exponents: FloatArray, coefficients: FloatArray, share: float) -> Diagnostics:
    law = reduced.law
    basis = law.terms(exponents, reduced.log_x) * reduced.w[:, np.newaxis]
    by_exponent = (law.terms_gradient(exponents, reduced.log_x) @ coefficients) * reduced.w  # (q, n)
    residual = basis @ coefficients - reduced.y
    # By the log of each parameter, so that their units don't count.
    jacobian = np.column_stack([basis * coefficients, by_exponent.T * exponents])
    low, high = _log_bounds(law)
    logs = np.log(np.abs(exponents))
    stopped = (logs - low < BOUND_TOLERANCE) | (high - logs < BOUND_TOLERANCE)
    bound = np.concatenate([coefficients == 0, stopped])
    free = jacobian[:, ~bound]
    # A coefficient at 0 takes its exponent's effect with it; such a column has no direction.
    free = free[:, np.linalg.norm(free, axis=0) > 0]
    names = law.coefficients + law.exponents
    return Diagnostics(
        share_of_starts_at_optimum=share,
        gradient_norm=float(np.linalg.norm(free.T @ residual) / np.sum(reduced.y**2)),
        condition_number=float(np.linalg.cond(free / np.linalg.norm(free, axis=0))),
        at_bound=tuple(name for name in law.parameters if bound[names.index(name)]),
    )


def _bound_warning(fit: Fit, name: str) -> str:
    value = fit.parameters[name]
    if name in fit.law.coefficients:
        return (
            f"{name} lies on its bound 0: the points don't show this term; add runs over a wider range, "
            "or doubt that the runs follow one law"
        )
    return f"{name} lies at the end {value:g} of its searched range: the points don't determine it"
