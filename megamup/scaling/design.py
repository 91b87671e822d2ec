"""Which runs to train next: those that narrow the interval of one prediction most for their FLOPs.

The delta method's variance of a quantity with gradient g by θ is gᵀ M⁻¹ g, where the information M = JᵀJ/σ² grows by
j jᵀ/σ² with a run whose row of the Jacobian is j. What a run takes off the variance is thus known before it is trained
(c-optimal design: Elfving 1952, Ann. Math. Stat. 23:255; nonlinear laws, at the fitted θ: Chernoff 1953, ibid. 24:586).

A number of runs within a budget is chosen greedily twice: by gain per FLOP, which spends the count on the cheapest runs
where it is short, and by gain alone, which spends the budget on one. The better set (Leskovec et al. 2007, KDD, section
3.2) is then improved run by run (Fedorov 1972, Theory of Optimal Experiments, ch. 3). Replicates are allowed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import t as student

from megamup.errors import MegamupError
from megamup.scaling.fit import Data, Fit, as_inputs, linearised
from megamup.scaling.laws.base import LOG_COEFFICIENTS, NO_TERM, FloatArray, Law
from megamup.scaling.uncertainty import degrees_of_freedom, no_interval_reason

PRIOR_STD = 10.0
"""Of every θ (logs of coefficients, exponents), as a ridge on M: far beyond anything published, it tells nothing where
the points tell anything, and keeps M invertible where they don't."""
UNSEEN = 0.1
"""Share of the response that a term is taken to have where the fit put it on its bound 0, its exponent in the middle of
the range: what the points don't show isn't known to be absent, and a design that believes so never looks for it."""

GRID = {1: 129, 2: 33}
"""Candidates along each input, by the number of inputs."""
GRID_OF_MANY = 9
RATIO_STEP = 4.0
"""Tokens per parameter of a candidate leave the range of the runs and the target by this factor at most."""
WORTH = 1e-3
"""Share of the variance left that a run must take off to be proposed beside others."""
SAME_VARIANCE = 1e-6
"""Share of the variance below which an exchange is no improvement."""

Flops = Callable[[FloatArray], FloatArray]
"""Inputs (m, d) -> FLOPs of a run (m,)."""


@dataclass(frozen=True)
class Proposal:
    """One run to train."""

    inputs: dict[str, float]
    flops: float
    share_of_budget: float
    half_width_before: float
    """Of the target's interval, in the target's unit, before this run and after those proposed above it."""
    half_width_after: float
    gain_per_flop: float
    """Share of the target's variance that it takes off, per FLOP."""


@dataclass(frozen=True)
class Design:
    """The runs to train next, by falling gain per FLOP."""

    target: str
    """The quantity whose interval they narrow, in words."""
    value: float
    """Of the target, by the fit."""
    level: float
    half_width_before: float
    half_width_after: float
    """With all proposals: the delta method's interval of the law itself, not of one more run with its noise."""
    std_before: float
    std_after: float
    """Standard error of the target, in its unit."""
    flops: float
    budget: float
    runs: tuple[Proposal, ...]


