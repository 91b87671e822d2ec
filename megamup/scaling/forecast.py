"""What a fit says of a run before it starts: its final loss, and the band that its training loss should stay in.

The run is given by its config, from which N, D and C are counted as the fit's points were.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import numpy as np
from scipy.stats import norm

from megamup.config import Config
from megamup.errors import MegamupError
from megamup.flops import Convention, flops_per_token, training_flops
from megamup.parameters import count
from megamup.scaling.analysis import Result
from megamup.scaling.curve_table import CurveTable, effective_records, schedule_shape
from megamup.scaling.curves import FloatArray, Smoothing, parse_smoothing
from megamup.scaling.estimate import beyond, estimate
from megamup.scaling.fit import fit_law
from megamup.scaling.fit_file import load_result
from megamup.scaling.readers.conventions import AS_IN, EXACT, PARAMETER_COUNTS
from megamup.scaling.runs import LOSSES, Ladder, Reading
from megamup.scaling.uncertainty import LEVEL, no_interval_reason, predict

INPUTS = ({"N", "D"}, {"N"}, {"D"}, {"C"})
"""What a law of the loss may take: a config tells these before a run has started."""
STARTS = 8
OPEN = 20.0
"""Log of the factor at which an end lies that the points leave open."""
UNLIKE = 1.25
"""A run whose D (or N) lies by more than this factor off what the fitted ones had at its size is of another kind."""


@dataclass(frozen=True)
class Forecast:
    """The final loss of one run, with the interval that holds it at 95%, noise included; nats per token."""

    result: Result = field(repr=False)
    inputs: dict[str, float]
    """The law's inputs, counted as the fit's points were."""
    loss: float
    low: float | None
    high: float | None
    """None in both where the fit has no intervals."""
    meaning: str
    """Which loss, as the fit's convention says."""
    over_largest: float | None
    """How many times the largest fitted run this one is; None where that isn't known."""
    warnings: tuple[str, ...]

    @property
    def smoothing(self) -> Smoothing:
        """How the fit smoothed the loss that it is of."""
        text = self.result.ladder.convention.get("reading")
        return Smoothing("none") if text is None else Reading.from_text(text).smooth

    @property
    def measured(self) -> str:
        """The metric of the trainer that it is of."""
        own = self.meaning.split(" ")[0]
        return own if own in LOSSES else "valid_loss"

    def as_json(self) -> dict[str, Any]:
        """Loss, interval, and what they are of."""
        return {
            "law": self.result.law.name,
            "at": self.inputs,
            "loss": self.loss,
            "low": self.low,
            "high": self.high,
            "loss_kind": self.meaning,
            "over_largest_run": self.over_largest,
            "warnings": list(self.warnings),
        }

    def __str__(self) -> str:
        name = self.meaning if self.meaning.startswith(AS_IN) else self.measured
        ends = f" ({no_interval_reason(self.result.fit)})"
        if self.low is not None and self.high is not None:
            ends = f" ({self.low:.4g} to {self.high:.4g}, {LEVEL:.0%})"
        far = "" if self.over_largest is None else f"; {self.over_largest:.3g} times the largest fitted run"
        return f"final {name} {self.loss:.4g}{ends}{far}"


@dataclass(frozen=True)
class Band:
    """Where the smoothed training loss of one run should lie, at shares of its training; all (k,), nats per token.

    At each share the interval holds the run at 95%; no correction is made for looking at many shares.
    """

    fraction: FloatArray
    loss: FloatArray
    low: FloatArray
    high: FloatArray
    smoothing: Smoothing

    def at(self, fraction: float) -> tuple[float, float, float] | None:
        """(loss, low, high) there, linear in log(fraction); None before the band begins."""
        if fraction < self.fraction[0]:
            return None
        where, known = math.log(fraction), np.log(self.fraction)
        loss, low, high = (float(np.interp(where, known, values)) for values in (self.loss, self.low, self.high))
        return loss, low, high


