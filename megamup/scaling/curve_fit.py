"""Laws of whole loss curves from runs: their points and schedules, the fit, and the curve of a schedule nobody ran."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from megamup.errors import MegamupError
from megamup.scaling.analysis import AUTO, Result, Tried, inputs_of
from megamup.scaling.backtest import Backtest
from megamup.scaling.choice import CANDIDATES
from megamup.scaling.curve_backtest import LEAST_FALL, CurveEvidence, anneals, final_of, hold_out, rms_log_error
from megamup.scaling.curves import UNKNOWN_WARMUP
from megamup.scaling.fit import Data, fit_law, warnings_of
from megamup.scaling.identifiability import check, check_fit
from megamup.scaling.laws import LAWS, get_law
from megamup.scaling.laws.annealing import Annealing, CurveLaw, predict_curve
from megamup.scaling.laws.base import FloatArray
from megamup.scaling.laws.schedules import Schedules
from megamup.scaling.objective import Objective, get_objective
from megamup.scaling.readers.track import Track
from megamup.scaling.runs import Ladder, Point, Reading
from megamup.scaling.uncertainty import LEVEL, no_interval_reason, parameter_intervals

CURVE_LAWS = tuple(name for name, law in LAWS.items() if isinstance(law, CurveLaw))
POINTS = 100
"""Of each curve, even in steps: spaced by their logs a short decay, which tells most, would have hardly any."""
SAMPLING = f"mean of each of up to {POINTS} even stretches of a run after its warm-up and first {UNKNOWN_WARMUP:.0%}"
DECAYS = (0.99, 0.995, 0.999)
"""λ of the law `annealing` that are tried, as its source did; the longer a decay, the more hangs on it."""
TIE = 1.02
"""Held-out errors within 2% of the least are as good: the simpler candidate is taken."""
SAME = 0.01
"""Runs whose parameters or batch differ by more are not of one curve's law."""
SHOWN = 200
"""Steps at which a predicted curve is given."""


@dataclass(frozen=True)
class SchedulePrediction:
    """The loss curve of a run with a schedule of its own; arrays are (m,)."""

    steps: FloatArray
    rates: FloatArray
    loss: FloatArray
    """Nats per token."""
    half_width: float | None
    """Of the 95% interval of one new schedule's loss, in logs; None where there is none."""
    length: int
    """T, steps of the schedule."""
    over_longest: float
    """T over the steps of the longest fitted run."""

    @property
    def low(self) -> FloatArray | None:
        return None if self.half_width is None else self.loss * math.exp(-self.half_width)

    @property
    def high(self) -> FloatArray | None:
        return None if self.half_width is None else self.loss * math.exp(self.half_width)


@dataclass(frozen=True)
class Measured:
    """A measured curve beside its prediction; arrays are (m,)."""

    steps: FloatArray
    loss: FloatArray
    predicted: FloatArray

    @property
    def final(self) -> float:
        """Mean loss over the last 5% of the points."""
        return final_of(self.loss)

    @property
    def final_error(self) -> float:
        """predicted / measured - 1 there."""
        return final_of(self.predicted) / self.final - 1

    @property
    def rms_error(self) -> float:
        """Root mean square of log(predicted / measured) over the points."""
        return rms_log_error(self.predicted, self.loss)


def is_curve_law(names: str) -> bool:
    """Whether `names` (several divided by commas) begins with a law of whole curves."""
    return names.split(",")[0] in CURVE_LAWS


