"""The fit file: one JSON object with all that a prediction, a report and a trainer need."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import scipy

from megamup.errors import MegamupError
from megamup.files import write_json_atomic
from megamup.scaling.analysis import Result, Tried, inputs_of, response_of
from megamup.scaling.backtest import Backtest, Trial
from megamup.scaling.curve_backtest import CurveEvidence, ScheduleTrial
from megamup.scaling.curve_table import CurveTable
from megamup.scaling.fit import Data, Diagnostics, Fit
from megamup.scaling.laws import Law, get_law
from megamup.scaling.laws.annealing import Annealing, CurveLaw
from megamup.scaling.laws.schedules import Schedules
from megamup.scaling.objective import get_objective
from megamup.scaling.runs import Ladder, Point
from megamup.scaling.uncertainty import LEVEL, RESAMPLES, covariance, no_interval_reason

FORMAT = 2
METHOD_NAMES = {
    "profile": "profile likelihood",
    "delta": "delta method",
    "bootstrap": f"percentiles of {RESAMPLES} bootstraps over runs",
}


def provenance(command: str) -> dict[str, str]:
    """What made a fit: command, date (UTC), versions."""
    return {
        "command": command,
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "numpy": np.__version__,
        "scipy": scipy.__version__,
    }


def to_json(result: Result, folder: Path) -> dict[str, Any]:
    """The object that `--json` prints and the fit file holds; run folders are given relative to `folder`."""
    fit = result.fit
    matrix = covariance(fit)
    return {
        "format": FORMAT,
        "law": fit.law.name,
        "formula": fit.law.formula,
        "inputs": list(fit.law.inputs),
        "response": fit.law.response,
        "source": fit.law.source,
        "parameters": fit.parameters,
        "intervals": {name: list(ends) for name, ends in result.intervals.items()},
        "interval_level": LEVEL,
        "interval_note": no_interval_reason(fit) or f"{METHOD_NAMES[result.method]}; null: no end on that side",
        "interval_method": result.method,
        "objective": fit.objective_value,
        "objective_name": fit.objective.name,
        "objective_meaning": fit.objective.meaning,
        "tried": [asdict(row) for row in result.tried],
        "reason": result.reason,
        "residual_std": fit.residual_std,
        "data_sha256": result.ladder.hash(),
        "convention": result.ladder.convention,
        "seed": result.seed,
        "optimum": {
            "theta": fit.theta.tolist(),
            "log_centre": fit.data.log_centre.tolist(),
            **asdict(fit.diagnostics),
        },
        "schedules": fit.law.known.knots() if isinstance(fit.law, CurveLaw) else None,
        "curve_evidence": None if result.curve_evidence is None else _evidence_json(result.curve_evidence, fit.law),
        "covariance": None if matrix is None else matrix.tolist(),
        "backtest": {
            "folds": result.backtest.folds,
            "inflation": result.backtest.inflation,
            "held": result.backtest.held,
            "rms_error": result.backtest.rms_error,
            "drift": result.backtest.drift,
            "trials": [_finite(asdict(trial)) for trial in result.backtest.trials],
        },
        "warnings": result.warnings,
        "points": [
            {
                **_point_json(point, folder),
                "fitted": float(fitted),
                "residual_percent": 100 * (float(measured / fitted) - 1),
            }
            for point, fitted, measured in zip(result.ladder.points, fit.fitted, fit.data.response, strict=True)
        ],
        "reduction": result.reduction,
        "runs": None if result.runs is None else [_point_json(point, folder) for point in result.runs.points],
        "companions": [to_json(companion, folder) for companion in result.companions],
        "curves": None if result.curves is None else asdict(result.curves),
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
        MegamupError: no such file, no fit file, one of another format, or one whose points were changed.
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
    except _ChangedError as error:
        raise MegamupError(
            f"--fit: {path}: its points are not those that it was fitted to (data_sha256 {str(error)[:12]}...); make "
            "it again with `fit --output`"
        ) from None
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise MegamupError(f"--fit: {path}: {error!r}: is incomplete; make it again with `fit --output`") from error


def _from_json(content: dict[str, Any], folder: Path) -> Result:
    ladder = _ladder(content["points"], content["convention"], folder)
    if ladder.hash() != content["data_sha256"]:
        raise _ChangedError(content["data_sha256"])
    law = get_law(content["law"], content["inputs"][0] if content["law"] == "power" else None)
    if isinstance(law, CurveLaw):
        law = replace(law, schedules=Schedules.from_knots(content["schedules"]))
    evidence = content["curve_evidence"]
    if evidence is not None and isinstance(law, Annealing):
        law = replace(law, decay=evidence["decay"])
    inputs = inputs_of(ladder, law)
    law = law.bound_to(dict(zip(law.inputs, inputs.T, strict=True)))
    optimum = content["optimum"]
    known = ("starts", "share_of_starts_at_optimum", "gradient_norm", "condition_number")
    diagnostics = Diagnostics(**{key: optimum[key] for key in known}, at_bound=tuple(optimum["at_bound"]))
    fit = Fit(
        law=law,
        objective=get_objective(content["objective_name"]),
        data=Data(inputs, response_of(ladder, law), ladder.runs),
        theta=np.array(optimum["theta"]),
        diagnostics=diagnostics,
    )
    trials = tuple(Trial(**_infinite(trial)) for trial in content["backtest"]["trials"])
    return Result(
        fit=fit,
        ladder=ladder,
        intervals={name: (low, high) for name, (low, high) in content["intervals"].items()},
        backtest=Backtest(trials, content["backtest"]["folds"]),
        tried=tuple(Tried(**row) for row in content["tried"]),
        reason=content["reason"],
        warnings=content["warnings"],
        provenance=content["provenance"],
        seed=content["seed"],
        method=content["interval_method"],
        reduction=content["reduction"],
        runs=None if content["runs"] is None else _ladder(content["runs"], content["convention"], folder),
        companions=tuple(_from_json(companion, folder) for companion in content["companions"]),
        curve_evidence=None if evidence is None else _evidence(evidence),
        curves=None if content["curves"] is None else _curves(content["curves"]),
    )


class _ChangedError(Exception):
    """Points that aren't those of the hash beside them."""


