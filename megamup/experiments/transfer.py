"""What a transfer experiment says: the best learning rate of each size, and how far it moves from the base's.

The experiment is Tensor Programs V's (Yang et al. 2022, figure 1): the same rates at every size, and loss against rate
as one U-curve a size. Sizes are widths, depths, batches or tokens; groups are parametrizations, side by side. Rates are
compared in doublings (log2), losses in nats per token.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from megamup.errors import MegamupError

FloatArray = NDArray[np.float64]
Edge = Literal["lowest", "highest", "only", "cliff"]

CLIFF_NATS = 1.0
"""A rate this much worse than the best counts as diverged: a parabola through it would say nothing of the bottom."""


@dataclass(frozen=True)
class Point:
    """One trial."""

    group: str
    size: float
    rate: float
    """Base learning rate: before the table's factors."""
    loss: float
    """Validation loss (nats per token); infinite or NaN where the run diverged."""
    seed: int = 0


@dataclass(frozen=True)
class RatePoint:
    """All seeds of one rate at one size."""

    rate: float
    loss: float
    """Mean over the seeds; infinite where one of them diverged: a rate that may diverge is not one to transfer."""
    std: float | None
    """Sample standard deviation over the seeds; None with one seed or a diverged one."""
    seeds: int
    diverged: int


@dataclass(frozen=True)
class Optimum:
    """Where the U-curve turns, between the rates that were run."""

    rate: float
    loss: float
    standard_error: float | None
    """Of the rate, in doublings, by the jackknife over seeds; None unless every rate it rests on has the same seeds."""


@dataclass(frozen=True)
class Curve:
    """Loss against rate at one size, and what it says beside the group's base."""

    size: float
    points: tuple[RatePoint, ...]
    """By rate, lowest first."""
    best: RatePoint | None
    """The best rate that was run; None where all diverged."""
    edge: Edge | None
    """Why the optimum is not known: the best rate is the lowest, highest or only one, or a neighbour
    diverged or is worse by `CLIFF_NATS`."""
    optimum: Optimum | None
    shift: float | None = None
    """Doublings from the base's optimum to this one; None where either is not known."""
    lost: float | None = None
    """Loss at the base's best rate, less the best loss here; infinite where it diverged, None where it was not run."""

    @property
    def at_edge(self) -> bool:
        return self.edge is not None


@dataclass(frozen=True)
class Group:
    name: str
    curves: tuple[Curve, ...]
    """By size; the first is the base."""
    shift: float | None
    """Doublings from the smallest size's optimum to the largest's."""
    slope: float | None
    """Doublings of the rate per doubling of the size: least squares over the sizes whose optimum is known."""


@dataclass(frozen=True)
class Transfer:
    axis: str
    """What sizes are: width, depth, batch tokens, tokens."""
    groups: tuple[Group, ...]

    def group(self, name: str) -> Group:
        """Raises: MegamupError: no such group."""
        names = [group.name for group in self.groups]
        if name not in names:
            raise MegamupError(f"group {name}: not in this experiment; expected one of {', '.join(names)}")
        return self.groups[names.index(name)]

    def as_json(self) -> dict[str, Any]:
        """For `json.dump`; what is infinite, which JSON has no word for, is "diverged"."""

        def speakable(value: Any) -> Any:
            if isinstance(value, dict):
                return {key: speakable(item) for key, item in value.items()}
            if isinstance(value, list | tuple):
                return [speakable(item) for item in value]
            return "diverged" if value == math.inf else value

        found: dict[str, Any] = speakable(asdict(self))
        return found


# --------------------------------------------------------------------------- analysis


