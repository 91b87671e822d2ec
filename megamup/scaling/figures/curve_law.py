"""A law of whole curves: measured and fitted losses by step, predicted ones dashed, the learning rates below."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from megamup.page import HELD, RAMP, dress
from megamup.scaling.analysis import Result
from megamup.scaling.curve_fit import Measured, SchedulePrediction, curve_law
from megamup.scaling.figures.drawing import Drawing, add_legend, axis_label, name_axes, plain

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SIZE = (8.4, 5.6)  # inches
BAND = 0.15  # opacity
DASHES = ("--", ":", "-.")

Predicted = tuple[str, SchedulePrediction, Measured | None]
"""The name of a schedule that was not fitted, its curve, and what was measured of it."""


def curve_law_drawing(result: Result, predicted: Sequence[Predicted] = ()) -> Drawing:
    """Points and the law for every fitted run, predicted curves with their band, and all learning rates.

    Args:
        result: of `analyse_curves`.
        predicted: schedules that were not fitted, each drawn dashed.
    """
    law, evidence = curve_law(result), result.curve_evidence
    assert evidence is not None
    figure, above, below = _panels()
    drawn: list[dict[str, Any]] = []
    for number, run in enumerate(evidence.runs, start=1):
        color = RAMP[round((number - 1) * (len(RAMP) - 1) / max(len(evidence.runs) - 1, 1))]
        mine = result.fit.inputs[:, 0] == number
        steps, measured, fitted = result.fit.inputs[mine, 1], result.fit.loss[mine], result.fit.fitted[mine]
        above.scatter(steps, measured, s=9, color=color, lw=0, alpha=0.6)
        above.plot(steps, fitted, color=color, lw=1.5, label=run)
        rate = law.known.rates[number - 1]
        below.plot(np.arange(1, len(rate) + 1), rate, color=color, lw=1.2)
        drawn.append({"run": run, "predicted": False, "step": steps, "loss": measured, "law": fitted})
    for index, (name, curve, measured_curve) in enumerate(predicted):
        style = DASHES[index % len(DASHES)]
        above.plot(curve.steps, curve.loss, color=HELD, lw=1.5, ls=style, label=f"{name} (predicted)")
        if curve.low is not None and curve.high is not None:
            above.fill_between(curve.steps, curve.low, curve.high, color=HELD, alpha=BAND, lw=0)
        if measured_curve is not None:
            above.scatter(measured_curve.steps, measured_curve.loss, s=9, color=HELD, lw=0)
        below.plot(curve.steps, curve.rates, color=HELD, lw=1.2, ls=style)
        drawn.append(
            {
                "run": name,
                "predicted": True,
                "step": curve.steps,
                "law": curve.loss,
                "low": curve.low,
                "high": curve.high,
                "measured_step": None if measured_curve is None else measured_curve.steps,
                "loss": None if measured_curve is None else measured_curve.loss,
            }
        )
    name_axes(above, "", axis_label("L", {}))
    name_axes(below, axis_label("step", {}), axis_label("lr", {}))
    add_legend(above)
    held = "" if evidence.rms_error is None else f"; {evidence.held_out} held out err by {evidence.rms_error:.2%} rms"
    caption = (
        f"Points: {result.ladder.convention['loss']}. Lines: {law.formula} ({law.source}), fitted to the learning "
        f"rates below{held}."
    )
    if predicted:
        caption += " Dashed: schedules that were not fitted, with the 95% interval of one new run."
    numbers = plain({"curves": drawn, "schedules": law.known.knots()})
    return Drawing("curve_law", "Loss by learning-rate schedule", caption, figure, numbers)


def _panels() -> tuple[Figure, Axes, Axes]:
    """Loss above, learning rate below, by one axis of steps."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=SIZE, layout="constrained")
    figure.patch.set_alpha(0)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    for axes in (above, below):
        dress(axes, "")
        axes.tick_params(labelsize=9.5)
    return figure, above, below
