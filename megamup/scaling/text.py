"""What `tools/scaling.py` prints: tables of text."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np

from megamup.scaling.analysis import Result
from megamup.scaling.curve_backtest import final_of, rms_log_error
from megamup.scaling.curve_fit import Measured, SchedulePrediction
from megamup.scaling.design import Design
from megamup.scaling.estimate import Estimate

MOST_ROWS = 40
"""Points that are listed; the fit file has all."""


def table_lines(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Names flush left, figures flush right, under the header that is the first row; then an empty line."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        figures = (cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))
        yield "  ".join([row[0].ljust(widths[0]), *figures]).rstrip()
    yield ""


def fit_lines(result: Result) -> Iterator[str]:
    """A fit: law, conventions, parameters with intervals, what was tried, points, diagnostics."""
    fit, convention = result.fit, result.ladder.convention
    yield f"law        {fit.law.formula}   ({fit.law.source})"
    for key, quantity in (("N", "parameters"), ("C", "flops"), ("L", "loss")):
        if key in (*fit.law.inputs, fit.law.response) and quantity in convention:
            yield f"{key}          {convention[quantity]}"
    yield f"objective  {fit.objective.meaning}: {fit.objective_value:.6g}"
    yield f"chosen     {result.reason}"
    yield ""
    rows = [("parameter", "value", "95% low", "95% high")]
    for name, value in fit.parameters.items():
        low, high = ("-" if end is None else f"{end:.6g}" for end in result.intervals[name])
        rows.append((name, f"{value:.6g}", low, high))
    yield from table_lines(rows)
    if len(result.tried) > 1:
        yield from table_lines(tried_rows(result))
    yield from table_lines(point_rows(result) if result.curve_evidence is None else curve_rows(result))
    diagnostics = fit.diagnostics
    std = "-" if fit.residual_std is None else f"{fit.residual_std:.3g}"
    yield (
        f"residual std {std}, {diagnostics.share_of_starts_at_optimum:.0%} of {diagnostics.starts} starts at the "
        f"optimum, gradient norm {diagnostics.gradient_norm:.1e}, condition number {diagnostics.condition_number:.3g}"
    )
    evidence = result.curve_evidence
    if evidence is not None and evidence.rms_error is not None:
        width = "none" if evidence.half_width is None else f"± {100 * evidence.half_width:.2g}% (Student's t)"
        yield (
            f"{evidence.held_out} held out: {len(evidence.trials)} predicted from the rest, error along their curves "
            f"{100 * evidence.rms_error:.2f}% rms; 95% interval of a new schedule {width}"
        )
    test = result.backtest
    if test.trials:
        yield (
            f"backtest: {len(test.trials)} larger runs predicted from {test.folds} cuts, next-larger error "
            f"{100 * (test.rms_error or 0):.2f}% rms, {test.held:.0%} inside their interval; intervals widened by "
            f"{test.inflation:.3g}"
        )


def tried_rows(result: Result) -> list[tuple[str, ...]]:
    """Every law and objective with its error on held-out larger runs."""
    rows: list[tuple[str, ...]] = [("tried", "objective", "held-out error %", "trials")]
    for tried in result.tried:
        error = "-" if tried.rms_error is None else f"{100 * tried.rms_error:.3f}"
        rows.append((tried.law, tried.objective, error, str(tried.trials)))
    return rows


def point_rows(result: Result) -> list[tuple[str, ...]]:
    """Points with what the law gives them; the middle of a long list is left out."""
    law, fit = result.law, result.fit
    response = "loss" if law.response == "L" else law.response
    rows: list[tuple[str, ...]] = [("run", *law.inputs, response, "law", "residual %")]
    order = np.argsort(fit.inputs.prod(axis=1), kind="stable")
    for index in order:
        measured, fitted = fit.data.response[index], fit.fitted[index]
        inputs = [f"{value:.4g}" for value in fit.inputs[index]]
        residual = f"{100 * (measured / fitted - 1):+.2f}"
        rows.append((result.ladder.points[index].name, *inputs, f"{measured:.5g}", f"{fitted:.5g}", residual))
    if len(rows) <= MOST_ROWS + 1:
        return rows
    half = MOST_ROWS // 2
    left = f"... {len(rows) - 1 - MOST_ROWS} more"
    return [*rows[: half + 1], (left, *[""] * (len(rows[0]) - 1)), *rows[-half:]]


def curve_rows(result: Result) -> list[tuple[str, ...]]:
    """Runs of a law of whole curves: final loss (mean over the last 5% of points), errors fitted and held out."""
    evidence, fit = result.curve_evidence, result.fit
    assert evidence is not None
    header = ("run", "steps", "final loss", "law", "error %", "rms %", "held out: error %", "rms %")
    rows: list[tuple[str, ...]] = [header]
    held = {trial.run: trial for trial in evidence.trials}
    for number, run in enumerate(evidence.runs, start=1):
        mine = fit.inputs[:, 0] == number
        measured, fitted = fit.loss[mine], fit.fitted[mine]
        final, law = final_of(measured), final_of(fitted)
        figures = [f"{fit.inputs[mine, 1].max():.0f}", f"{final:.5g}", f"{law:.5g}", f"{100 * (law / final - 1):+.2f}"]
        figures.append(f"{100 * rms_log_error(fitted, measured):.2f}")
        trial = held.get(run)
        figures += [f"{100 * math.expm1(trial.error):+.2f}", f"{100 * trial.rms_error:.2f}"] if trial else ["-", "-"]
        rows.append((run, *figures))
    return rows


def schedule_lines(result: Result, predicted: SchedulePrediction, measured: Measured | None) -> Iterator[str]:
    """The last step of a predicted curve, and how a measured one compares."""
    loss = f"loss {predicted.loss[-1]:.5g}"
    if predicted.low is not None and predicted.high is not None:
        loss += f"   (95%: {predicted.low[-1]:.5g} to {predicted.high[-1]:.5g}, of one new schedule)"
    yield f"{loss} at step {predicted.steps[-1]:.0f} of {predicted.length}"
    yield f"{predicted.over_longest:.3g} times as long as the longest fitted run"
    if result.curve_evidence is not None and result.curve_evidence.no_interval_reason is not None:
        yield f"no interval: {result.curve_evidence.no_interval_reason}"
    if measured is not None:
        there = measured.final * (1 + measured.final_error)
        yield (
            f"measured {measured.final:.5g} over its last points, where {there:.5g} is predicted: error "
            f"{100 * measured.final_error:+.2f}%, along the curve {100 * measured.rms_error:.2f}% rms"
        )


def estimate_line(found: Estimate) -> str:
    """One quantity with its interval."""
    name = {"L": "loss", "D_per_N": "D/N"}.get(found.name, found.name)
    digits = 5 if found.name == "L" else 4
    value = f"{name} {found.value:.{digits}g}"
    if found.low is None and found.high is None:
        return value
    ends = " to ".join("unbounded" if end is None else f"{end:.{digits}g}" for end in (found.low, found.high))
    return f"{value}   (95%: {ends}{', of one new run' if found.new_run else ''})"


def design_lines(design: Design) -> Iterator[str]:
    """The runs to train next, in the order of their gain per FLOP."""
    yield f"target     {design.target} = {design.value:.5g}"
    yield f"now        ± {design.half_width_before:.3g} ({design.level:.0%} interval of the law)"
    yield f"then       ± {design.half_width_after:.3g} for {design.flops:.3g} of {design.budget:.3g} FLOPs"
    yield ""
    rows = [("run", *design.runs[0].inputs, "FLOPs", "of budget", "± before", "± after")] if design.runs else []
    for number, run in enumerate(design.runs, start=1):
        inputs = [f"{value:.4g}" for value in run.inputs.values()]
        share = f"{100 * run.share_of_budget:.1f}%"
        widths = (f"{run.half_width_before:.3g}", f"{run.half_width_after:.3g}")
        rows.append((str(number), *inputs, f"{run.flops:.3g}", share, *widths))
    if rows:
        yield from table_lines(rows)