def analyse(points: Sequence[Point], axis_name: str) -> Transfer:
    """Read the U-curves of all groups and sizes; groups keep the order in which they first appear.

    Raises:
        MegamupError: no points, a size or rate that is not positive, or one trial given twice.
    """
    if not points:
        raise MegamupError("points: none given; expected the trials of at least one group and size")
    seen = set[tuple[str, float, float, int]]()
    for point in points:
        for key, value in (("size", point.size), ("rate", point.rate)):
            if not 0 < value < math.inf:
                raise MegamupError(f"{point.group}: {key}={value}: expected a positive number (its log2 is compared)")
        trial = (point.group, point.size, point.rate, point.seed)
        if trial in seen:
            raise MegamupError(
                f"{point.group}: {axis_name} {point.size:g}, rate {point.rate:g}, seed {point.seed}: given twice; "
                "give each seed of a rate its own number"
            )
        seen.add(trial)
    names = dict.fromkeys(point.group for point in points)
    return Transfer(axis_name, tuple(read_group(name, [p for p in points if p.group == name]) for name in names))


def read_group(name: str, points: Sequence[Point]) -> Group:
    sizes = sorted({point.size for point in points})
    curves = [read_curve(size, [point for point in points if point.size == size]) for size in sizes]
    base = curves[0]
    curves = [replace(curve, shift=shift(base, curve), lost=lost(base, curve)) for curve in curves]
    return Group(name, tuple(curves), curves[-1].shift if len(curves) > 1 else None, slope(curves))


def read_curve(size: float, points: Sequence[Point]) -> Curve:
    losses: dict[float, dict[int, float]] = {}
    for point in sorted(points, key=lambda point: point.rate):
        losses.setdefault(point.rate, {})[point.seed] = point.loss
    means = tuple(over_seeds(rate, list(by_seed.values())) for rate, by_seed in losses.items())
    at = min(range(len(means)), key=lambda index: means[index].loss)
    if math.isinf(means[at].loss):
        return Curve(size, means, None, None, None)
    edge = edge_of(means, at)
    return Curve(size, means, means[at], edge, None if edge else find_optimum(list(losses.values()), means, at))


def over_seeds(rate: float, losses: Sequence[float]) -> RatePoint:
    diverged = sum(not math.isfinite(loss) for loss in losses)
    if diverged:
        return RatePoint(rate, math.inf, None, len(losses), diverged)
    std = float(np.std(losses, ddof=1)) if len(losses) > 1 else None
    return RatePoint(rate, float(np.mean(losses)), std, len(losses), 0)


def edge_of(means: Sequence[RatePoint], at: int) -> Edge | None:
    if len(means) == 1:
        return "only"
    if at in (0, len(means) - 1):
        return "lowest" if at == 0 else "highest"
    worst = max(means[at - 1].loss, means[at + 1].loss)
    return "cliff" if worst > means[at].loss + CLIFF_NATS else None


def find_optimum(losses: Sequence[dict[int, float]], means: Sequence[RatePoint], at: int) -> Optimum | None:
    """The turning point of a parabola in log2(rate): least squares over all rates within a doubling of the best.

    On a grid of factor 2 that is the usual reading, through the best point and its neighbours, which always count. On
    finer grids three points lie so close that noise decides. Simulated on a grid of √2 with 0.014 nats of noise (two
    seeds of a small width differ so), over U-curves as measured at widths 32 to 256: rms error 0.12 doublings this way,
    0.16 through three points, 0.25 by the best rate run. Without noise 0.07, 0.02 and 0.14: real curves lean.

    The standard error is the jackknife's: leave out one seed at every rate, so that what a seed does to all rates alike
    cancels. In the same simulation, with 2 or 3 seeds, ± it times Student's t covers noise in 93 to 96% of curves.

    Args:
        losses: {seed: loss} of every rate.
        means: the same over seeds; ``at`` and its two neighbours are off the cliff.
        at: index of the best.
    """
    x, y = np.log2([mean.rate for mean in means]), np.array([mean.loss for mean in means])
    near = (np.abs(x - x[at]) <= 1 + 1e-9) & (y <= y[at] + CLIFF_NATS)
    near[at - 1 : at + 2] = True
    found = turning_point(x, y, near, at)
    if found is None:
        return None
    return Optimum(2 ** found[0], found[1], jackknife(losses, x, y, near, at))


