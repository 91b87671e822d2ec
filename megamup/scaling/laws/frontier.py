"""The compute-optimal frontier: the N and D of least loss with 6·N·D = C FLOPs, and what follows from it.

Hoffmann et al. 2022 (arXiv:2203.15556), eq. 4: of A/N^alpha + B/D^beta the least at a budget lies at

    N = G·(C/6)^(beta/(alpha+beta)),  D = (C/6)^(alpha/(alpha+beta)) / G,  G = (alpha·A / (beta·B))^(1/(alpha+beta)).

All in logs, as A·N^-alpha may be a quotient of numbers beyond a float's range. Arrays broadcast.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from megamup.scaling.laws.base import FloatArray, Quantity

FLOPS_PER_PARAMETER_AND_TOKEN = 6.0
"""C = 6·N·D: forward and backward pass, attention's scores left out (Kaplan et al. 2020, section 2.1)."""


@dataclass(frozen=True)
class TwoTerms:
    """A/N^alpha + B/D^beta; each (...,)."""

    log_a: FloatArray
    alpha: FloatArray
    log_b: FloatArray
    beta: FloatArray

    def log_optimum(self, budget: float | FloatArray) -> tuple[FloatArray, FloatArray]:
        """Log N and log D of the least sum at `budget` FLOPs."""
        product = np.log(np.asarray(budget) / FLOPS_PER_PARAMETER_AND_TOKEN)
        total = self.alpha + self.beta
        log_g = (np.log(self.alpha / self.beta) + self.log_a - self.log_b) / total
        return log_g + self.beta / total * product, self.alpha / total * product - log_g

    def least(self, budget: float | FloatArray) -> FloatArray:
        """Log of the least sum at `budget` FLOPs."""
        n, d = self.log_optimum(budget)
        return np.logaddexp(self.log_a - self.alpha * n, self.log_b - self.beta * d)

    def budget(self, log_sum: FloatArray) -> FloatArray:
        """FLOPs at which the least sum is e^log_sum: both terms fall as C^(-alpha·beta/(alpha+beta))."""
        exponent = self.alpha * self.beta / (self.alpha + self.beta)
        log_c = (self.least(1.0) - log_sum) / exponent
        return np.asarray(np.exp(log_c))


def frontier(
    terms: Callable[[FloatArray], TwoTerms],
    loss: Callable[[FloatArray, FloatArray], FloatArray],
    excess: Callable[[FloatArray, float], FloatArray],
    at: Mapping[str, float],
) -> dict[str, Quantity]:
    """What a law of N and D says at ``{"C": budget}`` or at ``{"L": loss}``.

    At a budget: N_opt, D_opt, D_per_N (tokens per parameter) and L, the loss there. At a loss: C, the FLOPs that reach
    it on the frontier, with N_opt, D_opt and D_per_N there; NaN for a loss that the law never reaches.

    Args:
        terms: parameters (..., p) -> the part that N and D share between them.
        loss: parameters, log of that part -> the loss.
        excess: parameters, loss -> log of that part; NaN where there is none.
    """
    if set(at) == {"C"}:
        budget = at["C"]
        return _at_budget(terms, lambda p: np.asarray(budget)) | {"L": lambda p: loss(p, terms(p).least(budget))}
    if set(at) == {"L"}:

        def compute(p: FloatArray) -> FloatArray:
            return terms(p).budget(excess(p, at["L"]))

        return {"C": compute} | _at_budget(terms, compute)
    return {}


def _at_budget(
    terms: Callable[[FloatArray], TwoTerms], budget: Callable[[FloatArray], FloatArray]
) -> dict[str, Quantity]:
    def optimum(p: FloatArray) -> tuple[FloatArray, FloatArray]:
        return terms(p).log_optimum(budget(p))

    return {
        "N_opt": lambda p: np.asarray(np.exp(optimum(p)[0])),
        "D_opt": lambda p: np.asarray(np.exp(optimum(p)[1])),
        "D_per_N": lambda p: np.asarray(np.exp(optimum(p)[1] - optimum(p)[0])),
    }


def log_above(loss: float, offset: FloatArray) -> FloatArray:
    """log(loss - offset); NaN where the loss is not above it."""
    above = loss - np.asarray(offset)
    return np.log(np.where(above > 0, above, np.nan))
