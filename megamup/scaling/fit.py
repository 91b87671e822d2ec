"""The one solver: a law fitted to points from many starts, with what tells whether the optimum can be believed.

Inputs are centred on a log scale, the searched vector θ is in units of the law's own effect (`laws/base.py`), gradients
are analytic. A law that is linear in its coefficients is first searched in its exponents alone (`projection.py`), then
every end goes on in all parameters under the objective asked for; Huber's is approached from least squares by shrinking
delta, as its own valleys have kinks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike, NDArray

from megamup.errors import MegamupError
from megamup.scaling.laws.base import FloatArray, IntArray, Law, SumOfPowers
from megamup.scaling.objective import OBJECTIVES, Objective, get_objective
from megamup.scaling.projection import Projected
from megamup.scaling.solver import Problem, minimise

STARTS = 32

# Beyond these a result is reported with a warning. 1e4: rounding of the losses in the fourth digit moves the
# parameters by their own size. 1e-7: the search stops near 1e-12 where it converges.
MAX_CONDITION_NUMBER = 1e4
MAX_GRADIENT_NORM = 1e-7
MIN_SHARE_OF_STARTS = 0.5

# Ends whose objectives agree this well are one optimum.
SAME_OPTIMUM = 1e-7

HUBER_PATH = (1e6, 100.0, 10.0, 1.0)
"""Delta over the one asked for, from least squares to the objective itself."""


@dataclass(frozen=True)
class Data:
    """n points as a law sees them."""

    inputs: FloatArray
    """(n, d), as given."""
    response: FloatArray
    """(n,): nats per token, where the response is the loss."""
    runs: NDArray[np.int64]
    """(n,): index of the run that a point belongs to; points of one curve are no independent evidence."""

    centre: FloatArray | None = None
    """(d,): log of what the inputs are divided by; None for their geometric mean."""

    @cached_property
    def log_centre(self) -> FloatArray:
        """Log of what the inputs are divided by: (d,)."""
        return np.asarray(np.log(self.inputs).mean(axis=0) if self.centre is None else self.centre)

    @cached_property
    def log_x(self) -> FloatArray:
        """Logs of the centred inputs: (n, d)."""
        return np.log(self.inputs) - self.log_centre

    def take(self, rows: NDArray[np.bool_]) -> Data:
        """The points where `rows` (n,) is true, centred as all of them are: θ keeps its meaning."""
        return Data(self.inputs[rows], self.response[rows], self.runs[rows], self.log_centre)


@dataclass(frozen=True)
class Diagnostics:
    """How far the optimum found can be believed."""

    starts: int
    share_of_starts_at_optimum: float
    """Share of the starts whose search ended at the best objective found."""
    gradient_norm: float
    """Of the objective by θ, over (the objective + rounding) times the scale of each parameter: 0 at an optimum."""
    condition_number: float
    """Of the Jacobian with columns of unit norm: how nearly the effects of parameters cancel each other."""
    at_bound: tuple[str, ...]
    """Parameters on their bound: a coefficient at 0, an exponent at an end of its searched range."""


@dataclass(frozen=True)
class Fit:
    """A law fitted to n points."""

    law: Law
    objective: Objective
    data: Data
    theta: FloatArray
    """(p,), at centred inputs."""
    diagnostics: Diagnostics = field(repr=False)

    @cached_property
    def parameters(self) -> dict[str, float]:
        """The law's parameters as published, in the units of the inputs and the response as given."""
        values = self.law.public(self.theta, self.data.log_centre)
        return {name: float(value) for name, value in zip(self.law.parameters, values, strict=True)}

    @property
    def inputs(self) -> FloatArray:
        return self.data.inputs

    @property
    def loss(self) -> FloatArray:
        return self.data.response

    @property
    def fitted(self) -> FloatArray:
        """The law at the fitted points: (n,)."""
        return self.at(self.data.inputs)

    @property
    def residuals(self) -> FloatArray:
        """In the objective's own scale: (n,)."""
        return self.objective.residual(self.law.log_value(self.theta, self.data.log_x), self.data.response)

    @property
    def objective_value(self) -> float:
        """Sum of squared residuals, or of Huber's losses."""
        return self.objective.value(self.residuals)

    @property
    def degrees_of_freedom(self) -> int:
        """Points less parameters."""
        return len(self.data.response) - len(self.law.parameters)

    @property
    def residual_std(self) -> float | None:
        """Noise of one run, in the objective's scale (nats, or a share of the response); None without freedom left."""
        dof = self.degrees_of_freedom
        return math.sqrt(float(np.sum(self.residuals**2)) / dof) if dof > 0 else None

    def at(self, inputs: ArrayLike) -> FloatArray:
        """The law at `inputs` (m, d), or (m,) for a law of one input: the response (m,)."""
        log_x = np.log(as_inputs(inputs)) - self.data.log_centre
        return np.asarray(np.exp(self.law.log_value(self.theta, log_x)))