def turning_point(x: FloatArray, y: FloatArray, near: NDArray[np.bool_], at: int) -> tuple[float, float] | None:
    """(x, y) at the bottom of the parabola; of three points where that of all doesn't turn between the neighbours."""
    three = np.abs(np.arange(len(x)) - at) <= 1
    for chosen in (near, three):
        a, b, c = np.polyfit(x[chosen] - x[at], y[chosen], 2)
        if a > 0 and x[at - 1] <= x[at] - b / (2 * a) <= x[at + 1]:
            return float(x[at] - b / (2 * a)), float(c - b * b / (4 * a))
    return None


def jackknife(
    losses: Sequence[dict[int, float]], x: FloatArray, y: FloatArray, near: NDArray[np.bool_], at: int
) -> float | None:
    used = [by_seed for by_seed, keep in zip(losses, near, strict=True) if keep]
    seeds = sorted(used[0])
    if len(seeds) < 2 or any(sorted(by_seed) != seeds for by_seed in used):
        return None
    found = []
    for left_out in seeds:
        without = y.copy()
        without[near] = [np.mean([by_seed[seed] for seed in seeds if seed != left_out]) for by_seed in used]
        found.append(turning_point(x, without, near, at))
    turns = [turn[0] for turn in found if turn is not None]
    return math.sqrt(len(seeds) - 1) * float(np.std(turns)) if len(turns) == len(seeds) else None


def shift(start: Curve, end: Curve) -> float | None:
    """Doublings from one optimum to another."""
    if start.optimum is None or end.optimum is None:
        return None
    return math.log2(end.optimum.rate / start.optimum.rate)


def lost(start: Curve, end: Curve) -> float | None:
    """Loss at ``end`` with the best rate run at ``start``, less the best loss at ``end`` (nats per token)."""
    there = [point.loss for point in end.points if start.best and point.rate == start.best.rate]
    if not there:
        return None
    return there[0] - end.best.loss if end.best else math.inf


def slope(curves: Sequence[Curve]) -> float | None:
    known = [(curve.size, curve.optimum.rate) for curve in curves if curve.optimum]
    if len(known) < 2:
        return None
    sizes, rates = np.log2(known).T
    return float(np.polyfit(sizes, rates, 1)[0])


# --------------------------------------------------------------------------- claims


@dataclass(frozen=True)
class Claim:
    """A sentence that an experiment can refute, such as: mup: |shift| from width 32 to 256 < 0.5 doublings."""

    group: str
    quantity: Literal["shift", "|shift|", "slope", "lost"]
    """As the functions of these names have it; ``|shift|`` is its size."""
    relation: Literal["<", ">"]
    bound: float
    sizes: tuple[float, float] | None = None
    """From, to; default: the group's smallest and largest."""


@dataclass(frozen=True)
class Conclusion:
    claim: str
    value: float | None
    holds: bool | None
    """None where the value is not known: the points show neither."""


def conclusions(transfer: Transfer, claims: Sequence[Claim]) -> list[Conclusion]:
    """What the experiment says of each claim.

    Raises:
        MegamupError: a claim names a group or a size that was not run.
    """
    return [conclude(transfer, claim) for claim in claims]


def conclude(transfer: Transfer, claim: Claim) -> Conclusion:
    curves = {curve.size: curve for curve in transfer.group(claim.group).curves}
    first, last = claim.sizes or (min(curves), max(curves))
    for size in (first, last):
        if size not in curves:
            known = ", ".join(map(number, curves))
            raise MegamupError(f"{claim.group}: {transfer.axis} {number(size)}: not run; expected one of {known}")
    start, end = curves[first], curves[last]
    span = f"from {transfer.axis} {number(first)} to {number(last)}"
    if claim.quantity == "lost":
        value, what, unit = lost(start, end), f"loss lost by transferring the best rate {span}", "nats"
    elif claim.quantity == "slope":
        value = slope([curve for size, curve in curves.items() if first <= size <= last])
        what, unit = f"shift per doubling {span}", "doublings"
    else:
        value, what, unit = shift(start, end), f"{claim.quantity} {span}", "doublings"
        if claim.quantity == "|shift|" and value is not None:
            value = abs(value)
    holds = None if value is None else value < claim.bound if claim.relation == "<" else value > claim.bound
    return Conclusion(f"{claim.group}: {what} {claim.relation} {claim.bound:g} {unit}", value, holds)


