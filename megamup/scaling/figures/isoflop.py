"""Approach 2: the runs of each budget by size, the parabolas through them, and their vertices."""

from __future__ import annotations

import math

import numpy as np
from scipy.stats import t as student

from megamup.page import INK
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
from megamup.scaling.isoflop import Budget, IsoFlop
from megamup.scaling.parabola import NEEDED
from megamup.scaling.uncertainty import LEVEL

LINE_POINTS = 60
NAMED = 8
"""Budgets that are named one by one; of more, some are."""


def isoflop_drawing(found: IsoFlop) -> Drawing:
    """Loss against N, one parabola a budget; the vertex is a star with its interval, hollow where it is no optimum."""
    figure, (axes,) = new_figure()
    log_scale(axes, "x")
    colors = shades([budget.flops for budget in found.budgets])
    named = set(np.linspace(0, len(colors) - 1, min(NAMED, len(colors))).round().astype(int).tolist())
    rows = []
    for i, (budget, color) in enumerate(zip(found.budgets, colors, strict=True)):
        label = f"C = {budget.flops:.3g}" if i in named else None
        axes.plot(budget.parameters, budget.loss, "o", color=color, ms=5, label=label)
        parabola, (low, high) = budget.parabola, vertex_interval(budget)
        if math.isfinite(parabola.vertex):
            ends = [budget.parameters.min(), budget.parameters.max()]
            x = np.geomspace(ends[0] / 1.1, ends[1] * 1.1, LINE_POINTS)
            axes.plot(x, parabola.at(x), color=color, lw=1.2)
        if not parabola.fault:
            axes.plot(parabola.vertex, parabola.value, "*", color=INK, ms=10, zorder=4)
            if low is not None and high is not None:
                within = np.clip([low, high], budget.parameters.min() / 2, budget.parameters.max() * 2)
                axes.hlines(parabola.value, *within, color=INK, lw=1.4, zorder=4)
        rows.append(
            {
                "C": budget.flops,
                "N": budget.parameters,
                "loss": budget.loss,
                "N_opt": parabola.vertex,
                "low": low,
                "high": high,
                "loss_at_vertex": parabola.value,
                "curvature": parabola.curvature,
                "D_opt": budget.tokens,
                "left_out": parabola.fault or None,
            }
        )
    axes.plot([], [], "*", color=INK, ms=10, lw=0, label="best N, 95%")
    name_axes(axes, axis_label("N", found.ladder.convention), axis_label("L", {}))
    add_legend(axes)
    left = len(found.budgets) - len(found.ladder)
    out = f" {left} of {len(found.budgets)} budgets have no optimum between their runs and no star." if left else ""
    caption = (
        f"Runs of the same compute, and a parabola in log N for each budget (Hoffmann et al. 2022, approach 2).{out}"
    )
    return Drawing("isoflop", "IsoFLOP curves", caption, figure, plain({"budgets": rows}))


def vertex_interval(budget: Budget) -> tuple[float | None, float | None]:
    """95% interval of the best N by the delta method in its log; None where no point is left to tell the noise."""
    std, freedom = budget.parabola.vertex_log_std, len(budget.parameters) - NEEDED
    if std is None or budget.parabola.fault:
        return None, None
    reach = math.exp(min(float(student.ppf((1 + LEVEL) / 2, freedom)) * std, 700))
    return budget.parabola.vertex / reach, budget.parabola.vertex * reach
