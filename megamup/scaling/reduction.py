"""What runs are reduced to before laws are fitted to it: optima by budget, envelopes, steps by batch and loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megamup.scaling.critical_batch import critical_batch
from megamup.scaling.curves import Curve
from megamup.scaling.envelope import envelope
from megamup.scaling.isoflop import isoflop
from megamup.scaling.laws import REDUCTIONS, Law
from megamup.scaling.laws.batch import BATCH_LOSS
from megamup.scaling.optimum import optima
from megamup.scaling.runs import Ladder, Point

Curves = Sequence[tuple[Point, Curve]]


@dataclass(frozen=True)
class Reduced:
    """Points for one law after another, and what was left out on the way."""

    parts: tuple[tuple[Law, Ladder], ...]
    warnings: tuple[str, ...]


def reduce_runs(name: str, ladder: Ladder, curves: Callable[[], Curves]) -> Reduced:
    """The runs reduced as `name`, a key of `REDUCTIONS`, says; `curves` is asked for only where curves are needed.

    Raises:
        MegamupError: runs without what the reduction needs, or of which too little is left.
    """
    reduction = REDUCTIONS[name]
    if name == "critical-batch":
        found = critical_batch(curves(), convention=ladder.convention)
        parts = ((law, found.b_crit if law is BATCH_LOSS else found.ladder) for law in reduction.laws)
        return Reduced(tuple(parts), found.warnings)
    if name == "envelope":
        lowest = envelope(curves(), convention=ladder.convention)
        return Reduced(tuple((law, lowest.ladder) for law in reduction.laws), lowest.warnings)
    best = isoflop(ladder) if name == "isoflop" else optima(ladder)
    return Reduced(tuple((law, best.ladder) for law in reduction.laws), best.warnings)