# --------------------------------------------------------------------------- in words


def number(value: float) -> str:
    """A size: whole where that is short."""
    return f"{value:.0f}" if value < 1e6 and value == round(value) else f"{value:.3g}"


def header(transfer: Transfer) -> tuple[str, ...]:
    return (transfer.axis, "best rate", "loss", "optimum", "± doublings", "shift", "lost by transferring")


def rows(group: Group) -> Iterator[tuple[str, ...]]:
    """A line a size, under `header`; an optimum that is only a bound is not interpolated."""
    for curve in group.curves:
        if curve.best is None:
            yield (number(curve.size), "all diverged", "–", "–", "–", "–", "–")
            continue
        rate = f"{curve.best.rate:.4g}"
        bounds = {"lowest": f"≤ {rate}", "highest": f"≥ {rate}", "only": "one rate", "cliff": "beside a cliff"}
        error = curve.optimum.standard_error if curve.optimum else None
        yield (
            number(curve.size),
            rate,
            f"{curve.best.loss:.4f}",
            f"{curve.optimum.rate:.4g}" if curve.optimum else bounds[curve.edge] if curve.edge else "–",
            "–" if error is None else f"{error:.2g}",
            "–" if curve.shift is None else signed(curve.shift, 2),
            "not known" if curve.lost is None else signed(curve.lost, 4),
        )


def signed(value: float, digits: int) -> str:
    """With its sign, but none on what rounds to zero."""
    if math.isinf(value):
        return "diverged"
    return f"{value:+.{digits}f}" if round(value, digits) else f"{0:.{digits}f}"


def sentence(transfer: Transfer, group: Group) -> str:
    """What the group's curves say, in one sentence with its figures."""
    base, largest = group.curves[0], group.curves[-1]
    if base is largest:
        return f"{group.name}: one {transfer.axis} only ({number(base.size)}), so nothing was transferred."
    span = f"from {transfer.axis} {number(base.size)} to {number(largest.size)}"
    if group.shift is not None and group.slope is not None:
        doublings = f"{signed(group.shift, 2)} doublings {span} ({signed(group.slope, 2)} per doubling)"
        moved = f"the optimum moves by {doublings}"
    else:
        ends = [number(curve.size) for curve in (base, largest) if curve.optimum is None]
        where = f"the grid does not resolve the optimum at {transfer.axis} {' and '.join(ends)}"
        moved = f"how far the optimum moves {span} is not known, as {where}"
    if base.best is None:
        return f"{group.name}: {moved}; all rates diverge at the base."
    keeping = f"keeping the base's best rate, {base.best.rate:.4g},"
    if largest.lost is None:
        return f"{group.name}: {moved}; what {keeping} costs is not known (not run at {number(largest.size)})."
    cost = "diverges" if math.isinf(largest.lost) else f"costs {largest.lost:.4f} nats"
    return f"{group.name}: {moved}; {keeping} {cost} at {transfer.axis} {number(largest.size)}."


def lines(transfer: Transfer) -> Iterator[str]:
    """The experiment as text: a table and a sentence a group."""
    for group in transfer.groups:
        table = [header(transfer), *rows(group)]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        yield group.name
        for row in table:
            yield "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        yield from (sentence(transfer, group), "")


def markdown(transfer: Transfer) -> str:
    """The same as Markdown."""
    found = []
    for group in transfer.groups:
        head, *body = header(transfer), *rows(group)
        table = [(f"{group.name}: {head[0]}", *head[1:]), ("---",) * len(head), *body]
        found += ["| " + " | ".join(row) + " |" for row in table] + ["", sentence(transfer, group), ""]
    return "\n".join(found)
