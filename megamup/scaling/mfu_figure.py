"""MFU over time drawn, one panel a run, and the page around it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING

import numpy as np

from megamup.page import FITTED, HELD, INK, MUTED, dress, figure_section, page, table_section
from megamup.scaling.mfu import FloatArray, Intervals, Utilisation, lost_rows, notes, table_rows

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PANELS = 12
PANELS_A_ROW = 3
FIGURE_WIDTH, ROW_HEIGHT = 8.4, 2.6  # inches
CURVE_POINTS = 300
STALLS_SHOWN = 20
TITLE_LENGTH = 36


def mfu_figure(runs: Sequence[Utilisation]) -> Figure:
    """MFU against hours (or minutes), a panel for each of the first `PANELS` runs; stalls shaded, restarts dotted."""
    from matplotlib.figure import Figure

    shown = runs[:PANELS]
    long = max(float(run.intervals.end_s[-1]) for run in shown) >= 3600
    unit, seconds = ("hours", 3600) if long else ("minutes", 60)
    columns = min(len(shown), PANELS_A_ROW)
    n_rows = math.ceil(len(shown) / columns)
    figure = Figure(figsize=(FIGURE_WIDTH, ROW_HEIGHT * n_rows + 0.8), layout="constrained")
    figure.patch.set_alpha(0)
    panels = figure.subplots(n_rows, columns, sharey=True, squeeze=False).flatten()
    for axes, run in zip(panels, shown, strict=False):
        dress(axes, run.name if len(run.name) <= TITLE_LENGTH else f"…{run.name[1 - TITLE_LENGTH :]}")
        axes.title.set_fontsize(8.5)
        _draw_run(axes, run, seconds)
    for axes in panels[len(shown) :]:
        axes.set_visible(False)
    panels[0].set_ylim(bottom=0)
    without = [run for run in shown if run.wall_s is None]
    label = f"{unit} of training steps" if len(without) == len(shown) else f"{unit} since the first start"
    if without and len(without) < len(shown):
        label += f" (of training steps: {', '.join(run.name for run in without)})"
    figure.supxlabel(label, color=INK, fontsize=10).set_parse_math(False)
    figure.supylabel("MFU (%)", color=INK, fontsize=10)
    _add_legend(figure, shown)
    return figure


def mfu_page(runs: Sequence[Utilisation], command: str = "") -> str:
    """The page as one HTML document without any outside file, script or font.

    Args:
        command: what made the page, for its provenance.
    """
    caption = (
        "Model FLOPs over what the devices could have done (PaLM's convention), evaluation and saving aside; dashed is "
        "the mean. Shaded: stalls, where tokens came at less than half the run's median speed."
    )
    if len(runs) > PANELS:
        caption += f" The first {PANELS} of {len(runs)} runs."
    header, *rows = table_rows(runs)
    lost_header, *lost = lost_rows(runs)
    sections = [
        figure_section(mfu_figure(runs), "mfu", "MFU over time", caption),
        table_section("Runs", header, rows),
        table_section("Where the wall time went", lost_header, lost),
        _stall_section(runs),
        table_section("What the figures rest on", ("run", "basis"), notes(runs)),
    ]
    if command:
        sections.append(f"<p class='lead'>Made by <code>{escape(command)}</code></p>")
    return page("Utilization", sections)


def _stall_section(runs: Sequence[Utilisation]) -> str:
    """The longest stalls of all runs; nothing where there are none."""
    found = [(run, stall) for run in runs for stall in run.stalls]
    if not found:
        return ""
    longest = sorted(found, key=lambda pair: pair[1].begin_s - pair[1].end_s)[:STALLS_SHOWN]
    title = "Stalls" if len(found) <= STALLS_SHOWN else f"The {STALLS_SHOWN} longest of {len(found)} stalls"
    rows = [
        (
            run.name,
            f"{stall.first_step} to {stall.last_step}",
            f"{stall.begin_s / 3600:.4f}",
            f"{stall.end_s - stall.begin_s:.3g}",
            f"{stall.tokens_per_s:,.0f}",
            f"{run.median_tokens_per_s:,.0f}",
        )
        for run, stall in longest
    ]
    header = ("run", "steps", "begins at hour", "seconds", "tokens/s while stepping", "median tokens/s")
    return table_section(title, header, rows)


def _draw_run(axes: Axes, run: Utilisation, unit: float) -> None:
    """One panel, with time in units of so many seconds."""
    time_s, mfu = _thinned(run.intervals)
    axes.plot(time_s / unit, mfu, color=FITTED, lw=1.2)
    axes.axhline(run.mfu_percent, color=MUTED, lw=1, ls=(0, (5, 4)))
    for stall in run.stalls:
        axes.axvspan(stall.begin_s / unit, stall.end_s / unit, color=HELD, alpha=0.25, lw=0)
    for start in run.starts_s[1:]:
        axes.axvline(start / unit, color=HELD, lw=1, ls=":")


def _thinned(at: Intervals) -> tuple[FloatArray, FloatArray]:
    """A line of some `CURVE_POINTS` levels, each the mean of intervals in a row; broken where nothing ran."""
    time_s, mfu = list[float](), list[float]()
    restarted = np.flatnonzero(at.begin_s[1:] > at.end_s[:-1]) + 1
    for session in np.split(np.arange(len(at.step)), restarted):
        for b in np.array_split(session, min(math.ceil(CURVE_POINTS * len(session) / len(at.step)), len(session))):
            time_s += [float(at.begin_s[b[0]]), float(at.end_s[b[-1]])]
            mfu += [float(np.average(at.mfu_percent[b], weights=at.trained_s[b]))] * 2
        time_s.append(math.nan)
        mfu.append(math.nan)
    return np.array(time_s[:-1]), np.array(mfu[:-1])


def _add_legend(figure: Figure, runs: Sequence[Utilisation]) -> None:
    """Below the panels: what the marks mean, where they occur."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles: list[Line2D | Patch] = [Line2D([], [], color=MUTED, lw=1, ls=(0, (5, 4)), label="mean")]
    if any(run.stalls for run in runs):
        handles.append(Patch(color=HELD, alpha=0.25, lw=0, label="stall"))
    if any(run.restarts for run in runs):
        handles.append(Line2D([], [], color=HELD, lw=1, ls=":", label="restart"))
    figure.legend(
        handles=handles, loc="outside upper right", ncols=len(handles), frameon=False, labelcolor=INK, fontsize=8.5
    )
