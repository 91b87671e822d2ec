"""Schedules held out: a law of whole curves is fitted to all schedules but one, and predicts that one's curve.

That is what such a law claims to do, so its errors there choose law and objective and make the interval of a
prediction: the final loss of one more schedule errs like those held out, as Student's t with as many degrees of
freedom as there were. The points along a curve share its noise and are no independent evidence of that. With one
schedule only its later steps can be held out (rolling origin), which says nothing about another schedule.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import t as student

from megamup.scaling.fit import Data, fit_law
from megamup.scaling.laws.annealing import CurveLaw
from megamup.scaling.laws.base import FloatArray
from megamup.scaling.objective import Objective
from megamup.scaling.uncertainty import LEVEL

STARTS = 8
FINAL_SHARE = 0.05
"""Share of a curve's points, at its end, whose mean is its final loss: one point of a small run is mostly noise."""
LEAST_FALL = 0.1
"""Of the peak: a rate that has fallen by less shows too little of what annealing wins."""
CUTS = (0.5, 0.6, 0.7, 0.8, 0.9)
"""Shares of a single curve that its end is predicted from."""


@dataclass(frozen=True)
class ScheduleTrial:
    """One schedule, or the end of one, predicted from others."""

    run: str
    fitted: int
    """Points that the prediction was fitted to."""
    predicted: float
    """Mean loss over the last 5% of the points, in nats per token."""
    measured: float
    rms_error: float
    """Root mean square of log(predicted / measured) over all points that were held out."""

    @property
    def error(self) -> float:
        """log(predicted / measured) of the final loss."""
        return math.log(self.predicted / self.measured)


@dataclass(frozen=True)
class CurveEvidence:
    """The runs that a law of whole curves was fitted to, and how it predicts those held out."""

    runs: tuple[str, ...]
    """Their names, in the order of the law's schedules."""
    trials: tuple[ScheduleTrial, ...]

    @property
    def held_out(self) -> str:
        """What was held out: whole schedules, or the later steps of the only one."""
        return "schedules" if len(self.runs) > 1 else "steps"

    @property
    def rms_error(self) -> float | None:
        """Root mean square of log(predicted / measured) over the held-out curves, each with equal weight."""
        return math.sqrt(float(np.mean([t.rms_error**2 for t in self.trials]))) if self.trials else None

    @property
    def half_width(self) -> float | None:
        """Half of the 95% interval of the log of one more schedule's loss; None where no schedule was held out."""
        if self.held_out == "steps" or not self.trials:
            return None
        rms = math.sqrt(float(np.mean([trial.error**2 for trial in self.trials])))
        return rms * float(student.ppf((1 + LEVEL) / 2, len(self.trials)))

    @property
    def no_interval_reason(self) -> str | None:
        """Why predictions have no interval; None where they have."""
        if self.half_width is not None:
            return None
        if self.held_out == "steps":
            return "one schedule was fitted, which says nothing about the error under another: add a run with another"
        return "without any one schedule the rest don't determine the law, so none was held out: add runs with a decay"

    def warnings(self) -> list[str]:
        """What the trials say about predictions, in words."""
        if self.no_interval_reason is not None:
            return [f"predictions have no interval: {self.no_interval_reason}"]
        if len(self.trials) < 3:
            return [
                f"intervals rest on {len(self.trials)} held-out of {len(self.runs)} schedules and are wide: add runs "
                "with other decays"
            ]
        return []


def hold_out(law: CurveLaw, data: Data, objective: Objective, names: Sequence[str]) -> tuple[ScheduleTrial, ...]:
    """Predict each schedule from the others; of a single one its end from its beginning, at several cuts.

    What is left must show a decay; schedules without which it doesn't are not held out.

    Args:
        data: inputs are curve and step, in the order of both.
        names: of the curves.
    """
    found = []
    for name, rows in _folds(data, names):
        kept = ~rows
        if not anneals(law, data.inputs[kept]):
            continue
        runs = data.runs[kept].tolist()
        fit = fit_law(law, data.inputs[kept], data.response[kept], objective=objective, starts=STARTS, runs=runs)
        predicted, measured = fit.at(data.inputs[rows]), data.response[rows]
        if not np.all(np.isfinite(predicted)):  # what annealing would win is more than the loss
            continue
        rms = rms_log_error(predicted, measured)
        found.append(ScheduleTrial(name, int(kept.sum()), final_of(predicted), final_of(measured), rms))
    return tuple(found)


def final_of(values: FloatArray) -> float:
    """Mean over the last 5% of a curve's points, at least one."""
    return float(np.mean(values[-max(1, round(FINAL_SHARE * len(values))) :]))


def rms_log_error(predicted: FloatArray, measured: FloatArray) -> float:
    """Root mean square of log(predicted / measured)."""
    return math.sqrt(float(np.mean(np.log(predicted / measured) ** 2)))


def anneals(law: CurveLaw, inputs: FloatArray) -> bool:
    """Whether some curve's rate has fallen visibly by its last point (inputs: curve and step, (n, 2))."""
    for curve in np.unique(inputs[:, 0]):
        last = int(inputs[inputs[:, 0] == curve, 1].max())
        rate = law.known.rates[int(curve) - 1][:last]
        if np.max(np.maximum.accumulate(rate) - rate) >= LEAST_FALL * rate.max():
            return True
    return False


def _folds(data: Data, names: Sequence[str]) -> Iterator[tuple[str, NDArray[np.bool_]]]:
    """The name and the rows (n,) of what is held out."""
    curves, step = data.inputs.T
    if len(names) > 1:
        for number, name in enumerate(names, start=1):
            yield name, curves == number
        return
    for cut in CUTS:
        yield f"{names[0]} after {cut:.0%}", step > cut * step.max()
