"""What a scaling law is to the solver, and the form that most published ones have: a sum of powers.

A law is searched in a vector θ of its own, at inputs divided by their geometric mean over the fitted points: in the
inputs themselves the coefficients of a ladder at 1e24 FLOPs span twenty orders of magnitude, and no solver's
tolerance means anything. θ holds the logs of what is positive and has no natural bound (coefficients), and the
exponents as they are. `public` turns θ into the parameters that papers print, `internal` back.

Shapes: n points, d inputs, p parameters; leading axes are batches (starts, resamples), which are searched at once.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

# Published exponents of the loss lie between 0.05 (Kaplan et al. 2020, by compute) and 0.6 (Besiroglu et al. 2024 by
# data); the range leaves room on both sides. Below 0.005 a power can't be told from a logarithm, above 3 from a step.
SMALLEST_EXPONENT, LARGEST_EXPONENT = 0.005, 3.0

# The searched range of the log of a coefficient at the centre of the points; a term below NO_TERM of the response at
# every point is gone: its coefficient is 0.
LOG_COEFFICIENTS = (-60.0, 60.0)
NO_TERM = 1e-9

Quantity = Callable[[FloatArray], FloatArray]
"""θ's public parameters (..., p) -> a number (...,) that follows from them."""


class Law(ABC):
    """One scaling law: log of the response as a function of θ and the logs of the inputs."""

    name: str
    """What the user writes after `--law`."""
    formula: str
    """The law for a reader."""
    inputs: tuple[str, ...]
    """Keys of the points' inputs, in the order of the columns: N parameters, D tokens, C FLOPs, S steps, ..."""
    response: str = "L"
    """What the law gives: L, the loss, or the key of an input."""
    parameters: tuple[str, ...]
    """The p public parameters, in the order of the formula, which is that of θ."""
    published_objective: str = "log"
    """The objective (`objective.py`) that the law's source fitted with."""
    source: str
    """The paper the form is taken from."""

    @property
    @abstractmethod
    def bounds(self) -> tuple[FloatArray, FloatArray]:
        """The searched range of θ: low (p,), high (p,)."""

    @abstractmethod
    def log_value(self, theta: FloatArray, log_x: FloatArray) -> FloatArray:
        """(..., p), log of centred inputs (n, d) -> log of the response (..., n); -inf or NaN where there is none."""

    @abstractmethod
    def jacobian(self, theta: FloatArray, log_x: FloatArray) -> FloatArray:
        """Derivative of `log_value` by θ: (..., n, p)."""

    @abstractmethod
    def starts(self, log_x: FloatArray, log_y: FloatArray, unit: FloatArray) -> FloatArray:
        """Where searches begin: θ (s, p) from uniform draws `unit` (s, p) in (0, 1)."""

    @abstractmethod
    def public(self, theta: FloatArray, log_centre: FloatArray) -> FloatArray:
        """θ (..., p) -> parameters (..., p) in the units of the inputs."""

    @abstractmethod
    def internal(self, parameters: FloatArray, log_centre: FloatArray) -> FloatArray:
        """Parameters (..., p) -> θ (..., p)."""

    @property
    def logged(self) -> tuple[bool, ...]:
        """Which parameters (p,) are positive and span decades, so that their intervals are found in their logs."""
        return tuple(bool(low == LOG_COEFFICIENTS[0]) for low in self.bounds[0])

    def may_vanish(self, name: str) -> bool:
        """Whether 0 is a value of the parameter, the natural end of its interval: a constant term."""
        del name
        return False

    def at_bound(self, theta: FloatArray, log_x: FloatArray) -> tuple[str, ...]:
        """Parameters of θ (p,) that lie on a bound: an exponent at an end of its range, a term that is gone."""
        low, high = self.bounds
        near = 1e-3 * (high - low)
        return tuple(name for name, out in zip(self.parameters, (theta - low < near) | (high - theta < near)) if out)  # noqa: B905

    def quantities(self, at: Mapping[str, float]) -> dict[str, Quantity]:
        """What follows from the law at given inputs, or at a budget or loss, by name; empty where nothing does.

        The response at `at == inputs` is not among them: `Fit.at` gives it.
        """
        del at
        return {}

    def bound_to(self, columns: Mapping[str, FloatArray]) -> Law:
        """The law as these points want it; a law with a parameter per group of points returns a new one."""
        del columns
        return self

    def predict(self, parameters: FloatArray, inputs: FloatArray) -> FloatArray:
        """Parameters (..., p) as published, inputs (n, d) in their own unit -> the response (..., n)."""
        nothing = np.zeros(inputs.shape[-1])
        return np.asarray(np.exp(self.log_value(self.internal(parameters, nothing), np.log(inputs))))


