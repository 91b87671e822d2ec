"""What all figures share: axes in the page's colours, labels with units, shades of a ramp, and the files they go to."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import ArrayLike

from megamup.page import INK, RAMP, dress
from megamup.scaling.analysis import Result
from megamup.scaling.laws import FloatArray
from megamup.scaling.runs import Ladder, Point

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SIZE = (8.4, 4.2)  # inches
SMALL = 8.5  # points
RESOLUTION = 160  # dots per inch, of PNG files
LEGEND_INSIDE = 4
"""More entries go beside the axes, where they hide nothing."""

LOG_STEPS = ((1.0,), (1.0, 3.0), (1.0, 2.0, 5.0))
"""Of a log axis, within a decade: the first that give it enough ticks."""
FEWEST_TICKS, MOST_DECADES = 3, 5
PLAIN_FROM, PLAIN_TO = 0.01, 1000.0
"""Ticks between are labelled without a power of ten."""

LABELS = {
    "L": "loss (nats per token)",
    "N": "N, parameters",
    "D": "D, tokens",
    "C": "C, training compute (FLOPs)",
    "S": "S, optimizer steps",
    "B": "B, batch (tokens a step)",
    "U": "U, unique tokens",
    "lr": "learning rate",
    "Cmin": "C_min (FLOPs)",
    "Smin": "S_min, optimizer steps",
    "step": "optimizer steps",
}
COUNTED = {"N": "N, parameters ({})", "C": "C, training compute (FLOPs, convention: {})"}


@dataclass(frozen=True)
class Drawing:
    """One figure with its words, and the numbers that are drawn."""

    name: str
    """Of its files and of its entry among the numbers; unique on a page."""
    title: str
    caption: str
    figure: Figure
    numbers: dict[str, Any]
    """JSON-ready."""


def axis_label(key: str, convention: Mapping[str, str]) -> str:
    """An input (or L) with its unit, and how it was counted where that is known."""
    counted = convention.get({"N": "parameters", "C": "flops"}.get(key, ""), "none")
    if counted != "none" and key in COUNTED:
        return COUNTED[key].format(counted)
    return LABELS.get(key, key)


def new_figure(columns: int = 1, size: tuple[float, float] = SIZE) -> tuple[Figure, list[Axes]]:
    """A figure of panels in a row, transparent and dressed in the page's colours."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    figure.patch.set_alpha(0)
    panels = list(figure.subplots(1, columns, squeeze=False).flatten())
    for axes in panels:
        dress(axes, "")
        axes.tick_params(labelsize=9.5)
    return figure, panels


def name_axes(axes: Axes, x_label: str, y_label: str) -> None:
    """Labels as they are: a table's column may have a $ in its name."""
    for label, text in ((axes.xaxis.label, x_label), (axes.yaxis.label, y_label)):
        label.set(text=text, color=INK, fontsize=10, parse_math=False)


def log_scale(axes: Axes, which: Literal["x", "y", "xy"]) -> None:
    """Log scales whose ticks have room for their labels, also where they span less than a decade."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    class Ticks(LogLocator):
        """Powers of ten; where these are too few, steps between them, in the end even ones."""

        def tick_values(self, vmin: float, vmax: float) -> Any:
            low, high = sorted((vmin, vmax))
            for subs in LOG_STEPS if high < 10**MOST_DECADES * low else ():
                found = np.asarray(LogLocator(subs=subs).tick_values(low, high))
                inside = found[(low <= found) & (found <= high)]
                if len(inside) >= FEWEST_TICKS:
                    return inside
            wide = high >= 10**MOST_DECADES * low
            return super().tick_values(low, high) if wide else MaxNLocator(FEWEST_TICKS).tick_values(low, high)

    for key in which:
        axes.set(**{f"{key}scale": "log"})
        axis = axes.xaxis if key == "x" else axes.yaxis
        axis.set_major_locator(Ticks())
        axis.set_major_formatter(FuncFormatter(lambda value, _: log_label(value)))
        axis.set_minor_formatter(NullFormatter())


def log_label(value: float) -> str:
    """A tick's label: 20, 10^12 or 5·10^12, in mathtext where a power is in it."""
    if value <= 0:
        return ""
    if PLAIN_FROM <= value < PLAIN_TO:
        return f"{value:.4g}"
    digits, power = f"{value:.3e}".split("e")
    factor = float(digits)
    return rf"$\mathdefault{{{'' if factor == 1 else f'{factor:g}·'}10^{{{int(power)}}}}}$"


def add_legend(axes: Axes, *, below: bool = False) -> None:
    """A legend where it hides nothing, below a panel that shares its row; none where nothing has a label."""
    handles, labels = axes.get_legend_handles_labels()
    if not handles:
        return
    place: dict[str, Any] = {"loc": "best"}
    if below:
        place = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.14), "ncols": 2}
    elif len(handles) > LEGEND_INSIDE:
        place = {"loc": "upper left", "bbox_to_anchor": (1.0, 1.0)}
    legend = axes.legend(handles, labels, frameon=False, labelcolor=INK, fontsize=SMALL, **place)
    for text in legend.get_texts():
        text.set_parse_math(False)  # a run may have $ in its name


def shades(values: ArrayLike) -> list[str]:
    """A colour for each value > 0, by its log between the least and the largest: (n,)."""
    logs = np.log(np.asarray(values, dtype=np.float64))
    spread = float(np.ptp(logs)) if logs.size else 0.0
    place = (logs - logs.min()) / spread if spread > 0 else np.zeros_like(logs)
    return [RAMP[round(float(p) * (len(RAMP) - 1))] for p in place]


def shaded_points(axes: Axes, x: FloatArray, y: FloatArray, key: str, values: FloatArray) -> None:
    """Points coloured by the log of `values` (n,), with at most a handful of them in the legend."""
    axes.scatter(x, y, s=26, c=shades(values), lw=0, zorder=3)
    order = np.argsort(values, kind="stable")
    ends = sorted({int(order[round(p)]) for p in np.linspace(0, len(order) - 1, 5)}, key=lambda i: float(values[i]))
    seen: set[str] = set()
    for i in ends:
        label = f"{key} = {values[i]:.3g}"
        if label not in seen:
            axes.scatter([], [], s=26, c=shades(values)[i], lw=0, label=label)
        seen.add(label)


def with_held(result: Result, held: Sequence[Point]) -> Ladder:
    """The fitted points, then the held-out ones."""
    return Ladder((*result.ladder.points, *held), result.ladder.convention)


def log_range(values: Iterable[float], factor: float = 1.5) -> tuple[float, float]:
    """The least and the largest of values > 0, and a little beyond."""
    known = [value for value in values if 0 < value < math.inf]
    return min(known) / factor, max(known) * factor


def plain(value: Any) -> Any:
    """`value` as JSON has it: arrays as lists, what isn't finite as null."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, np.ndarray):
        return plain(value.tolist())
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, np.generic):
        return plain(value.item())
    return None if isinstance(value, float) and not math.isfinite(value) else value


def save_figures(drawings: Sequence[Drawing], folder: Path) -> list[Path]:
    """Each figure as NAME.png and NAME.svg, on white; the files written.

    Raises:
        OSError: the folder can't be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for drawing in drawings:
        FigureCanvasAgg(drawing.figure)
        drawing.figure.patch.set_alpha(1)  # a page gives its own ground, a file has none
        for suffix in (".png", ".svg"):
            path = folder / f"{drawing.name}{suffix}"
            drawing.figure.savefig(path, dpi=RESOLUTION, facecolor="white")
            written.append(path)
    return written
