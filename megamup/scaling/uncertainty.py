"""Intervals of parameters, of predictions and of what follows from a law: by profile likelihood by default.

``profile`` (`profile.py`) is exact in curved problems and costs some refits; ``delta`` (`delta.py`) is the ellipse at
the optimum; ``bootstrap`` (`bootstrap.py`) resamples runs and knows their noise as it is, but no more than the runs do.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import t as student

from megamup.errors import MegamupError
from megamup.scaling.bootstrap import bootstrap
from megamup.scaling.delta import (
    LEVEL,
    Targets,
    covariance,
    degrees_of_freedom,
    delta,
    delta_std,
    no_interval_reason,
    noise_std,
    predictions_of,
    quantities_of,
)
from megamup.scaling.fit import Fit, as_inputs
from megamup.scaling.laws.base import FloatArray, Quantity
from megamup.scaling.profile import profile

__all__ = [
    "LEVEL",
    "METHODS",
    "Interval",
    "Prediction",
    "bootstrap",
    "covariance",
    "degrees_of_freedom",
    "delta_std",
    "no_interval_reason",
    "noise_std",
    "parameter_intervals",
    "predict",
    "quantity_intervals",
    "quantity_values",
]

METHODS = ("profile", "delta", "bootstrap")
RESAMPLES = 2000

Interval = tuple[float | None, float | None]


@dataclass(frozen=True)
class Prediction:
    """The law at m inputs and the interval that holds one new run there; all (m,), in units of the response."""

    loss: FloatArray
    low: FloatArray
    high: FloatArray
    """NaN in `low` and `high` where no degree of freedom is left."""

    def widened(self, factor: float) -> Prediction:
        """Both sides `factor` times as far from the law, in logs."""
        return Prediction(
            self.loss, self.loss * (self.low / self.loss) ** factor, self.loss * (self.high / self.loss) ** factor
        )


def predict(fit: Fit, inputs: ArrayLike, level: float = LEVEL, method: str = "profile") -> Prediction:
    """The prediction interval at `inputs` (m, d) or (m,): it holds the response of one new run, noise included.

    By profile it is that of the new run's response y when y joins the data; for a linear law, the textbook's prediction
    interval.

    Raises:
        MegamupError: `method` is none of `METHODS`.
    """
    check_method(method)
    value = fit.at(inputs)
    if no_interval_reason(fit) is not None:
        nothing = np.full_like(value, np.nan)
        return Prediction(value, nothing, nothing)
    log_x = np.log(as_inputs(inputs)) - fit.data.log_centre
    noise = noise_std(fit) * (value if fit.objective.scale == "relative" else np.ones_like(value))
    if method == "bootstrap":
        logs = fit.law.log_value(bootstrap(fit, RESAMPLES), log_x)  # (r, m)
        own = logs if fit.objective.scale == "log" else np.exp(logs)
        low, high = _quantiles(own + noise * np.random.default_rng(0).standard_normal(own.shape), level)
    else:
        low, high = _ends_of(fit, predictions_of(fit, log_x), len(value), level, method, noise)
    if fit.objective.scale == "log":
        low, high = np.exp(low), np.exp(high)
    return Prediction(value, np.minimum(np.maximum(low, 0), value), np.maximum(high, value))


def parameter_intervals(fit: Fit, level: float = LEVEL, method: str = "profile") -> dict[str, Interval]:
    """The interval of every parameter of the law.

    An end is None where the data set none: where it lies at the end of an exponent's searched range, or, at both
    ends, where the fit has as many parameters as points.

    Raises:
        MegamupError: `method` is none of `METHODS`.
    """
    check_method(method)
    names = fit.law.parameters
    found: dict[str, Interval] = dict.fromkeys(names, (None, None))
    if no_interval_reason(fit) is not None:
        return found
    gone = {name for name in fit.diagnostics.at_bound if fit.parameters[name] == 0 and _is_logged(fit, name)}
    known = [index for index, name in enumerate(names) if name not in gone]
    functions = [_component(index, fit.law.logged[index]) for index in known]
    if method == "bootstrap":
        public = fit.law.public(bootstrap(fit, RESAMPLES), fit.data.log_centre)
        low, high = _quantiles(np.stack([function(public) for function in functions], axis=-1), level)
    else:
        low, high = _ends_of(fit, quantities_of(fit, functions), len(known), level, method)
    for i, index in enumerate(known):
        found[names[index]] = _ends(fit, index, float(low[i]), float(high[i]))
    return found


def quantity_intervals(
    fit: Fit, quantities: Mapping[str, Quantity], level: float = LEVEL, method: str = "profile"
) -> dict[str, tuple[float, float | None, float | None]]:
    """(value, low, high) of quantities > 0 that follow from the law's parameters; see `Law.quantities`.

    Raises:
        MegamupError: `method` is none of `METHODS`.
    """
    check_method(method)
    values = quantity_values(fit, quantities)
    found: dict[str, tuple[float, float | None, float | None]] = {n: (v, None, None) for n, v in values.items()}
    known = [name for name, value in values.items() if 0 < value < np.inf]
    if no_interval_reason(fit) is not None or not known:
        return found
    functions = [_logarithm(quantities[name]) for name in known]
    if method == "bootstrap":
        public = fit.law.public(bootstrap(fit, RESAMPLES), fit.data.log_centre)
        low, high = _quantiles(np.stack([function(public) for function in functions], axis=-1), level)
    else:
        low, high = _ends_of(fit, quantities_of(fit, functions), len(known), level, method)
    for i, name in enumerate(known):
        below, above = (float(np.exp(end[i])) if np.isfinite(end[i]) else None for end in (low, high))
        found[name] = (values[name], below, above)
    return found


def quantity_values(fit: Fit, quantities: Mapping[str, Quantity]) -> dict[str, float]:
    """Each quantity at the fitted parameters."""
    public = fit.law.public(fit.theta, fit.data.log_centre)
    return {name: float(quantity(public)) for name, quantity in quantities.items()}


def check_method(method: str) -> None:
    """Refuse what is none of `METHODS`.

    Raises:
        MegamupError: with those there are.
    """
    if method not in METHODS:
        raise MegamupError(f"--intervals: {method!r} is unknown; expected one of {', '.join(METHODS)}")


def _ends_of(
    fit: Fit, targets: Targets, count: int, level: float, method: str, noise: FloatArray | None = None
) -> tuple[FloatArray, FloatArray]:
    """Both ends of each target by profile or by the delta method, (count,) each; of an observation, with `noise`."""
    if method == "profile":
        return profile(fit, targets, count, level, noise)
    value, std, _ = delta(fit, targets, count)
    half = float(student.ppf((1 + level) / 2, degrees_of_freedom(fit))) * np.hypot(std, 0.0 if noise is None else noise)
    return value - half, value + half


def _quantiles(sample: FloatArray, level: float) -> tuple[FloatArray, FloatArray]:
    """Percentile interval over the first axis; what a resample doesn't have is left out."""
    low, high = np.nanquantile(sample, [(1 - level) / 2, (1 + level) / 2], axis=0)
    return low, high


def _component(index: int, logged: bool) -> Quantity:
    def one(public: FloatArray) -> FloatArray:
        return np.asarray(np.log(public[..., index]) if logged else public[..., index])

    return one


def _logarithm(quantity: Quantity) -> Quantity:
    return lambda public: np.asarray(np.log(quantity(public)))


def _is_logged(fit: Fit, name: str) -> bool:
    return fit.law.logged[fit.law.parameters.index(name)]


def _ends(fit: Fit, index: int, low: float, high: float) -> Interval:
    """Ends as reported: in the parameter's own unit, None where open, 0 where a constant may vanish."""
    name = fit.law.parameters[index]
    value = fit.parameters[name]
    if fit.law.logged[index]:
        low, high = float(np.exp(low)), float(np.exp(high))
        return (min(low, value) if low > 0 else None, max(high, value) if np.isfinite(high) else None)
    if np.isneginf(low) and fit.law.may_vanish(name):
        low = 0.0
    return (min(low, value) if np.isfinite(low) else None, max(high, value) if np.isfinite(high) else None)
