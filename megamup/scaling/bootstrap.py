"""The bootstrap over runs: the law refitted to resampled runs, all points of a run together."""

from __future__ import annotations

import numpy as np

from megamup.scaling.fit import Fit, search
from megamup.scaling.laws.base import FloatArray

CHUNK = 500
"""Resamples that are refitted at once."""


def bootstrap(fit: Fit, resamples: int = 1000, seed: int = 0) -> FloatArray:
    """θ (resamples, p) refitted to resampled runs, all points of a run together (Efron & Tibshirani 1993, ch. 9)."""
    random = np.random.default_rng(seed)
    runs, index = np.unique(fit.data.runs, return_inverse=True)
    counts = random.multinomial(len(runs), np.full(len(runs), 1 / len(runs)), size=resamples)
    found = []
    for first in range(0, resamples, CHUNK):
        weights = counts[first : first + CHUNK, index].astype(np.float64)  # (b, n)
        begin = np.tile(fit.theta, (len(weights), 1))
        found.append(search(fit.law, fit.data, fit.objective, begin, weights)[0])
    return np.concatenate(found)
