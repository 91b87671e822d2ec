"""Runs in: the points that a law is fitted to, from run folders, wandb, TensorBoard or tables."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megamup.errors import MegamupError
from megamup.scaling.curves import (
    DEFAULT_SHARE,
    FINAL,
    At,
    FloatArray,
    Moment,
    Smoothing,
    parse_at,
    parse_smoothing,
    read_at,
    smoothed,
)
from megamup.scaling.curves import Curve as Curve
from megamup.scaling.readers import conventions
from megamup.scaling.readers.columns import QUANTITIES, check_keys
from megamup.scaling.readers.conventions import AS_IN, NONE
from megamup.scaling.readers.log import RunLog, listed, matches, nearest
from megamup.scaling.readers.rows import RowPoint, rows_of, table_convention, tracks_of_rows
from megamup.scaling.readers.sources import check_excluded, check_unique, find_runs, read_run
from megamup.scaling.readers.tables import facts_by_run, filtered, histories, read_table
from megamup.scaling.readers.track import Track, default_columns, track_of

LOSSES = {"valid_loss": "held-out loss", "loss": "training loss, smoothed"}
PARAMETER_COUNTS = conventions.PARAMETER_COUNTS
DECAYING = ("cosine", "linear", "wsd")
"""Schedules under which a loss before the end is no final loss of a shorter run."""


@dataclass(frozen=True)
class Point:
    """One measured loss as a law sees it."""

    name: str
    """Unique within a ladder."""
    inputs: dict[str, float]
    """What is known of N (parameters), D (tokens seen), C (FLOPs), S (optimizer steps), B (batch, tokens a step), U
    (unique tokens the run could see) and lr (peak)."""
    loss: float
    """Nats per token."""
    source: Path | None = None
    """The run's folder or file, where `read_curve` finds its curve; None for tables."""
    run: str = ""
    """The run that it belongs to: points of one curve are no independent evidence. Default `name`."""


