"""The report's figures, drawn by matplotlib as SVG that takes its colours from the page."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from megamup.page import FITTED, GRID, HELD, INK, MUTED
from megamup.scaling.fit_file import Result
from megamup.scaling.laws import FloatArray
from megamup.scaling.runs import Curve, Point
from megamup.scaling.uncertainty import predict

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SIZE = (8.4, 4.2)
BAND_POINTS = 160
CURVE_POINTS = 300

AXIS_LABELS = {
    "C": "C, training compute (FLOPs, convention: {flops})",
    "N": "N, parameters ({parameters})",
}


def axis_label(result: Result) -> str:
    """The law's input with its unit and convention."""
    return AXIS_LABELS[result.x].format(**result.ladder.convention)


def law_figure(result: Result, held: Sequence[Point]) -> "Figure":
    """Loss against x: the points, the law with the prediction interval, and the offset c."""
    figure, axes = _axes(axis_label(result), "loss (nats per token)")
    points = result.ladder.points
    x_all = np.array([point.inputs[result.x] for point in (*points, *held)])
    x = np.geomspace(x_all.min() / 1.5, x_all.max() * 1.5, BAND_POINTS)
    prediction = predict(result.fit, x)
    axes.set_xscale("log")
    axes.plot(x, prediction.loss, color=FITTED, lw=1.6, label=result.fit.law.formula.format(x=result.x))
    if np.all(np.isfinite(prediction.low)):
        axes.fill_between(
            x,
            prediction.low,
            prediction.high,
            color=FITTED,
            alpha=0.16,
            lw=0,
            label="95% interval of one new run",
        )
    _scatter(axes, result, points, FITTED, "o", "fitted runs")
    _scatter(axes, result, held, HELD, "D", "held-out runs")
    losses = np.array([point.loss for point in (*points, *held)])
    _draw_offset(axes, result.fit.parameters["c"], float(losses.min()), float(np.ptp(losses)))
    _legend(axes)
    return figure


def residual_figure(result: Result, held: Sequence[Point]) -> "Figure":
    """Measured over predicted loss, in percent, against x."""
    figure, axes = _axes(axis_label(result), "measured − fitted (%)")
    axes.set_xscale("log")
    axes.axhline(0, color=MUTED, lw=1)
    for points, color, marker, label in (
        (result.ladder.points, FITTED, "o", "fitted runs"),
        (held, HELD, "D", "held-out runs"),
    ):
        if points:
            x = np.array([point.inputs[result.x] for point in points])
            residual = 100 * (np.array([point.loss for point in points]) / result.fit.at(x) - 1)
            axes.vlines(x, 0, residual, color=color, lw=1.2, alpha=0.6)
            axes.plot(x, residual, marker, color=color, ms=6, label=label)
    axes.margins(x=0.08, y=0.2)
    _legend(axes)
    return figure


def curve_figure(curves: Sequence[tuple[str, Curve]], held: Sequence[tuple[str, Curve]]) -> "Figure":
    """Training loss against tokens, one line a run, held-out runs dashed."""
    from matplotlib import colormaps

    figure, axes = _axes("tokens", "training loss (nats per token)")
    axes.set_xscale("log")
    # The middle of the map reads on white and on black.
    colors = colormaps["viridis"](np.linspace(0.35, 0.8, max(len(curves), 1)))
    for color, (name, curve) in zip(colors, curves, strict=False):
        axes.plot(*_thinned(curve), color=color, lw=1.3, label=name)
    for name, curve in held:
        axes.plot(*_thinned(curve), color=HELD, lw=1.3, ls="--", label=f"{name} (held out)")
    columns = 1 + (len(curves) + len(held)) // 12
    _legend(axes, columns, 8)
    return figure


def _axes(x_label: str, y_label: str) -> tuple["Figure", "Axes"]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=SIZE, layout="constrained")
    figure.patch.set_alpha(0)
    axes = figure.add_subplot()
    axes.patch.set_alpha(0)
    axes.set_xlabel(x_label, color=INK)
    axes.set_ylabel(y_label, color=INK)
    axes.xaxis.label.set_parse_math(False)  # so may a table's column
    axes.tick_params(which="both", color=MUTED, labelcolor=INK, length=3)
    axes.grid(color=GRID, lw=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(MUTED)
    return figure, axes


def _legend(axes: "Axes", columns: int = 1, size: float = 10) -> None:
    legend = axes.legend(frameon=False, labelcolor=INK, ncols=columns, fontsize=size)
    for text in legend.get_texts():
        text.set_parse_math(False)  # a run may have $ in its name


def _scatter(axes: "Axes", result: Result, points: Sequence[Point], color: str, marker: str, label: str) -> None:
    if points:
        x = [point.inputs[result.x] for point in points]
        axes.plot(x, [point.loss for point in points], marker, color=color, ms=6.5, label=label, zorder=3)


def _draw_offset(axes: "Axes", offset: float, lowest: float, spread: float) -> None:
    """The offset as a dashed line, or in words where it would flatten the points."""
    if offset > lowest - 1.5 * spread:
        axes.axhline(offset, color=MUTED, lw=1.2, ls=(0, (5, 4)), label=f"offset c = {offset:.4g}")
    else:
        axes.plot([], [], color=MUTED, lw=1.2, ls=(0, (5, 4)), label=f"offset c = {offset:.4g}, below the axis")


def _thinned(curve: Curve) -> tuple[FloatArray, FloatArray]:
    """At most `CURVE_POINTS` points, each the mean of a bin of steps: noise is averaged and not picked."""
    tokens, loss = np.array(curve.tokens), np.array(curve.loss)
    bins = np.array_split(np.arange(len(tokens)), min(CURVE_POINTS, len(tokens)))
    return np.array([tokens[b].mean() for b in bins]), np.array([loss[b].mean() for b in bins])
