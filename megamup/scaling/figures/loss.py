"""What a law says against each of its inputs: lines with the interval of one new run, and the points."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from megamup.page import FITTED, HELD, INK, MUTED
from megamup.scaling.analysis import Result, inputs_of, response_of
from megamup.scaling.estimate import flops_per_product
from megamup.scaling.figures.drawing import (
    Drawing,
    add_legend,
    axis_label,
    log_scale,
    name_axes,
    new_figure,
    plain,
    shades,
    with_held,
)
from megamup.scaling.figures.groups import LIKE, Group, groups_of
from megamup.scaling.laws import FloatArray
from megamup.scaling.laws.frontier import FLOPS_PER_PARAMETER_AND_TOKEN
from megamup.scaling.runs import Point
from megamup.scaling.uncertainty import quantity_values

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LINE_POINTS, LINE_POINTS_OF_MANY = 60, 24
"""Inputs at which a band is computed: of a line alone, and of each of several."""
BEYOND = 1.5
"""Lines go on so far beyond the points."""

DRAWN_ELSEWHERE = ("critical-batch", "annealing", "multi-power")
"""Laws that hold at certain values of an input only (levels of loss, curves) and have a figure of their own."""

Columns = dict[str, FloatArray]
"""Quantity -> its value for each of some points."""


@dataclass(frozen=True)
class _View:
    """A law seen against one quantity, others being constant."""

    x: str
    constant: tuple[str, ...]
    solve: Callable[[FloatArray, dict[str, float]], Columns]
    """x (m,) and the constants -> the law's inputs, (m,) each."""


def loss_drawings(result: Result, held: Sequence[Point], prefix: str) -> list[Drawing]:
    """A figure for each input of the law, and one against C for a law of N and D.

    Args:
        held: runs that the fit has not seen, with the law's inputs.
        prefix: of the names.
    """
    if result.law.name in DRAWN_ELSEWHERE:
        return []
    everyone = with_held(result, held)
    known = _known(result, inputs_of(everyone, result.law))
    response = response_of(everyone, result.law)
    return [_drawing(result, response, known, view, prefix) for view in _views(result, known)]


def _known(result: Result, inputs: FloatArray) -> Columns:
    """The law's inputs (n, d) by name; of a law of N and D also C and D/N."""
    known = dict(zip(result.law.inputs, inputs.T, strict=True))
    if set(known) == {"N", "D"}:
        known |= {"C": flops_per_product(result) * known["N"] * known["D"], "D/N": known["D"] / known["N"]}
    return known


def _views(result: Result, known: Columns) -> list[_View]:
    law = result.law
    if set(law.inputs) != {"N", "D"}:
        return [_against(x, law.inputs) for x in law.inputs]
    k = flops_per_product(result)
    at_n, at_ratio = ("N",), ("D/N",)
    pairs = [
        (_against("N", ("N", "D")), _View("N", at_ratio, lambda x, at: {"N": x, "D": x * at["D/N"]})),
        (_against("D", ("N", "D")), _View("D", at_ratio, lambda x, at: {"N": x / at["D/N"], "D": x})),
        (
            _View("C", at_n, lambda x, at: {"N": np.full_like(x, at["N"]), "D": x / (k * at["N"])}),
            _View("C", at_ratio, lambda x, at: {"N": (x / k / at["D/N"]) ** 0.5, "D": (x / k * at["D/N"]) ** 0.5}),
        ),
    ]
    # Some ladders are made at several D, some at several D/N: the lines that lie nearest to their points.
    return [min(pair, key=lambda view: (_spread(view, known), len(_groups(view, known)))) for pair in pairs]


def _against(x: str, names: Sequence[str]) -> _View:
    others = tuple(name for name in names if name != x)
    return _View(x, others, lambda values, at: {x: values} | {key: np.full_like(values, at[key]) for key in others})


def _groups(view: _View, known: Columns) -> list[Group]:
    n = len(known[view.x])
    return groups_of(
        view.constant, np.stack([known[key] for key in view.constant], -1) if view.constant else np.ones((n, 0))
    )


def _spread(view: _View, known: Columns) -> float:
    """How far points are from their group's constant, at most, in logs; what is within its 10% is none."""
    widest = max(float(np.ptp(np.log(known[view.constant[0]][group.rows]))) for group in _groups(view, known))
    return widest if widest > np.log(LIKE) else 0.0


