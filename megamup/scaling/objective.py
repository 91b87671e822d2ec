"""What a fit makes least: least squares on the loss, on relative errors or on logs, or Huber's loss on logs."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megamup.errors import MegamupError
from megamup.scaling.laws.base import FloatArray

HUBER_DELTA = 1e-3
"""Hoffmann et al. 2022, section 3.3. Nearly least absolute error: residuals of 0.3% count by their size."""


@dataclass(frozen=True)
class Objective:
    """Σ_i ρ(r_i): r is the residual in `scale`, ρ is r²/2, or Huber's with `delta` where that is given."""

    name: str
    scale: str
    """``loss``: fitted - measured; ``relative``: that over the measured; ``log``: log fitted - log measured."""
    delta: float | None = None

    @property
    def meaning(self) -> str:
        """The objective in words."""
        kind = {
            "loss": "fitted - measured",
            "relative": "(fitted - measured) / measured",
            "log": "log(fitted / measured)",
        }
        if self.delta is None:
            return f"least squares on {kind[self.scale]}"
        return f"Huber loss with delta {self.delta:g} on {kind[self.scale]}"

    def residual(self, log_value: FloatArray, y: FloatArray) -> FloatArray:
        """(..., n), from the log of the fitted response (..., n) and the measured one (n,)."""
        if self.scale == "log":
            return log_value - np.log(y)
        difference = np.exp(log_value) - y
        return difference / y if self.scale == "relative" else difference

    def slope(self, log_value: FloatArray, y: FloatArray) -> FloatArray:
        """d residual / d log fitted, (..., n)."""
        if self.scale == "log":
            return np.ones_like(log_value)
        return np.exp(log_value) / y if self.scale == "relative" else np.exp(log_value)

    def weights(self, y: FloatArray) -> FloatArray:
        """What a difference fitted - measured is multiplied by, to first order: (n,)."""
        return np.ones_like(y) if self.scale == "loss" else 1 / y

    def rho(self, r: FloatArray) -> FloatArray:
        """ρ of each residual."""
        if self.delta is None:
            return r * r / 2
        size = np.abs(r)
        return np.where(size <= self.delta, r * r / 2, self.delta * (size - self.delta / 2))

    def psi(self, r: FloatArray) -> FloatArray:
        """ρ', the pull of each residual."""
        return r if self.delta is None else np.clip(r, -self.delta, self.delta)

    def curvature(self, r: FloatArray) -> FloatArray:
        """ρ'' of each residual: 0 where Huber's loss is straight."""
        return np.ones_like(r) if self.delta is None else (np.abs(r) <= self.delta).astype(np.float64)

    def majorizer(self, r: FloatArray) -> FloatArray:
        """ρ'/r: the curvature of the parabola that lies above ρ and touches it at r."""
        return np.ones_like(r) if self.delta is None else self.delta / np.maximum(np.abs(r), self.delta)

    def value(self, r: FloatArray) -> float:
        """What is reported: the sum of squares, or the sum of Huber's losses as published fits give it."""
        return float(np.sum(self.rho(r)) * (2 if self.delta is None else 1))


OBJECTIVES = {
    "loss": Objective("loss", "loss"),
    "relative": Objective("relative", "relative"),
    "log": Objective("log", "log"),
    "huber": Objective("huber", "log", HUBER_DELTA),
}


def get_objective(name: str) -> Objective:
    """The objective called `name`; ``huber:0.01`` is Huber's with another delta.

    Raises:
        MegamupError: no such objective, or a delta that is no number above 0.
    """
    if name in OBJECTIVES:
        return OBJECTIVES[name]
    kind, _, text = name.partition(":")
    if kind == "huber":
        try:
            delta = float(text)
        except ValueError:
            delta = 0.0
        if not 0 < delta < np.inf:
            raise MegamupError(
                f"objective: {name!r}: delta is {text!r}; expected a number above 0, such as huber:0.001"
            )
        return Objective(name, "log", delta)
    raise MegamupError(f"objective: {name!r} is unknown; expected one of {', '.join(OBJECTIVES)}, huber:DELTA")
