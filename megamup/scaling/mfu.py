"""How well a run used its devices: MFU and tokens/s over time, stalls, goodput, and what the lost time went to.

Everything comes from the run's folder. `metrics.jsonl` tells how fast the steps were (evaluation and saving aside),
how long evaluation and saving took and when each record was written; `starts.jsonl` when the run was started and
resumed. A run that lacks the clock (written before there was one) has MFU, but its goodput is unknown.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megamup.errors import MegamupError
from megamup.scaling.readers.run_folder import read_metrics

FloatArray = NDArray[np.float64]

STALL = 0.5
"""An interval is stalled where its tokens came at less than this share of the run's median tokens/s.

Evaluation and saving aside, but with time on the wall clock that nobody accounts for: a suspended machine is a stall.
"""
MEASURED = ("evaluation", "saving", "compile", "profile")
"""What a run measures itself: ``NAME_s`` of its records."""
CAUSES = ("restarts", "start-up", *MEASURED, "stalls", "other")
"""What wall time that did not train went to.

``restarts``: from the last record that was kept to the next start, which includes the steps that were thrown away.
``start-up``: from a start to its first step, and what a stalled first interval (cold caches) took beyond the median
speed. ``evaluation``, ``saving``, ``compile``, ``profile``: as the run measured them, but for a save after the last
record.
``stalls``: what any other stalled interval took beyond the median speed. ``other``: the rest, such as writing logs.
"""
CLOCK_STEP_S = 5.0
"""A clock that is this much behind the time that the steps took has been set back; less is rounding."""


@dataclass(frozen=True)
class Intervals:
    """The n intervals between logged steps, in order; seconds since the first start, or since the first step where
    the run has no clock."""

    step: FloatArray
    """(n,), the step that ends the interval."""
    begin_s: FloatArray
    end_s: FloatArray
    tokens: FloatArray
    tokens_per_s: FloatArray
    """Without evaluation and saving, as `metrics.jsonl` has it."""
    mfu_percent: FloatArray
    loss: FloatArray
    """Nats per token; NaN where the record has none."""
    stalled: NDArray[np.bool_]

    @property
    def trained_s(self) -> FloatArray:
        """Seconds that the steps took: (n,)."""
        return self.tokens / self.tokens_per_s


@dataclass(frozen=True)
class Stall:
    """Stalled intervals in a row."""

    first_step: int
    last_step: int
    begin_s: float
    end_s: float
    tokens_per_s: float


@dataclass(frozen=True)
class Utilisation:
    """What `utilisation` finds in one run."""

    name: str
    folder: Path
    intervals: Intervals
    median_tokens_per_s: float
    """Over steps."""
    starts_s: tuple[float, ...]
    """Seconds since the first start of every start that is known; empty without a clock."""
    wall_s: float | None
    """From the first start to the last record or start, idle time between included; None without a clock."""
    lost_s: dict[str, float] | None
    """Seconds by `CAUSES`; with `productive_s` they are `wall_s`. None without a clock."""
    no_goodput: str | None
    """Why goodput is unknown."""
    peak_flops: float | None
    """FLOP/s of all devices together."""
    peak_basis: str

    @property
    def tokens_per_s(self) -> float:
        """Mean over the time that the steps took."""
        return float(self.intervals.tokens.sum() / self.intervals.trained_s.sum())

    @property
    def mfu_percent(self) -> float:
        """Mean over the time that the steps took."""
        return float(np.average(self.intervals.mfu_percent, weights=self.intervals.trained_s))

    @property
    def productive_s(self) -> float | None:
        """Wall time that trained: a stalled interval counts for as long as its tokens take at the median speed."""
        return None if self.wall_s is None or self.lost_s is None else self.wall_s - sum(self.lost_s.values())

    @property
    def goodput_percent(self) -> float | None:
        """Share of the wall time that trained; None where unknown."""
        return None if self.productive_s is None or not self.wall_s else 100 * self.productive_s / self.wall_s

    @property
    def wall_mfu_percent(self) -> float | None:
        """MFU over the whole wall time: the steps' FLOPs over what the devices could have done meanwhile."""
        if self.wall_s is None:
            return None
        return self.mfu_percent * float(self.intervals.trained_s.sum()) / self.wall_s

    @property
    def restarts(self) -> int | None:
        return len(self.starts_s) - 1 if self.starts_s else None

    @property
    def stalls(self) -> list[Stall]:
        """Stalled intervals, those in a row together."""
        at = self.intervals
        edges = np.flatnonzero(np.diff(np.concatenate(([False], at.stalled, [False])).astype(np.int8)))
        found = []
        for first, end in zip(edges[::2], edges[1::2], strict=True):
            speed = float(at.tokens[first:end].sum() / at.trained_s[first:end].sum())
            before = int(at.step[first - 1]) if first else 0
            last = end - 1
            found.append(Stall(before + 1, int(at.step[last]), float(at.begin_s[first]), float(at.end_s[last]), speed))
        return found


