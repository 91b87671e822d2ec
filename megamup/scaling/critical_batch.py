"""The critical batch size from runs of several batches and learning rates.

At each of some losses, and for each batch, the fewest steps that any learning rate needs to reach it: what McCandlish
et al. 2018 (arXiv:1812.06162, section 2.3) and Kaplan et al. 2020 (arXiv:2001.08361, section 5.1) fit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy.stats import t as student

from megamup.errors import MegamupError
from megamup.scaling.curves import Curve, steps_to
from megamup.scaling.laws.batch import c_min, s_min
from megamup.scaling.parabola import FloatArray
from megamup.scaling.runs import Ladder, Point

LEVELS = 6
NEEDED_BATCHES = 3
EARLIEST = 0.25
"""Share of each batch's run that the highest level may take: earlier ones are warm-up."""


@dataclass(frozen=True)
class Level:
    """Steps against batch at one loss: S = S_min + E_min/B, linear in 1/B, by least squares on relative errors."""

    loss: float
    batches: FloatArray
    """Tokens a step, rising: (n,)."""
    steps: FloatArray
    """(n,)"""
    rates: FloatArray
    """The learning rate that needed the fewest: (n,)."""
    s_min: float
    e_min: float
    """Tokens."""
    b_crit: float
    """Tokens: E_min / S_min; NaN where either is not above 0."""
    b_crit_low: float | None
    b_crit_high: float | None
    """95% by the delta method on its log; None without freedom left."""


@dataclass(frozen=True)
class CriticalBatches:
    """What the runs say of steps, batches and losses."""

    ladder: Ladder
    """A point for each batch and level: B, S and lr, with the level as its loss. For the law `critical-batch`."""
    b_crit: Ladder
    """A point for each level: B is B_crit. For the law `batch-loss`."""
    levels: tuple[Level, ...]
    """Losses falling."""
    warnings: tuple[str, ...]


def critical_batch(
    curves: Sequence[tuple[Point, Curve]], levels: int = LEVELS, convention: Mapping[str, str] | None = None
) -> CriticalBatches:
    """Fewest steps by batch and loss, from smoothed curves of runs with B and lr.

    The lowest level is the lowest loss that every batch reaches with some rate; the highest is one that takes each
    batch a quarter of its way there.

    Raises:
        MegamupError: a run without B or lr, fewer than three batches, or curves that don't overlap.
    """
    runs = _by_batch(curves)
    losses = _levels(runs, levels)
    found = [_level(runs, loss) for loss in losses]
    points = tuple(
        Point(f"B={b:.4g},L={level.loss:.4g}", {"B": b, "S": s, "lr": rate}, level.loss)
        for level in found
        for b, s, rate in zip(level.batches.tolist(), level.steps.tolist(), level.rates.tolist(), strict=True)
    )
    known = [level for level in found if level.b_crit > 0]
    critical = tuple(Point(f"L={level.loss:.4g}", {"B": level.b_crit}, level.loss) for level in known)
    shown = dict(convention or {})
    warnings = (*_edge_warnings(runs, found), *_level_warnings(found))
    return CriticalBatches(Ladder(points, shown), Ladder(critical, shown), tuple(found), warnings)


def apply_critical_batch(ladder: Ladder, b_star: float, alpha_b: float) -> Ladder:
    """The points with Cmin and Smin, of a batch far below and far above B_crit (Kaplan et al., eq. 5.4 and 5.5).

    Args:
        ladder: points with B, and with C, S or both.
        b_star, alpha_b: of B_crit = b_star·L^(-1/alpha_b), at each point's own loss; in the unit of B.

    Raises:
        MegamupError: a point without B, or with neither C nor S.
    """
    batches = ladder.columns(["B"])[:, 0]
    points = []
    for point, batch in zip(ladder.points, batches, strict=True):
        critical = np.array(b_star * point.loss ** (-1 / alpha_b))
        added = {}
        if "C" in point.inputs:
            added["Cmin"] = float(c_min(np.array(point.inputs["C"]), batch, critical))
        if "S" in point.inputs:
            added["Smin"] = float(s_min(np.array(point.inputs["S"]), batch, critical))
        if not added:
            raise MegamupError(f"{point.name}: neither C nor S is known; expected one of them beside B")
        points.append(replace(point, inputs=point.inputs | added))
    return replace(ladder, points=tuple(points))


@dataclass(frozen=True)
class _Run:
    rate: float
    curve: Curve
    """With steps."""