def analyse_curves(
    names: str,
    ladder: Ladder,
    tracks: Sequence[Track],
    *,
    objective: str = AUTO,
    seed: int = 0,
    provenance: dict[str, str] | None = None,
) -> Result:
    """Fit the law whose error on held-out schedules is least, under the objective whose error is.

    Args:
        names: of laws of whole curves, divided by commas.
        ladder: the runs' last points, and how they were counted.
        tracks: the runs, not smoothed.

    Raises:
        MegamupError: a law of another kind; runs of several models or batches, without learning rates, or without a
            decay among them; points that don't determine the law.
    """
    points, schedules = curve_points(tracks)
    runs = [track.name for track in tracks]
    laws = [replace(law, schedules=schedules) for name in names.split(",") for law in _forms(name)]
    convention = ladder.convention | {"loss": _loss_words(ladder)}
    fitted = Ladder(tuple(points), convention, ladder.warnings)
    x = inputs_of(fitted, laws[0])
    data = Data(x, fitted.losses, fitted.runs)
    for law in laws:
        _check_decay(law, data, runs)
        check(law.bound_to(_columns(x)), data)
    candidates = [
        _Candidate(law, get_objective(name), _evidence(law, data, get_objective(name), runs))
        for law in laws
        for name in (CANDIDATES if objective == AUTO else (objective,))
    ]
    chosen, reason = _choose(candidates)
    fit = fit_law(chosen.law, x, fitted.losses, objective=chosen.objective, seed=seed, runs=fitted.runs.tolist())
    unknown = no_interval_reason(fit)
    return Result(
        fit=fit,
        ladder=fitted,
        intervals=parameter_intervals(fit),
        backtest=Backtest((), 0),
        tried=tuple(
            Tried(form_of(c.law), c.objective.name, c.evidence.rms_error, len(c.evidence.trials)) for c in candidates
        ),
        reason=f"{form_of(chosen.law)}: {reason}",
        warnings=[
            *ladder.warnings,
            *warnings_of(fit),
            *check_fit(fit),
            *([] if unknown is None else [f"no intervals of the parameters: {unknown}"]),
            *chosen.evidence.warnings(),
        ],
        provenance=provenance or {},
        seed=seed,
        curve_evidence=chosen.evidence,
    )


def curve_points(tracks: Sequence[Track]) -> tuple[list[Point], Schedules]:
    """Points of every curve, each the mean over a stretch of it, and the runs' schedules as they were logged.

    A point's inputs are `curve`, counted from 1, and `step`, beside what is constant in its run.

    Raises:
        MegamupError: runs of several models or batches, without optimizer steps or learning rates, or all warm-up.
    """
    _check_alike(tracks)
    schedules = Schedules.from_knots([_logged_rates(track) for track in tracks])
    points = []
    for number, (track, rate) in enumerate(zip(tracks, schedules.rates, strict=True), start=1):
        steps, losses = _stretches(track, rate)
        for i, (step, loss) in enumerate(zip(steps, losses, strict=True), start=1):
            inputs = track.constants | {"curve": float(number), "step": float(step)}
            points.append(Point(f"{track.name} {i}/{len(steps)}", inputs, float(loss), track.source, track.name))
    return points, schedules


def form_of(law: CurveLaw) -> str:
    """The law's name, with its λ where it has one."""
    return f"{law.name} λ={law.decay:g}" if isinstance(law, Annealing) else law.name


def predict_schedule(result: Result, rates: ArrayLike, steps: ArrayLike | None = None) -> SchedulePrediction:
    """The loss curve under another schedule, with the interval of one new run.

    Args:
        rates: learning rate of steps 1 to T, (T,).
        steps: where, (m,); default up to 200 even steps after the first twentieth, T among them.

    Raises:
        MegamupError: a step beyond the schedule, or one whose decay would win more than the whole loss.
    """
    rate = np.asarray(rates, dtype=np.float64)
    first = max(1, math.ceil(UNKNOWN_WARMUP * len(rate)))
    at = np.unique(np.rint(np.linspace(first, len(rate), SHOWN))) if steps is None else np.asarray(steps, np.float64)
    law = curve_law(result)
    _, loss = predict_curve(law, result.fit.parameters, rate, at)
    if not np.all(np.isfinite(loss)):
        raise MegamupError(
            f"--schedule: under it {law.name} would give a loss below 0, as its decay is far from any that was fitted; "
            "expected one nearer to them: fit runs with such a decay"
        )
    longest = max(len(known) for known in law.known.rates)
    return SchedulePrediction(
        at,
        rate[at.astype(np.int64) - 1],
        loss,
        half_width=_evidence_of(result).half_width,
        length=len(rate),
        over_longest=len(rate) / longest,
    )