@dataclass(frozen=True)
class Ladder:
    """Points that may be fitted together: one way to count FLOPs and parameters, one loss."""

    points: tuple[Point, ...]
    convention: dict[str, str]
    """What C ("flops"), N ("parameters") and L ("loss") mean for these points; "ratio", what C/(N·D) is where all are
    known; "reading", how runs were read, for `load_holdout`."""
    warnings: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.points)

    def sorted_by(self, x: str) -> Ladder:
        """The same points from the smallest to the largest input `x`."""
        points = sorted(self.points, key=lambda point: point.inputs[x])
        return Ladder(tuple(points), self.convention, self.warnings)

    def columns(self, keys: Sequence[str]) -> FloatArray:
        """Inputs of all points: (points, keys).

        Raises:
            MegamupError: a point doesn't have one.
        """
        for key in keys:
            lacking = [point.name for point in self.points if key not in point.inputs]
            if lacking:
                raise MegamupError(
                    f"{key} ({QUANTITIES.get(key, 'unknown')}) is not known of {listed(lacking, 5)}; expected it of "
                    f"every point: say which column it is with --columns {key}=COLUMN, or leave these out by --exclude"
                )
        return np.array([[point.inputs[key] for key in keys] for point in self.points]).reshape(-1, len(keys))

    @property
    def losses(self) -> FloatArray:
        """(points,)."""
        return np.array([point.loss for point in self.points])

    @property
    def runs(self) -> NDArray[np.int64]:
        """Index of each point's run, in the order in which they first appear: (points,)."""
        index: dict[str, int] = {}
        return np.array([index.setdefault(point.run or point.name, len(index)) for point in self.points], np.int64)

    def hash(self) -> str:
        """SHA-256 of points and conventions, whatever their order and wherever they lie."""
        rows = [[p.name, p.run or p.name, sorted(p.inputs.items()), p.loss] for p in self.points]
        counted = {key: self.convention.get(key) for key in conventions.QUANTITY_OF}
        return hashlib.sha256(json.dumps([sorted(rows), counted], sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Reading:
    """What is read of runs and tables, and how."""

    loss: str = "valid_loss"
    """One of LOSSES; `--columns L=` names it where it has another name."""
    parameters: str = "non_embedding"
    """One of PARAMETER_COUNTS: what N is in runs of ours."""
    columns: Mapping[str, str] = field(default_factory=dict)
    at: At | None = None
    """None: the end of a run; every row of a table."""
    smoothing: Smoothing | None = None
    """None: over 2% of the tokens for training losses, none otherwise."""
    stated: Mapping[str, str] = field(default_factory=dict)
    """Conventions of tables that their user knows."""
    exclude: Sequence[str] = ()
    """Names of runs or points to leave out."""
    where: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Column (or a run's fact) -> the values to keep."""
    facts: Path | None = None
    """A table with a row for each run, which gives what logs lack."""

    @property
    def smooth(self) -> Smoothing:
        """The smoothing that is used."""
        if self.smoothing is not None:
            return self.smoothing
        return Smoothing("share", DEFAULT_SHARE) if self.loss == "loss" else Smoothing("none")

    @property
    def defaults(self) -> dict[str, str]:
        """Column of each quantity in runs of ours."""
        return default_columns(self.loss, self.parameters)

    def loss_meaning(self, name: str) -> str:
        """The loss of a curve called `name`, in words."""
        text = f"{name} {(self.at or FINAL).meaning}"
        return text if self.smooth.kind == "none" else f"{text}, {self.smooth.meaning}"

    def as_text(self) -> str:
        """For `from_text`: what held-out runs must be read by, too."""
        values = {"loss": self.loss, "parameters": self.parameters, "columns": dict(self.columns)}
        return json.dumps(values | {"at": str(self.at or FINAL), "smooth": str(self.smooth)}, sort_keys=True)

    @staticmethod
    def from_text(text: str) -> Reading:
        """The reading of `as_text`."""
        values = json.loads(text)
        smoothing, at = parse_smoothing(values.pop("smooth")), parse_at(values.pop("at"))
        return Reading(**values, at=at, smoothing=smoothing)


@dataclass(frozen=True)
class _Part:
    """Runs or rows that were read together, and how they were counted."""

    name: str
    tracks: list[Track]
    rows: list[RowPoint]
    convention: dict[str, str]
    counted: bool
    """C was counted by the trainer, as its convention says."""


def load(runs: Sequence[Path], tables: Sequence[Path], reading: Reading) -> Ladder:
    """Points of runs (folders of ours, offline wandb runs, TensorBoard) and of tables, as one ladder.

    Raises:
        MegamupError: what a reader refuses; a run short of its last step or without its loss there; a moment outside a
            curve; conventions that differ; a name that is there twice; a name to leave out that isn't there.
    """
    finished = (reading.at or FINAL).kind in ("final", "best", "fraction")
    parts = _parts(runs, tables, reading, curves=reading.at is not None, finished=finished)
    points = [Point(row.name, row.inputs, row.loss, run=row.run) for part in parts for row in part.rows]
    for track in (track for part in parts for track in part.tracks):
        points += _points(track, reading)
    return _ladder(points, parts, reading)


def load_curves(runs: Sequence[Path], tables: Sequence[Path], reading: Reading) -> tuple[Ladder, list[Curve]]:
    """The curves of `load_tracks`.

    Raises:
        MegamupError: as `load_tracks`.
    """
    ladder, tracks = load_tracks(runs, tables, reading)
    return ladder, [track.curve for track in tracks]


def load_tracks(runs: Sequence[Path], tables: Sequence[Path], reading: Reading) -> tuple[Ladder, list[Track]]:
    """Runs with their whole curves, smoothed, and a ladder of their last points, one each and in the same order.

    Runs may be short of their last step. A table's rows are curves where `run=` names their runs.

    Raises:
        MegamupError: as `load`, except of runs that are short.
    """
    parts = _parts(runs, tables, reading, curves=True, finished=False)
    tracks = [replace(t, curve=smoothed(t.curve, reading.smooth)) for part in parts for t in part.tracks]
    points = [_point(track, track.curve.moment(-1), track.name) for track in tracks]
    return _ladder(points, parts, reading), tracks


def load_runs(
    folders: Sequence[Path],
    *,
    loss: str = "valid_loss",
    parameters: str = "non_embedding",
    exclude: Sequence[str] = (),
) -> Ladder:
    """`load` of runs alone, at their end."""
    return load(folders, (), Reading(loss=loss, parameters=parameters, exclude=exclude))


def load_csv(path: Path, columns: dict[str, str], *, exclude: Sequence[str] = ()) -> Ladder:
    """`load` of one table alone."""
    return load((), (path,), Reading(columns=columns, exclude=exclude))


def load_holdout(folders: Sequence[Path], ladder: Ladder) -> tuple[Point, ...]:
    """Points from runs that `ladder` was not fitted to, read as its own runs were.

    Raises:
        MegamupError: as `load`; a run that is among the ladder's; N, C or L counted in another way.
    """
    reading = Reading.from_text(ladder.convention["reading"]) if "reading" in ladder.convention else Reading()
    held = load(folders, (), reading)
    fitted = {point.source.resolve() for point in ladder.points if point.source is not None}
    for point in held.points:
        if point.source is not None and point.source.resolve() in fitted:
            raise MegamupError(
                f"--holdout: {point.name} is one of the fitted runs; expected runs that the fit has not "
                f"seen: fit again with --exclude {point.name}"
            )
    conventions.check_same({"the fitted runs": ladder.convention, "held out": held.convention}, "--holdout")
    return held.points


def read_curve(run: Path) -> Curve:
    """The training curve of a run, as it was logged.

    Raises:
        MegamupError: what its reader refuses, or it logs no `loss`.
    """
    return track_of(read_run(run), {}, default_columns("loss", "non_embedding")).curve


def _parts(
    runs: Sequence[Path], tables: Sequence[Path], reading: Reading, *, curves: bool, finished: bool
) -> list[_Part]:
    """Everything read; a table's rows as curves, and runs only where `finished`, as asked."""
    check_keys(reading.columns)
    parts: list[_Part] = []
    names: list[str] = []
    for path in tables:
        table = filtered(read_table(path), reading.where)
        logs = histories(table, reading.columns)
        if logs:
            parts += _logged(logs, replace(reading, where={}), names, finished)
            continue
        prefix = f"{path.stem} " if len(tables) > 1 else ""
        rows, seen = rows_of(table, reading.columns, reading.exclude, prefix)
        names += seen
        convention = conventions.agreed(table_convention(reading.columns), reading.stated, str(path))
        if curves and convention["loss"].startswith(AS_IN):
            convention["loss"] = reading.loss_meaning(convention["loss"])
        if reading.smoothing is not None and not curves:
            raise MegamupError(
                f"--smooth: {reading.smoothing}: {path} has single points, and no curve to average; leave it out, or "
                "say which rows are of one run (--columns run=COLUMN) and where to read it (--at)"
            )
        tracks = tracks_of_rows(rows, str(path)) if curves else []
        parts.append(_Part(str(path), tracks, [] if curves else rows, convention, counted=False))
    found = find_runs(runs)
    names += found
    logs = [read_run(path, name) for name, path in found.items() if name not in reading.exclude]
    if len({log.name for log in logs}) < len(logs):  # wandb may show two runs under one name
        logs = [replace(log, name=log.source.as_posix() if log.source else log.name) for log in logs]
    # Beside tables, `--columns` is theirs.
    parts += _logged(logs, replace(reading, columns={}) if tables else reading, names, finished)
    check_excluded(reading.exclude, names)
    if not parts:
        raise MegamupError(f"--exclude, --where: leave none of {listed(names)}; expected some runs: drop a condition")
    return parts


def _logged(logs: Sequence[RunLog], reading: Reading, names: list[str], finished: bool) -> list[_Part]:
    """A part for each log that isn't left out; `names` gets them all."""
    parts = []
    extra = facts_by_run(reading.facts) if reading.facts is not None else {}
    for log in logs:
        names.append(log.name)
        facts = log.facts | extra.get(log.name, {})
        for column in reading.where:
            if column not in facts:
                raise MegamupError(
                    f"--where: {log.name} has no {column!r}{nearest(column, facts)}; it has {listed(facts)}"
                )
        if log.name in reading.exclude or not matches(facts, reading.where):
            continue
        if finished:
            _check_finished(log)
        track = track_of(replace(log, facts=facts), reading.columns, reading.defaults)
        convention = conventions.agreed(_convention(log, track, reading), reading.stated, log.name)
        counted = convention["flops"] == log.flops_convention
        parts.append(_Part(log.name, [track], [], convention, counted))
    return parts


def _convention(log: RunLog, track: Track, reading: Reading) -> dict[str, str]:
    """How a logged run counts: what it says itself, or the name of what it was read from."""
    mapped = {key: AS_IN + text for key, text in reading.columns.items()}
    flops = mapped.get("C", log.flops_convention or f"{AS_IN}{reading.defaults['C']}")
    return {
        "flops": flops if np.all(np.isfinite(track.curve.flops)) else NONE,
        "parameters": mapped.get("N", reading.parameters) if "N" in track.constants else NONE,
        "loss": reading.loss_meaning(reading.columns.get("L", reading.loss)),
    }


def _points(track: Track, reading: Reading) -> list[Point]:
    """The points of a run that `reading.at` asks for."""
    where = reading.at or FINAL
    if where.kind == "final" and reading.loss == "valid_loss" and track.last_loss_step < track.last_step:
        raise MegamupError(
            f"{track.name}: valid_loss is missing at the final step {track.last_step:g} (last at step "
            f"{track.last_loss_step:g}); expected an evaluation there: let train.eval_every divide train.steps, fit "
            "the training loss with --loss loss, or interpolate with --at"
        )
    try:
        moments = read_at(smoothed(track.curve, reading.smooth), where, warmup_steps=track.warmup_steps)
    except MegamupError as error:
        raise MegamupError(f"{track.name}: {error}") from None
    if len(moments) == 1:
        return [_point(track, moments[0], track.name)]
    return [_point(track, moment, f"{track.name} {i}/{len(moments)}") for i, moment in enumerate(moments, start=1)]


def _check_finished(log: RunLog) -> None:
    last, planned = log.records[-1]["step"], log.planned_steps
    if planned is not None and last < planned:
        raise MegamupError(
            f"{log.name}: stopped at step {last:g} of {planned:g} (train.steps); its loss is no final loss: resume it "
            f"to the end, or leave it out with --exclude {log.name}"
        )


def _point(track: Track, moment: Moment, name: str) -> Point:
    measured = {"D": moment.tokens, "C": moment.flops, "S": moment.step}
    inputs = track.constants | {key: value for key, value in measured.items() if math.isfinite(value)}
    return Point(name, inputs, moment.loss, track.source, track.name)


def _ladder(points: Sequence[Point], parts: Sequence[_Part], reading: Reading) -> Ladder:
    """Points as one ladder, once they are known to be counted alike."""
    check_unique([point.name for point in points], "names of runs")
    convention = conventions.check_same({part.name: part.convention for part in parts})
    convention["reading"] = reading.as_text()
    if points and all({"N", "D", "C"} <= point.inputs.keys() for point in points):
        n, d, c = np.array([[point.inputs[key] for key in "NDC"] for point in points]).T
        counted = all(part.counted for part in parts)
        convention["ratio"] = conventions.flops_ratio(n, d, c, convention, counted=counted)
    return Ladder(tuple(points), convention, _warnings(parts, reading))


def _warnings(parts: Sequence[_Part], reading: Reading) -> tuple[str, ...]:
    schedules = {track.schedule for part in parts for track in part.tracks if track.schedule in DECAYING}
    if reading.at is None or reading.at.kind == "final" or not schedules:
        return ()
    kinds = ", ".join(sorted(str(kind) for kind in schedules))
    return (
        f"losses are read before the end of runs whose rate decays (schedule.kind={kinds}): a run planned to "
        "end there would be lower (Hoffmann et al. 2022, section 3.1)",
    )