def propose(
    fit: Fit,
    at: Mapping[str, float],
    *,
    budget: float,
    count: int = 5,
    quantity: str | None = None,
    candidates: ArrayLike | None = None,
    flops: Flops | None = None,
    noise: float | None = None,
    widening: float = 1.0,
    level: float = 0.95,
) -> Design:
    """The runs, at most `count` and `budget` FLOPs in all, that narrow the target's interval most.

    Args:
        at: the law's inputs, where the target is its prediction there; or what `Law.quantities` wants.
        quantity: which of `Law.quantities`; default the loss, or the only one.
        candidates: (m, d) runs to choose from; default `candidate_grid`. None as dear as the target itself is proposed.
        flops: cost of runs; default `run_flops`, which knows laws of C or of N and D.
        noise: standard deviation of one run in the objective's scale, known; default the fit's own, measured.
        widening: the factor by which a backtest widens intervals; half-widths are multiplied by it.

    Raises:
        MegamupError: a target that the law doesn't have, no noise, or a budget that pays for no candidate.
    """
    flops = flops or run_flops(fit.law, fit.data)
    target = _target(fit, at, quantity)
    fit = replace(fit, theta=_with_unseen(fit))
    points = candidate_grid(fit, at, budget, flops) if candidates is None else as_inputs(candidates)
    sigma = _noise(fit, noise)
    rows, cost = _rows(fit, points) / sigma, flops(points)
    usable = np.all(np.isfinite(rows), axis=1) & (cost <= budget) & (cost < _target_flops(fit.law, at, flops))
    if count < 1 or not usable.any():
        raise MegamupError(
            f"budget: {budget:.3g} FLOPs for {count} runs pays for none of the {len(points)} candidates, which cost "
            f"{cost.min():.3g} and more; expected a run or more that costs less than the target: raise the budget"
        )
    points, rows, cost = points[usable], rows[usable], cost[usable]
    search = _Search(_information(fit, sigma), target.gradient, rows, cost, budget, count)
    chosen = search.in_order(search.best())
    variances = np.array([search.variance(chosen[:i]) for i in range(len(chosen) + 1)])
    stds = target.value * np.sqrt(variances)
    # Noise that is given is known; what is measured is known better with every run.
    dof = np.inf if noise is not None else degrees_of_freedom(fit) + np.arange(len(stds))
    halves = widening * stds * student.ppf((1 + level) / 2, dof)
    runs = [
        Proposal(
            inputs=dict(zip(fit.law.inputs, map(float, points[j]), strict=True)),
            flops=float(cost[j]),
            share_of_budget=float(cost[j] / budget),
            half_width_before=float(halves[i]),
            half_width_after=float(halves[i + 1]),
            gain_per_flop=float((1 - variances[i + 1] / variances[i]) / cost[j]),
        )
        for i, j in enumerate(chosen)
    ]
    return Design(
        target=target.name,
        value=target.value,
        level=level,
        half_width_before=float(halves[0]),
        half_width_after=float(halves[-1]),
        std_before=float(stds[0]),
        std_after=float(stds[-1]),
        flops=float(cost[chosen].sum()),
        budget=budget,
        runs=tuple(runs),
    )


def run_flops(law: Law, data: Data, flops: ArrayLike | None = None) -> Flops:
    """What a run costs by the law's inputs: C itself, or N·D times 6 (Kaplan et al. 2020, section 2.1).

    Args:
        flops: (n,) FLOPs of the fitted points in the ladder's own convention. Then N·D is multiplied by their own mean
            ratio, and for laws of other inputs log C is regressed on the logs of these.

    Raises:
        MegamupError: a law of neither C nor N and D, and no `flops`.
    """
    keys = law.inputs
    if "C" in keys:
        column = keys.index("C")
        return lambda x: x[:, column]
    own = None if flops is None else np.asarray(flops, dtype=np.float64)
    if {"N", "D"} <= set(keys):
        n, d = keys.index("N"), keys.index("D")
        ratio = 6.0 if own is None else float(np.exp(np.mean(np.log(own / (data.inputs[:, n] * data.inputs[:, d])))))
        return lambda x: ratio * x[:, n] * x[:, d]
    if own is None:
        raise MegamupError(
            f"flops: the cost of a run doesn't follow from {', '.join(keys)}, the inputs of the law {law.name}; "
            "expected the FLOPs of the fitted runs: give runs that carry C"
        )
    basis = np.concatenate([np.ones((len(own), 1)), data.log_x], axis=1)
    coefficients = np.linalg.lstsq(basis, np.log(own), rcond=None)[0]
    return lambda x: np.exp(coefficients[0] + (np.log(x) - data.log_centre) @ coefficients[1:])


