"""Residuals of a fit against size and against a normal distribution, and what each run does to the fit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from scipy.stats import norm

from megamup.page import FITTED, HELD, INK, MUTED
from megamup.scaling.analysis import Result, inputs_of, response_of, sizes_of
from megamup.scaling.figures.drawing import (
    SMALL,
    Drawing,
    add_legend,
    axis_label,
    log_scale,
    name_axes,
    new_figure,
    plain,
    shaded_points,
    with_held,
)
from megamup.scaling.influence import LARGE_COOK, Influence
from megamup.scaling.laws import FloatArray
from megamup.scaling.runs import Ladder, Point

if TYPE_CHECKING:
    from matplotlib.axes import Axes

NAMED = 6
"""Runs of the largest Cook's distance, named in the figure."""
LINE_HEIGHT = 0.06
"""Of a name, as a share of the panel's height."""


def residual_drawing(result: Result, held: Sequence[Point], prefix: str) -> Drawing:
    """Measured over the law's response against size, coloured by N; and the fitted runs' by normal quantiles."""
    figure, (left, right) = new_figure(2)
    everyone = with_held(result, held)
    size, size_is = sizes_of(everyone, result.law), _size_name(everyone, result)
    percent = 100 * (response_of(everyone, result.law) / result.fit.at(inputs_of(everyone, result.law)) - 1)
    n = len(result.ladder)
    log_scale(left, "x")
    left.axhline(0, color=MUTED, lw=1)
    if all("N" in point.inputs for point in result.ladder.points):
        shaded_points(left, size[:n], percent[:n], "N", result.ladder.columns(["N"])[:, 0])
    else:
        left.plot(size[:n], percent[:n], "o", color=FITTED, ms=5.5, label="fitted runs")
    if held:
        left.plot(size[n:], percent[n:], "D", color=HELD, ms=6.5, label="held-out runs")
    left.margins(x=0.08, y=0.15)
    name_axes(left, axis_label(size_is, result.ladder.convention), "measured over fitted, less 1 (%)")
    add_legend(left, below=True)
    quantiles = norm.ppf((np.arange(n) + 0.5) / n)
    right.plot(quantiles, float(np.std(percent[:n])) * quantiles, color=MUTED, lw=1, label="a normal distribution's")
    right.plot(quantiles, np.sort(percent[:n]), "o", color=FITTED, ms=4.5, label="fitted runs")
    name_axes(right, "normal quantile", "")
    add_legend(right, below=True)
    caption = (
        "Left: a pattern along x, or among the sizes, says that the law bends otherwise than the runs. Right: points "
        "off the line at its ends are outliers, which least squares follows and Huber's loss doesn't."
    )
    numbers = {"size": size, "size_is": size_is, "residual_percent": percent, "held_out": np.arange(len(size)) >= n}
    return Drawing(f"{prefix}-residuals", "Residuals", caption, figure, plain(numbers))


def influence_drawing(result: Result, found: Influence, names: Sequence[str], prefix: str) -> Drawing:
    """Studentised residual against leverage, the marker's area by Cook's distance."""
    figure, (axes,) = new_figure()
    cook = np.nan_to_num(found.cook)
    axes.axhline(0, color=MUTED, lw=1)
    large = cook > LARGE_COOK
    for rows, color, label in ((~large, FITTED, "runs"), (large, HELD, f"Cook's distance above {LARGE_COOK:g}")):
        if rows.any():
            area = 18 + 120 * cook[rows] / max(float(cook.max()), 1e-300)
            x, y = found.leverage[rows], np.nan_to_num(found.studentised[rows])
            axes.scatter(x, y, s=area, c=color, alpha=0.75, lw=0, label=label)
    axes.margins(x=0.12, y=0.15)
    _name_largest(axes, found, cook, names)
    name_axes(axes, "leverage", "studentised residual")
    if large.any():
        add_legend(axes)
    caption = (
        "Leverage is the run's part in the fit of its own loss, the residual that from the law fitted without it, in "
        "standard errors; the area is Cook's distance. Named are runs of the largest, as far as there is room."
    )
    listed = [
        {"run": name, "leverage": h, "studentised": t, "cook": c, "prediction_shift": p, "parameter_shifts": q}
        for name, h, t, c, p, q in zip(
            names,
            found.leverage,
            found.studentised,
            found.cook,
            found.prediction_shifts,
            found.parameter_shifts,
            strict=True,
        )
    ]
    numbers = {"parameters": result.law.parameters, "runs": listed}
    return Drawing(f"{prefix}-influence", "Influence of each run", caption, figure, plain(numbers))


def _name_largest(axes: Axes, found: Influence, cook: FloatArray, names: Sequence[str]) -> None:
    """Names towards the panel's middle, but for those that would cover one of a larger distance."""
    taken: list[float] = []
    low, high = axes.get_ylim()
    for i in np.argsort(-cook)[:NAMED]:
        x, y = float(found.leverage[i]), float(np.nan_to_num(found.studentised[i]))
        right = x > sum(axes.get_xlim()) / 2
        if any(abs(y - other) < LINE_HEIGHT * (high - low) for other in taken):
            continue
        taken.append(y)
        place, ha = ((-7, 5), "right") if right else ((7, 5), "left")
        text = axes.annotate(
            names[i], (x, y), xytext=place, textcoords="offset points", ha=ha, fontsize=SMALL, color=INK
        )
        text.set_parse_math(False)


def _size_name(ladder: Ladder, result: Result) -> str:
    """What `sizes_of` gives."""
    known = set.intersection(*(set(point.inputs) for point in ladder.points))
    return "C" if "C" in known else "N·D" if {"N", "D"} <= known else result.law.inputs[0]
