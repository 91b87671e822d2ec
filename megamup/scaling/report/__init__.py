"""`report.html`: one self-contained page on fitted laws, for whoever decides whether to train the large model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from megamup.errors import MegamupError
from megamup.page import figure_section, page, table_section
from megamup.scaling import allocation, mfu
from megamup.scaling.allocation import Cluster
from megamup.scaling.analysis import Result, inputs_of
from megamup.scaling.estimate import Estimate, estimate
from megamup.scaling.figures.backtest import backtest_drawing
from megamup.scaling.figures.batch import critical_batch_drawing
from megamup.scaling.figures.curve_law import curve_law_drawing
from megamup.scaling.figures.curves import curves_drawing, envelope_drawing
from megamup.scaling.figures.drawing import Drawing, plain
from megamup.scaling.figures.frontier import contour_drawing, has_frontier, optimum_drawing
from megamup.scaling.figures.isoflop import isoflop_drawing
from megamup.scaling.figures.loss import loss_drawings
from megamup.scaling.figures.residuals import influence_drawing, residual_drawing
from megamup.scaling.fit_file import to_json
from megamup.scaling.influence import flags, influence
from megamup.scaling.mfu_figure import mfu_figure
from megamup.scaling.reduction import Curves
from megamup.scaling.report import tables
from megamup.scaling.report.allotment import allotments
from megamup.scaling.report.evidence import Evidence, evidence_of
from megamup.scaling.report.verdict import Verdict, cards, judge
from megamup.scaling.runs import Ladder, Point

FORMAT = 1
"""Of the numbers."""


@dataclass(frozen=True)
class Report:
    """A page, and what is on it for other programs."""

    html: str
    """One document without any outside file, script or font."""
    numbers: dict[str, Any]
    """All that is drawn or tabulated, JSON-ready."""
    drawings: tuple[Drawing, ...]
    """For `figures.drawing.save_figures`."""


def make_report(
    results: Sequence[Result],
    held: Sequence[Point] = (),
    *,
    command: str = "",
    curves: Curves | None = None,
    target: Mapping[str, float] | None = None,
    budgets: Sequence[float] = (),
    cluster: Cluster | None = None,
) -> Report:
    """The page on some laws, with sections for what is known; those without data are left out.

    Args:
        results: what was fitted, one page for all; laws fitted to one reduction come as companions of the first.
        held: runs that no fit has seen; empty for a page without a verdict. Each law of the loss judges them.
        command: what made the page, for its provenance.
        curves: smoothed curves of the runs, for laws fitted to reduced curves of a table; default: read from the runs.
        target: what is to be predicted: a law's inputs, or a budget C.
        budgets: FLOPs that a table says the best model and data for.
        cluster: what trains it, for days and cost.

    Raises:
        MegamupError: held-out runs without a law's inputs, a target that no law can do anything with, a budget that
            isn't finite and above 0.
    """
    laws = [each for result in results for each in (result, *result.companions)]
    found = evidence_of(results, held, curves)
    verdicts = [v for result in laws if result.law.response == "L" for v in judge(result, held)]
    estimates = _estimates(laws, target)
    rows = allotments(laws, budgets, cluster)
    parts = [
        _Part("".join(map(_summary, laws)) + cards(verdicts)),
        _Part(_warnings([*(w for result in laws for w in result.warnings), *found.warnings])),
        _Part(tables.target_table(target, estimates) if target else ""),
        _Part(_allocation_section(rows)),
        *_figures(laws, held, found, target, budgets),
        *_checks(laws, held, target),
        *_runs(found),
        *(_Part(_tables(result, held, command, several=len(laws) > 1)) for result in laws),
    ]
    drawings = tuple(part.drawing for part in parts if part.drawing is not None)
    numbers = {
        "format": FORMAT,
        "command": command,
        "fits": [to_json(result, Path()) for result in results],
        "held_out": [_verdict_json(verdict) for verdict in verdicts],
        "target": {"at": target, "estimates": [{"law": r.law.name, **asdict(e)} for r, e in estimates]},
        "allocation": allocation.as_json(rows),
        "utilization": [mfu.as_json(run) for run in found.utilisations],
        "figures": {drawing.name: drawing.numbers for drawing in drawings},
    }
    title = f"Scaling law {laws[0].law.formula}" if len(laws) == 1 else "Scaling laws"
    return Report(page(title, [part.html for part in parts]), plain(numbers), drawings)


@dataclass(frozen=True)
class _Part:
    """One or more sections of the page; the drawing that is in it."""

    html: str
    drawing: Drawing | None = None


def _shown(drawing: Drawing | None) -> list[_Part]:
    if drawing is None:
        return []
    return [_Part(figure_section(drawing.figure, drawing.name, drawing.title, drawing.caption), drawing)]


def _figures(
    laws: Sequence[Result],
    held: Sequence[Point],
    found: Evidence,
    target: Mapping[str, float] | None,
    budgets: Sequence[float],
) -> Iterable[_Part]:
    """What the laws say, and the runs that they say it of."""
    names = _names(laws)
    for result, name in zip(laws, names, strict=True):
        for drawing in loss_drawings(result, held if result.law.response == "L" else (), name):
            yield from _shown(drawing)
        if result.curve_evidence is not None:
            yield from _shown(curve_law_drawing(result))
    if found.envelope is not None:
        yield from _shown(envelope_drawing(found.envelope, found.smoothed))
    if found.isoflop is not None:
        yield from _shown(isoflop_drawing(found.isoflop))
    yield from _shown(optimum_drawing(laws, found.envelope, found.isoflop, budgets))
    for result, name in zip(laws, names, strict=True):
        if has_frontier(result):
            yield from _shown(contour_drawing(result, name, target, budgets))
    if found.critical is not None:
        yield from _shown(critical_batch_drawing(found.critical, laws))


def _checks(laws: Sequence[Result], held: Sequence[Point], target: Mapping[str, float] | None) -> Iterable[_Part]:
    """How far each law may be believed: backtest, what was tried, residuals, influence."""
    for result, name in zip(laws, _names(laws), strict=True):
        if result.curve_evidence is not None:
            yield _Part(tables.tried_table(result, "what was tried"))
            continue  # held out by schedule, not by size: in the figure of the curves
        own_held = held if result.law.response == "L" else ()
        prefix = "" if len(laws) == 1 else f"{result.law.formula}: "
        yield from _shown(_prefixed(backtest_drawing(result, name), prefix))
        yield _Part(tables.tried_table(result, f"{prefix}what was tried"))
        yield from _shown(_prefixed(residual_drawing(result, own_held, name), prefix))
        yield from _influence(result, own_held, target, name, prefix)


def _influence(
    result: Result, held: Sequence[Point], target: Mapping[str, float] | None, name: str, prefix: str
) -> Iterable[_Part]:
    """Influence on the target where it is one run, else on the first held-out run, else on the largest fitted one."""
    law = result.law
    if target is not None and set(law.inputs) <= target.keys():
        at, where = np.array([[target[key] for key in law.inputs]]), "the target"
    elif held:
        at, where = inputs_of(Ladder(tuple(held[:1]), result.ladder.convention), law), held[0].name
    else:
        largest = int(np.argmax(result.fit.inputs.prod(axis=1)))
        at, where = result.fit.inputs[largest : largest + 1], result.ladder.points[largest].name
    try:
        found = influence(result.fit, at)
    except MegamupError:
        return  # as many parameters as runs: each run is all there is
    runs = list(dict.fromkeys(point.run or point.name for point in result.ladder.points))
    yield from _shown(_prefixed(influence_drawing(result, found, runs, name), prefix))
    yield _Part(tables.influence_table(found, runs, f"{prefix}runs that matter most for {where}"))
    yield _Part(_notes(flags(found, runs, len(law.parameters))))


def _runs(found: Evidence) -> Iterable[_Part]:
    """Curves and utilization of the runs."""
    yield from _shown(curves_drawing(found.curves, found.held_curves))
    if found.utilisations:
        caption = (
            "Model FLOPs over what the devices could have done (PaLM's convention), evaluation and saving aside; "
            "dashed is the mean. Shaded: stalls."
        )
        numbers = plain({"runs": [mfu.as_json(run) for run in found.utilisations]})
        drawing = Drawing("mfu", "MFU over time", caption, mfu_figure(found.utilisations), numbers)
        yield from _shown(drawing)
        header, *rows = mfu.table_rows(found.utilisations)
        yield _Part(table_section("Utilization", header, rows))


def _tables(result: Result, held: Sequence[Point], command: str, *, several: bool) -> str:
    prefix = f"{result.law.formula}: " if several else ""

    def titled(words: str) -> str:
        return f"{prefix}{words}" if several else words[0].upper() + words[1:]

    return "".join(
        [
            tables.parameters_table(result, titled("parameters")),
            tables.points_table(result, held if result.law.response == "L" else (), titled("runs")),
            tables.diagnostics_table(result, titled("diagnostics")),
            tables.provenance_table(result, command, titled("provenance")),
        ]
    )


def _names(laws: Sequence[Result]) -> list[str]:
    """A name for each law, unique and fit for files and ids."""
    names: list[str] = []
    for result in laws:
        law = result.law
        name = f"power-{law.inputs[0]}" if law.name == "power" else law.name
        names.append(name if name not in names else f"{name}-{len(names) + 1}")
    return names


def _prefixed(drawing: Drawing | None, prefix: str) -> Drawing | None:
    return drawing if drawing is None or not prefix else replace(drawing, title=f"{prefix}{drawing.title.lower()}")


def _estimates(laws: Sequence[Result], target: Mapping[str, float] | None) -> list[tuple[Result, Estimate]]:
    """What each law says of the target.

    Raises:
        MegamupError: none says anything.
    """
    found: list[tuple[Result, Estimate]] = []
    refused: list[MegamupError] = []
    for result in laws if target else ():
        try:
            found += [(result, one) for one in estimate(result, target or {})]
        except MegamupError as error:
            refused.append(error)
    if refused and not found:
        raise refused[0]
    return found


def _summary(result: Result) -> str:
    values = ", ".join(f"{name} = {value:.4g}" for name, value in result.fit.parameters.items())
    reach = "; ".join(
        f"{key} from {min(column):.3g} to {max(column):.3g}"
        for key, column in zip(result.law.inputs, result.fit.inputs.T, strict=True)
    )
    words = f"{result.law.formula}: {values}; fitted to {len(result.ladder)} points, {reach}."
    return f"<p class='lead'>{escape(words)}</p>"


def _allocation_section(rows: Sequence[allocation.Allocation]) -> str:
    if not rows:
        return ""
    header, *cells = allocation.table_rows(rows)
    note = (
        "<p class='lead'>N and D are counted as the fit counts them, C = 6·N·D. The interval is that of one new run. A "
        "dash is what nothing here tells: batch and lr need a law of theirs, days and cost a cluster.</p>"
    )
    return table_section("Allocation", header, cells) + note


def _warnings(warnings: Sequence[str]) -> str:
    return _listed("Warnings", list(dict.fromkeys(warnings)))


def _notes(words: Sequence[str]) -> str:
    return _listed("Runs to look at", words)


def _listed(title: str, words: Sequence[str]) -> str:
    if not words:
        return ""
    items = "".join(f"<li>{escape(text)}</li>" for text in words)
    return f"<section class='warning' role='note'><h2>{title}</h2><ul>{items}</ul></section>"


def _verdict_json(verdict: Verdict) -> dict[str, Any]:
    return {
        "run": verdict.point.name,
        "law": verdict.law,
        "inputs": verdict.point.inputs,
        "predicted": verdict.predicted,
        "low": verdict.low,
        "high": verdict.high,
        "measured": verdict.measured,
        "error_percent": verdict.error_percent,
        "inside": verdict.inside,
    }
