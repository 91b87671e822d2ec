"""Loss curves: against tokens, and their envelope by compute."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from megamup.page import FITTED, HELD, INK
from megamup.scaling.curves import Curve
from megamup.scaling.envelope import Envelope
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
from megamup.scaling.runs import Point

if TYPE_CHECKING:
    from matplotlib.axes import Axes

CURVE_POINTS = 300
NAMED = 10
"""Curves that are named one by one; of more, the sizes are."""
KEPT_SHOWN = 40
"""Budgets of the envelope that are marked."""


def curves_drawing(curves: Sequence[tuple[Point, Curve]], held: Sequence[tuple[Point, Curve]]) -> Drawing | None:
    """Training loss against tokens, one line a run, held-out runs dashed; None without any."""
    if not curves and not held:
        return None
    figure, (axes,) = new_figure()
    log_scale(axes, "x")
    drawn = [
        {"run": point.run or point.name, "held_out": False, "tokens": x, "loss": y}
        for point, (x, y) in zip((p for p, _ in curves), _draw_curves(axes, curves, "tokens"), strict=True)
    ]
    for point, curve in held:
        x, y = thinned(curve.tokens, curve.loss)
        axes.plot(x, y, color=HELD, lw=1.3, ls="--", label=f"{point.run or point.name} (held out)")
        drawn.append({"run": point.run or point.name, "held_out": True, "tokens": x, "loss": y})
    name_axes(axes, "tokens", "training loss (nats per token)")
    add_legend(axes)
    caption = "Training loss of each run against the tokens it has seen (means over bins of steps)."
    return Drawing("curves", "Training curves", caption, figure, plain({"curves": drawn}))


def envelope_drawing(found: Envelope, curves: Sequence[tuple[Point, Curve]]) -> Drawing:
    """Approach 1: every curve by compute, their lower envelope, and the budgets whose best size lies between others."""
    figure, (axes,) = new_figure()
    log_scale(axes, "x")
    drawn = [
        {"run": point.run or point.name, "N": point.inputs["N"], "C": x, "loss": y}
        for (point, _), (x, y) in zip(curves, _draw_curves(axes, curves, "flops"), strict=True)
    ]
    measured = np.isfinite(found.loss)
    axes.plot(found.flops[measured], found.loss[measured], color=INK, lw=1.8, label="envelope")
    kept = np.flatnonzero(found.kept)
    shown = kept[np.unique(np.linspace(0, len(kept) - 1, KEPT_SHOWN).astype(int))]
    axes.plot(found.flops[shown], found.loss[shown], "o", color=FITTED, ms=4.5, label="budgets kept", zorder=4)
    # Where the curves begin, losses are of no use and hide the rest.
    lowest, highest = float(found.loss[measured].min()), float(found.loss[kept].max())
    axes.set_ylim(lowest - 0.08 * (highest - lowest), highest + 0.6 * (highest - lowest))
    name_axes(axes, axis_label("C", found.ladder.convention), axis_label("L", {}))
    add_legend(axes)
    caption = (
        f"Smoothed curves by compute. {found.kept.sum()} of {len(found.flops)} budgets are kept: there a size between "
        "smaller and larger ones is the best (Hoffmann et al. 2022, approach 1)."
    )
    numbers = {"curves": drawn, "C": found.flops, "envelope": found.loss, "kept": found.kept}
    return Drawing("envelope", "Envelope of the curves", caption, figure, plain(numbers))


def thinned(x: FloatArray, y: FloatArray) -> tuple[FloatArray, FloatArray]:
    """At most `CURVE_POINTS` points, each the mean of a bin of records: noise is averaged and not picked."""
    bins = np.array_split(np.arange(len(x)), min(CURVE_POINTS, len(x)))
    return np.array([x[b].mean() for b in bins]), np.array([y[b].mean() for b in bins])


def _draw_curves(axes: Axes, curves: Sequence[tuple[Point, Curve]], x: str) -> list[tuple[FloatArray, FloatArray]]:
    """One line a run, coloured by N (by order where that tells none apart) and named where they are few."""
    sizes = [point.inputs.get("N") for point, _ in curves]
    by_size = None not in sizes and len(set(sizes)) > 1
    values = np.array(sizes if by_size else np.arange(1, len(curves) + 1), dtype=np.float64)
    colors, lines, seen = shades(values), [], set[Any]()
    few = len(curves) <= NAMED
    for i in np.argsort(values, kind="stable"):
        (point, curve), color = curves[i], colors[i]
        label = (point.run or point.name) if few else f"N = {values[i]:.2g}" if by_size and color not in seen else None
        seen.add(color)
        line = thinned(getattr(curve, x), curve.loss)
        axes.plot(*line, color=color, lw=1.1, label=label)
        lines.append((int(i), line))
    return [line for _, line in sorted(lines, key=lambda pair: pair[0])]