def _point_json(point: Point, folder: Path) -> dict[str, Any]:
    return {
        "name": point.name,
        "run": point.run,
        "inputs": point.inputs,
        "loss": point.loss,
        "source": None if point.source is None else _relative(point.source, folder),
    }


def _evidence_json(evidence: CurveEvidence, law: Law) -> dict[str, Any]:
    """With λ of the law `annealing`, and what follows from the trials."""
    return asdict(evidence) | {
        "decay": law.decay if isinstance(law, Annealing) else None,
        "held_out": evidence.held_out,
        "rms_error": evidence.rms_error,
        "half_width": evidence.half_width,
    }


def _evidence(content: dict[str, Any]) -> CurveEvidence:
    trials = tuple(ScheduleTrial(**trial) for trial in content["trials"])
    return CurveEvidence(tuple(content["runs"]), trials)


def _ladder(points: list[dict[str, Any]], convention: dict[str, str], folder: Path) -> Ladder:
    found = (
        Point(
            name=point["name"],
            inputs=point["inputs"],
            loss=point["loss"],
            source=None if point["source"] is None else folder / point["source"],
            run=point["run"],
        )
        for point in points
    )
    return Ladder(tuple(found), convention)


def _curves(table: dict[str, Any]) -> CurveTable:
    losses = tuple(None if row is None else tuple(row) for row in table["losses"])
    arrays = {key: tuple(table[key]) for key in ("fractions", "noise")}
    return CurveTable(**table | arrays | {"losses": losses})


def _finite(trial: dict[str, Any]) -> dict[str, Any]:
    """JSON has no infinity: an open end is null."""
    return {key: None if value in (float("inf"), float("-inf")) else value for key, value in trial.items()}


def _infinite(trial: dict[str, Any]) -> dict[str, Any]:
    return trial | ({"high": float("inf")} if trial["high"] is None else {})


def _relative(path: Path, folder: Path) -> str:
    return Path(os.path.relpath(path, folder)).as_posix()