@dataclass(frozen=True)
class Exponent:
    """An exponent of a law and the range it is searched in."""

    name: str
    low: float = SMALLEST_EXPONENT
    high: float = LARGEST_EXPONENT


@dataclass(frozen=True)
class Term:
    """coefficient · Π (scale · input)^(sign · exponent); without powers a constant."""

    coefficient: str
    powers: Mapping[str, tuple[str, float]]
    """Input -> (name of its exponent, +1 or -1 as the formula writes it)."""
    scale: float = 1.0
    as_scale: bool = False
    """The parameter is the x_c of (x_c / x)^α rather than the coefficient."""


@dataclass(frozen=True)
class SumOfPowers(Law):
    """response = Σ_k coefficient_k · Π_j input_j^(± exponent); linear in its coefficients, which are >= 0.

    θ: the log of each term at the centre of the points, then the exponents.
    """

    name: str
    formula: str
    inputs: tuple[str, ...]
    terms: tuple[Term, ...]
    exponents: tuple[Exponent, ...]
    source: str
    response: str = "L"
    published_objective: str = "log"
    derived: Callable[[SumOfPowers, Mapping[str, float]], dict[str, Quantity]] | None = None

    @cached_property
    def parameters(self) -> tuple[str, ...]:  # type: ignore[override]
        return tuple(t.coefficient for t in self.terms) + tuple(e.name for e in self.exponents)

    @cached_property
    def slopes(self) -> FloatArray:
        """(k, q, d): d log term_k = exponents_q · slopes_kqd · d log input_d."""
        slopes = np.zeros((len(self.terms), len(self.exponents), len(self.inputs)))
        order = [exponent.name for exponent in self.exponents]
        for k, term in enumerate(self.terms):
            for key, (exponent, sign) in term.powers.items():
                slopes[k, order.index(exponent), self.inputs.index(key)] = sign
        return slopes

    @property
    def bounds(self) -> tuple[FloatArray, FloatArray]:
        k = len(self.terms)
        low = [LOG_COEFFICIENTS[0]] * k + [e.low for e in self.exponents]
        high = [LOG_COEFFICIENTS[1]] * k + [e.high for e in self.exponents]
        return np.array(low), np.array(high)

    @property
    def logged(self) -> tuple[bool, ...]:
        return tuple(bool(term.powers) for term in self.terms) + (False,) * len(self.exponents)

    def may_vanish(self, name: str) -> bool:
        return any(term.coefficient == name and not term.powers for term in self.terms)

    def split(self, theta: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Log coefficients (..., k) and exponents (..., q)."""
        k = len(self.terms)
        return theta[..., :k], theta[..., k:]

    def log_powers(self, exponents: FloatArray, log_x: FloatArray) -> FloatArray:
        """Log of each term without its coefficient: (..., n, k)."""
        by_exponent = np.einsum("kqd,nd->nkq", self.slopes, log_x)
        return np.asarray(np.einsum("nkq,...q->...nk", by_exponent, exponents))

    def powers_gradient(self, log_x: FloatArray) -> FloatArray:
        """Derivative of `log_powers` by the exponents, which is constant: (n, k, q)."""
        return np.asarray(np.einsum("kqd,nd->nkq", self.slopes, log_x))

    def log_value(self, theta: FloatArray, log_x: FloatArray) -> FloatArray:
        coefficients, exponents = self.split(theta)
        logs = coefficients[..., np.newaxis, :] + self.log_powers(exponents, log_x)  # (..., n, k)
        return _log_sum(logs)[0]

    def jacobian(self, theta: FloatArray, log_x: FloatArray) -> FloatArray:
        coefficients, exponents = self.split(theta)
        _, shares = _log_sum(coefficients[..., np.newaxis, :] + self.log_powers(exponents, log_x))
        by_exponent = np.einsum("...nk,nkq->...nq", shares, self.powers_gradient(log_x))
        return np.concatenate([shares, by_exponent], axis=-1)

    def starts(self, log_x: FloatArray, log_y: FloatArray, unit: FloatArray) -> FloatArray:
        """Terms that share the response at the centre at random, exponents spread over the logs of their range."""
        k = len(self.terms)
        shares = np.log(unit[..., :k]) - np.log(unit[..., :k].sum(axis=-1, keepdims=True))
        drawn = [spread(exponent, unit[..., k + q]) for q, exponent in enumerate(self.exponents)]
        return np.concatenate([log_y.mean() + shares, np.stack(drawn, axis=-1)], axis=-1)

    def at_bound(self, theta: FloatArray, log_x: FloatArray) -> tuple[str, ...]:
        coefficients, exponents = self.split(theta)
        _, shares = _log_sum(coefficients + self.log_powers(exponents, log_x))
        gone = [t.coefficient for t, share in zip(self.terms, shares.max(axis=0), strict=True) if share < NO_TERM]
        # Within 0.1% of an end (or of the whole range, where the end is 0).
        ends = [
            e.name
            for e, value in zip(self.exponents, exponents, strict=True)
            if min(abs(value - e.low) / max(abs(e.low), 1e-3), abs(value - e.high) / max(abs(e.high), 1e-3)) < 1e-3
        ]
        return tuple(name for name in self.parameters if name in gone or name in ends)

    def public(self, theta: FloatArray, log_centre: FloatArray) -> FloatArray:
        logs, exponents = self.split(theta)
        # What is gone at the centre is 0, not e^-60: an offset of 1e-26 would be read as one.
        logs = np.where(logs - logs.max(axis=-1, keepdims=True) < -50, -np.inf, logs)
        own = logs - self._at_centre(exponents, log_centre)
        own = np.stack([self._scale(k, own[..., k], exponents, -1) for k in range(len(self.terms))], axis=-1)
        return np.concatenate([np.exp(own), exponents], axis=-1)

    def internal(self, parameters: FloatArray, log_centre: FloatArray) -> FloatArray:
        values, exponents = self.split(np.asarray(parameters, dtype=np.float64))
        with np.errstate(divide="ignore"):
            logs = np.log(values)
        logs = np.stack([self._scale(k, logs[..., k], exponents, 1) for k in range(len(self.terms))], axis=-1)
        logs = logs + self._at_centre(exponents, log_centre)
        return np.concatenate([np.maximum(logs, LOG_COEFFICIENTS[0]), exponents], axis=-1)

    def quantities(self, at: Mapping[str, float]) -> dict[str, Quantity]:
        return {} if self.derived is None else self.derived(self, at)

    def _at_centre(self, exponents: FloatArray, log_centre: FloatArray) -> FloatArray:
        """Log of each term at the centre, without its coefficient: (..., k)."""
        scales = np.log([term.scale for term in self.terms])
        shifted = log_centre[np.newaxis, :] + scales[:, np.newaxis]  # (k, d)
        return np.asarray(np.einsum("kqd,kd,...q->...k", self.slopes, shifted, exponents))

    def _scale(self, k: int, log: FloatArray, exponents: FloatArray, way: int) -> FloatArray:
        """Log coefficient <-> log x_c of (x_c / x)^α, where the term is written so."""
        if not self.terms[k].as_scale:
            return log
        (exponent, _sign), *_ = self.terms[k].powers.values()
        alpha = exponents[..., [e.name for e in self.exponents].index(exponent)]
        return log * alpha if way > 0 else log / alpha


def spread(exponent: Exponent, unit: FloatArray) -> FloatArray:
    """Draws over the exponent's range, even in its log where that has one sign."""
    low, high = exponent.low, exponent.high
    if low * high > 0:
        ends = np.log(abs(low)), np.log(abs(high))
        return np.asarray(np.sign(low) * np.exp(ends[0] + unit * (ends[1] - ends[0])))
    return low + unit * (high - low)


def _log_sum(logs: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Log of the sum of exponentials over the last axis, and each one's share of it."""
    top = logs.max(axis=-1, keepdims=True)
    parts = np.exp(logs - top)
    total = parts.sum(axis=-1, keepdims=True)
    return (top + np.log(total))[..., 0], parts / total


def columns_of(points: Sequence[Mapping[str, float]], keys: Sequence[str]) -> FloatArray:
    """(n, len(keys)) of the points' inputs."""
    return np.array([[point[key] for key in keys] for point in points], dtype=np.float64)
