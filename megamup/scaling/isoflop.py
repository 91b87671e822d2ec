"""Approach 2 of Hoffmann et al. 2022 (arXiv:2203.15556, section 3.2): at each budget, the size of least loss.

Runs of one budget differ in size; a parabola in log N gives the best size between them. The optima of all budgets are
points for the laws N_opt(C), D_opt(C) and L(C).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megamup.errors import MegamupError
from megamup.scaling.parabola import NEEDED, FloatArray, Parabola, fit_parabola
from megamup.scaling.runs import Ladder, Point

TOLERANCE = 0.1
"""Runs are of one budget where the largest C is at most this share above the least."""
NEEDED_BUDGETS = 2


@dataclass(frozen=True)
class Budget:
    """The runs of one budget and the parabola through their losses."""

    flops: float
    """Geometric mean of the runs' C."""
    parameters: FloatArray
    """N of the runs, rising: (n,)."""
    loss: FloatArray
    """(n,)"""
    parabola: Parabola
    tokens: float
    """D at the parabola's vertex, by the runs' own N·D."""


@dataclass(frozen=True)
class IsoFlop:
    """Optima by budget."""

    ladder: Ladder
    """A point for each budget that has an optimum: C, N, D and the loss there."""
    budgets: tuple[Budget, ...]
    """All of them, rising."""
    warnings: tuple[str, ...]
    """Budgets left out, with the reason."""


def isoflop(ladder: Ladder, tolerance: float = TOLERANCE) -> IsoFlop:
    """The best size at every budget of a ladder whose points have C, N and D.

    Raises:
        MegamupError: a point without them, or fewer than two budgets with an optimum, with the reason for each.
    """
    columns = ladder.columns(["C", "N", "D"])
    budgets = tuple(_budget(columns[rows], ladder.losses[rows]) for rows in _groups(columns[:, 0], tolerance))
    good = [budget for budget in budgets if not budget.parabola.fault]
    warnings = tuple(
        f"budget C = {budget.flops:.3g} is left out ({len(budget.parameters)} runs, N from "
        f"{budget.parameters[0]:.3g} to {budget.parameters[-1]:.3g}): {budget.parabola.fault}"
        for budget in budgets
        if budget.parabola.fault
    )
    if len(good) < NEEDED_BUDGETS:
        raise MegamupError(
            f"isoflop: {len(good)} of {len(budgets)} budgets have an optimum between their runs; expected at least "
            f"{NEEDED_BUDGETS}, each of {NEEDED} sizes or more around the best{_listed(warnings)}"
        )
    points = tuple(
        Point(
            f"C={budget.flops:.4g}",
            {"C": budget.flops, "N": budget.parabola.vertex, "D": budget.tokens},
            budget.parabola.value,
        )
        for budget in good
    )
    return IsoFlop(Ladder(points, ladder.convention, ladder.warnings), budgets, warnings)


def _groups(flops: FloatArray, tolerance: float) -> list[FloatArray]:
    """Rows of the points of each budget, from the least: a group ends where C is too far above its first."""
    groups: list[list[int]] = []
    first = 0.0
    for row in np.argsort(flops, kind="stable"):
        if not groups or flops[row] > first * (1 + tolerance):
            groups.append([])
            first = float(flops[row])
        groups[-1].append(int(row))
    return [np.array(group) for group in groups]


def _budget(columns: FloatArray, loss: FloatArray) -> Budget:
    order = np.argsort(columns[:, 1])
    c, n, d = columns[order].T
    parabola = fit_parabola(n, loss[order])
    # N·D is the same for all runs of a budget, to what the FLOPs convention adds to 6·N·D.
    tokens = float(np.exp(np.mean(np.log(n * d))) / parabola.vertex)
    return Budget(float(np.exp(np.mean(np.log(c)))), n, loss[order], parabola, tokens)


def _listed(warnings: tuple[str, ...]) -> str:
    return "".join(f"\n  {warning}" for warning in warnings)
