"""For every law its published parameters (or some like them) and points of a believable design that lie on it.

What the tests and the benchmark recover the parameters from.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from megamup.scaling.laws import LAWS, FloatArray, Law, get_law
from megamup.scaling.laws.annealing import CurveLaw
from megamup.scaling.laws.schedules import Schedules

PF_DAY = 8.64e19


@dataclass(frozen=True)
class Example:
    """A law and the truth that a fit to its points is to find."""

    law: Law
    """Bound to its points."""
    inputs: FloatArray
    """(n, d)"""
    truth: FloatArray
    """(p,)"""

    @property
    def response(self) -> FloatArray:
        """(n,), on the law exactly."""
        return self.law.predict(self.truth, self.inputs)


def grid(*axes: FloatArray) -> FloatArray:
    """Every combination: (n, d)."""
    return np.stack([axis.ravel() for axis in np.meshgrid(*axes, indexing="ij")], axis=-1)


def cosine(steps: int, peak: float, warmup: int, end: float = 0.1) -> FloatArray:
    """Linear warm-up, then half a cosine from the peak to `end` of it: (steps,)."""
    step = np.arange(1, steps + 1)
    share = np.clip((step - warmup) / (steps - warmup), 0, 1)
    return peak * np.where(step <= warmup, step / warmup, end + (1 - end) * (1 + np.cos(np.pi * share)) / 2)


def wsd(steps: int, peak: float, warmup: int, decay: int, end: float = 0.1) -> FloatArray:
    """Linear warm-up, a constant rate, an exponential decay over the last `decay` steps: (steps,)."""
    step = np.arange(1, steps + 1)
    falling = end ** np.clip((step - (steps - decay)) / decay, 0, 1)
    return peak * np.where(step <= warmup, step / warmup, falling)


SCHEDULES = Schedules([cosine(4000, 3e-4, 100), wsd(4000, 3e-4, 100, 800), np.full(4000, 3e-4)])
_N, _D, _C = np.geomspace(1e7, 1e10, 7), np.geomspace(2e8, 2e11, 7), np.geomspace(1e17, 1e22, 8)
_CURVES = grid(np.arange(1.0, 4.0), np.rint(np.geomspace(200, 4000, 40)))

# Kaplan et al. 2020, tables 5 and 6 and eq. 1.7 (in PF-days); Hoffmann et al. 2022 by Besiroglu et al. 2024
# (arXiv:2404.10102); Gadre et al. 2024; Muennighoff et al. 2023, section 6; Li et al. 2025; Luo et al. 2025 (100M, as
# fitted by others).
_TABLE: dict[str, tuple[FloatArray, list[float]]] = {
    "power": (_C, [40.0, 1.75, -0.11]),
    "kaplan-n": (_N, [8.8e13, 0.076]),
    "kaplan-d": (_D, [5.4e13, 0.095]),
    "kaplan-c": (_C, [1.6e7 * PF_DAY, 0.057]),
    "kaplan-cmin": (_C, [3.1e8 * PF_DAY, 0.050]),
    "kaplan-nd": (grid(_N, _D), [6.4e13, 1.8e13, 0.076, 0.103]),
    "kaplan-ns": (grid(_N, np.geomspace(1e3, 1e6, 7)), [6.5e13, 2.1e3, 0.077, 0.76]),
    "kaplan-nopt": (_C, [0.1, 0.5]),
    "dopt": (_C, [1.7, 0.5]),
    "kaplan-nopt-cmin": (_C, [1.3e9 * PF_DAY**-0.73, 0.73]),
    "kaplan-batch": (_C, [2.0e6 * PF_DAY**-0.24, 0.24]),
    "kaplan-smin": (_C, [5.4e3 * PF_DAY**-0.03, 0.03]),
    "chinchilla": (grid(_N, _D), [1.8172, 482.01, 2085.43, 0.3478, 0.3658]),
    "overtraining": (grid(_N, _D), [1.83665, 166.21, 366.69, -0.27285]),
    "data-constrained": (
        grid(np.geomspace(2e7, 2e10, 7), np.geomspace(1e8, 1e12, 9), np.array([1e8, 1e9, 1e11])),
        [1.87, 521.0, 1488.0, 0.353, 0.353, 15.39, 5.31],
    ),
    "critical-batch": (
        grid(np.geomspace(2e4, 5e6, 6), np.array([4.0, 3.5, 3.0])),
        [2.1e8, 0.21, 1.3e3, 2.7e3, 6.1e3],
    ),
    "batch-loss": (np.array([4.0, 3.5, 3.0, 2.6]), [2.1e8, 0.21]),
    "step-law-lr": (grid(_N, _D), [1.79, -0.713, 0.307]),
    "step-law-batch": (_D, [0.58, 0.571]),
    "annealing": (_CURVES, [2.65, 0.4, 0.51, 0.4]),
    "multi-power": (_CURVES, [2.651, 0.601, 0.453, 437.946, 2.132, 0.598, 0.655]),
}


def example(name: str) -> Example:
    """The law called `name` with its points."""
    inputs, truth = _TABLE[name]
    inputs = inputs.reshape(len(inputs), -1)
    law = get_law(name)
    if isinstance(law, CurveLaw):
        law = replace(law, schedules=SCHEDULES)
    law = law.bound_to(dict(zip(law.inputs, inputs.T, strict=True)))
    return Example(law, inputs, np.array(truth))


NAMES = list(LAWS)
