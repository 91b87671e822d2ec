"""The page's sections on the laws and on their runs; those without data are left out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from html import escape

import numpy as np

from megamup.errors import MegamupError
from megamup.page import figure_section, table_section
from megamup.scaling import mfu
from megamup.scaling.analysis import inputs_of
from megamup.scaling.figures.backtest import backtest_drawing
from megamup.scaling.figures.batch import critical_batch_drawing
from megamup.scaling.figures.curve_law import curve_law_drawing
from megamup.scaling.figures.curves import curves_drawing, envelope_drawing
from megamup.scaling.figures.drawing import Drawing, plain
from megamup.scaling.figures.frontier import contour_drawing, has_frontier, optimum_drawing
from megamup.scaling.figures.isoflop import isoflop_drawing
from megamup.scaling.figures.loss import loss_drawings
from megamup.scaling.figures.residuals import influence_drawing, residual_drawing
from megamup.scaling.influence import flags, influence
from megamup.scaling.mfu_figure import PANELS, mfu_figure
from megamup.scaling.report import tables
from megamup.scaling.report.evidence import Evidence
from megamup.scaling.report.subject import Subject
from megamup.scaling.runs import Ladder
from megamup.scaling.text import curve_rows


@dataclass(frozen=True)
class Part:
    """One or more sections of the page; the drawing that is in it."""

    html: str
    drawing: Drawing | None = None


def figures(
    subjects: Sequence[Subject], found: Evidence, target: Mapping[str, float] | None, budgets: Sequence[float]
) -> Iterable[Part]:
    """What the laws say, and the runs that they say it of."""
    laws = [subject.result for subject in subjects]
    for subject in subjects:
        if subject.result.curve_evidence is not None:
            drawing = replace(curve_law_drawing(subject.result), name=f"{subject.name}-curves")
            yield from _shown(drawing, subject)
        elif not _drawn_together(subject, found):
            for drawing in loss_drawings(subject.result, subject.held, subject.name):
                yield from _shown(drawing, subject)
    if found.envelope is not None:
        yield from _shown(envelope_drawing(found.envelope, found.smoothed))
    if found.isoflop is not None:
        yield from _shown(isoflop_drawing(found.isoflop))
    yield from _shown(optimum_drawing(laws, found.envelope, found.isoflop, budgets))
    for subject in subjects:
        if has_frontier(subject.result):
            yield from _shown(contour_drawing(subject.result, subject.name, target, budgets), subject)
    if found.critical is not None:
        yield from _shown(critical_batch_drawing(found.critical, laws))


def checks(subject: Subject, target: Mapping[str, float] | None) -> Iterable[Part]:
    """How far a law may be believed: backtest, what was tried, residuals, influence."""
    result = subject.result
    if result.curve_evidence is not None:
        yield Part(tables.tried_table(result, subject.title("what was tried")))
        header, *rows = curve_rows(result)
        yield Part(table_section(subject.title("schedules, fitted and held out"), header, rows))
        return
    yield from _shown(backtest_drawing(result, subject.name), subject)
    yield Part(tables.tried_table(result, subject.title("what was tried")))
    if result.fit.degrees_of_freedom > 1 or subject.held:
        yield from _shown(residual_drawing(result, subject.held, subject.name), subject)
    if result.fit.degrees_of_freedom > 1:  # else no run can be left out and the rest still tell the noise
        yield from _influence(subject, target)


def runs(found: Evidence) -> Iterable[Part]:
    """Curves and utilization of the runs."""
    yield from _shown(curves_drawing(found.curves, found.held_curves))
    if found.utilisations:
        count = len(found.utilisations)
        shown = f"The first {PANELS} of {count} runs. " if count > PANELS else ""
        caption = (
            f"{shown}Model FLOPs over what the devices could have done (PaLM's convention), evaluation and saving "
            "aside; dashed is the mean. Shaded: stalls."
        )
        numbers = plain({"runs": [mfu.as_json(run) for run in found.utilisations]})
        yield from _shown(Drawing("mfu", "MFU over time", caption, mfu_figure(found.utilisations), numbers))
        header, *rows = mfu.table_rows(found.utilisations)
        yield Part(table_section("Utilization", header, rows))


def in_numbers(subject: Subject, command: str) -> str:
    """The tables that end the page."""
    result, title = subject.result, subject.title
    of_whole_curves = result.curve_evidence is not None
    return "".join(
        [
            tables.parameters_table(result, title("parameters")),
            "" if of_whole_curves else tables.points_table(result, subject.held, title("runs")),
            tables.diagnostics_table(result, title("diagnostics")),
            tables.provenance_table(result, command, title("provenance")),
        ]
    )


def listed(title: str, words: Sequence[str]) -> str:
    """A box of notes; nothing without any."""
    if not words:
        return ""
    items = "".join(f"<li>{escape(text)}</li>" for text in words)
    return f"<section class='warning' role='note'><h2>{escape(title)}</h2><ul>{items}</ul></section>"


def _shown(drawing: Drawing | None, subject: Subject | None = None) -> list[Part]:
    """The drawing's section, under a title that says of which law it is."""
    if drawing is None:
        return []
    if subject is not None:
        drawing = replace(drawing, title=subject.title(drawing.title))
    return [Part(figure_section(drawing.figure, drawing.name, drawing.title, drawing.caption), drawing)]


def _drawn_together(subject: Subject, found: Evidence) -> bool:
    """Whether the law is in a figure of its own kind: N_opt and D_opt by compute, B_crit by loss."""
    law = subject.result.law
    return (law.response in ("N", "D") and law.inputs == ("C",)) or (
        law.name == "batch-loss" and found.critical is not None
    )


def _influence(subject: Subject, target: Mapping[str, float] | None) -> Iterable[Part]:
    """Influence on the target where it is one run, else on the first held-out run, else on the largest fitted one."""
    result, law, held = subject.result, subject.result.law, subject.held
    if target is not None and set(law.inputs) <= target.keys():
        at, where = np.array([[target[key] for key in law.inputs]]), "the target"
    elif held:
        at, where = inputs_of(Ladder(held[:1], result.ladder.convention), law), held[0].name
    else:
        largest = int(np.argmax(result.fit.inputs.prod(axis=1)))
        at, where = result.fit.inputs[largest : largest + 1], result.ladder.points[largest].name
    try:
        found = influence(result.fit, at)
    except MegamupError:
        return  # as many parameters as runs: each run is all there is
    names = list(dict.fromkeys(point.run or point.name for point in result.ladder.points))
    yield from _shown(influence_drawing(result, found, names, subject.name), subject)
    yield Part(tables.influence_table(found, names, subject.title(f"runs that matter most for {where}")))
    yield Part(listed(subject.title("runs to look at"), flags(found, names, len(law.parameters))))
