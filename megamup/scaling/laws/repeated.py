"""The law of repeated data: what epochs beyond the first are worth (Muennighoff et al. 2023, arXiv:2305.16264)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from megamup.scaling.laws.base import (
    LARGEST_EXPONENT,
    LOG_COEFFICIENTS,
    SMALLEST_EXPONENT,
    FloatArray,
    Law,
    Quantity,
    spread,
)
from megamup.scaling.laws.frontier import FLOPS_PER_PARAMETER_AND_TOKEN
from megamup.scaling.laws.starts import LIKELY_EXPONENT, log_coefficients

# Published: 15.4 for data, 5.3 for parameters. Below 0.1 a repetition is worth nothing, above 1e4 as much as new data.
LOG_DECAY = (float(np.log(0.1)), float(np.log(1e4)))
LIKELY_DECAY = 100.0

BISECTIONS = 55
BUDGETS = (1e6, 1e36)
"""FLOPs between which a run that reaches a loss is searched for."""

_LOG_SIX = float(np.log(FLOPS_PER_PARAMETER_AND_TOKEN))


class _Effective(NamedTuple):
    """Logs of what the terms see, and their derivatives; (..., n) each."""

    n: FloatArray
    d: FloatArray
    n_by_n: FloatArray
    d_by_d: FloatArray
    n_by_unique: FloatArray
    """Of n by the log of U_N; 0 where U_N is N itself."""
    n_by_decay: FloatArray
    d_by_decay: FloatArray


@dataclass(frozen=True)
class DataConstrained(Law):
    """L = E + A/N'^alpha + B/D'^beta, where repeated data and parameters beyond their use are worth less and less.

        D' = U_D + U_D·R_D·(1 - exp(-(D/U_D - 1)/R_D)),   U_D = min(D, U), U the unique tokens
        N' = U_N + U_N·R_N·(1 - exp(-(N/U_N - 1)/R_N)),   U_N = min(N, the compute-optimal N for U_D tokens)

    θ: logs of E and of the two terms (as of N and D) at the centre, alpha, beta, logs of R_D and R_N.
    """

    name = "data-constrained"
    formula = "L = E + A/N'^alpha + B/D'^beta, D' = U_D·(1 + R_D·(1 - exp(-(D/U_D - 1)/R_D))), N' likewise of U_N, R_N"
    inputs = ("N", "D", "U")
    parameters = ("E", "A", "B", "alpha", "beta", "R_D", "R_N")
    source = "Muennighoff et al. 2023, arXiv:2305.16264, eq. 5 and 6"
    published_objective = "huber"

    log_epochs: float = 0.0
    """Log of D/U at the centre of the points: centred inputs alone don't tell how often data was repeated."""

    def bound_to(self, columns: Mapping[str, FloatArray]) -> DataConstrained:
        return replace(self, log_epochs=float(np.mean(np.log(columns["D"])) - np.mean(np.log(columns["U"]))))

    def predict(self, parameters: FloatArray, inputs: FloatArray) -> FloatArray:
        return super(DataConstrained, replace(self, log_epochs=0.0)).predict(parameters, inputs)

    @property
    def bounds(self) -> tuple[FloatArray, FloatArray]:
        low, high = zip(*[LOG_COEFFICIENTS] * 3, *[(SMALLEST_EXPONENT, LARGEST_EXPONENT)] * 2, *[LOG_DECAY] * 2)  # noqa: B905
        return np.array(low), np.array(high)

    @property
    def logged(self) -> tuple[bool, ...]:
        return (True, True, True, False, False, True, True)

    def may_vanish(self, name: str) -> bool:
        return name == "E"

    def log_value(self, theta: FloatArray, log_x: FloatArray) -> FloatArray:
        logs, _ = self._terms(theta, log_x)
        return np.asarray(np.logaddexp.reduce(logs, axis=-1))

    def jacobian(self, theta: FloatArray, log_x: FloatArray) -> FloatArray:
        logs, seen = self._terms(theta, log_x)
        shares = np.exp(logs - np.logaddexp.reduce(logs, axis=-1)[..., np.newaxis])
        _, of_n, of_d = np.moveaxis(shares, -1, 0)
        log_a, log_b, alpha, beta = (theta[..., i, np.newaxis] for i in (1, 2, 3, 4))
        # U_N = optimum(A, B, alpha, beta): log U_N = (log(alpha·A) - log(beta·B) + beta·log U_D) / alpha.
        unique_d = self._unique(log_x)
        by_unique = -alpha * seen.n_by_unique * of_n
        unique = (np.log(alpha / beta) + log_a - log_b + beta * unique_d) / alpha
        columns = [
            shares[..., 0],
            of_n + by_unique / alpha,
            of_d - by_unique / alpha,
            -of_n * seen.n + by_unique * (1 / alpha - unique) / alpha,
            -of_d * seen.d + by_unique * (unique_d - 1 / beta) / alpha,
            -beta * seen.d_by_decay * of_d,
            -alpha * seen.n_by_decay * of_n,
        ]
        return np.stack(columns, axis=-1)

    def starts(self, log_x: FloatArray, log_y: FloatArray, unit: FloatArray) -> FloatArray:
        """Exponents and decays even in their logs, with the best coefficients where no parameter is too many."""
        exponents = spread(LIKELY_EXPONENT, unit[..., 3:5])
        decays = np.log(LIKELY_DECAY) * unit[..., 5:]
        d, *_ = _effective(log_x[:, 1], self._unique(log_x), np.exp(decays[..., :1]))
        seen = np.stack(np.broadcast_arrays(log_x[:, 0], d), axis=-1)
        powers = np.exp(-exponents[..., np.newaxis, :] * seen)  # (s, n, 2)
        basis = np.concatenate([np.ones_like(powers[..., :1]), powers], axis=-1)
        return np.concatenate([log_coefficients(basis, log_y), exponents, decays], axis=-1)

    def public(self, theta: FloatArray, log_centre: FloatArray) -> FloatArray:
        logs, exponents, decays = theta[..., :3], theta[..., 3:5], theta[..., 5:]
        logs = np.where(logs - logs.max(axis=-1, keepdims=True) < -50, -np.inf, logs)  # gone is 0, not e^-60
        return np.concatenate([np.exp(logs + _shift(exponents, log_centre)), exponents, np.exp(decays)], axis=-1)

    def internal(self, parameters: FloatArray, log_centre: FloatArray) -> FloatArray:
        values = np.asarray(parameters, dtype=np.float64)
        exponents = values[..., 3:5]
        with np.errstate(divide="ignore"):
            logs = np.maximum(np.log(values[..., :3]) - _shift(exponents, log_centre), LOG_COEFFICIENTS[0])
        return np.concatenate([logs, exponents, np.log(values[..., 5:])], axis=-1)

    def quantities(self, at: Mapping[str, float]) -> dict[str, Quantity]:
        """At {"C", "U"}: N_opt, D_opt, D_per_N, epochs (D/U) and the loss L of the best run of C = 6·N·D FLOPs.

        At {"L", "U"}: the C of the least run that reaches a loss; NaN where no number of epochs does.
        """
        unbound = replace(self, log_epochs=0.0)
        if set(at) == {"C", "U"}:
            return unbound._at_budget(lambda p: np.full(p.shape[:-1], np.log(at["C"])), at["U"])
        if set(at) == {"L", "U"}:
            log_c: Quantity = lambda p: unbound._log_budget(p, at["L"], at["U"])  # noqa: E731
            best = unbound._at_budget(log_c, at["U"])
            return {"C": lambda p: np.exp(log_c(p))} | {name: best[name] for name in ("N_opt", "D_opt", "epochs")}
        return {}

    def _at_budget(self, log_budget: Quantity, unique: float) -> dict[str, Quantity]:
        def optimum(p: FloatArray) -> FloatArray:
            return self._optimum(p, log_budget(p), unique)

        def log_d(p: FloatArray) -> FloatArray:
            return log_budget(p) - _LOG_SIX - optimum(p)

        return {
            "N_opt": lambda p: np.asarray(np.exp(optimum(p))),
            "D_opt": lambda p: np.asarray(np.exp(log_d(p))),
            "D_per_N": lambda p: np.asarray(np.exp(log_d(p) - optimum(p))),
            "epochs": lambda p: np.asarray(np.exp(log_d(p)) / unique),
            "L": lambda p: self._least(p, log_budget(p), unique),
        }

    def _optimum(self, p: FloatArray, log_c: FloatArray, unique: float) -> FloatArray:
        """Log of the N of least loss at a budget: (...,). More N gains less the more there is, so this bisects."""
        theta = self.internal(p, np.zeros(3))
        low, high = np.zeros(p.shape[:-1]), np.asarray(log_c) - _LOG_SIX

        def gain_of_n(n: FloatArray) -> FloatArray:
            log_x = np.stack([n, log_c - _LOG_SIX - n, np.full_like(n, np.log(unique))], axis=-1)
            logs, seen = self._terms(theta, log_x[..., np.newaxis, :])
            of_n = theta[..., 3] * np.exp(logs[..., 0, 1]) * seen.n_by_n[..., 0]
            return np.asarray(of_n - theta[..., 4] * np.exp(logs[..., 0, 2]) * seen.d_by_d[..., 0])

        return _bisect(gain_of_n, low, high)

    def _least(self, p: FloatArray, log_c: FloatArray, unique: float) -> FloatArray:
        """The least loss at a budget: (...,)."""
        n = self._optimum(p, log_c, unique)
        log_x = np.stack([n, log_c - _LOG_SIX - n, np.full_like(n, np.log(unique))], axis=-1)
        value = self.log_value(self.internal(p, np.zeros(3)), log_x[..., np.newaxis, :])
        return np.asarray(np.exp(value[..., 0]))

    def _log_budget(self, p: FloatArray, loss: float, unique: float) -> FloatArray:
        """Log FLOPs at which the least loss is `loss`."""
        low, high = (np.full(p.shape[:-1], np.log(end)) for end in BUDGETS)
        reached = self._least(p, high, unique) < loss
        return np.where(reached, _bisect(lambda c: self._least(p, c, unique) - loss, low, high), np.nan)

    def _terms(self, theta: FloatArray, log_x: FloatArray) -> tuple[FloatArray, _Effective]:
        """Logs of the three terms (..., n, 3) and what they see; `log_x` (n, 3), or (..., n, 3)."""
        log_e, log_a, log_b, alpha, beta, log_rd, log_rn = (theta[..., i, np.newaxis] for i in range(7))
        unique_d = self._unique(log_x)
        d, d_by_d, _, d_by_decay = _effective(log_x[..., 1], unique_d, np.exp(log_rd))
        optimum = (np.log(alpha / beta) + log_a - log_b + beta * unique_d) / alpha
        n, n_by_n, n_by_unique, n_by_decay = _effective(log_x[..., 0], optimum, np.exp(log_rn))
        logs = np.stack(np.broadcast_arrays(log_e, log_a - alpha * n, log_b - beta * d), axis=-1)
        return logs, _Effective(n, d, n_by_n, d_by_d, n_by_unique, n_by_decay, d_by_decay)

    def _unique(self, log_x: FloatArray) -> FloatArray:
        """Log of U_D, centred as D is."""
        return np.minimum(log_x[..., 1], log_x[..., 2] - self.log_epochs)