def utilisations(folders: Sequence[Path]) -> list[Utilisation]:
    """The utilisation of each run, named by the end of its path that tells it from the others.

    Raises:
        MegamupError: as `utilisation`; one folder twice.
    """
    paths = [folder.resolve() for folder in folders]
    twice = next((folder for folder, path in zip(folders, paths, strict=True) if paths.count(path) > 1), None)
    if twice is not None:
        raise MegamupError(f"{twice}: is given twice; expected different run folders")
    names, parts = [path.name for path in paths], 1
    while len(set(names)) < len(names):
        parts += 1
        names = ["/".join(path.parts[-parts:]) for path in paths]
    return [replace(utilisation(folder), name=name) for folder, name in zip(folders, names, strict=True)]


def utilisation(folder: Path) -> Utilisation:
    """The utilisation of a run from its folder.

    Raises:
        MegamupError: no `metrics.jsonl`, none of its records has a speed, or one has a value that can't be.
    """
    path = folder / "metrics.jsonl"
    records = [record for record in read_metrics(path) if "tokens_per_s" in record]
    if not records:
        raise MegamupError(f"{path}: no record has tokens_per_s; expected the metrics of a training run: leave it out")
    step, total, speed, mfu = (_column(path, records, key) for key in ("step", "tokens", "tokens_per_s", "mfu_percent"))
    tokens = np.diff(total, prepend=0.0)
    if np.any(tokens <= 0):
        where = int(step[np.argmax(tokens <= 0)])
        raise MegamupError(
            f"{path}: step {where}: tokens {total[step == where][0]:g} are no more than before; restore it"
        )
    loss = np.array([_number(record.get("loss"), math.nan) for record in records])
    median = _median(speed, np.diff(step, prepend=0.0))
    end = np.cumsum(tokens / speed)
    at = Intervals(step, end - tokens / speed, end, tokens, speed, mfu, loss, speed < STALL * median)
    peak, basis = _peak(folder)
    found = Utilisation(folder.resolve().name, folder, at, median, (), None, None, None, peak, basis)
    try:
        starts, resumed = _starts(folder / "starts.jsonl")
        return _on_the_clock(found, records, starts, resumed)
    except UnknownTimeError as reason:
        return replace(found, no_goodput=str(reason))


class UnknownTimeError(Exception):
    """Why the wall time of a run can't be told; never leaves this module."""