def candidate_grid(
    fit: Fit,
    at: Mapping[str, float],
    budget: float,
    flops: Flops,
    limits: Mapping[str, tuple[float, float]] | None = None,
) -> FloatArray:
    """Runs (m, d) on a log grid: from the smallest fitted to what the budget pays, no input beyond runs and target.

    N and D go together only at tokens per parameter within a factor `RATIO_STEP` of those of the runs and the target:
    farther off the law is untested.

    Args:
        limits: lowest and highest value of an input, in place of the default's.
    """
    keys, x = fit.law.inputs, fit.data.inputs
    reach = max(1.0, (budget / float(flops(x).max())) ** (1 / len(keys)))
    axes = []
    for j, key in enumerate(keys):
        low, high = x[:, j].min(), x[:, j].max()
        low, high = (limits or {}).get(key, (low, max(high, at[key]) if key in at else high * reach))
        # Losses that a law takes as an input are those it was fitted at.
        axis = np.unique(x[:, j]) if key == "L" else np.geomspace(low, high, GRID.get(len(keys), GRID_OF_MANY))
        axes.append(np.unique(axis))
    grid = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, len(keys))
    if {"N", "D"} <= set(keys):
        n, d = keys.index("N"), keys.index("D")
        known = np.append(x[:, d] / x[:, n], [at["D"] / at["N"]] if {"N", "D"} <= set(at) else [])
        ratio = grid[:, d] / grid[:, n]
        grid = grid[(ratio >= known.min() / RATIO_STEP) & (ratio <= known.max() * RATIO_STEP)]
    return grid


@dataclass(frozen=True)
class _Target:
    name: str
    value: float
    gradient: FloatArray
    """(p,): of the log of the value by θ."""


def _target(fit: Fit, at: Mapping[str, float], quantity: str | None) -> _Target:
    law, where = fit.law, ", ".join(f"{key}={value:.4g}" for key, value in at.items())
    if set(law.inputs) == set(at) and quantity in (None, law.response):
        name = law.response
        log_x = np.log([[at[key] for key in law.inputs]]) - fit.data.log_centre

        def log(theta: FloatArray) -> FloatArray:
            return law.log_value(theta, log_x)[..., 0]
    else:
        found = law.quantities(at)
        name = quantity or (next(iter(found)) if len(found) == 1 else "L")
        if name not in found:
            raise MegamupError(
                f"at: {where or 'nothing'} with the quantity {name} is no target of the law {law.name}; expected "
                f"{', '.join(f'{key}=...' for key in law.inputs)}"
                + (f", or the quantity {' or '.join(found)}" if found else "")
            )

        def log(theta: FloatArray) -> FloatArray:
            return np.asarray(np.log(found[name](law.public(theta, fit.data.log_centre))))

    theta, step = _with_unseen(fit), 1e-5 * np.eye(len(fit.theta))
    gradient = (log(theta + step) - log(theta - step)) / 2e-5  # (p,), central differences
    value = float(np.exp(log(fit.theta)))
    if not (0 < value < np.inf and np.all(np.isfinite(gradient))):
        raise MegamupError(
            f"at: {name} at {where} is {value:g} by the fit; expected a number above 0: choose another target"
        )
    return _Target(f"{name} at {where}", value, gradient)


def _with_unseen(fit: Fit) -> FloatArray:
    """θ (p,) of the fit, with what lies on a bound or has no effect at the points put where its effect shows."""
    low, high = fit.law.bounds
    logs = low == LOG_COEFFICIENTS[0]
    effect = np.abs(fit.law.jacobian(fit.theta, fit.data.log_x)).max(axis=0)
    on_bound = np.array([name in fit.diagnostics.at_bound for name in fit.law.parameters]) | (effect < NO_TERM)
    middle = np.sign(low + high) * np.sqrt(np.abs(low * high))
    share = np.log(UNSEEN) + np.mean(np.log(fit.data.response))
    return np.where(on_bound, np.where(logs, share, middle), fit.theta)


def _target_flops(law: Law, at: Mapping[str, float], flops: Flops) -> float:
    """What the target itself costs; inf where that isn't known."""
    if set(law.inputs) <= set(at):
        return float(flops(np.array([[at[key] for key in law.inputs]]))[0])
    return at.get("C", np.inf)


def _noise(fit: Fit, noise: float | None) -> float:
    if noise is not None and not 0 < noise < np.inf:
        raise MegamupError(f"noise: {noise!r}; expected a number above 0, such as 0.003 for 0.3% of the loss")
    reason = no_interval_reason(fit)
    if noise is None and reason is not None:
        raise MegamupError(
            f"noise: {reason}; expected a known spread of one run: give the noise, such as 0.003 for 0.3% of the loss"
        )
    std = fit.residual_std if noise is None else noise
    # Points that lie on the law leave rounding.
    return max(float(std or 0.0), 1e-12)


