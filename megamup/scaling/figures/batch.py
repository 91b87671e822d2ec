"""The critical batch size: B_crit by loss with the law, and steps against examples at each loss."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from megamup.page import FITTED, HELD, INK
from megamup.scaling.analysis import Result
from megamup.scaling.critical_batch import CriticalBatches
from megamup.scaling.figures.drawing import (
    Drawing,
    add_legend,
    axis_label,
    log_scale,
    name_axes,
    new_figure,
    plain,
    shades,
)
from megamup.scaling.laws import FloatArray
from megamup.scaling.laws.base import Quantity
from megamup.scaling.uncertainty import quantity_intervals

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LINE_POINTS = 30


def critical_batch_drawing(found: CriticalBatches, results: Sequence[Result]) -> Drawing:
    """Left: each level's own B_crit and the laws through all. Right: steps and examples, a hyperbola a level."""
    figure, (left, right) = new_figure(2, (8.4, 4.6))
    numbers: dict[str, Any] = {"levels": _draw_levels(left, found), "laws": {}}
    ends = [level.loss for level in found.levels]
    loss = np.geomspace(min(ends) / 1.03, max(ends) * 1.03, LINE_POINTS)
    styles = iter(((FITTED, "-"), (INK, (0, (6, 3)))))
    for result in results:
        if result.law.name in ("critical-batch", "batch-loss"):
            numbers["laws"][result.law.name] = _draw_law(left, result, loss, *next(styles))
    log_scale(left, "y")
    left.invert_xaxis()
    name_axes(left, axis_label("L", {}), "B_crit (tokens)")
    add_legend(left, below=True)
    _draw_hyperbolas(right, found)
    log_scale(right, "xy")
    name_axes(right, "steps S", "examples E = B·S (tokens)")
    add_legend(right, below=True)
    caption = (
        "Left: the batch at which twice the fewest steps and twice the fewest tokens are needed, at each loss alone "
        "(bars: 95%) and by the law. Right: (S/S_min - 1)·(E/E_min - 1) = 1 at each loss (McCandlish et al. 2018), a "
        "point for each batch at its best learning rate."
    )
    return Drawing("critical-batch", "Critical batch size", caption, figure, plain(numbers))


def _draw_levels(axes: Axes, found: CriticalBatches) -> list[dict[str, Any]]:
    rows, labelled = [], False
    for level in found.levels:
        if level.b_crit > 0:
            label = None if labelled else "at each loss alone"
            axes.plot(level.loss, level.b_crit, "D", color=HELD, ms=6, label=label, zorder=3)
            labelled = True
            if level.b_crit_low is not None and level.b_crit_high is not None:
                axes.vlines(level.loss, level.b_crit_low, level.b_crit_high, color=HELD, lw=1.3)
        rows.append(
            {
                "loss": level.loss,
                "B": level.batches,
                "S": level.steps,
                "lr": level.rates,
                "S_min": level.s_min,
                "E_min": level.e_min,
                "B_crit": level.b_crit,
                "low": level.b_crit_low,
                "high": level.b_crit_high,
            }
        )
    return rows


def _draw_law(axes: Axes, result: Result, loss: FloatArray, color: str, style: Any) -> dict[str, Any]:
    """B_crit by the law with the interval of the law itself."""
    law = result.law
    if law.name == "batch-loss":
        quantities = {str(i): _b_crit(result, float(value)) for i, value in enumerate(loss)}
    else:
        quantities = {str(i): law.quantities({"L": float(value)})["B_crit"] for i, value in enumerate(loss)}
    found = list(quantity_intervals(result.fit, quantities).values())
    value, low, high = ([one[i] for one in found] for i in range(3))
    words = {"critical-batch": "law of all steps", "batch-loss": "law of the B_crit alone"}[law.name]
    axes.plot(loss, value, color=color, ls=style, lw=1.5, label=words)  # type: ignore[arg-type]
    if None not in (*low, *high):
        axes.fill_between(loss, low, high, color=color, alpha=0.13, lw=0)  # type: ignore[arg-type]
    return {"loss": loss, "B_crit": value, "low": low, "high": high}


def _b_crit(result: Result, loss: float) -> Quantity:
    """The law `batch-loss` at a loss, as a function of its parameters."""
    return lambda p: np.asarray(result.law.predict(p, np.array([[loss]]))[..., 0])


def _draw_hyperbolas(axes: Axes, found: CriticalBatches) -> None:
    colors = shades([1 / level.loss for level in found.levels])
    for level, color in zip(found.levels, colors, strict=True):
        examples = level.batches * level.steps
        axes.plot(level.steps, examples, "o", color=color, ms=5, label=f"L = {level.loss:.3g}")
        if level.b_crit > 0 and math.isfinite(level.s_min):
            batch = np.geomspace(level.batches.min() / 3, level.batches.max() * 3, LINE_POINTS)
            steps = level.s_min + level.e_min / batch
            axes.plot(steps, batch * steps, color=color, lw=1.2)
