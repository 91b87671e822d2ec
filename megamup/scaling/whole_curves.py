"""Whole loss curves with their learning-rate schedules: what the laws `annealing` and `multi-power` are fitted to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

import numpy as np

from megamup.errors import MegamupError
from megamup.scaling.curves import Curve, at, sample
from megamup.scaling.laws.annealing import CurveLaw
from megamup.scaling.laws.base import FloatArray
from megamup.scaling.laws.schedules import Schedules, schedule_of
from megamup.scaling.readers.sources import read_run
from megamup.scaling.runs import Ladder, Point

POINTS = 60
"""Of each curve: what is left of a smoothed one is a few dozen independent values."""

SomeLaw = TypeVar("SomeLaw", bound=CurveLaw)


def whole_curves(
    curves: Sequence[tuple[Point, Curve]],
    law: SomeLaw,
    points: int = POINTS,
    convention: Mapping[str, str] | None = None,
) -> tuple[Ladder, SomeLaw]:
    """Log-spaced points of every smoothed curve after its warm-up, and the law with the runs' schedules.

    A point's inputs are `curve`, counted from 1, and `step`; it belongs to its run.

    Raises:
        MegamupError: a run without steps or a logged `lr`, or with fewer records than points.
    """
    schedules = [_schedule(point) for point, _ in curves]
    found = []
    for number, ((point, curve), rates) in enumerate(zip(curves, schedules, strict=True), start=1):
        if not np.all(np.isfinite(curve.step)):
            raise MegamupError(f"{law.name}: {point.name} has no steps along its curve; expected them at every record")
        moments = sample(curve, points, warmup_steps=float(np.argmax(rates)))
        first, last = np.ceil(curve.step[0]), np.floor(curve.step[-1])
        for step in np.unique(np.clip(np.rint([moment.step for moment in moments]), first, last)).tolist():
            loss = at(curve, step=step).loss
            inputs = {"curve": float(number), "step": step}
            found.append(Point(f"{point.name}@{step:.0f}", inputs, loss, point.source, point.name))
    return Ladder(tuple(found), dict(convention or {})), replace(law, schedules=Schedules(schedules))


def _schedule(point: Point) -> FloatArray:
    """Learning rate by step of a run, from its log."""
    records = [] if point.source is None else read_run(point.source).records
    logged = [(record["step"], record["lr"]) for record in records if isinstance(record.get("lr"), int | float)]
    if not logged:
        raise MegamupError(
            f"{point.name}: no `lr` is logged by step; expected runs (folders of ours, wandb or TensorBoard) that log "
            "it: a curve's law needs the whole schedule"
        )
    steps, rates = np.array(logged, dtype=np.float64).T
    return schedule_of(steps, rates)