def _on_the_clock(
    run: Utilisation, records: Sequence[dict[str, Any]], starts: FloatArray, resumed: FloatArray
) -> Utilisation:
    """`run` with its wall time, and what that went to.

    Args:
        starts: (s,), Unix seconds, in the order of the starts.
        resumed: (s,), the step that each went on from.
    """
    at, median, zero = run.intervals, run.median_tokens_per_s, float(starts[0])
    if any("time_unix_s" not in record for record in records):
        raise UnknownTimeError("records of metrics.jsonl have no time_unix_s: they were written before it was recorded")
    written = np.array([_number(record["time_unix_s"], math.nan) for record in records])
    measured = {name: np.array([_number(record.get(f"{name}_s"), 0.0) for record in records]) for name in MEASURED}
    # The interval that each start begins; a later start that went further back threw an earlier one's records away.
    begins = np.minimum.accumulate(np.searchsorted(at.step, resumed, side="right")[::-1])[::-1]
    begin, first = np.concatenate(([zero], written[:-1])), np.zeros(len(written), dtype=bool)
    restarts, last = 0.0, float(written[-1])
    for start, step, interval in zip(starts, resumed, begins, strict=True):
        before = last if interval == len(written) else begin[interval]
        _forward(start - before, f"the start from step {step:.0f}")
        restarts += max(start - before, 0.0)
        if interval == len(written):
            last = start  # a start that has written nothing yet
        else:
            begin[interval], first[interval] = start, True
    spent = written - begin - sum(measured.values())  # on steps, and on what nobody accounts for
    for step, slack in zip(at.step, spent - at.trained_s, strict=True):
        _forward(slack, f"step {step:.0f}")
    spent = np.maximum(spent, at.trained_s)
    # What goes before the first step of a start is known, and no stall of that step.
    slow = at.tokens / np.where(first, at.trained_s, spent) < STALL * median
    beyond = spent - np.where(slow, at.tokens / median, at.trained_s)
    lost = {
        "restarts": restarts,
        "start-up": float(beyond[first].sum()),
        **{name: float(seconds.sum()) for name, seconds in measured.items()},
        "stalls": float(beyond[slow & ~first].sum()),
        "other": float(beyond[~slow & ~first].sum()),
    }
    timed = replace(at, begin_s=begin - zero, end_s=written - zero, stalled=slow & ~first)
    return replace(run, intervals=timed, starts_s=tuple((starts - zero).tolist()), wall_s=last - zero, lost_s=lost)


def _forward(seconds: float, where: str) -> None:
    """Raise UnknownTimeError where time that must be positive is not, beyond the tolerance."""
    if not seconds >= -CLOCK_STEP_S:
        raise UnknownTimeError(f"the clock went back by {-seconds:.0f} s at {where}")


def _starts(path: Path) -> tuple[FloatArray, FloatArray]:
    """When the run was started or resumed (Unix seconds), and from which step."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        starts = [json.loads(line) for line in lines if line.strip()]
        found = np.array([[start["time_unix_s"], start["step"]] for start in starts], dtype=np.float64)
    except OSError:
        raise UnknownTimeError("the folder has no starts.jsonl: the run was made before starts were recorded") from None
    except (ValueError, KeyError, TypeError):
        raise UnknownTimeError(f"{path.name} has a line without `step` and `time_unix_s`") from None
    if not len(found) or found[0, 1] != 0:
        raise UnknownTimeError(f"{path.name} lacks the run's first start")
    return found[:, 0], found[:, 1]


def _median(values: FloatArray, weights: FloatArray) -> float:
    """The weighted median: values (n,), weights (n,)."""
    order = np.argsort(values)
    share = np.cumsum(weights[order])
    return float(values[order][np.searchsorted(share, share[-1] / 2)])


def _column(path: Path, records: Sequence[dict[str, Any]], key: str) -> FloatArray:
    """A key of every record, finite and above 0."""
    values = np.array([_number(record.get(key), math.nan) for record in records])
    wrong = ~(np.isfinite(values) & (values > 0))
    if np.any(wrong):
        record = records[int(np.argmax(wrong))]
        raise MegamupError(
            f"{path}: step {record['step']}: {key} is {record.get(key)!r}; expected a finite number above 0: restore "
            "the file, or delete that line"
        )
    return values


def _number(value: object, default: float) -> float:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else default


def _peak(folder: Path) -> tuple[float | None, str]:
    """Peak FLOP/s of the run's devices together and what it rests on, as the trainer wrote it."""
    try:
        environment = json.loads((folder / "environment.json").read_text(encoding="utf-8"))
        return float(environment["peak_flops"]), str(environment["peak_basis"])
    except (OSError, ValueError, KeyError, TypeError):
        return None, "not recorded in environment.json"


