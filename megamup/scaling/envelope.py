"""Approach 1 of Hoffmann et al. 2022 (arXiv:2203.15556, section 3.1): the envelope of loss curves by compute.

For each of many budgets, the run whose smoothed curve is lowest there names the best N, and the tokens that it had seen
D. A curve says what a shorter run would reach only where its learning rate had come down by then: give runs of several
lengths a size, or constant rates.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megamup.errors import MegamupError
from megamup.scaling.curves import Curve
from megamup.scaling.parabola import FloatArray
from megamup.scaling.runs import Ladder, Point

BUDGETS = 1500
"""As the source takes."""
NEEDED_SIZES = 2


@dataclass(frozen=True)
class Envelope:
    """The lowest loss by compute."""

    ladder: Ladder
    """A point for each budget that is kept: C, N, D and the loss; points of one curve belong to its run."""
    flops: FloatArray
    """All budgets, rising: (budgets,)."""
    loss: FloatArray
    """The lowest there: (budgets,)."""
    kept: NDArray[np.bool_]
    """Whether a smaller and a larger model than the best were measured there too: (budgets,)."""
    warnings: tuple[str, ...]


def envelope(
    curves: Sequence[tuple[Point, Curve]], budgets: int = BUDGETS, convention: Mapping[str, str] | None = None
) -> Envelope:
    """The envelope of smoothed curves, each of a run with N.

    A budget is left out where the lowest curve is that of the smallest or the largest model measured there: the best
    may be beyond.

    Raises:
        MegamupError: a run without N or FLOPs, or optima at fewer than two sizes.
    """
    sizes = np.array([_size(point, curve) for point, curve in curves])
    ends = np.array([(curve.flops[0], curve.flops[-1]) for _, curve in curves])
    flops = np.geomspace(ends[:, 0].min(), ends[:, 1].max(), budgets)
    losses = np.stack([_on(curve, curve.loss, flops) for _, curve in curves])  # (runs, budgets), inf where not measured
    covered = np.isfinite(losses).any(axis=0)  # curves may leave gaps between them
    flops, losses = flops[covered], losses[:, covered]
    best = np.argmin(losses, axis=0)
    measured = np.where(np.isfinite(losses), sizes[:, np.newaxis], np.nan)
    smallest, largest = (edge(measured, axis=0) for edge in (np.nanmin, np.nanmax))
    at_smallest, at_largest = sizes[best] <= smallest, sizes[best] >= largest
    kept = ~(at_smallest | at_largest)
    points = [_point(curves[int(best[i])], float(flops[i]), int(i)) for i in np.flatnonzero(kept)]
    different = len({point.inputs["N"] for point in points})
    if different < NEEDED_SIZES:
        raise MegamupError(
            f"envelope: {different} sizes are best somewhere between smaller and larger ones; expected at least "
            f"{NEEDED_SIZES}: of {len(flops)} budgets the smallest model there is best at {int(at_smallest.sum())} and "
            f"the largest at {int(at_largest.sum())}; add sizes beyond, or train longer"
        )
    warnings = tuple(
        f"{int(edge.sum())} of {len(flops)} budgets are left out: the {name} model measured there is the best"
        for edge, name in ((at_smallest, "smallest"), (at_largest & ~at_smallest, "largest"))
        if edge.any()
    )
    return Envelope(Ladder(tuple(points), dict(convention or {})), flops, losses.min(axis=0), kept, warnings)


def _size(point: Point, curve: Curve) -> float:
    if "N" not in point.inputs:
        raise MegamupError(f"envelope: {point.name} has no N; expected the parameters of every run")
    if not np.all(np.isfinite(curve.flops)) or not np.all(curve.flops > 0):
        raise MegamupError(
            f"envelope: {point.name} has no FLOPs along its curve; expected them at every record: name their column, "
            "or an expression such as --columns C=6*N*D"
        )
    return point.inputs["N"]


def _on(curve: Curve, values: FloatArray, flops: FloatArray) -> FloatArray:
    """What a curve had at budgets (m,), linear in log FLOPs; inf beyond its ends."""
    return np.asarray(np.interp(np.log(flops), np.log(curve.flops), values, left=np.inf, right=np.inf))


def _point(run: tuple[Point, Curve], flops: float, index: int) -> Point:
    point, curve = run
    at = np.array([flops])
    tokens = float(np.exp(_on(curve, np.log(curve.tokens), at)[0]))
    inputs = {"C": flops, "N": point.inputs["N"], "D": tokens}
    return Point(f"{point.name}@{index}", inputs, float(_on(curve, curve.loss, at)[0]), point.source, point.name)
