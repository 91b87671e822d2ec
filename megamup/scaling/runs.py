"""Runs in: the points that a law is fitted to, from run folders or from a CSV file."""

import csv
import difflib
import io
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from megamup.errors import MegamupError

# Share of the training losses at a run's end whose mean stands for its final loss.
LOSS_TAIL = 0.05
LOSSES = {
    "valid_loss": "valid_loss at the final step",
    "loss": f"mean of the last {LOSS_TAIL:.0%} of the training losses",
}
PARAMETER_COUNTS = ("non_embedding", "total")
INPUTS = ("N", "C", "D")


@dataclass(frozen=True)
class Point:
    """One run as a law sees it."""

    name: str
    inputs: dict[str, float]
    """What is known of N (parameters), C (FLOPs of the whole run) and D (tokens)."""
    loss: float
    """Nats per token."""
    source: Path | None = None
    """The run's folder, where its loss curve lies."""


@dataclass(frozen=True)
class Ladder:
    """Points that may be fitted together: one way to count FLOPs and parameters, one loss."""

    points: tuple[Point, ...]
    convention: dict[str, str]
    """What C ("flops"), N ("parameters") and L ("loss") mean for these points."""

    def sorted_by(self, x: str) -> "Ladder":
        """The same points from the smallest to the largest input `x`."""
        return Ladder(tuple(sorted(self.points, key=lambda point: point.inputs[x])), self.convention)


@dataclass(frozen=True)
class Curve:
    """Training loss (nats per token) against tokens, both of shape (logged steps,)."""

    tokens: list[float] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)


