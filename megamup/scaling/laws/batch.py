"""The critical batch size: steps against examples at a loss (McCandlish et al. 2018, arXiv:1812.06162)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from megamup.scaling.laws.base import (
    LOG_COEFFICIENTS,
    Exponent,
    FloatArray,
    Law,
    Quantity,
    SumOfPowers,
    Term,
    spread,
)

# 1/alpha_B, the slope of log B_crit by log loss: Kaplan et al. give 4.8.
INVERSE_ALPHA = Exponent("1/alpha_B", 0.05, 50.0)

SAME_LEVEL = 1e-6
"""Logs of losses that agree this well are one level."""


def s_min(steps: FloatArray, batch: FloatArray, b_crit: FloatArray) -> FloatArray:
    """Steps that a batch far above B_crit would have needed: S/(1 + B_crit/B) (Kaplan et al. 2020, eq. 5.4)."""
    return np.asarray(steps / (1 + b_crit / batch))


def c_min(flops: FloatArray, batch: FloatArray, b_crit: FloatArray) -> FloatArray:
    """FLOPs that a batch far below B_crit would have needed: C/(1 + B/B_crit) (Kaplan et al. 2020, eq. 5.5)."""
    return np.asarray(flops / (1 + batch / b_crit))


@dataclass(frozen=True)
class BatchLoss(SumOfPowers):
    """B_crit = B_star·L^(-1/alpha_B); θ holds 1/alpha_B, in which the logs are linear."""

    def public(self, theta: FloatArray, log_centre: FloatArray) -> FloatArray:
        return _inverted(super().public(theta, log_centre))

    def internal(self, parameters: FloatArray, log_centre: FloatArray) -> FloatArray:
        return super().internal(_inverted(np.asarray(parameters, dtype=np.float64)), log_centre)


def _inverted(parameters: FloatArray) -> FloatArray:
    """With the last of the parameters (..., p) inverted."""
    return np.concatenate([parameters[..., :-1], 1 / parameters[..., -1:]], axis=-1)


BATCH_LOSS = BatchLoss(
    name="batch-loss",
    formula="B_crit = B_star·L^(-1/alpha_B)",
    inputs=("L",),
    terms=(Term("B_star", {"L": ("alpha_B", -1.0)}),),
    exponents=(replace(INVERSE_ALPHA, name="alpha_B"),),
    source="Kaplan et al. 2020, arXiv:2001.08361, eq. 5.3",
    response="B",
)


@dataclass(frozen=True)
class CriticalBatch(Law):
    """S = S_min(L)·(1 + B_crit(L)/B), B_crit(L) = B_star·L^(-1/alpha_B): steps S to reach the loss L with batch B.

    It is (S/S_min - 1)·(E/E_min - 1) = 1 with E = B·S examples and E_min = B_crit·S_min. S_min of each loss level is a
    parameter of its own, `S_min[level]`; `bound_to` finds the levels.

    θ: log of B_crit/B at the centre of the points, 1/alpha_B, then log S_min of every level.
    """

    name = "critical-batch"
    formula = "S = S_min(L)·(1 + B_crit(L)/B), B_crit(L) = B_star·L^(-1/alpha_B)"
    inputs = ("B", "L")
    response = "S"
    source = "McCandlish et al. 2018, arXiv:1812.06162, eq. 2.11; Kaplan et al. 2020, arXiv:2001.08361, eq. 5.1 and 5.3"

    levels: tuple[float, ...] = ()
    """The losses that the points are at, falling."""
    log_centre_of_losses: float = 0.0
    """What the log of a loss is given less by, in the points' centred inputs."""

    def bound_to(self, columns: Mapping[str, FloatArray]) -> CriticalBatch:
        """The law with the levels that the points (n,) are at."""
        losses = np.sort(columns["L"])[::-1]
        new = np.append(True, np.diff(np.log(losses)) < -SAME_LEVEL)
        return CriticalBatch(tuple(map(float, losses[new])), float(np.mean(np.log(columns["L"]))))

    @property
    def parameters(self) -> tuple[str, ...]:  # type: ignore[override]
        return ("B_star", "alpha_B", *(f"S_min[{level:.6g}]" for level in self.levels))

    @property
    def bounds(self) -> tuple[FloatArray, FloatArray]:
        low, high = LOG_COEFFICIENTS
        k = len(self.levels)
        return np.array([low, INVERSE_ALPHA.low, *[low] * k]), np.array([high, INVERSE_ALPHA.high, *[high] * k])

    def log_value(self, theta: FloatArray, log_x: FloatArray) -> FloatArray:
        level = self._level(log_x)
        log_s_min = theta[..., 2:][..., np.maximum(level, 0)]
        return np.where(level < 0, np.nan, log_s_min + np.logaddexp(0, _log_ratio(theta, log_x)))

    def jacobian(self, theta: FloatArray, log_x: FloatArray) -> FloatArray:
        ratio = _log_ratio(theta, log_x)
        share = np.exp(ratio - np.logaddexp(0, ratio))
        own = (self._level(log_x)[:, np.newaxis] == np.arange(len(self.levels))).astype(np.float64)  # (n, k)
        by_b = np.stack([share, -log_x[:, 1] * share], axis=-1)
        return np.concatenate([by_b, np.broadcast_to(own, (*by_b.shape[:-1], len(self.levels)))], axis=-1)

    def starts(self, log_x: FloatArray, log_y: FloatArray, unit: FloatArray) -> FloatArray:
        """B_crit within a factor 20 of the centre, each S_min up to a factor 20 below the steps seen at its level."""
        level = self._level(log_x)
        fewest = np.array([log_y[level == k].min() for k in range(len(self.levels))])
        wide = np.log(20)
        first = [(2 * unit[..., :1] - 1) * wide, spread(INVERSE_ALPHA, unit[..., 1:2])]
        return np.concatenate([*first, fewest - unit[..., 2:] * wide], axis=-1)

    def public(self, theta: FloatArray, log_centre: FloatArray) -> FloatArray:
        log_b_star = theta[..., :1] + log_centre[0] + theta[..., 1:2] * log_centre[1]
        return np.concatenate([np.exp(log_b_star), 1 / theta[..., 1:2], np.exp(theta[..., 2:])], axis=-1)

    def internal(self, parameters: FloatArray, log_centre: FloatArray) -> FloatArray:
        values = np.asarray(parameters, dtype=np.float64)
        slope = 1 / values[..., 1:2]
        first = np.log(values[..., :1]) - log_centre[0] - slope * log_centre[1]
        return np.concatenate([first, slope, np.log(values[..., 2:])], axis=-1)

    def predict(self, parameters: FloatArray, inputs: FloatArray) -> FloatArray:
        return super(CriticalBatch, replace(self, log_centre_of_losses=0.0)).predict(parameters, inputs)

    def quantities(self, at: Mapping[str, float]) -> dict[str, Quantity]:
        """At {"L"}: B_crit, the batch at which twice S_min steps and twice E_min examples are needed."""
        if set(at) != {"L"}:
            return {}
        return {"B_crit": lambda p: np.asarray(p[..., 0] * at["L"] ** (-1 / p[..., 1]))}

    def _level(self, log_x: FloatArray) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        """Index of each point's loss among the levels, -1 where it is none of them: (n,)."""
        distance = np.abs(log_x[:, 1, np.newaxis] + self.log_centre_of_losses - np.log(self.levels))
        return np.where(distance.min(axis=1) > SAME_LEVEL, -1, distance.argmin(axis=1))


def _log_ratio(theta: FloatArray, log_x: FloatArray) -> FloatArray:
    """Log of B_crit/B: (..., n)."""
    return theta[..., :1] - theta[..., 1:2] * log_x[:, 1] - log_x[:, 0]


CRITICAL_BATCH = CriticalBatch()
