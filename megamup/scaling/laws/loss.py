"""Laws of the loss that are sums of powers: μScaling, Chinchilla, overtraining."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from megamup.scaling.laws.base import Exponent, FloatArray, Quantity, SumOfPowers, Term
from megamup.scaling.laws.frontier import FLOPS_PER_PARAMETER_AND_TOKEN, TwoTerms, frontier, log_above


def power(x: str) -> SumOfPowers:
    """L = a·x^b + c for x = N, C, D or S."""
    return SumOfPowers(
        name="power",
        formula=f"L = a·{x}^b + c",
        inputs=(x,),
        terms=(Term("a", {x: ("b", 1.0)}), Term("c", {})),
        exponents=(Exponent("b", -3.0, -0.005),),
        source="Yao et al. 2023, μScaling, arXiv:2304.06875; offset as in Henighan et al. 2020, arXiv:2010.14701",
        published_objective="loss",
        derived=_power_quantities,
    )


def _power_quantities(law: SumOfPowers, at: Mapping[str, float]) -> dict[str, Quantity]:
    """At {"L"}: the x that reaches the loss; NaN for one that is not above c."""
    if set(at) != {"L"}:
        return {}

    def reaching(p: FloatArray) -> FloatArray:
        a, c, b = np.moveaxis(p, -1, 0)
        return np.asarray(np.exp((log_above(at["L"], c) - np.log(a)) / b))

    return {law.inputs[0]: reaching}


def _chinchilla_terms(p: FloatArray) -> TwoTerms:
    _, a, b, alpha, beta = np.moveaxis(p, -1, 0)
    return TwoTerms(np.log(a), alpha, np.log(b), beta)


def _overtraining_terms(p: FloatArray) -> TwoTerms:
    _, a, b, eta = np.moveaxis(p, -1, 0)
    return TwoTerms(np.log(a), -eta, np.log(b) + eta * 0.5 * np.log(6), -eta)


def _loss_above_offset(p: FloatArray, log_excess: FloatArray) -> FloatArray:
    return np.asarray(p[..., 0] + np.exp(log_excess))


def _chinchilla_quantities(law: SumOfPowers, at: Mapping[str, float]) -> dict[str, Quantity]:
    """As `frontier`."""
    return frontier(_chinchilla_terms, _loss_above_offset, lambda p, loss: log_above(loss, p[..., 0]), at)


def _overtraining_quantities(law: SumOfPowers, at: Mapping[str, float]) -> dict[str, Quantity]:
    """As `frontier`; at {"C", "M"} also the loss with M tokens per parameter instead of the optimum's."""
    if set(at) != {"C", "M"}:
        return frontier(_overtraining_terms, _loss_above_offset, lambda p, loss: log_above(loss, p[..., 0]), at)
    parameters = (at["C"] / FLOPS_PER_PARAMETER_AND_TOKEN / at["M"]) ** 0.5
    point = np.array([[parameters, at["M"] * parameters]])
    return {"L": lambda p: law.predict(p, point)[..., 0]}


CHINCHILLA = SumOfPowers(
    name="chinchilla",
    formula="L = E + A/N^alpha + B/D^beta",
    inputs=("N", "D"),
    terms=(Term("E", {}), Term("A", {"N": ("alpha", -1.0)}), Term("B", {"D": ("beta", -1.0)})),
    exponents=(Exponent("alpha"), Exponent("beta")),
    source="Hoffmann et al. 2022, arXiv:2203.15556, approach 3",
    published_objective="huber",
    derived=_chinchilla_quantities,
)

OVERTRAINING = SumOfPowers(
    name="overtraining",
    formula="L = E + a·N^eta + b·(sqrt(6)·D)^eta",
    inputs=("N", "D"),
    terms=(
        Term("E", {}),
        Term("a", {"N": ("eta", 1.0)}),
        Term("b", {"D": ("eta", 1.0)}, scale=6**0.5),
    ),
    exponents=(Exponent("eta", -3.0, -0.005),),
    source="Gadre et al. 2024, arXiv:2403.08540, eq. 4",
    published_objective="loss",
    derived=_overtraining_quantities,
)