def measure(result: Result, track: Track) -> tuple[FloatArray, Measured]:
    """A run's learning rate by step (T,), and its curve beside what the law predicts from that alone.

    Raises:
        MegamupError: as `curve_points` and `predict_schedule`.
    """
    points, schedules = curve_points([track])
    steps = np.array([point.inputs["step"] for point in points])
    predicted = predict_schedule(result, schedules.rates[0], steps).loss
    return schedules.rates[0], Measured(steps, np.array([point.loss for point in points]), predicted)


def schedule_json(result: Result, predicted: SchedulePrediction, measured: Measured | None) -> dict[str, Any]:
    """A predicted curve, JSON-ready; `loss`, `low` and `high` are those of its last step."""
    low, high = (None if end is None else end.tolist() for end in (predicted.low, predicted.high))
    return {
        "law": result.law.name,
        "step": float(predicted.steps[-1]),
        "steps": predicted.length,
        "over_longest_run": predicted.over_longest,
        "loss": float(predicted.loss[-1]),
        "low": low and low[-1],
        "high": high and high[-1],
        "interval_level": LEVEL,
        "interval_note": _evidence_of(result).no_interval_reason
        or "one new schedule, by Student's t of the errors of those held out",
        "curve": {
            "step": predicted.steps.tolist(),
            "lr": predicted.rates.tolist(),
            "loss": predicted.loss.tolist(),
            "low": low,
            "high": high,
        },
        "measured": measured
        and {
            "final": measured.final,
            "final_error": measured.final_error,
            "rms_error": measured.rms_error,
            "step": measured.steps.tolist(),
            "loss": measured.loss.tolist(),
        },
        "convention": result.ladder.convention,
    }


def other_model(result: Result, constants: Mapping[str, float]) -> list[str]:
    """Warnings where a run's N or B is not that of the fitted runs, of which alone the law speaks."""
    fitted = result.ladder.points[0].inputs
    return [
        f"{key} is {constants[key]:.4g}, of the fitted runs {fitted[key]:.4g}: the law holds for one model and batch"
        for key in ("N", "B")
        if key in constants and key in fitted and abs(constants[key] / fitted[key] - 1) > SAME
    ]


@dataclass(frozen=True)
class _Candidate:
    law: CurveLaw
    objective: Objective
    evidence: CurveEvidence


def _evidence(law: CurveLaw, data: Data, objective: Objective, runs: Sequence[str]) -> CurveEvidence:
    return CurveEvidence(tuple(runs), hold_out(law, data, objective, runs))


def _choose(candidates: Sequence[_Candidate]) -> tuple[_Candidate, str]:
    """The simplest of those whose held-out error is within 2% of the least, and why."""
    ranked = sorted(candidates, key=lambda c: len(c.law.parameters))  # stable: objectives stay in their order
    if len(ranked) == 1:
        return ranked[0], "the only one asked for"
    errors = [c.evidence.rms_error for c in ranked]
    known = [error for error in errors if error is not None]
    if not known:
        return ranked[0], "nothing could be held out: the simplest"
    best = next(c for c, error in zip(ranked, errors, strict=True) if error is not None and error <= TIE * min(known))
    return best, f"least error on held-out {best.evidence.held_out}, the simplest of those within {TIE - 1:.0%}"


def _forms(name: str) -> list[CurveLaw]:
    """The law called `name`, with each λ that is tried where it has one."""
    law = get_law(name)
    if not isinstance(law, CurveLaw):
        raise MegamupError(f"--law: {name} is no law of whole curves; expected only {', '.join(CURVE_LAWS)} together")
    return [replace(law, decay=decay) for decay in DECAYS] if isinstance(law, Annealing) else [law]


