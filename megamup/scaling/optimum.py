"""The best learning rate and batch by model and data, from a grid of runs, as Step Law is fitted to.

Li et al. 2025 (arXiv:2503.04715) take the best run of each grid; a parabola in the log between runs is less tied to the
grid: in log lr for each batch, then in log B through the vertices.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megamup.errors import MegamupError
from megamup.scaling.parabola import NEEDED, FloatArray, fit_parabola
from megamup.scaling.runs import Ladder, Point

WINDOW = 5
"""Runs around the best that the parabola goes through: far from it a loss rises faster than one."""


@dataclass(frozen=True)
class Optima:
    """The best rate and batch of each model and data."""

    ladder: Ladder
    """A point for each N and D: lr, B and the loss at the optimum."""
    warnings: tuple[str, ...]


def optima(ladder: Ladder) -> Optima:
    """The optimum of each (N, D) among points with N, D, lr and B.

    Where an (N, D) was trained at one batch, that batch is kept and only the rate is an optimum. Points of which no two
    share N and D are taken as optima already.

    Raises:
        MegamupError: a point without these inputs, or no (N, D) with an optimum between its runs.
    """
    models = np.unique(ladder.columns(["N", "D"]), axis=0)
    if len(models) == len(ladder):
        return Optima(ladder, ("every N and D has one run, which is taken as its optimum",))
    columns = ladder.columns(["N", "D", "lr", "B"])
    points, warnings = [], list[str]()
    for n, d in models:
        rows = np.all(columns[:, :2] == (n, d), axis=1)
        name = f"N={n:.4g},D={d:.4g}"
        found = _optimum(columns[rows, 2], columns[rows, 3], ladder.losses[rows])
        if isinstance(found, str):
            warnings.append(f"{name} is left out: {found}")
            continue
        rate, batch, loss = found
        points.append(Point(name, {"N": float(n), "D": float(d), "lr": rate, "B": batch}, loss))
    if not points:
        raise MegamupError(
            f"optimum: no N and D has its best learning rate between those tried; expected {NEEDED} rates or more "
            "around it" + "".join(f"\n  {warning}" for warning in warnings)
        )
    return Optima(Ladder(tuple(points), ladder.convention, ladder.warnings), tuple(warnings))


def _optimum(rates: FloatArray, batches: FloatArray, losses: FloatArray) -> tuple[float, float, float] | str:
    """Best rate, batch and the loss there; or why there is none."""
    found, faults = [], []
    for batch in np.unique(batches):
        of_batch = batches == batch
        parabola = fit_parabola(rates[of_batch], losses[of_batch], WINDOW)
        if parabola.fault:
            faults.append(f"batch {batch:.4g}: {parabola.fault}")
        else:
            found.append((float(batch), parabola.vertex, parabola.value))
    if not found:
        return "; ".join(faults)
    batch, rate, loss = np.array(found).T
    if len(np.unique(batches)) == 1:
        return float(rate[0]), float(batch[0]), float(loss[0])
    best = fit_parabola(batch, loss, WINDOW)
    if best.fault:
        return "; ".join([f"batch: {best.fault}", *faults])
    return float(np.exp(np.interp(np.log(best.vertex), np.log(batch), np.log(rate)))), best.vertex, best.value
