"""A transfer experiment drawn: U-curves side by side, as PNG and as a page."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from megamup.experiments.transfer import Conclusion, Curve, Group, Transfer, header, number, rows, sentence
from megamup.page import INK, MUTED, dress, figure_section, page, table_section

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Color = tuple[float, float, float, float]

PANELS_A_ROW = 3
FIGURE_WIDTH, ROW_HEIGHT = 8.4, 3.9  # inches
PIXELS_AN_INCH = 150
CROSS_STEP = 0.04
"""Crosses of different sizes at one rate stand below each other, this share of the axis apart."""


def figure(transfer: Transfer, path_png: str | Path) -> None:
    """Write the U-curves as a PNG of 1260 pixels, on white."""
    draw(transfer).savefig(path_png, dpi=PIXELS_AN_INCH, facecolor="white")


def html(
    transfers: Sequence[Transfer],
    title: str,
    environment: Mapping[str, str],
    conclusions: Sequence[Conclusion] = (),
) -> str:
    """The page as one HTML document without any outside file, script or font.

    Args:
        environment: what the runs rest on (versions, machine, date, command), shown as it is.
        conclusions: claims that the experiments were to test, shown first.
    """
    body = []
    if conclusions:
        verdicts = {True: "holds", False: "does not hold", None: "not known"}
        found = [(c.claim, "–" if c.value is None else f"{c.value:.4g}", verdicts[c.holds]) for c in conclusions]
        body.append(table_section("Claims", ("claim", "value", "verdict"), found))
    for position, transfer in enumerate(transfers):
        caption = "Loss against the base learning rate, one line a size. Parts far above the rest leave the axis."
        body.append(figure_section(draw(transfer), f"transfer{position}", f"Transfer over {transfer.axis}", caption))
        for group in transfer.groups:
            body.append(f"<p>{escape(sentence(transfer, group))}</p>")
            body.append(table_section(f"{group.name} over {transfer.axis}", header(transfer), list(rows(group))))
    if environment:
        body.append(table_section("Environment", ("what", "value"), list(environment.items())))
    return page(title, body)


def draw(transfer: Transfer) -> Figure:
    """One panel a group, all on the same axes."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    columns = min(len(transfer.groups), PANELS_A_ROW)
    n_rows = math.ceil(len(transfer.groups) / columns)
    found = Figure(figsize=(FIGURE_WIDTH, ROW_HEIGHT * n_rows), layout="constrained")
    found.patch.set_alpha(0)
    panels = found.subplots(n_rows, columns, sharex=True, sharey=True, squeeze=False).flatten()
    sizes = sorted({curve.size for group in transfer.groups for curve in group.curves})
    # The middle of the map reads on white and on black.
    shades = np.linspace(0.82, 0.25, len(sizes))
    colors: dict[float, Color] = {
        size: colormaps["viridis"](float(shade)) for size, shade in zip(sizes, shades, strict=True)
    }
    for axes, group in zip(panels, transfer.groups, strict=False):
        dress(axes, group.name)
        for curve in group.curves:
            plot_curve(axes, curve, colors[curve.size], 0.97 - CROSS_STEP * sizes.index(curve.size))
    for axes in panels[len(transfer.groups) :]:
        axes.set_visible(False)
    limit(panels[0], transfer.groups)
    label_rates(panels[0], transfer.groups, columns)
    found.supxlabel("base learning rate", color=INK, fontsize=10)
    found.supylabel("validation loss (nats per token)", color=INK, fontsize=10)
    add_legend(found, transfer, colors)
    return found


def plot_curve(axes: Axes, curve: Curve, color: Color, cross: float) -> None:
    """The line, its optimum (hollow at the best rate where it is not known), and crosses where a run diverged."""
    rates, losses = [point.rate for point in curve.points], [point.loss for point in curve.points]
    line = [loss if math.isfinite(loss) else math.nan for loss in losses]
    axes.plot(rates, line, "o-", color=color, lw=1.4, ms=3)
    if curve.optimum:
        axes.plot(curve.optimum.rate, curve.optimum.loss, "D", color=color, ms=7, zorder=3)
    elif curve.best:
        axes.plot(curve.best.rate, curve.best.loss, "D", color=color, ms=7, fillstyle="none", mew=1.5, zorder=3)
    crosses = [rate for rate, loss in zip(rates, losses, strict=True) if math.isinf(loss)]
    axes.plot(crosses, [cross] * len(crosses), "x", color=color, ms=6, mew=1.5, transform=axes.get_xaxis_transform())


def limit(axes: Axes, groups: Sequence[Group]) -> None:
    """Frame the bottoms of the curves: a loss near log(vocabulary) would flatten them all."""
    points = [point for group in groups for curve in group.curves for point in curve.points]
    losses = [point.loss for point in points if math.isfinite(point.loss)]
    if not losses or max(losses) == min(losses):
        return
    low, high = min(losses), max(losses)
    high = min(high, low + 4 * (float(np.median(losses)) - low)) if np.median(losses) > low else high
    crosses = max(len(group.curves) for group in groups) if len(losses) < len(points) else 0
    span = (high - low) / (0.9 - CROSS_STEP * crosses)
    axes.set_ylim(low - 0.06 * span, low + 0.94 * span)


def label_rates(axes: Axes, groups: Sequence[Group], columns: int) -> None:
    """A log2 axis whose ticks are rates that were run, as many as have room."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    rates = sorted({point.rate for group in groups for curve in group.curves for point in curve.points})
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(rates[:: math.ceil(len(rates) / (14 // columns))]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda rate, _: f"{rate:.2g}"))
    axes.xaxis.set_minor_locator(NullLocator())


def add_legend(found: Figure, transfer: Transfer, colors: Mapping[float, Color]) -> None:
    """Beside the panels: a line a size, and what the marks mean where they occur."""
    from matplotlib.lines import Line2D

    curves = [curve for group in transfer.groups for curve in group.curves]
    handles = [Line2D([], [], color=color, marker="o", ms=3, label=number(size)) for size, color in colors.items()]
    diverged = any(point.diverged for curve in curves for point in curve.points)
    for occurs, marker, face, label in (
        (any(curve.optimum for curve in curves), "D", MUTED, "optimum"),
        (any(curve.best and not curve.optimum for curve in curves), "D", "none", "best, at an edge"),
        (diverged, "x", MUTED, "diverged"),
    ):
        if occurs:
            handles.append(Line2D([], [], ls="none", color=MUTED, marker=marker, mfc=face, mew=1.5, label=label))
    legend = found.legend(
        handles=handles, title=transfer.axis, loc="outside right upper", frameon=False, labelcolor=INK, fontsize=8.5
    )
    legend.get_title().set_color(INK)