def _evidence_of(result: Result) -> CurveEvidence:
    assert result.curve_evidence is not None
    return result.curve_evidence


def curve_law(result: Result) -> CurveLaw:
    """The law of a result of `analyse_curves`.

    Raises:
        MegamupError: the result is of another kind.
    """
    if not isinstance(result.law, CurveLaw) or result.curve_evidence is None:
        raise MegamupError(f"--schedule: the law {result.law.name} has no schedule; expected {', '.join(CURVE_LAWS)}")
    return result.law


def _columns(x: FloatArray) -> dict[str, FloatArray]:
    return {"curve": x[:, 0], "step": x[:, 1]}


def _check_alike(tracks: Sequence[Track]) -> None:
    for key, what in (("N", "parameters"), ("B", "tokens a step")):
        known = {track.name: track.constants[key] for track in tracks if key in track.constants}
        if not known:
            continue
        least, most = min(known, key=known.__getitem__), max(known, key=known.__getitem__)
        if known[most] > (1 + SAME) * known[least]:
            raise MegamupError(
                f"{key}: {known[least]:.4g} {what} in {least}, {known[most]:.4g} in {most}; expected runs that "
                "differ in their schedule alone: fit those of one model and batch"
            )


def _check_decay(law: CurveLaw, data: Data, runs: Sequence[str]) -> None:
    if not anneals(law, data.inputs):
        raise MegamupError(
            f"--law {law.name}: the learning rate of {', '.join(runs)} falls by less than {LEAST_FALL:.0%}, which "
            "can't tell what a decay wins; expected one that falls: add a run with schedule.kind=cosine, linear or wsd"
        )


def _logged_rates(track: Track) -> dict[str, list[float]]:
    """The learning rates of a run and their steps, without those inside a constant stretch.

    Raises:
        MegamupError: the run logs none.
    """
    steps, rates = track.rates if track.rates is not None else (np.empty(0), np.empty(0))
    if len(steps) < 2:
        raise MegamupError(
            f"{track.name}: has no learning rate by step; expected `lr` in its records: say what it is called with "
            "--columns lr=NAME, or leave it out with --exclude"
        )
    inside = np.zeros(len(steps), dtype=np.bool_)
    inside[1:-1] = (rates[1:-1] == rates[:-2]) & (rates[1:-1] == rates[2:])
    return {"step": steps[~inside].tolist(), "lr": rates[~inside].tolist()}


def _stretches(track: Track, rate: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Mean step, rounded, and mean loss of up to `POINTS` even stretches of records: (n,) each."""
    curve = track.curve
    if not np.all(np.isfinite(curve.step)):
        raise MegamupError(f"{track.name}: has no optimizer steps at its losses; expected them: add --columns S=NAME")
    still = np.flatnonzero(np.diff(rate) <= 0)  # a warm-up rises
    warm = int(still[0]) + 1 if still.size else len(rate)
    begin = max(warm, UNKNOWN_WARMUP * curve.step[-1])
    rows = np.flatnonzero((curve.step >= begin) & (curve.step <= len(rate)))
    if not rows.size:
        raise MegamupError(
            f"{track.name}: no loss was logged between the end of its warm-up (step {warm}) and its last learning rate "
            f"(step {len(rate)}); expected both beyond it: leave this run out with --exclude"
        )
    parts = np.array_split(rows, min(POINTS, len(rows)))
    steps, losses = (np.array([values[part].mean() for part in parts]) for values in (curve.step, curve.loss))
    return np.rint(steps), losses


def _loss_words(ladder: Ladder) -> str:
    """Which loss the points are, and how they were read."""
    reading = Reading.from_text(ladder.convention["reading"])
    words = [reading.columns.get("L", reading.loss), SAMPLING]
    return ", ".join(words if reading.smooth.kind == "none" else [words[0], reading.smooth.meaning, words[1]])