def _effective(
    log_x: FloatArray, log_unique: FloatArray, decay: FloatArray
) -> tuple[FloatArray, FloatArray, FloatArray, FloatArray]:
    """Log of x' = u·(1 + R·(1 - exp(-(x/u - 1)/R))) with u <= x, and its derivatives by log x, log u and log R."""
    unique = np.minimum(log_x, log_unique)
    ratio = np.exp(np.minimum(log_x - unique, 50.0))
    left = np.exp(-(ratio - 1) / decay)  # what the next repetition is worth
    growth = 1 + decay * (1 - left)
    by_x = left * ratio / growth
    by_decay = (decay * (1 - left) - (ratio - 1) * left) / growth
    return unique + np.log(growth), by_x, 1 - by_x, by_decay


def _shift(exponents: FloatArray, log_centre: FloatArray) -> FloatArray:
    """Log of a term's coefficient less the log of the term at the centre, for E, A and B: (..., 3)."""
    shift = exponents * log_centre[:2]
    return np.concatenate([np.zeros_like(shift[..., :1]), shift], axis=-1)


def _bisect(function: Callable[[FloatArray], FloatArray], low: FloatArray, high: FloatArray) -> FloatArray:
    """Where a falling function (...,) crosses 0."""
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        above = function(middle) > 0
        low, high = np.where(above, middle, low), np.where(above, high, middle)
    return (low + high) / 2


DATA_CONSTRAINED = DataConstrained()
