"""Compute-optimal models: N_opt and D_opt by compute from every approach, and the loss over N and D."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from megamup.page import FITTED, HELD, INK, MUTED
from megamup.scaling.analysis import Result
from megamup.scaling.envelope import Envelope
from megamup.scaling.estimate import flops_per_product
from megamup.scaling.figures.drawing import (
    SMALL,
    Drawing,
    add_legend,
    axis_label,
    log_range,
    log_scale,
    name_axes,
    new_figure,
    plain,
    shades,
)
from megamup.scaling.figures.isoflop import vertex_interval
from megamup.scaling.isoflop import IsoFlop
from megamup.scaling.laws import FloatArray
from megamup.scaling.laws.frontier import FLOPS_PER_PARAMETER_AND_TOKEN
from megamup.scaling.uncertainty import quantity_intervals, quantity_values

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PUBLISHED = {
    "N": {"Kaplan et al. 2020": 0.73, "Hoffmann et al. 2022": 0.50},
    "D": {"Kaplan et al. 2020": 0.27, "Hoffmann et al. 2022": 0.50},
}
"""Slopes of log N_opt and log D_opt by log C: Kaplan et al., eq. 1.7 and 6.2; Hoffmann et al., table 2."""
STYLES = ((FITTED, "-"), (INK, (0, (6, 3))), (FITTED, (0, (2, 2))))
"""Of the laws of N and D."""
LINE_POINTS = 8
"""Budgets at which the intervals of N_opt are computed."""
FINE_POINTS = 60
ENVELOPE_SHOWN = 60
GRID_POINTS = 80
LEVELS = 9


def has_frontier(result: Result) -> bool:
    """Whether the law has an optimal N and D at a budget."""
    return {"N_opt", "D_opt"} <= result.law.quantities({"C": 1.0}).keys()


def optimum_drawing(
    results: Sequence[Result], envelope: Envelope | None, isoflop: IsoFlop | None, budgets: Sequence[float] = ()
) -> Drawing | None:
    """N_opt and D_opt against C from approaches 1, 2 and 3, beside published slopes; None where nothing tells them."""
    parametric = [result for result in results if has_frontier(result)]
    lines = [result for result in results if result.law.response in ("N", "D") and result.law.inputs == ("C",)]
    if not parametric and not lines and envelope is None and isoflop is None:
        return None
    figure, panels = new_figure(2, (8.4, 4.6))
    known = [float(c) for r in parametric for c in _budgets(r) * flops_per_product(r) / FLOPS_PER_PARAMETER_AND_TOKEN]
    known += [float(c) for result in lines for c in result.fit.inputs[:, 0]]
    known += [p.inputs["C"] for found in (envelope, isoflop) if found is not None for p in found.ladder.points]
    flops = np.geomspace(*log_range([*known, *budgets]), LINE_POINTS)
    numbers: dict[str, Any] = {"C": flops}
    intervals = [_best_sizes(result, flops) for result in parametric]
    for axes, key in zip(panels, ("N", "D"), strict=True):
        log_scale(axes, "xy")
        drawn: dict[str, Any] = {}
        if envelope is not None:
            drawn["approach 1"] = _draw_envelope(axes, envelope, key)
        if isoflop is not None:
            drawn["approach 2"] = _draw_vertices(axes, isoflop, key)
        for result in lines:
            if result.law.response == key:
                drawn[f"{key}_opt = a·C^b"] = _draw_power(axes, result, flops)
        for i, (result, of_n) in enumerate(zip(parametric, intervals, strict=True)):
            style = STYLES[i % len(STYLES)]
            drawn[f"approach 3: {result.law.name}"] = _draw_parametric(axes, result, key, flops, of_n, style)
        _draw_slopes(axes, key, flops)
        name_axes(axes, axis_label("C", {}), axis_label(key, {}).replace(key, f"{key}_opt", 1))
        numbers[f"{key}_opt"] = drawn
    handles: dict[str, Any] = {}
    for axes in panels:
        handles |= {label: handle for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    legend = figure.legend(
        list(handles.values()),
        list(handles),
        loc="outside lower center",
        ncols=2,
        frameon=False,
        labelcolor=INK,
        fontsize=SMALL,
    )
    for text in legend.get_texts():
        text.set_parse_math(False)
    caption = (
        "The best model and data at each budget, in FLOPs as the runs count them; a law of N and D takes these as "
        "proportional to N·D. Bands and bars are 95% intervals of the optimum. Published slopes are drawn through the "
        "middle, for comparison only."
    )
    return Drawing("optimum", "Compute-optimal model and data", caption, figure, plain(numbers))


def contour_drawing(
    result: Result, prefix: str, target: Mapping[str, float] | None = None, budgets: Sequence[float] = ()
) -> Drawing:
    """L(N, D) as contours, the runs, the efficient frontier and lines of equal compute; a star at the target.

    Args:
        target: N and D, or a budget C whose optimum is meant.
    """
    figure, (axes,) = new_figure(size=(8.4, 5.6))
    law, columns = result.law, dict(zip(result.law.inputs, result.fit.inputs.T, strict=True))
    star = _target(result, target)
    reach = [*_budgets(result), *budgets, *([FLOPS_PER_PARAMETER_AND_TOKEN * star[0] * star[1]] if star else [])]
    flops = np.geomspace(*log_range(reach, 1.0), FINE_POINTS)
    best = {key: _at_budgets(result, f"{key}_opt", flops) for key in ("N", "D")}
    inside = {
        key: [*columns[key], best[key][0], best[key][-1], *([star["ND".index(key)]] if star else [])] for key in "ND"
    }
    n, d = (np.geomspace(*log_range(inside[key], 2.0), GRID_POINTS) for key in "ND")
    grid = {"N": np.repeat(n, len(d)), "D": np.tile(d, len(n))}
    loss = result.fit.at(np.stack([grid[key] for key in law.inputs], axis=-1)).reshape(len(n), len(d))
    levels = _levels(loss)
    log_scale(axes, "xy")
    lines = axes.contour(
        n, d, loss.T, levels=levels, colors=shades(1 / (levels - levels.min() + np.ptp(levels) / 10)), linewidths=1.1
    )
    for text in axes.clabel(lines, fmt="%.3g", fontsize=SMALL):
        text.set_color(INK)
    for i, budget in enumerate(budgets or np.geomspace(flops[0], flops[-1], 4)):
        label = "equal compute, 6·N·D" if i == 0 else None
        axes.plot(n, budget / FLOPS_PER_PARAMETER_AND_TOKEN / n, color=MUTED, lw=0.9, ls=":", label=label)
    axes.plot(best["N"], best["D"], color=INK, lw=1.8, ls=(0, (6, 3)), label="efficient frontier")
    axes.plot(columns["N"], columns["D"], "o", color=FITTED, ms=5, label="fitted runs")
    if star:
        axes.plot(*star, "*", color=HELD, ms=15, label="target")
    axes.set(xlim=(n[0], n[-1]), ylim=(d[0], d[-1]))
    name_axes(axes, axis_label("N", result.ladder.convention), axis_label("D", {}))
    add_legend(axes, below=True)
    caption = (
        f"Lines of equal loss of {law.formula}. No other model reaches a lower loss than the frontier's at its compute."
    )
    numbers = {"levels": levels, "frontier": {"C": flops, "N_opt": best["N"], "D_opt": best["D"]}, "target": star}
    return Drawing(f"{prefix}-contours", "Loss over model and data", caption, figure, plain(numbers))


def _budgets(result: Result) -> FloatArray:
    """6·N·D of the fitted points: (n,)."""
    columns = dict(zip(result.law.inputs, result.fit.inputs.T, strict=True))
    return np.asarray(FLOPS_PER_PARAMETER_AND_TOKEN * columns["N"] * columns["D"])


def _at_budgets(result: Result, name: str, flops: FloatArray) -> FloatArray:
    """A quantity of the law at each budget: (m,)."""
    quantities = {str(i): result.law.quantities({"C": float(c)})[name] for i, c in enumerate(flops)}
    return np.array(list(quantity_values(result.fit, quantities).values()))


def _target(result: Result, target: Mapping[str, float] | None) -> tuple[float, float] | None:
    """N and D of the target."""
    if target is None:
        return None
    if {"N", "D"} <= target.keys():
        return target["N"], target["D"]
    if "C" not in target:
        return None
    n, d = (float(_at_budgets(result, name, np.array([target["C"]]))[0]) for name in ("N_opt", "D_opt"))
    return n, d


def _levels(loss: FloatArray) -> FloatArray:
    """Losses that contours are drawn at: even in the log of the loss above its least, so that lines are even, too."""
    low, high = float(loss.min()), float(loss.max())
    floor = low - 0.05 * (high - low)
    return np.asarray(floor + np.geomspace(low - floor, high - floor, LEVELS + 2)[1:-1])


def _draw_envelope(axes: Axes, envelope: Envelope, key: str) -> dict[str, Any]:
    columns = envelope.ladder.columns(["C", key])
    shown = columns[np.unique(np.linspace(0, len(columns) - 1, ENVELOPE_SHOWN).astype(int))]
    axes.plot(shown[:, 0], shown[:, 1], ".", color=MUTED, ms=5, label="approach 1: envelope")
    return {"C": shown[:, 0], key: shown[:, 1]}


def _draw_vertices(axes: Axes, isoflop: IsoFlop, key: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for budget in (budget for budget in isoflop.budgets if not budget.parabola.fault):
        low, high = vertex_interval(budget)
        value = budget.parabola.vertex
        if key == "D":  # of one budget, N·D is given
            product = budget.tokens * value
            value = budget.tokens
            low, high = (None if end is None else product / end for end in (high, low))
        label = "approach 2: IsoFLOP" if not rows else None
        axes.plot(budget.flops, value, "D", color=HELD, ms=6, label=label, zorder=4)
        if low is not None and high is not None:
            axes.vlines(budget.flops, low, high, color=HELD, lw=1.3, zorder=4)
        rows.append({"C": budget.flops, key: value, "low": low, "high": high})
    return rows


def _draw_power(axes: Axes, result: Result, flops: FloatArray) -> dict[str, Any]:
    """The pure power through the optima of approach 1 or 2."""
    value, slope = result.fit.at(flops[:, np.newaxis]), result.fit.parameters["b"]
    low, high = result.intervals["b"]
    axes.plot(flops, value, color=HELD, lw=1.2, label="its power law")
    axes.annotate(
        f"{result.law.response}_opt ∝ C^{slope:.3f}",
        (0.03, 0.95),
        xycoords="axes fraction",
        color=INK,
        fontsize=SMALL,
        va="top",
    )
    return {result.law.response: value, "slope": slope, "slope_low": low, "slope_high": high}


def _best_sizes(result: Result, flops: FloatArray) -> FloatArray:
    """N_opt at each budget, in the runs' own FLOPs, and the ends of its interval, NaN where open: (3, m)."""
    budgets = flops * FLOPS_PER_PARAMETER_AND_TOKEN / flops_per_product(result)
    quantities = {str(i): result.law.quantities({"C": float(c)})["N_opt"] for i, c in enumerate(budgets)}
    return np.array(list(quantity_intervals(result.fit, quantities).values()), dtype=np.float64).T


