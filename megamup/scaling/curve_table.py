"""Training losses of a ladder at the same shares of training, which a fit file keeps: what a predicted band is made of.

muScaling predicts the loss of a larger model at any step, not the last alone (Yao et al. 2023, arXiv:2304.06875):
runs of one schedule are compared at the same share of it. A trainer on a cluster doesn't see the ladder's folders, so
these losses travel in the fit file.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megamup.errors import MegamupError
from megamup.scaling.curves import Curve, FloatArray, Smoothing, at, smoothed
from megamup.scaling.readers.log import RunLog
from megamup.scaling.readers.sources import read_run
from megamup.scaling.readers.track import Track, default_columns, track_of
from megamup.scaling.runs import Ladder, Point, Reading

FRACTIONS = (*np.arange(2, 8) / 40, *np.arange(4, 21) / 20)
"""5% to 20% of training by 2.5%, where the loss falls fast, then by 5%."""
SMOOTHING = Smoothing("share", 0.1)
"""Of small ladders a batch alone tells the loss to a few percent: a long window, the same for ladder and run."""
LEAST_RECORDS = 10

Schedule = dict[str, str | float]


@dataclass(frozen=True)
class CurveTable:
    """Smoothed training losses of n points at k shares of their training."""

    fractions: tuple[float, ...]
    """(k,)."""
    smoothing: str
    """As `parse_smoothing` reads it."""
    losses: tuple[tuple[float, ...] | None, ...]
    """(n, k), nats per token; None for a point without a curve."""
    noise: tuple[float, ...]
    """(k,): standard error of these losses that the luck of their batches makes, nats."""
    token_noise: float
    """Standard deviation of one batch's loss times the square root of its tokens."""
    schedule: Schedule | None
    """The shape that all runs' schedules have, as `schedule_shape` gives it; None where they differ or aren't known."""
    warmup: float
    """The longest warm-up as a share of training."""


def curve_table(ladder: Ladder) -> CurveTable | None:
    """The table of a ladder of finished runs; None where no point is the end of a run that logged its training loss.

    A run without a curve that can be read is a None in the table, not an error.
    """
    reading = Reading.from_text(ladder.convention["reading"]) if "reading" in ladder.convention else Reading()
    if reading.at is not None and reading.at.kind != "final":
        return None
    # Columns that name another loss are of the loss that is fitted, not of the training curve.
    columns = {key: name for key, name in reading.columns.items() if key != "L" or reading.loss == "loss"}
    rows = [_row(point, columns) for point in ladder.points]
    known = [row for row in rows if row is not None]
    if not known:
        return None
    shapes = [row.schedule for row in known]
    return CurveTable(
        fractions=tuple(float(fraction) for fraction in FRACTIONS),
        smoothing=str(SMOOTHING),
        losses=tuple(None if row is None else row.losses for row in rows),
        noise=tuple(_rms([row.noise for row in known]).tolist()),
        token_noise=float(_rms([row.token_noise for row in known])),
        schedule=shapes[0] if all(shape == shapes[0] for shape in shapes) else None,
        warmup=max(row.warmup for row in known),
    )


def schedule_shape(facts: Mapping[str, Any]) -> Schedule | None:
    """What two schedules must share for their runs to be compared at shares of training; None if it isn't known.

    Args:
        facts: a config's keys, such as `schedule.kind`.
    """
    kind = facts.get("schedule.kind")
    if not isinstance(kind, str):
        return None
    keys = () if kind == "constant" else ("min_ratio", *(("decay_fraction",) if kind == "wsd" else ()))
    return {"kind": kind} | {key: float(facts[f"schedule.{key}"]) for key in keys if f"schedule.{key}" in facts}


def effective_records(tokens: FloatArray, smoothing: Smoothing) -> FloatArray:
    """How many equal records the average at each record amounts to, (Σ w)² / Σ w²: (n,)."""
    sums, squares = np.empty(len(tokens)), np.empty(len(tokens))
    total = square = 0.0
    for i, decay in enumerate(smoothing.decay(tokens)):
        total, square = total * decay + 1, square * decay**2 + 1
        sums[i], squares[i] = total, square
    return np.asarray(sums**2 / squares)


@dataclass(frozen=True)
class _Row:
    """What one run gives to the table."""

    losses: tuple[float, ...]
    noise: FloatArray
    token_noise: float
    schedule: Schedule | None
    warmup: float


def _row(point: Point, columns: Mapping[str, str]) -> _Row | None:
    found = None if point.source is None else _read(point, columns)
    if found is None:
        return None
    log, track = found
    curve, last = track.curve, track.last_step
    if len(curve) < LEAST_RECORDS or not np.all(np.isfinite(curve.step)):
        return None
    try:
        losses = tuple(at(smoothed(curve, SMOOTHING), fraction=f).loss for f in FRACTIONS)
    except MegamupError:  # logged from later than the first share on
        return None
    noise = _noise(curve)
    records = np.interp(FRACTIONS, curve.tokens / curve.tokens[-1], effective_records(curve.tokens, SMOOTHING))
    batch = curve.tokens[-1] / curve.step[-1]
    return _Row(
        losses=losses,
        noise=noise / np.sqrt(records),
        token_noise=noise * math.sqrt(batch),
        schedule=schedule_shape(log.facts),
        warmup=track.warmup_steps / last,
    )


def _read(point: Point, columns: Mapping[str, str]) -> tuple[RunLog, Track] | None:
    assert point.source is not None
    try:
        log = read_run(point.source)
        return log, track_of(log, columns, default_columns("loss", "non_embedding"))
    except MegamupError:
        return None


def _noise(curve: Curve) -> float:
    """Standard deviation of one record about the curve: of second differences, which no trend moves (Rice 1984)."""
    late = curve.loss[curve.tokens >= FRACTIONS[0] * curve.tokens[-1]]
    return math.sqrt(float(np.mean(np.diff(late, 2) ** 2)) / 6)


def _rms(values: Sequence[Any]) -> FloatArray:
    return np.asarray(np.sqrt(np.mean(np.square(values), axis=0)))
