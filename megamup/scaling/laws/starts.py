"""Where searches of laws that are partly linear begin: at the best coefficients of random exponents."""

from __future__ import annotations

import numpy as np

from megamup.scaling.laws.base import Exponent, FloatArray

LIKELY_EXPONENT = Exponent("", 0.1, 1.5)
"""Where exponents of a loss begin: nearer to 0 a search takes a term for the offset."""

LEAST_SHARE = 0.01
"""Least part of the response that a term starts with: one at 0 would have no effect that a search could follow."""


def log_coefficients(basis: FloatArray, log_y: FloatArray) -> FloatArray:
    """Logs (s, k) of the coefficients with which the columns of `basis` (s, n, k) fit e^log_y (n,) best.

    By least squares on relative errors; Golub & Pereyra 1973, SIAM J. Numer. Anal. 10:413, go on from here.
    """
    relative = basis * np.exp(-log_y)[:, np.newaxis]
    best = np.linalg.pinv(relative).sum(axis=-1)
    return np.asarray(np.log(np.maximum(best, LEAST_SHARE / (np.abs(relative).mean(axis=-2) + 1e-300))))
