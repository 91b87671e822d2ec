"""The laws of Kaplan et al. 2020, arXiv:2001.08361, and those of an optimum by compute, which share one form."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from megamup.scaling.laws.base import (
    LARGEST_EXPONENT,
    LOG_COEFFICIENTS,
    SMALLEST_EXPONENT,
    Exponent,
    FloatArray,
    Law,
    Quantity,
    SumOfPowers,
    Term,
    spread,
)
from megamup.scaling.laws.frontier import TwoTerms, frontier

KAPLAN = "Kaplan et al. 2020, arXiv:2001.08361"

LIKELY_EXPONENT = Exponent("", 0.02, 0.5)
"""Where the exponents of `KaplanND` begin; published are 0.076 and 0.103."""


def scale_law(name: str, x: str, equation: str) -> SumOfPowers:
    """L = (x_c / x)^alpha_x: the loss where all but x is plenty."""
    scale, exponent = f"{x}_c", f"alpha_{x}"

    def derived(law: SumOfPowers, at: Mapping[str, float]) -> dict[str, Quantity]:
        if set(at) != {"L"}:
            return {}
        return {x: lambda p: np.asarray(p[..., 0] * at["L"] ** (-1 / p[..., 1]))}

    return SumOfPowers(
        name=name,
        formula=f"L = ({scale}/{x})^{exponent}",
        inputs=(x,),
        terms=(Term(scale, {x: (exponent, -1.0)}, as_scale=True),),
        exponents=(Exponent(exponent),),
        source=f"{KAPLAN}, {equation}",
        derived=derived,
    )


def pure_power(name: str, response: str, x: str, source: str) -> SumOfPowers:
    """response = a·x^b: an optimum by compute or by loss. A line in the logs, so b may have either sign."""
    return SumOfPowers(
        name=name,
        formula=f"{response} = a·{x}^b",
        inputs=(x,),
        terms=(Term("a", {x: ("b", 1.0)}),),
        exponents=(Exponent("b", -LARGEST_EXPONENT, LARGEST_EXPONENT),),
        source=source,
        response=response,
    )


KAPLAN_N = scale_law("kaplan-n", "N", "eq. 1.1")
KAPLAN_D = scale_law("kaplan-d", "D", "eq. 1.2")
KAPLAN_C = scale_law("kaplan-c", "C", "table 5, C at a fixed batch")
KAPLAN_CMIN = scale_law("kaplan-cmin", "Cmin", "eq. 1.3")

KAPLAN_NS = SumOfPowers(
    name="kaplan-ns",
    formula="L = (N_c/N)^alpha_N + (S_c/Smin)^alpha_S",
    inputs=("N", "Smin"),
    terms=(
        Term("N_c", {"N": ("alpha_N", -1.0)}, as_scale=True),
        Term("S_c", {"Smin": ("alpha_S", -1.0)}, as_scale=True),
    ),
    exponents=(Exponent("alpha_N"), Exponent("alpha_S")),
    source=f"{KAPLAN}, eq. 1.6",
)

N_OPT = pure_power("kaplan-nopt", "N", "C", f"{KAPLAN}, section 6.1; Hoffmann et al. 2022, arXiv:2203.15556, table 2")
D_OPT = pure_power("dopt", "D", "C", "Hoffmann et al. 2022, arXiv:2203.15556, table 2")
N_OPT_CMIN = pure_power("kaplan-nopt-cmin", "N", "Cmin", f"{KAPLAN}, eq. 1.7")
BATCH_CMIN = pure_power("kaplan-batch", "B", "Cmin", f"{KAPLAN}, eq. 1.7")
S_MIN_CMIN = pure_power("kaplan-smin", "Smin", "Cmin", f"{KAPLAN}, eq. 1.7")


@dataclass(frozen=True)
class KaplanND(Law):
    """L = [(N_c/N)^(alpha_N/alpha_D) + D_c/D]^alpha_D, which tends to L(N) and to L(D) where the other is plenty.

    θ: the logs of these two limits at the centre of the points, then alpha_N and alpha_D.
    """

    name = "kaplan-nd"
    formula = "L = [(N_c/N)^(alpha_N/alpha_D) + D_c/D]^alpha_D"
    inputs = ("N", "D")
    parameters = ("N_c", "D_c", "alpha_N", "alpha_D")
    source = f"{KAPLAN}, eq. 1.5"

    @property
    def bounds(self) -> tuple[FloatArray, FloatArray]:
        low, high = LOG_COEFFICIENTS
        ends = (SMALLEST_EXPONENT, LARGEST_EXPONENT)
        return np.array([low, low, ends[0], ends[0]]), np.array([high, high, ends[1], ends[1]])

    def log_value(self, theta: FloatArray, log_x: FloatArray) -> FloatArray:
        of_n, of_d = _log_terms(theta, log_x)
        return theta[..., 3, np.newaxis] * np.logaddexp(of_n, of_d)

    def jacobian(self, theta: FloatArray, log_x: FloatArray) -> FloatArray:
        of_n, of_d = _log_terms(theta, log_x)
        total = np.logaddexp(of_n, of_d)
        share_n, share_d = np.exp(of_n - total), np.exp(of_d - total)
        alpha_d, d = theta[..., 3, np.newaxis], log_x[:, 1]
        by_alpha_d = total - share_n * of_n - share_d * (of_d + d)
        by_alpha_d = by_alpha_d + 0 * alpha_d
        return np.stack([share_n, share_d, -log_x[:, 0] * share_n, by_alpha_d], axis=-1)

    def starts(self, log_x: FloatArray, log_y: FloatArray, unit: FloatArray) -> FloatArray:
        """Limits whose terms share the response at the centre at random, exponents even in their logs."""
        exponents = spread(LIKELY_EXPONENT, unit[..., 2:])
        shares = np.log(unit[..., :2] / unit[..., :2].sum(axis=-1, keepdims=True))
        return np.concatenate([log_y.mean() + exponents[..., 1:] * shares, exponents], axis=-1)

    def public(self, theta: FloatArray, log_centre: FloatArray) -> FloatArray:
        exponents = theta[..., 2:]
        with np.errstate(over="ignore"):
            return np.concatenate([np.exp(theta[..., :2] / exponents + log_centre), exponents], axis=-1)

    def internal(self, parameters: FloatArray, log_centre: FloatArray) -> FloatArray:
        scales, exponents = np.split(np.asarray(parameters, dtype=np.float64), 2, axis=-1)
        return np.concatenate([exponents * (np.log(scales) - log_centre), exponents], axis=-1)

    def quantities(self, at: Mapping[str, float]) -> dict[str, Quantity]:
        """As `frontier`, of the sum in brackets: its terms are A/N^alpha and B/D^1."""
        return frontier(
            _frontier_terms,
            lambda p, log_sum: np.asarray(np.exp(p[..., 3] * log_sum)),
            lambda p, loss: np.log(loss) / p[..., 3],
            at,
        )


def _log_terms(theta: FloatArray, log_x: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Log of the two terms in brackets: (..., n) each."""
    u_n, u_d, alpha_n, alpha_d = (theta[..., i, np.newaxis] for i in range(4))
    return (u_n - alpha_n * log_x[:, 0]) / alpha_d, u_d / alpha_d - log_x[:, 1]


def _frontier_terms(p: FloatArray) -> TwoTerms:
    n_c, d_c, alpha_n, alpha_d = np.moveaxis(p, -1, 0)
    ratio = alpha_n / alpha_d
    return TwoTerms(ratio * np.log(n_c), ratio, np.log(d_c), np.ones_like(ratio))


KAPLAN_ND = KaplanND()