def table_rows(runs: Sequence[Utilisation]) -> list[tuple[str, ...]]:
    """A line a run, the header first; what is unknown is "-"."""
    header = ("run", "steps", "hours", "tokens/s", "MFU %", "MFU % of wall time", "goodput %", "restarts", "stalls")
    rows: list[tuple[str, ...]] = [header]
    for run in runs:
        hours = (run.wall_s or float(run.intervals.end_s[-1])) / 3600
        figures = (
            f"{run.intervals.step[-1]:.0f}",
            f"{hours:.3g}",
            f"{run.tokens_per_s:,.0f}",
            f"{run.mfu_percent:.3g}",
            "-" if run.wall_mfu_percent is None else f"{run.wall_mfu_percent:.3g}",
            _percent(run.goodput_percent),
            "-" if run.restarts is None else f"{run.restarts}",
            f"{len(run.stalls)}",
        )
        rows.append((run.name, *figures))
    return rows


def lost_rows(runs: Sequence[Utilisation]) -> list[tuple[str, ...]]:
    """Share of the wall time by what it went to, in percent, a line a run; the header first."""
    rows: list[tuple[str, ...]] = [("% of wall time", "training", *CAUSES)]
    for run in runs:
        shares = [None if run.lost_s is None or not run.wall_s else 100 * run.lost_s[c] / run.wall_s for c in CAUSES]
        rows.append((run.name, _percent(run.goodput_percent), *map(_percent, shares)))
    return rows


def notes(runs: Sequence[Utilisation]) -> list[tuple[str, str]]:
    """What each run's figures rest on, and why its goodput is unknown where it is."""
    found = []
    for run in runs:
        peak = "unknown" if run.peak_flops is None else f"{run.peak_flops:.4g} FLOP/s"
        high = float(run.intervals.mfu_percent.max())
        doubt = (
            f"; too low, as MFU reached {high:.0f}%: other work had a share of the devices then" if high > 100 else ""
        )
        reason = f"; goodput unknown: {run.no_goodput}" if run.no_goodput else ""
        found.append((run.name, f"peak of all devices {peak}, {run.peak_basis}{doubt}{reason}"))
    return found


def as_json(run: Utilisation) -> dict[str, Any]:
    """Everything about a run as one JSON object; unknown is null."""
    at = run.intervals
    series = {
        "step": at.step.astype(int).tolist(),
        "begin_s": at.begin_s.tolist(),
        "end_s": at.end_s.tolist(),
        "tokens_per_s": at.tokens_per_s.tolist(),
        "mfu_percent": at.mfu_percent.tolist(),
        "loss": [None if math.isnan(loss) else loss for loss in at.loss.tolist()],
        "stalled": at.stalled.tolist(),
    }
    return {
        "run": run.name,
        "folder": str(run.folder),
        "tokens_per_s": run.tokens_per_s,
        "median_tokens_per_s": run.median_tokens_per_s,
        "mfu_percent": run.mfu_percent,
        "mfu_convention": "palm",
        "peak_flops": run.peak_flops,
        "peak_basis": run.peak_basis,
        "wall_s": run.wall_s,
        "wall_mfu_percent": run.wall_mfu_percent,
        "goodput_percent": run.goodput_percent,
        "goodput_note": run.no_goodput,
        "productive_s": run.productive_s,
        "lost_s": run.lost_s,
        "starts_s": list(run.starts_s),
        "time_axis": "training steps alone" if run.wall_s is None else "wall clock from the first start",
        "stalls": [asdict(stall) for stall in run.stalls],
        "series": series,
    }


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"