def nearest(word: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?` for the known name closest to `word`, empty where none is close."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a `metrics.jsonl`, one for each step, in the order of the steps.

    Lines of one step are merged, later over earlier: an evaluation may stand on its own line, and a resumed
    run writes some steps twice. A half-written last line is what a killed run leaves, and is dropped.

    Raises:
        MegamupError: no such file, no complete line in it, or a broken line before the last (file:line).
    """
    if not path.is_file():
        raise MegamupError(f"{path}: no such file; expected the metrics of a run, one JSON object a line")
    lines = path.read_text(encoding="utf-8", errors="replace").rstrip().split("\n")
    by_step: dict[float, dict[str, Any]] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        record = _parse_record(line)
        if record is not None:
            by_step.setdefault(record["step"], {}).update(record)
        elif number < len(lines):
            raise MegamupError(
                f"{path}:{number}: {line[:60]!r} is no JSON object with a `step`; expected one object a "
                "line: restore the file, or delete this line if its step is of no use"
            )
    if not by_step:
        raise MegamupError(f"{path}: holds no complete line; the run logged nothing, so leave it out")
    return [by_step[step] for step in sorted(by_step)]


def _parse_record(line: str) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    is_step = isinstance(record, dict) and isinstance(record.get("step"), int | float)
    return record if is_step else None


def read_curve(run: Path) -> Curve:
    """The training curve of a run folder.

    Raises:
        MegamupError: as `read_metrics`.
    """
    records = [r for r in read_metrics(run / "metrics.jsonl") if "loss" in r and "tokens" in r]
    return Curve([float(r["tokens"]) for r in records], [float(r["loss"]) for r in records])


def load_runs(
    folders: Sequence[Path],
    *,
    loss: str = "valid_loss",
    parameters: str = "non_embedding",
    exclude: Sequence[str] = (),
) -> Ladder:
    """Points from run folders (`config.yaml`, `metrics.jsonl`, `environment.json`).

    C is the last `flops`, N `parameters.{parameters}` of environment.json, D the last `tokens`. The loss is
    `valid_loss` at the final step or, with `loss="loss"`, the mean of the last 5% of the training losses.

    Raises:
        MegamupError: a folder that is no run, a run short of its last step or without the loss asked for,
            runs whose FLOPs are counted differently, or a name in `exclude` that no folder has.
    """
    names = _run_names(folders)
    _check_excluded(exclude, names)
    points: list[Point] = []
    convention_of: dict[str, str] = {}
    for name, folder in zip(names, folders, strict=True):
        if name not in exclude:
            point, convention_of[name] = _load_run(name, folder, loss, parameters)
            points.append(point)
    if len(set(convention_of.values())) > 1:
        counted = ", ".join(f"{name}: {convention}" for name, convention in convention_of.items())
        raise MegamupError(
            f"flops_convention: {counted}; expected one convention, as C counted in two ways is no ladder: "
            "exclude one kind, or train those runs again with one `flops_convention`"
        )
    return Ladder(
        points=tuple(points),
        convention={
            "flops": next(iter(convention_of.values()), "none"),
            "parameters": parameters,
            "loss": LOSSES[loss],
        },
    )


def load_holdout(folders: Sequence[Path], ladder: Ladder) -> tuple[Point, ...]:
    """Points from run folders that `ladder` was not fitted to, counted and read as its own points were.

    Raises:
        MegamupError: as `load_runs`, a run that is among the ladder's, or FLOPs counted in another way.
    """
    convention = ladder.convention
    loss = next((key for key, meaning in LOSSES.items() if meaning == convention["loss"]), "valid_loss")
    counted = convention["parameters"]
    parameters = counted if counted in PARAMETER_COUNTS else "non_embedding"
    held = load_runs(folders, loss=loss, parameters=parameters)
    fitted = {point.source.resolve() for point in ladder.points if point.source is not None}
    for point in held.points:
        if point.source is not None and point.source.resolve() in fitted:
            raise MegamupError(
                f"--holdout: {point.name} is one of the fitted runs; expected runs that the fit has not "
                f"seen: fit again with --exclude {point.name}"
            )
    # A ladder from a table states no convention that a run's could be held against.
    from_runs = any(point.source is not None for point in ladder.points)
    if from_runs and held.convention["flops"] != convention["flops"]:
        raise MegamupError(
            f"--holdout: flops_convention is {held.convention['flops']!r}; expected "
            f"{convention['flops']!r} as in the fitted runs: their C can't be compared"
        )
    return held.points


def load_csv(path: Path, columns: dict[str, str], *, exclude: Sequence[str] = ()) -> Ladder:
    """Points from a CSV file with a header; `columns` maps L and some of N, C, D, `name` to its column names.

    Without a `name` column a point is called `row LINE`. The file's FLOPs and loss are taken as they are.

    Raises:
        MegamupError: no such file or column, a value that is no positive number (file:line), two rows of one
            name, or a name in `exclude` that no row has.
    """
    if not path.is_file():
        raise MegamupError(f"--data: {path} is no file; expected a CSV file with a header line")
    allowed = ("L", "name", *INPUTS)
    for key in columns:
        if key not in allowed:
            raise MegamupError(f"--columns: {key!r} is unknown; expected {', '.join(allowed)} as KEY=COLUMN")
    if "L" not in columns or not any(key in columns for key in INPUTS):
        raise MegamupError(f"--columns: {columns} is not enough; expected L=COLUMN and N=COLUMN or C=COLUMN")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise MegamupError(f"--data: {path} is not UTF-8: byte {error.start}; expected a CSV file") from None
    with io.StringIO(text, newline="") as file:
        reader = csv.DictReader(file)
        present = list(reader.fieldnames or [])
        for key, column in columns.items():
            if column not in present:
                raise MegamupError(
                    f"--columns: {key}={column}: {path} has no column {column!r}{nearest(column, present)}; "
                    f"it has {', '.join(present)}"
                )
        rows = [(row, reader.line_num) for row in reader]
    names = [row[columns["name"]] if "name" in columns else f"row {line}" for row, line in rows]
    _check_unique(names, f"{path}, column {columns.get('name')}")
    _check_excluded(exclude, names)
    points = [
        _csv_point(name, row, columns, f"{path}:{line}")
        for name, (row, line) in zip(names, rows, strict=True)
        if name not in exclude
    ]
    convention = {
        "flops": f"as in column {columns['C']}" if "C" in columns else "none",
        "parameters": f"as in column {columns['N']}" if "N" in columns else "none",
        "loss": f"as in column {columns['L']}",
    }
    return Ladder(points=tuple(points), convention=convention)


def _load_run(name: str, folder: Path, loss: str, parameters: str) -> tuple[Point, str]:
    """The point of one run folder, and how its FLOPs were counted."""
    steps = _lookup(_read_config(folder / "config.yaml"), ("train", "steps"), folder / "config.yaml")
    environment = _read_json(folder / "environment.json")
    count = _lookup(environment, ("parameters", parameters), folder / "environment.json")
    convention = environment.get("flops_convention")
    if not isinstance(convention, str):
        raise MegamupError(
            f"{folder / 'environment.json'}: flops_convention is {convention!r}; expected its name, such "
            "as '6N': without it the FLOPs of this run can't be compared with others"
        )
    metrics = folder / "metrics.jsonl"
    records = read_metrics(metrics)
    last = records[-1]["step"]
    if last < steps:
        raise MegamupError(
            f"{name}: stopped at step {last} of {steps} (train.steps); its loss is no final loss: resume "
            f"it to the end, or leave it out with --exclude {name}"
        )
    inputs = {
        "N": _positive(count, f"{folder / 'environment.json'}: parameters.{parameters}"),
        "C": _positive(_last(records, "flops"), f"{metrics}: flops"),
        "D": _positive(_last(records, "tokens"), f"{metrics}: tokens"),
    }
    final = _final_valid_loss(name, records) if loss == "valid_loss" else _final_train_loss(records)
    point = Point(name, inputs, _positive(final, f"{metrics}: {loss} (name {name})"), folder)
    return point, convention


def _final_valid_loss(name: str, records: list[dict[str, Any]]) -> Any:
    evaluated = [r for r in records if "valid_loss" in r]
    last = records[-1]["step"]
    if not evaluated or evaluated[-1]["step"] != last:
        found = f"last at step {evaluated[-1]['step']}" if evaluated else "nowhere in metrics.jsonl"
        raise MegamupError(
            f"{name}: valid_loss is missing at the final step {last} ({found}); expected an evaluation "
            "there: let train.eval_every divide train.steps, or fit the training loss with --loss loss"
        )
    return evaluated[-1]["valid_loss"]


def _final_train_loss(records: list[dict[str, Any]]) -> float | None:
    losses = [r["loss"] for r in records if "loss" in r]
    tail = losses[-max(1, round(LOSS_TAIL * len(losses))) :]
    return sum(tail) / len(tail) if tail else None


def _last(records: list[dict[str, Any]], key: str) -> Any:
    return next((r[key] for r in reversed(records) if key in r), None)


def _csv_point(name: str, row: dict[str, str], columns: dict[str, str], where: str) -> Point:
    values = {key: _positive(row[column], f"{where}: {column}") for key, column in columns.items() if key != "name"}
    loss = values.pop("L")
    return Point(name, values, loss)


def _positive(value: Any, where: str) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not (math.isfinite(number) and number > 0):
        raise MegamupError(
            f"{where} is {value!r}; expected a finite number above 0: correct it, or leave this point out "
            "with --exclude"
        )
    return number


def _run_names(folders: Sequence[Path]) -> list[str]:
    for folder in folders:
        if not (folder / "metrics.jsonl").is_file():
            inside = sorted(path.parent.name for path in folder.glob("*/metrics.jsonl"))
            advice = (
                f"it holds the runs {', '.join(inside)}: give {folder}/*"
                if inside
                else "a run's folder has config.yaml, metrics.jsonl and environment.json"
            )
            raise MegamupError(f"--runs: {folder} is no run folder; {advice}")
    resolved = [str(folder.resolve()) for folder in folders]
    _check_unique(resolved, "--runs")
    names = [folder.resolve().name for folder in folders]
    # Two studies may use one name for a run: then the whole path is the name.
    return names if len(set(names)) == len(names) else [folder.as_posix() for folder in folders]


def _check_unique(names: Sequence[str], where: str) -> None:
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise MegamupError(f"{where}: {twice[0]!r} is given twice; expected every run once: drop one")


def _check_excluded(exclude: Sequence[str], names: Sequence[str]) -> None:
    for name in exclude:
        if name not in names:
            raise MegamupError(
                f"--exclude: no run is called {name!r}{nearest(name, names)}; there are {', '.join(names)}"
            )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise MegamupError(f"{path}: no such file; expected what the trainer writes into a run's folder") from error
    except ValueError as error:
        raise MegamupError(f"{path}: is not JSON ({error}); restore it, or leave this run out") from error
    return content if isinstance(content, dict) else {}


def _read_config(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise MegamupError(f"{path}: no such file; expected the run's resolved config") from error
    except yaml.YAMLError as error:
        raise MegamupError(f"{path}: is not YAML ({error}); restore it, or leave this run out") from error
    return content if isinstance(content, dict) else {}


def _lookup(content: dict[str, Any], keys: Sequence[str], path: Path) -> float:
    value: Any = content
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise MegamupError(
            f"{path}: {'.'.join(keys)} is {value!r}; expected a number: restore the file, or leave this run out"
        )
    return value