def _drawing(result: Result, response: FloatArray, known: Columns, view: _View, prefix: str) -> Drawing:
    law, convention = result.law, result.ladder.convention
    figure, (axes,) = new_figure()
    log_scale(axes, "x" if law.response == "L" else "xy")
    name_axes(axes, axis_label(view.x, convention), axis_label(law.response, convention))
    groups = _groups(view, known)
    colors = [FITTED] if len(groups) == 1 else shades(np.exp(np.arange(len(groups), dtype=np.float64)))
    lines = [
        _draw_line(axes, result, view, group, known, color, alone=len(groups) == 1)
        for group, color in zip(groups, colors, strict=True)
    ]
    x, fitted = known[view.x], np.arange(len(response)) < len(result.ladder)
    for group, color in zip(groups, colors, strict=True):
        for rows, marker, size in (
            (group.rows[fitted[group.rows]], "o", 5.5),
            (group.rows[~fitted[group.rows]], "D", 6.5),
        ):
            axes.plot(x[rows], response[rows], marker, color=color if marker == "o" else HELD, ms=size, zorder=3)
    axes.plot([], [], "o", color=MUTED, ms=5.5, label="fitted runs")
    if not fitted.all():
        axes.plot([], [], "D", color=HELD, ms=6.5, label="held-out runs")
    frontier = _draw_frontier(axes, result, lines[0]["x"]) if view.x == "C" else None
    _draw_offset(axes, result, response)
    add_legend(axes)
    points = [{"x": a, law.response: b, "held_out": not c} for a, b, c in zip(x, response, fitted, strict=True)]
    return Drawing(
        f"{prefix}-{law.response}-{view.x}",
        f"{_name(law.response)} against {view.x}",
        _caption(result, view, banded=any(line["low"] is not None for line in lines)),
        figure,
        plain({"x": view.x, "constant": view.constant, "lines": lines, "frontier": frontier, "points": points}),
    )


def _draw_line(
    axes: Axes, result: Result, view: _View, group: Group, known: Columns, color: str, *, alone: bool
) -> dict[str, Any]:
    """The law along one group, with its band; what was drawn."""
    count = LINE_POINTS if alone else LINE_POINTS_OF_MANY
    x = np.geomspace(known[view.x].min() / BEYOND, known[view.x].max() * BEYOND, count)
    columns = view.solve(x, group.at)
    prediction = result.predict(np.stack([columns[key] for key in result.law.inputs], axis=-1))
    axes.plot(x, prediction.loss, color=color, lw=1.5, label=result.law.formula if alone else group.label)
    banded = bool(np.all(np.isfinite(prediction.low)) and np.all(np.isfinite(prediction.high)))
    if banded:
        label = "95% interval of one new run" if alone else None
        axes.fill_between(
            x, prediction.low, prediction.high, color=color, alpha=0.16 if alone else 0.10, lw=0, label=label
        )
    ends = {"low": prediction.low, "high": prediction.high} if banded else {"low": None, "high": None}
    return {"at": group.at, "x": x, "law": prediction.loss, **ends}


def _draw_frontier(axes: Axes, result: Result, x: FloatArray) -> dict[str, Any] | None:
    """The least loss at each budget, where the law has one, whose C is 6·N·D and not counted as the runs count it."""
    budgets = x * FLOPS_PER_PARAMETER_AND_TOKEN / flops_per_product(result)
    at = {str(i): result.law.quantities({"C": float(c)}).get("L") for i, c in enumerate(budgets)}
    if any(quantity is None for quantity in at.values()):
        return None
    least = quantity_values(result.fit, {key: quantity for key, quantity in at.items() if quantity is not None})
    loss = np.array([least[str(i)] for i in range(len(x))])
    axes.plot(x, loss, color=INK, lw=1.4, ls=(0, (6, 3)), label="best N and D of a budget")
    return {"x": x, "law": loss}


def _draw_offset(axes: Axes, result: Result, response: FloatArray) -> None:
    """The loss that no scale removes as a dashed line, or in words where it would flatten the points."""
    for name in (name for name in result.law.parameters if result.law.may_vanish(name)):
        offset = result.fit.parameters[name]
        style: dict[str, Any] = {"color": MUTED, "lw": 1.2, "ls": (0, (5, 4))}
        if offset > response.min() - 0.5 * np.ptp(response):
            axes.axhline(offset, label=f"offset {name} = {offset:.4g}", **style)
        else:
            axes.plot([], [], label=f"offset {name} = {offset:.4g}, below the axis", **style)


def _name(response: str) -> str:
    return "Loss" if response == "L" else response


def _caption(result: Result, view: _View, *, banded: bool) -> str:
    lines = f" Each line is at constant {' and '.join(view.constant)}, the mean of its points." if view.constant else ""
    words = f"The law {result.law.formula} through the runs.{lines}"
    if not banded:
        return f"{words} The runs leave nothing to measure the noise by, so there is no band."
    widening = result.backtest.inflation
    wider = f", {widening:.2g} times wider than the fit's own, as the backtest needed" if widening > 1 else ""
    return (
        f"{words} The band holds one new run with 95% confidence{wider}: the noise of the runs, and the error of the "
        "law as far as larger runs predicted from smaller ones show it."
    )
