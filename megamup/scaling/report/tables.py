"""The tables of the report's page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime, timezone

import numpy as np

from megamup.page import table_section
from megamup.scaling.analysis import Result, inputs_of, response_of
from megamup.scaling.estimate import Estimate
from megamup.scaling.influence import Influence
from megamup.scaling.report.verdict import signed
from megamup.scaling.runs import Ladder, Point
from megamup.scaling.text import MOST_ROWS, tried_rows

INFLUENCES = 12
"""Runs of the largest Cook's distance that are listed."""


def parameters_table(result: Result, title: str) -> str:
    rows = []
    for name, value in result.fit.parameters.items():
        low, high = ("not bounded" if end is None else f"{end:.6g}" for end in result.intervals[name])
        rows.append((name, f"{value:.6g}", low, high))
    return table_section(title, ("parameter", "value", "95% low", "95% high"), rows)


def target_table(target: Mapping[str, float], found: Sequence[tuple[Result, Estimate]]) -> str:
    """What the laws say of the target."""
    rows = []
    for result, one in found:
        low, high = ("not bounded" if end is None else f"{end:.5g}" for end in (one.low, one.high))
        kind = "one new run" if one.new_run else "the law's own"
        name = {"L": "loss", "D_per_N": "D/N"}.get(one.name, one.name)
        rows.append((name, result.law.name, f"{one.value:.5g}", low, high, kind))
    where = ", ".join(f"{key} = {value:.4g}" for key, value in target.items())
    return table_section(f"At {where}", ("quantity", "law", "value", "95% low", "95% high", "interval of"), rows)


def tried_table(result: Result, title: str) -> str:
    """Every law and objective that was compared; nothing where one was asked for, or where no run could be held out."""
    header, *rows = tried_rows(result)
    if len(rows) < 2 or not any(tried.trials for tried in result.tried):
        return ""
    return table_section(title, header, rows) + f"<p class='lead'>Chosen: {result.reason}.</p>"


def points_table(result: Result, held: Sequence[Point], title: str) -> str:
    """Every run with what the law gives it, by size; the middle of a long list is left to the fit file."""
    law = result.law
    ladder = Ladder((*result.ladder.points, *held), result.ladder.convention)
    inputs, measured = inputs_of(ladder, law), response_of(ladder, law)
    fitted = result.fit.at(inputs)
    rows = []
    for i in np.argsort(inputs.prod(axis=1), kind="stable"):
        use = "fitted" if i < len(result.ladder) else "held out"
        given = (f"{value:.4g}" for value in inputs[i])
        residual = signed(100 * (measured[i] / fitted[i] - 1))
        rows.append((ladder.points[i].name, use, *given, f"{measured[i]:.5g}", f"{fitted[i]:.5g}", residual))
    if len(rows) > MOST_ROWS:
        half, left = MOST_ROWS // 2, len(rows) - MOST_ROWS
        rows = [*rows[:half], (f"... {left} more", *[""] * (len(rows[0]) - 1)), *rows[-half:]]
    response = "loss" if law.response == "L" else law.response
    return table_section(title, ("run", "use", *law.inputs, response, "law", "residual %"), rows)


def influence_table(found: Influence, names: Sequence[str], title: str) -> str:
    """The runs of the largest Cook's distance; shifts are those of the prediction."""
    rows = []
    for i in np.argsort(-np.nan_to_num(found.cook, nan=np.inf), kind="stable")[:INFLUENCES]:
        shift = found.prediction_shifts[i]
        cells = (found.leverage[i], found.studentised[i], found.cook[i], *shift)
        rows.append((names[i], *("-" if np.isnan(cell) else f"{cell:.3g}" for cell in cells)))
    shifts = ("shift (std. errors)",) if found.prediction_shifts.shape[1] else ()
    return table_section(title, ("run", "leverage", "studentised residual", "Cook's distance", *shifts), rows)


def diagnostics_table(result: Result, title: str) -> str:
    fit, diagnostics, test = result.fit, result.fit.diagnostics, result.backtest
    response = "loss" if fit.law.response == "L" else fit.law.response
    unit = f" of the {response}" if fit.objective.scale == "log" else " nats per token"
    std = "none: no degree of freedom left" if fit.residual_std is None else f"{fit.residual_std:.4g}{unit}"
    rows = [
        ("objective", f"{fit.objective.meaning}: {fit.objective_value:.4g}"),
        ("why this law and objective", result.reason),
        ("residual standard deviation", std),
        ("degrees of freedom", str(fit.degrees_of_freedom)),
        ("starts that reached the optimum", f"{diagnostics.share_of_starts_at_optimum:.0%} of {diagnostics.starts}"),
        ("gradient norm at the optimum", f"{diagnostics.gradient_norm:.1e}"),
        ("condition number of the scaled Jacobian", f"{diagnostics.condition_number:.3g}"),
        ("parameters at a bound", ", ".join(diagnostics.at_bound) or "none"),
    ]
    if test.trials:
        rows.append(("predictions of larger runs inside their interval", f"{test.held:.0%} of {len(test.trials)}"))
        rows.append(("intervals widened by", f"{test.inflation:.3g}"))
    return table_section(title, ("what", "value"), rows)


def provenance_table(result: Result, command: str, title: str) -> str:
    made, convention = result.provenance, result.ladder.convention
    rows = [("law", f"{result.law.name}: {result.law.source}")]
    for key, words in (
        ("loss", "loss"),
        ("flops", "FLOPs convention"),
        ("parameters", "parameters counted"),
        ("ratio", "C against N·D"),
    ):
        if key in convention:
            rows.append((words, convention[key]))
    rows += [("data (SHA-256)", result.ladder.hash()), ("seed of the random starts", str(result.seed))]
    if made:
        versions = ", ".join(f"{key} {value}" for key, value in made.items() if key not in ("command", "date"))
        rows += [("fitted", f"{made['date']}, {versions}"), ("fitted with", made["command"])]
    rows += [("reported", f"{datetime.now(timezone.utc):%Y-%m-%d %H:%M} UTC"), ("reported with", command)]
    return table_section(title, ("what", "value"), rows)
