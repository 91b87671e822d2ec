"""The fit file: one JSON object with all that a prediction and a report need."""

import json
import os
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import scipy

from megamup.errors import MegamupError
from megamup.files import write_json_atomic
from megamup.scaling.fit import OBJECTIVES, Diagnostics, Fit, warnings_of
from megamup.scaling.laws import get_law
from megamup.scaling.runs import Ladder, Point
from megamup.scaling.uncertainty import LEVEL, Interval, covariance, no_interval_reason, parameter_intervals

FORMAT = 1


@dataclass(frozen=True)
class Result:
    """A fit with where its points came from: what a fit file holds."""

    fit: Fit
    x: str
    """The law's input: N, C."""
    ladder: Ladder
    intervals: dict[str, Interval]
    warnings: list[str]
    provenance: dict[str, str]
    """The command, the date (UTC) and the versions the fit was made with."""


def make_result(fit: Fit, x: str, ladder: Ladder, command: str) -> Result:
    """`fit` with its intervals, warnings and provenance."""
    intervals = parameter_intervals(fit)
    provenance = {
        "command": command,
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "numpy": np.__version__,
        "scipy": scipy.__version__,
    }
    return Result(fit, x, ladder, intervals, warnings_of(fit) + _interval_warnings(fit, intervals), provenance)


def to_json(result: Result, folder: Path) -> dict[str, Any]:
    """The object that `--json` prints and the fit file holds; run folders are given relative to `folder`."""
    fit = result.fit
    matrix = covariance(fit)
    return {
        "format": FORMAT,
        "law": fit.law.name,
        "formula": fit.law.formula.format(x=result.x),
        "x": result.x,
        "parameters": fit.parameters,
        "intervals": {name: list(ends) for name, ends in result.intervals.items()},
        "interval_level": LEVEL,
        "interval_note": no_interval_reason(fit) or "profile likelihood; null: the points set no end on that side",
        "objective": fit.objective_value,
        "objective_name": fit.objective,
        "objective_meaning": OBJECTIVES[fit.objective],
        "residual_std": fit.residual_std,
        "convention": result.ladder.convention,
        "diagnostics": {**vars(fit.diagnostics), "at_bound": list(fit.diagnostics.at_bound)},
        "warnings": result.warnings,
        "points": [
            {
                "name": point.name,
                "x": point.inputs[result.x],
                "loss": point.loss,
                "fitted": float(fitted),
                "residual_percent": 100 * (point.loss / float(fitted) - 1),
                "inputs": point.inputs,
                "source": None if point.source is None else _relative(point.source, folder),
            }
            for point, fitted in zip(result.ladder.points, fit.fitted, strict=True)
        ],
        "covariance": None if matrix is None else matrix.tolist(),
        "provenance": result.provenance,
    }


def save_result(result: Result, path: Path) -> None:
    """Write the fit file.

    Raises:
        OSError: `path` can't be written.
    """
    write_json_atomic(path, to_json(result, path.parent))


def load_result(path: Path) -> Result:
    """Read a fit file; nothing is fitted again.

    Raises:
        MegamupError: no such file, no fit file, or one of another format.
    """
    if not path.is_file():
        raise MegamupError(f"--fit: {path} is no file; expected what `scaling.py fit --output {path}` writes")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise MegamupError(f"--fit: {path} is not JSON ({error}); make it again with `fit --output`") from error
    found = content.get("format") if isinstance(content, dict) else None
    if found != FORMAT:
        raise MegamupError(f"--fit: {path}: format is {found!r}; expected {FORMAT}: make it again with `fit --output`")
    try:
        return _from_json(content, path.parent)
    except (KeyError, TypeError, AttributeError) as error:
        raise MegamupError(f"--fit: {path}: {error!r}: is incomplete; make it again with `fit --output`") from error


def _from_json(content: dict[str, Any], folder: Path) -> Result:
    law = get_law(content["law"])
    points = tuple(
        Point(
            name=point["name"],
            inputs=point["inputs"],
            loss=point["loss"],
            source=None if point["source"] is None else folder / point["source"],
        )
        for point in content["points"]
    )
    inputs = np.array([[point.inputs[content["x"]]] for point in points])
    exponents = np.array([content["parameters"][name] for name in law.exponents])
    own_unit = law.uncentre(exponents, np.mean(np.log(inputs), axis=0))
    diagnostics = content["diagnostics"]
    fit = Fit(
        law=law,
        objective=content["objective_name"],
        inputs=inputs,
        loss=np.array([point.loss for point in points]),
        exponents=exponents,
        coefficients=np.array([content["parameters"][name] for name in law.coefficients]) / own_unit,
        diagnostics=Diagnostics(**{**diagnostics, "at_bound": tuple(diagnostics["at_bound"])}),
    )
    return Result(
        fit=fit,
        x=content["x"],
        ladder=Ladder(points, content["convention"]),
        intervals={name: (low, high) for name, (low, high) in content["intervals"].items()},
        warnings=content["warnings"],
        provenance=content["provenance"],
    )


def _interval_warnings(fit: Fit, intervals: dict[str, Interval]) -> list[str]:
    reason = no_interval_reason(fit)
    if reason is not None:
        return [f"no intervals: {reason}"]
    found = [
        f"{name} has no bound on one side: its interval reaches the end of the searched exponents; add "
        "runs over a wider range"
        for name, ends in intervals.items()
        if None in ends
    ]
    if intervals.get("c", (1.0, 1.0))[0] == 0 and "c" not in fit.diagnostics.at_bound:
        found.append(
            "c, the loss that no scale removes, may be 0 within its interval: the range is too narrow to see it"
        )
    return found


def _relative(path: Path, folder: Path) -> str:
    return Path(os.path.relpath(path, folder)).as_posix()
