"""Rolling-origin backtest: fit the small runs, predict the larger, and see how far intervals must widen to hold.

An interval of a fit knows the noise of its runs, not the error of the law beyond them. The runs themselves tell about
that: cut them at every size, fit what lies below, predict what lies above (rolling-origin evaluation: Tashman 2000,
Int. J. Forecasting 16:437). Each prediction gives the factor by which its own interval would have had to be wider to
hold the measured loss. The factor that 95% of them needed, with the correction for their number of split conformal
prediction (Vovk et al. 2005), widens the intervals of the fit to all runs. Where the errors have one sign and grow with
the distance, that is said: then the law bends otherwise than the runs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from megamup.errors import MegamupError
from megamup.scaling.fit import Data, Fit, fit_law
from megamup.scaling.laws.base import FloatArray, IntArray, Law
from megamup.scaling.objective import Objective
from megamup.scaling.uncertainty import LEVEL, degrees_of_freedom, predict

MAX_FOLDS = 12
SAME_VALUE = 1.01
MAX_TRIALS = 20
"""Points of the next rung, and beyond it, that a fold predicts."""
STARTS = 8
MIN_SHARE = 0.5
"""Every fold fits at least half of the points: a law fitted to a few tiny runs says little of one fitted to all."""
SAME_SIZE = 1.1
"""Runs within 10% of compute are one rung: none of them is predicted from another."""


@dataclass(frozen=True)
class Trial:
    """One run predicted from smaller ones."""

    run: str
    fitted: int
    """Points that the prediction was fitted to."""
    distance: float
    """Its size over the largest fitted one."""
    predicted: float
    measured: float
    low: float
    high: float
    """The interval at 95% before any widening."""
    next_rung: bool
    """Whether it is of the next larger size; the others are farther."""

    @property
    def error(self) -> float:
        """log(predicted / measured)."""
        return math.log(self.predicted / self.measured)

    @property
    def needed(self) -> float:
        """Factor by which the interval would have had to be wider, in logs, to just hold the measured value."""
        end = self.high if self.measured > self.predicted else self.low
        half = abs(math.log(end / self.predicted)) if end > 0 else math.inf
        return abs(self.error) / half if half > 0 else math.inf


@dataclass(frozen=True)
class Backtest:
    """All trials of one law and objective, and what follows for the intervals."""

    trials: tuple[Trial, ...] = field(repr=False)
    folds: int

    @property
    def inflation(self) -> float:
        """What intervals are widened by: at least 1."""
        needed = sorted(trial.needed for trial in self.trials)
        if not needed:
            return 1.0
        rank = math.ceil(LEVEL * (len(needed) + 1))
        return max(1.0, needed[min(rank, len(needed)) - 1])

    @property
    def held(self) -> float | None:
        """Share of the trials inside their interval before widening."""
        return sum(trial.needed <= 1 for trial in self.trials) / len(self.trials) if self.trials else None

    @property
    def rms_error(self) -> float | None:
        """Root mean square of log(predicted / measured) of the next larger rungs."""
        errors = [trial.error for trial in self.trials if trial.next_rung]
        return math.sqrt(sum(error**2 for error in errors) / len(errors)) if errors else None

    @property
    def drift(self) -> float | None:
        """Bias per e-fold of distance: error = drift · log(distance), by least squares through the origin."""
        x = np.array([math.log(trial.distance) for trial in self.trials])
        y = np.array([trial.error for trial in self.trials])
        return float(x @ y / (x @ x)) if len(x) >= 3 and np.any(x > 0) else None

    @property
    def drifts(self) -> bool:
        """Whether the farther half of the trials errs to one side by more than intervals allow.

        All trials share runs, so their errors go together: a true law's farther half is off like this once in twenty.
        """
        if self.drift is None:
            return False
        middle = float(np.median([trial.distance for trial in self.trials]))
        signed = [math.copysign(t.needed, t.error) for t in self.trials if t.distance >= middle]
        return abs(float(np.median(signed))) > 1

    def warnings(self) -> list[str]:
        """What the trials say about predictions beyond the runs, in words."""
        if not self.trials:
            return [
                "no backtest: too few runs to fit the small and predict the larger, so the interval knows the "
                "noise of the runs and no error of the law; add runs at more sizes"
            ]
        found = []
        if self.inflation > 1:
            found.append(
                f"in the backtest {1 - (self.held or 0):.0%} of {len(self.trials)} predictions of larger runs fell "
                f"outside their 95% interval: intervals are {self.inflation:.2f} times wider than the fit's own"
            )
        if self.drift is not None and self.drifts:
            way = "above" if self.drift > 0 else "below"
            percent = 100 * abs(math.expm1(self.drift * math.log(10)))
            found.append(
                f"bias grows with distance: predictions lie {way} the measured by about {percent:.2g}% a decade "
                "of size beyond the fitted runs; the law bends otherwise than they do"
            )
        return found


def backtest(
    law: Law,
    data: Data,
    objective: Objective,
    size: FloatArray,
    names: Sequence[str],
    *,
    least: int | None = None,
    intervals: bool = True,
) -> Backtest:
    """Predict larger runs from smaller ones, at up to 12 cuts.

    Args:
        size: (n,), what runs are ordered by: FLOPs, or the law's only input; a run of several points has their
            geometric mean.
        least: runs that every fit has at least; default the law's parameters and one more, for intervals.
        intervals: without them only errors of the next rungs are found (`needed` is 0), as a choice of law wants.
    """
    size, runs = _of_runs(size, data), np.unique(data.runs)
    needed = max(least or 0, len(law.parameters) + 1, math.ceil(len(runs) * MIN_SHARE))
    folds, trials = 0, list[Trial]()
    for cut, until in _cuts(np.array([size[data.runs == run][0] for run in runs]), needed):
        fit = _fit_below(law, data, objective, size <= cut)
        near, far = np.flatnonzero((size > cut) & (size <= until)), np.flatnonzero(size > until)
        rows = _spread_out(near, far if intervals else far[:0])
        if fit is None or not (found := _predicted(fit, data, rows, intervals)):
            continue
        folds += 1
        trials += [
            Trial(
                run=names[row],
                fitted=len(fit.loss),
                distance=float(size[row] / cut),
                predicted=value,
                measured=float(data.response[row]),
                low=low,
                high=high,
                next_rung=bool(size[row] <= until),
            )
            for row, value, low, high in found
        ]
    return Backtest(tuple(trials), folds)


def _fit_below(law: Law, data: Data, objective: Objective, below: NDArray[np.bool_]) -> Fit | None:
    """The law fitted to the points `below` (n,); None where they don't determine it."""
    x, runs = data.inputs[below], data.runs[below].tolist()
    # An input of one value only: what depends on it can't be fitted.
    if np.any(x.max(axis=0) <= x.min(axis=0) * SAME_VALUE):
        return None
    try:
        fit = fit_law(law, x, data.response[below], objective=objective, starts=STARTS, runs=runs)
    except MegamupError:
        return None  # too few different inputs
    return fit if degrees_of_freedom(fit) > 0 else None