def read_forecast(path: Path, config: Config, option: str) -> Forecast:
    """The forecast of a run by the fit file at `path`, which `option` names.

    Raises:
        MegamupError: as `load_result` and `forecast`, under the option's name.
    """
    try:
        return forecast(load_result(path), config)
    except MegamupError as error:
        text = str(error).removeprefix("--fit: ")
        raise MegamupError(f"{option}: {text if str(path) in text else f'{path}: {text}'}") from None


def forecast(result: Result, config: Config) -> Forecast:
    """The final loss of the run that `config` describes.

    Raises:
        MegamupError: the fit is of no loss, takes what a config doesn't tell, or counted N or C in a way that isn't
            known.
    """
    law = result.law
    if law.response != "L" or set(law.inputs) not in INPUTS:
        raise MegamupError(
            f"law: {law.formula} of {', '.join(law.inputs)} gives no loss of a run that hasn't started; expected a law "
            "of the loss in N and D, in N, in D or in C: fit again with --law power, kaplan-nd, chinchilla, ..."
        )
    inputs = run_inputs(result, config, law.inputs)
    (found,) = estimate(result, inputs)
    return Forecast(
        result=result,
        inputs=inputs,
        loss=found.value,
        low=found.low,
        high=found.high,
        meaning=result.ladder.convention["loss"],
        over_largest=beyond(result, inputs),
        warnings=tuple(unlike(result, config)),
    )


def run_inputs(result: Result, config: Config, keys: tuple[str, ...]) -> dict[str, float]:
    """N, D and C of a whole run, counted as the fit's points were.

    Raises:
        MegamupError: the fit's convention isn't one that a config can be counted by.
    """
    count_of = {"N": _parameters, "D": lambda _, config: float(config.tokens), "C": _flops}
    return {key: count_of[key](result.ladder, config) for key in keys}


def unlike(result: Result, config: Config) -> list[str]:
    """How the run differs from the fitted ones in what the law doesn't take, in words; empty where it doesn't.

    A law in C alone holds for runs that spend it as the fitted ones did. Their D at each C (N at each D, D at each N)
    is taken for a power law, and the run must lie as near to it as they do, or within 25%.
    """
    ladder, law = result.ladder, result.law
    if len(law.inputs) > 1:
        return []
    (x,), other = law.inputs, "N" if law.inputs == ("D",) else "D"
    if not all({x, other} <= point.inputs.keys() for point in ladder.points):
        return []
    try:
        own = run_inputs(result, config, (x, other))
    except MegamupError:  # counted in a way that only the fit's source knows: nothing to compare
        return []
    log_x, log_other = np.log(ladder.columns([x, other])).T
    line = np.polynomial.Polynomial.fit(log_x, log_other, 1)
    expected = float(line(math.log(own[x])))
    spread = float(np.max(np.abs(log_other - line(log_x))))
    if abs(math.log(own[other]) - expected) <= spread + math.log(UNLIKE):
        return []
    return [
        f"at {x}={own[x]:.3g} the fitted runs' {other} would be {math.exp(expected):.3g}; this run's is "
        f"{own[other]:.3g}, which the law {law.name} in {x} knows nothing of: the prediction is of a run like the "
        "fitted ones; a law in N and D takes both"
    ]


