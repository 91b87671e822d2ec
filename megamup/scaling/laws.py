"""The registry of scaling laws: a law is a sum of terms, linear in its coefficients, with exponents inside.

    L(x) = sum_j coefficient_j * term_j(exponents, x),   coefficient_j >= 0

Most published laws have this form, which is what lets `fit` eliminate the coefficients (variable
projection). The terms are functions of log(x / centre), where `centre` is the geometric mean of the fitted
x: in x itself the coefficients of a ladder at 1e24 FLOPs span twenty orders of magnitude and no solver's
tolerance means anything.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megamup.errors import MegamupError

FloatArray = NDArray[np.float64]


@dataclass(frozen=True)
class Law:
    """One scaling law, separable into linear coefficients and nonlinear exponents.

    Shapes: n points, d inputs of the law, k coefficients, q exponents.
    """

    name: str
    """What the user writes after `--law`."""

    formula: str
    """The law for a reader; `{x}` stands for the input where the user chooses it."""

    choices: tuple[str, ...]
    """Inputs that x may be: N (parameters) or C (FLOPs)."""

    parameters: tuple[str, ...]
    """All parameter names, in the order of the formula."""

    coefficients: tuple[str, ...]
    """The k parameters that the loss is linear in; each is at least 0."""

    exponents: tuple[str, ...]
    """The q parameters that the loss is not linear in."""

    exponent_bounds: tuple[tuple[float, float], ...]
    """The searched range of each exponent; both ends have one sign."""

    terms: Callable[[FloatArray, FloatArray], FloatArray]
    """(exponents (..., q), log of centred inputs (n, d)) -> value of each term (..., n, k)."""

    terms_gradient: Callable[[FloatArray, FloatArray], FloatArray]
    """(exponents (q,), log of centred inputs (n, d)) -> derivative of terms by each exponent (q, n, k)."""

    uncentre: Callable[[FloatArray, FloatArray], FloatArray]
    """(exponents (..., q), log of centre (d,)) -> factors (..., k) from centred coefficients to the law's."""

    source: str
    """The paper the form is taken from."""


def _power_terms(exponents: FloatArray, log_x: FloatArray) -> FloatArray:
    power = np.exp(exponents[..., :1] * log_x[:, 0])  # (..., n)
    return np.stack([power, np.ones_like(power)], axis=-1)


def _power_terms_gradient(exponents: FloatArray, log_x: FloatArray) -> FloatArray:
    by_b = np.exp(exponents[0] * log_x[:, 0]) * log_x[:, 0]  # (n,)
    return np.stack([by_b, np.zeros_like(by_b)], axis=-1)[np.newaxis]


def _power_uncentre(exponents: FloatArray, log_centre: FloatArray) -> FloatArray:
    # a * x^b = (a * x0^b) * (x / x0)^b: the centred coefficient is a * x0^b.
    factor = np.exp(-exponents[..., 0] * log_centre[0])
    return np.stack([factor, np.ones_like(factor)], axis=-1)


POWER = Law(
    name="power",
    formula="L = a·{x}^b + c",
    choices=("N", "C"),
    parameters=("a", "b", "c"),
    coefficients=("a", "c"),
    exponents=("b",),
    # Published exponents lie between -0.05 (Kaplan et al. 2020, by compute) and -0.5; the range leaves room
    # on both sides. Below 0.005 in size a power can't be told from a logarithm, above 3 from a step.
    exponent_bounds=((-3.0, -0.005),),
    terms=_power_terms,
    terms_gradient=_power_terms_gradient,
    uncentre=_power_uncentre,
    source="Yao et al. 2023, μScaling, arXiv:2304.06875; offset as in Henighan et al. 2020, arXiv:2010.14701",
)

LAWS: dict[str, Law] = {law.name: law for law in (POWER,)}


def get_law(name: str) -> Law:
    """The law that `name` stands for.

    Raises:
        MegamupError: no such law; the message lists those there are.
    """
    if name not in LAWS:
        raise MegamupError(f"law: {name!r} is unknown; expected one of {', '.join(LAWS)}")
    return LAWS[name]