def _predicted(fit: Fit, data: Data, rows: IntArray, intervals: bool) -> list[tuple[int, float, float, float]]:
    """Each point's row, prediction and interval; a law with a parameter for each group may know nothing of some."""
    value = fit.at(data.inputs[rows])
    rows, value = rows[np.isfinite(value)], value[np.isfinite(value)]
    if not len(rows):
        return []
    low, high = np.zeros(len(rows)), np.full(len(rows), np.inf)
    if intervals:
        prediction = predict(fit, data.inputs[rows])
        low, high = prediction.low, prediction.high
    return list(zip(rows.tolist(), value.tolist(), low.tolist(), high.tolist(), strict=True))


def _spread_out(near: IntArray, far: IntArray) -> IntArray:
    """The points to predict: those of the next rung, and evenly chosen ones beyond, `MAX_TRIALS` of each at most."""
    chosen = [
        rows[np.unique(np.linspace(0, len(rows) - 1, min(len(rows), MAX_TRIALS)).round().astype(np.int64))]
        for rows in (near, far)
        if len(rows)
    ]
    return np.concatenate(chosen) if chosen else near


def _of_runs(size: FloatArray, data: Data) -> FloatArray:
    """The size of each point's run: the geometric mean over its points (n,)."""
    _, index = np.unique(data.runs, return_inverse=True)
    mean = np.bincount(index, np.log(size)) / np.bincount(index)
    return np.asarray(np.exp(mean)[index])


def _cuts(size: FloatArray, needed: int) -> list[tuple[float, float]]:
    """(largest fitted size, largest size of the next rung) of up to `MAX_FOLDS` cuts between rungs of runs (r,)."""
    ordered = np.sort(size)
    ends = [i for i in range(len(ordered) - 1) if ordered[i + 1] > SAME_SIZE * ordered[i]]
    places = [i for i in ends if i + 1 >= needed]
    if len(places) > MAX_FOLDS:
        places = [places[round(k)] for k in np.linspace(0, len(places) - 1, MAX_FOLDS)]
    last = len(ordered) - 1
    return [
        (float(ordered[place]), float(ordered[places[k + 1] if k + 1 < len(places) else last]))
        for k, place in enumerate(places)
    ]