def _by_batch(curves: Sequence[tuple[Point, Curve]]) -> dict[float, list[_Run]]:
    """Runs of each batch, batches rising, each with its rates rising."""
    runs: dict[float, list[_Run]] = {}
    for point, curve in curves:
        for key, meaning in (("B", "tokens a step"), ("lr", "the peak learning rate")):
            if key not in point.inputs:
                raise MegamupError(f"critical-batch: {point.name} has no {key}; expected {meaning} of every run")
        batch = point.inputs["B"]
        if not np.all(np.isfinite(curve.step)):
            curve = replace(curve, step=curve.tokens / batch)
        runs.setdefault(batch, []).append(_Run(point.inputs["lr"], curve))
    if len(runs) < NEEDED_BATCHES:
        raise MegamupError(
            f"critical-batch: {len(runs)} different batches; expected at least {NEEDED_BATCHES}: S_min and E_min take "
            "two and leave the noise to the others"
        )
    return {batch: sorted(runs[batch], key=lambda run: run.rate) for batch in sorted(runs)}


def _levels(runs: Mapping[float, list[_Run]], count: int) -> list[float]:
    """Losses that every batch reaches, falling."""
    best = [min(group, key=lambda run: float(run.curve.loss.min())) for group in runs.values()]
    lowest = max(float(run.curve.loss.min()) for run in best)
    # A crossing must be seen: below every curve's first record.
    highest = min(float(run.curve.loss[0]) for group in runs.values() for run in group) * (1 - 1e-12)
    for run in best if lowest < highest else ():
        reached = steps_to(run.curve, lowest) or float(run.curve.step[-1])
        highest = min(highest, float(np.interp(EARLIEST * reached, run.curve.step, run.curve.loss)))
    if highest <= lowest:
        raise MegamupError(
            f"critical-batch: no loss is crossed by every batch after a quarter of its run (the lowest that all reach "
            f"is {lowest:.4g}); expected curves that overlap: train the slowest batches longer, or log more often"
        )
    return [float(loss) for loss in np.geomspace(highest, lowest, count)]


def _level(runs: Mapping[float, list[_Run]], loss: float) -> Level:
    steps, rates = [], []
    for group in runs.values():
        reached = [(found, run.rate) for run in group if (found := steps_to(run.curve, loss)) is not None]
        fewest, rate = min(reached)
        steps.append(fewest)
        rates.append(rate)
    return _fitted(loss, np.array(list(runs)), np.array(steps), np.array(rates))


def _fitted(loss: float, batches: FloatArray, steps: FloatArray, rates: FloatArray) -> Level:
    basis = np.stack([np.ones_like(batches), batches.mean() / batches], axis=-1) / steps[:, np.newaxis]
    coefficients, *_ = np.linalg.lstsq(basis, np.ones_like(steps), rcond=None)
    least_steps, least_tokens = float(coefficients[0]), float(coefficients[1] * batches.mean())
    low = high = None
    critical = math.nan
    if least_steps > 0 and least_tokens > 0:
        critical = least_tokens / least_steps
        freedom = len(steps) - 2
        if freedom > 0:
            noise = float(np.sum((basis @ coefficients - 1) ** 2)) / freedom
            slope = np.array([-1, 1]) / coefficients  # of log B_crit
            std = math.sqrt(noise * float(slope @ np.linalg.inv(basis.T @ basis) @ slope))
            reach = math.exp(min(float(student.ppf(0.975, freedom)) * std, 700))
            low, high = critical / reach, critical * reach
    return Level(loss, batches, steps, rates, least_steps, least_tokens, critical, low, high)


def _edge_warnings(runs: Mapping[float, list[_Run]], levels: Sequence[Level]) -> list[str]:
    """Batches whose best rate is the smallest or largest tried: fewer steps may be beyond."""
    found = []
    for i, (batch, group) in enumerate(runs.items()):
        if len(group) == 1:
            found.append(
                f"batch {batch:.4g}: one learning rate ({group[0].rate:g}) was tried; a better one needs fewer steps"
            )
            continue
        for edge, name in ((group[0].rate, "smallest"), (group[-1].rate, "largest")):
            count = sum(level.rates[i] == edge for level in levels)
            if count:
                found.append(
                    f"batch {batch:.4g}: the {name} learning rate tried ({edge:g}) is the best at {count} of "
                    f"{len(levels)} losses; try ones beyond"
                )
    return found


def _level_warnings(levels: Sequence[Level]) -> list[str]:
    found = []
    for level in levels:
        if not level.b_crit > 0:
            found.append(
                f"loss {level.loss:.4g}: steps don't fall with the batch as S_min + E_min/B with both above 0: no "
                "B_crit"
            )
        elif not level.batches[0] <= level.b_crit <= level.batches[-1]:
            found.append(
                f"loss {level.loss:.4g}: B_crit = {level.b_crit:.3g} lies outside the batches tried "
                f"({level.batches[0]:.3g} to {level.batches[-1]:.3g})"
            )
    return found
