"""A run as laws see it: what is constant in it, and its loss curve."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megamup.errors import MegamupError
from megamup.scaling.curves import Curve, FloatArray
from megamup.scaling.readers.columns import QUANTITIES, Expression, parse_expression
from megamup.scaling.readers.log import RunLog, listed

CONSTANTS = ("N", "B", "U", "lr")
COUNTS = ("D", "C", "S")
"""What is 0 before the first step."""
MAY_BE_ZERO = (*COUNTS, "lr")
"""Counts before the first step, and a rate that has decayed: such records are left out of the series."""
STEADY = 0.01
"""Tokens a step that vary by more over a run are no batch size."""


@dataclass(frozen=True)
class Track:
    """One run, with the loss asked for."""

    name: str
    source: Path | None
    """Where `read_curve` finds it; None for tables."""
    constants: dict[str, float]
    """What is known of N, B, U, lr."""
    curve: Curve
    last_step: float = 0.0
    """That anything was logged at."""
    last_loss_step: float = 0.0
    warmup_steps: float = 0.0
    schedule: str | None = None
    rates: tuple[FloatArray, FloatArray] | None = None
    """Optimizer steps (n,) and the learning rate that was logged at each (n,); None where none was."""


def default_columns(loss: str, parameters: str) -> dict[str, str]:
    """Our own names, which run folders and copies of them have."""
    return {
        "L": loss,
        "N": f"parameters.{parameters}",
        "D": "tokens",
        "C": "flops",
        "S": "step",
        "U": "data.unique_tokens",
        "lr": "optim.lr",
    }


def track_of(log: RunLog, columns: Mapping[str, str], defaults: Mapping[str, str]) -> Track:
    """The run with each quantity under the name that `columns` gives it, or else `defaults`.

    A default that the run doesn't have is left out, except loss and tokens. B is D/S where that is steady.

    Raises:
        MegamupError: a name in `columns` that the run doesn't have, no loss or tokens, or a value not above 0.
    """
    facts, known = log.facts, log.keys
    expressions = {
        key: parse_expression(key, text, known, f"run {log.name}")
        for key, text in (dict(defaults) | dict(columns)).items()
        if key in QUANTITIES and (key in columns or text in known)
    }
    for key, what in (("L", "loss"), ("D", "tokens seen")):
        if key not in expressions:
            raise MegamupError(_missing(log, key, what, defaults[key], known))
    series = {
        key: _series(log, expression, facts, may_be_zero=key in MAY_BE_ZERO) for key, expression in expressions.items()
    }
    curve = _curve(log, series, expressions["L"].text)
    constants = {
        key: float(np.max(values) if key == "lr" else values[-1])
        for key in CONSTANTS
        if key in series and len(values := series[key][1]) > 0
    }
    batch = curve.tokens / curve.step
    if "B" not in constants and np.ptp(batch) <= STEADY * batch[-1]:
        constants["B"] = float(batch[-1])
    warmup, schedule = facts.get("schedule.warmup_steps"), facts.get("schedule.kind")
    return Track(
        name=log.name,
        source=log.source,
        constants=constants,
        curve=curve,
        last_step=float(log.records[-1]["step"]),
        last_loss_step=float(series["L"][0][-1]),
        warmup_steps=float(warmup) if isinstance(warmup, int | float) else 0.0,
        schedule=schedule if isinstance(schedule, str) else None,
        rates=_rates(log, columns.get("lr", "lr"), *series["S"]) if "S" in series else None,
    )


def _missing(log: RunLog, key: str, what: str, default: str, known: list[str]) -> str:
    if default == "valid_loss":
        return (
            f"{log.name}: valid_loss is missing at the final step {log.records[-1]['step']:g} (nowhere in "
            f"{log.source or 'the table'}); expected an evaluation there: let train.eval_every divide train.steps, fit "
            "the training loss with --loss loss, or say what the run calls it with --columns L=NAME"
        )
    return (
        f"{log.name}: has no {default!r} ({what}); it has {listed(known)}: say which it is with --columns {key}=NAME "
        "(a product such as D=step*4096 will do)"
    )


def _series(
    log: RunLog, expression: Expression, facts: Mapping[str, Any], *, may_be_zero: bool
) -> tuple[FloatArray, FloatArray]:
    """(log steps, values) of the records that have every name of the expression."""
    steps, values = [], []
    for record in log.records:
        scope = {name: record.get(name, facts.get(name)) for name in expression.names}
        if any(value is None or (may_be_zero and value == 0) for value in scope.values()):
            continue
        steps.append(float(record["step"]))
        values.append(expression.value(scope, f"{log.source or log.name}: step {record['step']:g} (name {log.name})"))
    return np.array(steps), np.array(values)


def _rates(log: RunLog, name: str, known: FloatArray, steps: FloatArray) -> tuple[FloatArray, FloatArray] | None:
    """Optimizer steps and learning rates of the records that have `name`; optimizer `steps` are those of `known`."""
    logged = [(float(r["step"]), float(r[name])) for r in log.records if isinstance(r.get(name), int | float)]
    if not logged:
        return None
    at, rates = np.array(logged).T
    optimizer_steps = _at_steps(at, known, steps)
    rows = np.isfinite(optimizer_steps)
    return optimizer_steps[rows], rates[rows]


def _curve(log: RunLog, series: Mapping[str, tuple[FloatArray, FloatArray]], loss: str) -> Curve:
    steps, losses = series["L"]
    if len(steps) == 0:
        raise MegamupError(
            f"{log.name}: {loss} is in no record; expected the loss of the run: correct --columns L=NAME"
        )
    nothing = (steps[:0], steps[:0])
    tokens, flops, optimizer_steps = (_at_steps(steps, *series.get(key, nothing)) for key in ("D", "C", "S"))
    known = np.isfinite(tokens)
    if not known.any():
        raise MegamupError(
            f"{log.name}: tokens are known at no step that {loss} was logged at; expected both: correct --columns D=..."
        )
    curve = Curve(optimizer_steps[known], tokens[known], flops[known], losses[known])
    rises = np.diff(curve.tokens)
    if np.any(rises < 0) or (len(rises) and not rises.any()):
        raise MegamupError(
            f"{log.name}: tokens go from {curve.tokens[0]:g} to {curve.tokens[-1]:g} and don't always rise; expected "
            "those seen so far, not those of a step: correct --columns D=..."
        )
    return curve.at_rows(np.concatenate([rises > 0, [True]]))  # of records at the same tokens the last


def _at_steps(steps: FloatArray, known: FloatArray, values: FloatArray) -> FloatArray:
    """`values`, logged at steps `known`, at `steps`: linear between, NaN outside."""
    if len(known) == 0:
        return np.full(len(steps), math.nan)
    return np.asarray(np.interp(steps, known, values, left=math.nan, right=math.nan))