def fit_law(
    law: Law,
    inputs: ArrayLike,
    response: ArrayLike,
    *,
    objective: str | Objective = "log",
    starts: int = STARTS,
    seed: int = 0,
    runs: Sequence[int] | None = None,
) -> Fit:
    """Fit `law` to points from `starts` random starts; the best end is kept.

    Args:
        inputs: (n, d), or (n,) for a law of one input; above 0, in any unit.
        response: (n,), above 0.
        objective: a name that `get_objective` knows.
        runs: (n,), the run of each point; default each its own.

    Raises:
        MegamupError: fewer points, or fewer different inputs, than the law has parameters; a value not above 0.
    """
    x, y = as_inputs(inputs), np.asarray(response, dtype=np.float64)
    if not (np.all(x > 0) and np.all(y > 0) and np.all(np.isfinite(x)) and np.all(np.isfinite(y))):
        raise MegamupError(f"points: inputs {x.tolist()}, losses {y.tolist()}; expected finite numbers above 0")
    law = law.bound_to(dict(zip(law.inputs, x.T, strict=True)))
    check_enough(law, x)
    data = Data(x, y, np.arange(len(y)) if runs is None else np.asarray(runs, dtype=np.int64))
    wanted = get_objective(objective) if isinstance(objective, str) else objective
    unit = np.random.default_rng(seed).uniform(0.001, 0.999, (starts, len(law.parameters)))
    begin = law.starts(data.log_x, np.log(y), unit)
    theta, costs = search(law, data, wanted, begin)
    # Equal to rounding where the points lie on the law exactly.
    floor = 1e-24 * float(np.sum((wanted.weights(y) * y) ** 2))
    best = int(np.argmin(costs))
    share = float(np.mean(costs <= costs[best] * (1 + SAME_OPTIMUM) + floor))
    return Fit(law, wanted, data, theta[best], _diagnose(law, data, wanted, theta[best], starts, share, floor))


def search(
    law: Law, data: Data, objective: Objective, begin: FloatArray, weights: FloatArray | None = None
) -> tuple[FloatArray, FloatArray]:
    """Follow starts (s, p) to minima of the objective: θ (s, p) and Σ ρ (s,)."""
    if isinstance(law, SumOfPowers) and weights is None:
        begin = _projected(law, data, objective, begin)
    problem = problem_of(law, data, objective)
    # Resamples start at the optimum, which is near enough.
    path = (1.0,) if objective.delta is None or weights is not None else HUBER_PATH
    ends = None
    for factor in path:
        stage = objective if objective.delta is None else replace(objective, delta=objective.delta * factor)
        ends = minimise(problem, begin, law.bounds, stage, weights)
        begin = ends.theta
    assert ends is not None
    return ends.theta, ends.cost


def problem_of(law: Law, data: Data, objective: Objective) -> Problem:
    """The residuals of all points and their derivatives by θ, in the objective's scale."""

    def problem(theta: FloatArray, which: IntArray) -> tuple[FloatArray, FloatArray]:
        del which
        log_value = law.log_value(theta, data.log_x)
        slope = objective.slope(log_value, data.response)
        return objective.residual(log_value, data.response), law.jacobian(theta, data.log_x) * slope[..., np.newaxis]

    return problem


def linearised(law: Law, data: Data, objective: Objective, theta: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Residuals (n,) at θ (p,) and their derivative by it (n, p), in the objective's scale."""
    residual, jacobian = problem_of(law, data, objective)(theta[np.newaxis], np.zeros(1, dtype=np.int64))
    return residual[0], jacobian[0]


def _projected(law: SumOfPowers, data: Data, objective: Objective, begin: FloatArray) -> FloatArray:
    """The starts after variable projection under least squares (on relative errors in place of logs)."""
    reduced = Projected(law, data.log_x, data.response, objective.weights(data.response))
    low, high = law.bounds
    k = len(law.terms)
    ends = minimise(reduced, begin[:, k:], (low[k:], high[k:]), OBJECTIVES["loss"])
    return reduced.theta(ends.theta)


def as_inputs(inputs: ArrayLike) -> FloatArray:
    """`inputs` as floats of shape (n, d)."""
    array = np.asarray(inputs, dtype=np.float64)
    return array.reshape(-1, 1) if array.ndim == 1 else array


def check_enough(law: Law, inputs: FloatArray) -> None:
    """Refuse fewer points, or fewer different ones, than the law has parameters.

    Raises:
        MegamupError: with how many to add.
    """
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


def _diagnose(
    law: Law, data: Data, objective: Objective, theta: FloatArray, starts: int, share: float, floor: float
) -> Diagnostics:
    residual, jacobian = linearised(law, data, objective, theta)
    at_bound = law.at_bound(theta, data.log_x)
    free = [i for i, name in enumerate(law.parameters) if name not in at_bound]
    columns = jacobian[:, free]
    lengths = np.linalg.norm(columns, axis=0)
    columns = columns[:, lengths > 0] / lengths[lengths > 0]  # an exponent whose term is gone has no effect
    # |Jᵀψ| over |J| |ψ|: the cosine between the residuals' pull and what parameters could do about it; residuals of
    # 1e-7 of the response are none (logs of 1e10 round at 5e-15).
    pull = objective.psi(residual)
    size = float(np.linalg.norm(pull)) + 1e5 * math.sqrt(floor)
    return Diagnostics(
        starts=starts,
        share_of_starts_at_optimum=share,
        gradient_norm=float(np.linalg.norm(columns.T @ pull)) / size if size else 0.0,
        condition_number=float(np.linalg.cond(columns)) if columns.size else math.inf,
        at_bound=at_bound,
    )


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


def _bound_warning(fit: Fit, name: str) -> str:
    value = fit.parameters[name]
    if value == 0:
        return (
            f"{name} lies on its bound 0: the points don't show this term; add runs over a wider range, "
            "or doubt that the runs follow one law"
        )
    return f"{name} lies at the end {value:g} of its searched range: the points don't determine it"
