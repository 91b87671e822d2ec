"""How far off predictions of larger runs from smaller ones were, and how far intervals had to widen to hold them."""

from __future__ import annotations

import numpy as np

from megamup.page import FITTED, HELD, INK, MUTED
from megamup.scaling.analysis import Result
from megamup.scaling.figures.drawing import Drawing, add_legend, log_range, log_scale, name_axes, new_figure, plain
from megamup.scaling.uncertainty import LEVEL

ROOM = 1.15
"""A factor of distance, left and right of the points, which may all be at one."""
LARGEST_NEEDED = 100.0
"""Factors beyond, and those of intervals without width, are drawn here."""


def backtest_drawing(result: Result, prefix: str) -> Drawing | None:
    """Error, and the factor its interval needed, against distance; None where nothing was predicted."""
    test = result.backtest
    if not test.trials:
        return None
    figure, (left, right) = new_figure(2)
    trials = sorted(test.trials, key=lambda trial: trial.distance)
    distance = np.array([trial.distance for trial in trials])
    error = np.array([100 * (trial.measured / trial.predicted - 1) for trial in trials])
    low, high = (
        np.array([100 * (getattr(trial, end) / trial.predicted - 1) for trial in trials]) for end in ("low", "high")
    )
    needed = np.array([trial.needed for trial in trials])
    outside = needed > 1
    left.axhline(0, color=MUTED, lw=1)
    reach = 3 * max(float(np.abs(error).max()), 1e-9)
    left.vlines(
        distance,
        np.maximum(low, -reach),
        np.minimum(high, reach),
        color=MUTED,
        lw=1.6,
        alpha=0.45,
        label="95% interval, not widened",
    )
    for axes, values in ((left, error), (right, np.clip(needed, 1e-2, LARGEST_NEEDED))):
        log_scale(axes, "x")
        axes.plot(distance[~outside], values[~outside], "o", color=FITTED, ms=5, label="inside")
        if outside.any():
            axes.plot(distance[outside], values[outside], "D", color=HELD, ms=5.5, label="outside")
        axes.set_xlim(log_range(distance, ROOM))
    log_scale(right, "y")
    right.axhline(1, color=MUTED, lw=1)
    label = f"widening: {test.inflation:.3g}"
    right.axhline(min(test.inflation, LARGEST_NEEDED), color=INK, lw=1.2, ls=(0, (5, 4)), label=label)
    for axes, y in ((left, "measured over predicted, less 1 (%)"), (right, "widening that would have held it")):
        name_axes(axes, "size over that of the largest fitted run", y)
        add_legend(axes, below=True)
    cuts = "one cut" if test.folds == 1 else f"{test.folds} cuts"
    caption = (
        f"Each point is a run predicted from smaller ones only, at {cuts}. Left: its error, with the "
        f"interval of that fit. Right: by what factor the interval would have had to be wider. {LEVEL:.0%} of them "
        "needed at most the widening, which every interval on this page has."
    )
    numbers = {
        "folds": test.folds,
        "inflation": test.inflation,
        "held": test.held,
        "rms_error": test.rms_error,
        "trials": [
            {"run": trial.run, "fitted": trial.fitted, "distance": a, "error_percent": b, "needed": c}
            for trial, a, b, c in zip(trials, distance, error, needed, strict=True)
        ],
    }
    return Drawing(f"{prefix}-backtest", "Larger runs predicted from smaller ones", caption, figure, plain(numbers))
