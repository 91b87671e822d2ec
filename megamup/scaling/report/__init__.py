"""`report.html`: one self-contained page on fitted laws, for whoever decides whether to train the large model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from html import escape
from pathlib import Path
from typing import Any

from megamup.cluster import Cluster
from megamup.errors import MegamupError
from megamup.page import page, table_section
from megamup.scaling import allocation, mfu
from megamup.scaling.analysis import Result
from megamup.scaling.estimate import Estimate, estimate
from megamup.scaling.figures.drawing import Drawing, plain
from megamup.scaling.fit_file import to_json
from megamup.scaling.reduction import Curves
from megamup.scaling.report import sections, tables
from megamup.scaling.report.allotment import allotments
from megamup.scaling.report.evidence import evidence_of
from megamup.scaling.report.sections import Part
from megamup.scaling.report.subject import Subject, subjects_of
from megamup.scaling.report.verdict import Verdict, cards, judge
from megamup.scaling.runs import Point

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
        held: runs that no fit has seen; empty for a page without a verdict. Each law of a run's loss judges them.
        command: what made the page, for its provenance.
        curves: smoothed curves of the runs, for laws fitted to reduced curves of a table; default: read from the runs.
        target: what is to be predicted: a law's inputs, or a budget C.
        budgets: FLOPs that a table says the best model and data for.
        cluster: what trains it, for days and cost.

    Raises:
        MegamupError: held-out runs without a law's inputs, a target that no law can do anything with, a budget that
            isn't finite and above 0.
    """
    subjects = subjects_of(results, held)
    laws = [subject.result for subject in subjects]
    found = evidence_of(results, held, curves)
    verdicts = [verdict for subject in subjects for verdict in judge(subject.result, subject.held)]
    estimates = _estimates(laws, target)
    only_curves = all(result.curve_evidence is not None for result in laws)  # which judge schedules, not runs
    allotted = allotments(subjects, budgets, cluster)
    parts = [
        Part("".join(map(_summary, subjects)) + ("" if only_curves else cards(verdicts))),
        Part(sections.listed("Warnings", [*_warnings(subjects), *found.warnings])),
        Part(tables.target_table(target, estimates) if target else ""),
        Part(_allocation_sections(allotted)),
        *sections.figures(subjects, found, target, budgets),
        *(part for subject in subjects for part in sections.checks(subject, target)),
        *sections.runs(found),
        *(Part(sections.in_numbers(subject, command)) for subject in subjects),
    ]
    drawings = tuple(part.drawing for part in parts if part.drawing is not None)
    numbers = {
        "format": FORMAT,
        "command": command,
        "fits": [to_json(result, Path()) for result in results],
        "held_out": [_verdict_json(verdict) for verdict in verdicts],
        "target": {"at": target, "estimates": [{"law": r.law.name, **asdict(e)} for r, e in estimates]},
        "allocation": [{"law": label, **row} for label, rows in allotted for row in allocation.as_json(rows)],
        "utilization": [mfu.as_json(run) for run in found.utilisations],
        "figures": {drawing.name: drawing.numbers for drawing in drawings},
    }
    title = f"Scaling law {laws[0].law.formula}" if len(laws) == 1 else "Scaling laws"
    return Report(page(title, [part.html for part in parts]), plain(numbers), drawings)


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


def _summary(subject: Subject) -> str:
    result = subject.result
    values = ", ".join(f"{name} = {value:.4g}" for name, value in result.fit.parameters.items())
    if result.curve_evidence is not None:
        reach = f"the curves of {len(result.curve_evidence.runs)} schedules"
    else:
        ranges = (
            f"{key} from {min(column):.3g} to {max(column):.3g}"
            for key, column in zip(result.law.inputs, result.fit.inputs.T, strict=True)
        )
        reach = f"{len(result.ladder)} points, {'; '.join(ranges)}"
    return f"<p class='lead'>{escape(f'{subject.label}: {values}; fitted to {reach}.')}</p>"


def _allocation_sections(allotted: Sequence[tuple[str, list[allocation.Allocation]]]) -> str:
    """A table for each law that knows an optimum: where they disagree, none is sure."""
    found = []
    for label, rows in allotted:
        header, *cells = allocation.table_rows(rows)
        title = "Allocation" if len(allotted) == 1 else f"Allocation by {label}"
        found.append(table_section(title, header, cells))
    note = (
        "<p class='lead'>N and D are counted as the fit counts them, C = 6·N·D; powers of C take it as their runs "
        "count it. The interval is that of one new run. A dash is what nothing here tells: batch and lr need a law of "
        "theirs, days and cost a cluster.</p>"
    )
    return "".join(found) + note if found else ""


def _warnings(subjects: Sequence[Subject]) -> list[str]:
    """Each once, with its law where there are several."""
    return list(
        dict.fromkeys(
            warning if subject.alone else f"{subject.label}: {warning}"
            for subject in subjects
            for warning in subject.result.warnings
        )
    )


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
