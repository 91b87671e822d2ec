"""The vertex of a parabola in the log of an input: where a loss is least between the values tried."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]

NEEDED = 3
"""Different values that a parabola needs."""


@dataclass(frozen=True)
class Parabola:
    """y = value + curvature·(log x - log vertex)², by least squares."""

    vertex: float
    """x where y is least; NaN where the parabola doesn't open upwards."""
    value: float
    """y there."""
    curvature: float
    vertex_log_std: float | None
    """Standard error of log vertex; None where no point is left to measure the noise by."""
    fault: str
    """Why the vertex is no optimum; empty where it is one."""

    def at(self, x: FloatArray) -> FloatArray:
        """y at x (n,)."""
        return np.asarray(self.value + self.curvature * (np.log(x) - math.log(self.vertex)) ** 2)


def fit_parabola(x: FloatArray, y: FloatArray, window: int | None = None) -> Parabola:
    """The parabola through y (n,) against log x (n,), of the lowest point and its neighbours where a window is given.

    The standard error is the delta method's: of -b/2a, from the covariance of a and b.

    Args:
        window: how many points at most, the nearest in log x to the lowest one.
    """
    if window is not None and len(x) > window:
        order = np.argsort(x)
        best = int(np.argmin(y[order]))
        first = min(max(best - window // 2, 0), len(x) - window)
        x, y = x[order][first : first + window], y[order][first : first + window]
    if len(np.unique(x)) < NEEDED:
        return _faulty(f"{len(np.unique(x))} different values of the {NEEDED} that a parabola takes")
    centre = float(np.log(x).mean())
    basis = np.vander(np.log(x) - centre, 3)  # (n, 3): squares, log x, 1
    coefficients, *_ = np.linalg.lstsq(basis, y, rcond=None)
    a, b, c = map(float, coefficients)
    # Rounding of a straight line is no curvature.
    if a * float(np.ptp(np.log(x))) ** 2 <= 1e-9 * float(np.abs(y).max()):
        return _faulty("the losses don't curve upwards")
    log_vertex = -b / (2 * a)
    vertex = math.exp(min(max(log_vertex + centre, -700), 700))
    fault = "" if x.min() <= vertex <= x.max() else f"the optimum {vertex:.3g} lies outside those tried"
    std = None
    if len(x) > NEEDED:
        noise = float(np.sum((basis @ coefficients - y) ** 2)) / (len(x) - NEEDED)
        slope = np.array([b / (2 * a * a), -1 / (2 * a), 0.0])
        std = math.sqrt(noise * float(slope @ np.linalg.inv(basis.T @ basis) @ slope))
    return Parabola(vertex, c - b * b / (4 * a), a, std, fault)


def _faulty(fault: str) -> Parabola:
    return Parabola(math.nan, math.nan, math.nan, None, fault)