def _rows(fit: Fit, inputs: FloatArray) -> FloatArray:
    """The Jacobian's rows of runs at `inputs` (m, d) that lie on the law, in the objective's scale: (m, p)."""
    log_x = np.log(inputs) - fit.data.log_centre
    log_value = fit.law.log_value(fit.theta, log_x)
    slope = fit.objective.slope(log_value, np.exp(log_value))
    return fit.law.jacobian(fit.theta, log_x) * slope[:, np.newaxis]


def _information(fit: Fit, sigma: float) -> FloatArray:
    """M (p, p) of the fitted points; those of one run's curve count as one, as they are no independent evidence."""
    _, jacobian = linearised(fit.law, fit.data, fit.objective, fit.theta)
    _, index, counts = np.unique(fit.data.runs, return_inverse=True, return_counts=True)
    rows = jacobian / (sigma * np.sqrt(counts[index]))[:, np.newaxis]
    return np.asarray(rows.T @ rows + np.eye(rows.shape[1]) / PRIOR_STD**2)


@dataclass(frozen=True)
class _Search:
    """Sets of runs, as lists of candidates' indices, and the target's variance after them."""

    information: FloatArray
    """(p, p), of what has been run."""
    gradient: FloatArray
    """(p,), of the target."""
    rows: FloatArray
    """(m, p), of the candidates, over the noise."""
    cost: FloatArray
    """(m,)"""
    budget: float
    count: int

    def variance(self, chosen: list[int]) -> float:
        """Of the target after the chosen runs."""
        return float(self.gradient @ np.linalg.solve(self._information_after(chosen), self.gradient))

    def gains(self, chosen: list[int]) -> FloatArray:
        """What each candidate takes off the variance after the chosen runs (m,); -inf where the budget forbids it."""
        inverse = np.linalg.inv(self._information_after(chosen))
        # (M + j jᵀ)⁻¹ = M⁻¹ - M⁻¹j jᵀM⁻¹ / (1 + jᵀM⁻¹j)
        along = self.rows @ (inverse @ self.gradient)
        gain = along**2 / (1 + np.sum((self.rows @ inverse) * self.rows, axis=1))
        left = self.budget * (1 + 1e-9) - self.cost[chosen].sum()
        return np.where((self.cost <= left) & (len(chosen) < self.count), gain, -np.inf)

    def best(self) -> list[int]:
        """The set of least variance that two greedy searches and exchanges find."""
        chosen = min((self._filled([], self.cost), self._filled([], np.ones_like(self.cost))), key=self.variance)
        while True:
            rivals = []
            for i in range(len(chosen)):
                rest = chosen[:i] + chosen[i + 1 :]
                rivals.append(self._filled([*rest, int(np.argmax(self.gains(rest)))], np.ones_like(self.cost)))
            rival = min(rivals, key=self.variance)
            if self.variance(rival) >= self.variance(chosen) * (1 - SAME_VARIANCE):
                return chosen
            chosen = rival

    def in_order(self, chosen: list[int]) -> list[int]:
        """The chosen runs by falling gain per FLOP, each given those before it; those that win nothing are left out."""
        ordered: list[int] = []
        left = list(chosen)
        while left:
            gains = self.gains(ordered)[left]
            best = int(np.argmax(gains / self.cost[left]))
            if ordered and gains.max() < WORTH * self.variance(ordered):
                break
            ordered.append(left.pop(best))
        return ordered

    def _filled(self, chosen: list[int], price: FloatArray) -> list[int]:
        """`chosen` and what is added greedily by gain per price, while budget and count allow."""
        chosen = list(chosen)
        while True:
            gains = self.gains(chosen)
            if not np.any(np.isfinite(gains)):
                return chosen
            chosen.append(int(np.argmax(gains / price)))

    def _information_after(self, chosen: list[int]) -> FloatArray:
        rows = self.rows[chosen]
        return np.asarray(self.information + rows.T @ rows)