def _draw_parametric(
    axes: Axes, result: Result, key: str, flops: FloatArray, best_sizes: FloatArray, style: tuple[str, Any]
) -> dict[str, Any]:
    """The optimum of a law of N and D, with its interval where it has one."""
    value, low, high = best_sizes
    if key == "D":  # of a budget, N·D is given
        value, high, low = flops / flops_per_product(result) / best_sizes
    color, dashes = style
    axes.plot(flops, value, color=color, lw=1.6, ls=dashes, label=f"approach 3: {result.law.name}")
    axes.fill_between(flops, low, high, color=color, alpha=0.13, lw=0)
    return {key: value, "low": low, "high": high}


def _draw_slopes(axes: Axes, key: str, flops: FloatArray) -> None:
    """Published slopes through the middle of what is drawn, which keeps its axes."""
    limits = axes.get_ylim()
    last = axes.get_lines()[-1]
    middle = [float(np.log(np.asarray(data, dtype=np.float64)).mean()) for data in last.get_data()]
    for (source, slope), style in zip(PUBLISHED[key].items(), ("--", ":"), strict=True):
        value = np.exp(middle[1] + slope * (np.log(flops) - middle[0]))
        axes.plot(flops, value, color=MUTED, lw=0.9, ls=style, label=f"slope of {source}")
    axes.set_ylim(limits)