def band(forecast: Forecast, config: Config) -> Band:
    """The band of the run's smoothed training loss: the law refitted to the ladder's losses at each share of training.

    A constant share of D or C only moves coefficients, so the points keep their final inputs. The interval is widened
    as the final one's is, and by the luck of batches: of the run's own, and of the ladder's, which may be the same for
    all its runs and then isn't in their scatter.

    Raises:
        MegamupError: with the reason why there is no band.
    """
    result = forecast.result
    table = _comparable(forecast, config)
    fit, rows = result.fit, np.array([row is not None for row in table.losses])
    losses = np.array([row for row in table.losses if row is not None])  # (runs, k)
    fraction = np.array(table.fractions)
    later = fraction >= max(table.warmup, config.schedule.warmup_steps / config.train.steps)
    smoothing = parse_smoothing(table.smoothing)
    noise = np.hypot(table.noise, _own_noise(table, config, smoothing, fraction))
    ends = []
    for k in np.flatnonzero(later):
        at_share = fit_law(
            result.law,
            fit.inputs[rows],
            losses[:, k],
            objective=fit.objective,
            starts=STARTS,
            seed=result.seed,
            runs=fit.data.runs[rows].tolist(),
        )
        reason = no_interval_reason(at_share)
        if reason is not None:
            raise MegamupError(reason)
        found = predict(at_share, [list(forecast.inputs.values())]).widened(result.backtest.inflation)
        loss, low, high = (float(value[0]) for value in (found.loss, found.low, found.high))
        own = float(norm.ppf((1 + LEVEL) / 2)) * noise[k] / loss
        down, up = math.hypot(_log_ratio(loss, low), own), math.hypot(_log_ratio(high, loss), own)
        ends.append((loss, loss * math.exp(-down), loss * math.exp(up)))
    loss_at, low_at, high_at = np.array(ends).T
    return Band(fraction[later], loss_at, low_at, high_at, smoothing)


def _comparable(forecast: Forecast, config: Config) -> CurveTable:
    """The table of curves, where the run's may be compared with them. Raises MegamupError where not."""
    table = forecast.result.curves
    if table is None:
        raise MegamupError("the fit file holds no training curves: fit finished run folders (tools/scaling.py fit)")
    if forecast.warnings:
        raise MegamupError("the run is unlike the fitted ones")
    own = schedule_shape({f"schedule.{key}": value for key, value in config.schedule})
    if table.schedule != own:
        theirs = "differing or unknown schedules" if table.schedule is None else _words(table.schedule)
        raise MegamupError(f"the fitted runs have {theirs}, this one {_words(own or {})}: curves of one shape compare")
    return table


def _log_ratio(above: float, below: float) -> float:
    """log(above / below); `OPEN` where an end is 0 or infinite: a number, so that bands can be interpolated."""
    return min(math.log(above / below), OPEN) if below > 0 else OPEN


def _words(schedule: dict[str, str | float]) -> str:
    return ", ".join(f"schedule.{key}={value}" for key, value in schedule.items())


def _own_noise(table: CurveTable, config: Config, smoothing: Smoothing, fraction: FloatArray) -> FloatArray:
    """Standard error of the run's smoothed loss that the luck of its own batches makes: (k,) nats."""
    every, last = config.train.log_every, config.train.steps
    steps = np.append(np.arange(every, last, every), last).astype(np.float64)
    records = np.interp(fraction, steps / last, effective_records(steps, smoothing))
    return np.asarray(table.token_noise / np.sqrt(config.batch_tokens * records))


def _parameters(ladder: Ladder, config: Config) -> float:
    counted = ladder.convention["parameters"]
    if counted not in PARAMETER_COUNTS:
        raise _uncounted("N", counted, f"parameters={'|'.join(PARAMETER_COUNTS)}")
    return float(count(config.model)[counted])


def _flops(ladder: Ladder, config: Config) -> float:
    """By the convention's name; as 6·N·D where that is what C is in every point, whatever it is called."""
    counted = ladder.convention["flops"]
    if all({"N", "D", "C"} <= point.inputs.keys() for point in ladder.points):
        n, d, c = ladder.columns(["N", "D", "C"]).T
        if np.all(np.abs(c / (6 * n * d) - 1) < EXACT):
            return training_flops(_parameters(ladder, config), config.tokens)
    if counted == "6N_total":
        return training_flops(count(config.model)["total"], config.tokens)
    known: tuple[Convention, ...] = get_args(Convention)
    for name in known:
        if counted == name:
            return flops_per_token(config.model, config.lengths, name) * config.tokens
    raise _uncounted("C", counted, f"flops={'|'.join((*known, '6N_total'))}")


def _uncounted(key: str, counted: str, expected: str) -> MegamupError:
    return MegamupError(
        f"{key}: the fit's points have it counted {counted!r}, which no config can be counted by; expected "
        f"{expected}: if the table's is one of these, fit again with --convention"
    )
