"""A coordinate check drawn: the size of every module's change against width, as PNG and as a page."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from datetime import date
from platform import machine, python_version
from typing import TYPE_CHECKING

import numpy as np

from megamup.experiments.coord_check import Check, Slopes, shown
from megamup.page import HELD, INK, MUTED, dress, figure_section, page, table_section

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLUMNS = 5
PANEL = (2.3, 1.75)  # inches


def figure(check: Check) -> Figure:
    """One panel a module: RMS of the change on size, a line a step; what isn't flat has its title in red."""
    from matplotlib.figure import Figure

    rows = math.ceil(len(check.slopes) / COLUMNS)
    found = Figure(figsize=(PANEL[0] * COLUMNS, PANEL[1] * rows), layout="constrained")
    found.patch.set_alpha(0)
    panels = found.subplots(rows, COLUMNS, sharex=True, squeeze=False).flatten()
    for axes, slopes in zip(panels, check.slopes, strict=False):
        draw(axes, check, slopes)
    for axes in panels[len(check.slopes) :]:
        axes.set_visible(False)
    found.supxlabel(f"{check.axis} (one line a step, from light to dark)", color=INK, fontsize=10)
    found.supylabel("RMS of the change since initialization", color=INK, fontsize=10)
    return found


def draw(axes: Axes, check: Check, slopes: Slopes) -> None:
    from matplotlib import colormaps
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter, NullLocator

    dress(axes, slopes.module)
    outside = "change" in slopes.outside(check.tolerance)
    axes.set_title(f"{slopes.module}  {shown(slopes.change[-1])}", fontsize=7.5, color=HELD if outside else INK)
    steps = len(slopes.change)
    for step in range(1, steps):
        values = [check.rms[size][slopes.module][step][1] or math.nan for size in check.sizes]
        shade = colormaps["viridis"](0.85 - 0.6 * step / max(steps - 1, 1))
        axes.plot(check.sizes, values, "o-", color=shade, lw=1, ms=2)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.xaxis.set_major_locator(FixedLocator([check.sizes[0], check.sizes[-1]]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda size, _: f"{size:g}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.tick_params(labelsize=7, color=MUTED)
    low, high = axes.get_ylim()
    middle = math.sqrt(low * high)
    if np.isfinite(middle) and high / low < 100:  # the same two decades everywhere, so that flat looks flat
        axes.set_ylim(middle / 10, middle * 10)


def html(check: Check) -> str:
    """The page as one HTML document: verdict, figure, slopes."""
    config, axis = check.config, check.axis
    verdict = "flat" if check.flat else "not flat"
    lead = (
        f"<p class='lead'><strong>{verdict}</strong>: {config.model.arch}, {config.mup.parametrization}, "
        f"{config.parallel.label}, "
        f"{axis} {', '.join(map(str, check.sizes))}, {check.seeds} seed(s), tolerance {check.tolerance:g}.</p>"
    )
    caption = f"Each panel spans two decades or more; the figure in its title is the last step's slope on log {axis}."
    header = ("module", "output at init", "change at the last step", *map(str, check.sizes), "verdict")
    where = {"date": str(date.today()), "machine": f"{machine()}, {os.cpu_count()} cores", "python": python_version()}
    return page(
        f"Coordinate check over {axis}",
        [
            lead,
            figure_section(figure(check), "coordinates", "Change of every module's output", caption),
            table_section(f"Slopes, and the change's RMS at each {axis}", header, list(rows(check))),
            table_section("Environment", ("what", "value"), list(where.items())),
        ],
    )


def rows(check: Check) -> Iterator[tuple[str, ...]]:
    for slopes in check.slopes:
        init = shown(slopes.rms[0]) if slopes.judged_at_init else f"({shown(slopes.rms[0])})"
        change = shown(slopes.change[-1]) if slopes.judged_change != "no" else f"({shown(slopes.change[-1])})"
        sizes = (f"{check.rms[size][slopes.module][-1][1]:.3g}" for size in check.sizes)
        wrong = slopes.outside(check.tolerance)
        yield slopes.module, init, change, *sizes, f"{' and '.join(wrong)} not flat" if wrong else "flat"
