"""`report.html`: one self-contained page on a fit, for whoever decides whether to train the large model."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from html import escape
from typing import TYPE_CHECKING

from megamup.errors import MegamupError
from megamup.page import figure_section, page, table_section
from megamup.scaling.figures import curve_figure, law_figure, residual_figure
from megamup.scaling.fit import OBJECTIVES
from megamup.scaling.fit_file import Result
from megamup.scaling.runs import Curve, Point, read_curve
from megamup.scaling.uncertainty import Interval, predict

if TYPE_CHECKING:
    pass


@dataclass(frozen=True)
class Verdict:
    """What the law said of one held-out run, and what the run measured (nats per token)."""

    point: Point
    predicted: float
    low: float
    high: float
    """NaN in `low` and `high` where the fit has no intervals."""

    @property
    def error_percent(self) -> float:
        """Predicted over measured, less one."""
        return 100 * (self.predicted / self.point.loss - 1)

    @property
    def inside(self) -> bool | None:
        """Whether the measured loss lies within the interval; None without one."""
        if not self.low <= self.high:
            return None
        return self.low <= self.point.loss <= self.high


def judge(result: Result, held: Sequence[Point]) -> list[Verdict]:
    """The law's prediction of each held-out run beside its measured loss."""
    if not held:
        return []
    prediction = predict(result.fit, [point.inputs[result.x] for point in held])
    return [
        Verdict(point, float(loss), float(low), float(high))
        for point, loss, low, high in zip(held, prediction.loss, prediction.low, prediction.high, strict=True)
    ]


def make_report(result: Result, held: Sequence[Point], command: str) -> str:
    """The page as one HTML document without any outside file, script or font.

    Args:
        held: runs that the fit has not seen; empty for a page without a verdict.
        command: what made the page, for its provenance.
    """
    formula = result.fit.law.formula.format(x=result.x)
    curves, missing = _curves(result.ladder.points)
    held_curves, held_missing = _curves(held)
    sections = [
        _summary(result),
        _headline(judge(result, held)),
        _warnings(result.warnings + missing + held_missing),
        figure_section(
            law_figure(result, held),
            "law",
            f"Loss against {result.x}",
            f"The law {formula} through the runs. The band holds the loss of one new run with 95% "
            "confidence if the law goes on as fitted. It knows the noise of the runs, not a change of "
            "regime beyond them.",
        ),
        figure_section(
            residual_figure(result, held),
            "residuals",
            "Residuals",
            "Measured less fitted loss, in percent of the fitted. A pattern along x says that the law bends "
            "otherwise than the runs.",
        ),
        _parameters(result),
        _points(result, held),
        _diagnostics(result),
        _provenance(result, command),
    ]
    if curves or held_curves:
        caption = "Training loss of each run against the tokens it has seen (means over bins of steps)."
        curve_section = figure_section(curve_figure(curves, held_curves), "curves", "Training curves", caption)
        sections.insert(5, curve_section)
    return page(f"Scaling law {formula}", sections)


def _curves(points: Sequence[Point]) -> tuple[list[tuple[str, Curve]], list[str]]:
    """The curves of the points that have a run folder, and a warning for each that can't be read."""
    found, missing = [], []
    for point in points:
        if point.source is None:
            continue
        try:
            curve = read_curve(point.source)
        except MegamupError as error:
            missing.append(f"the training curve of {point.name} is not shown: {error}")
        else:
            found.append((point.name, curve))
    return found, missing


def _summary(result: Result) -> str:
    x = [point.inputs[result.x] for point in result.ladder.points]
    values = ", ".join(f"{name} = {value:.4g}" for name, value in result.fit.parameters.items())
    reach = f"{result.x} from {min(x):.3g} to {max(x):.3g}"
    return f"<p class='lead'>{values}; fitted to {len(x)} runs, {reach}.</p>"


def _headline(verdicts: Sequence[Verdict]) -> str:
    if not verdicts:
        return (
            "<p class='lead'>No run was held out, so nothing here tests the law beyond the runs it was "
            "fitted to. Fit with <code>--exclude</code> on the largest run and give it to <code>report "
            "--holdout</code>.</p>"
        )
    return f"<div class='cards'>{''.join(_card(verdict) for verdict in verdicts)}</div>"


def _card(verdict: Verdict) -> str:
    if verdict.inside is None:
        interval, state, word = "too few runs to measure the noise", "unknown", "no interval"
    else:
        interval = f"95% interval {verdict.low:.4f} to {verdict.high:.4f}"
        state = "inside" if verdict.inside else "outside"
        word = f"{state} the interval"
    return (
        f"<section class='card {state}'><h2>{escape(verdict.point.name)} <small>held out</small></h2>"
        f"<dl><div><dt>predicted</dt><dd>{verdict.predicted:.4f}</dd></div>"
        f"<div><dt>measured</dt><dd>{verdict.point.loss:.4f}</dd></div>"
        f"<div><dt>error</dt><dd>{_signed(verdict.error_percent)}%</dd></div></dl>"
        f"<p><strong>{word}</strong> · {interval}</p></section>"
    )


def _warnings(warnings: Sequence[str]) -> str:
    if not warnings:
        return ""
    items = "".join(f"<li>{escape(warning)}</li>" for warning in warnings)
    return f"<section class='warning' role='note'><h2>Warnings</h2><ul>{items}</ul></section>"


def _parameters(result: Result) -> str:
    rows = [(name, f"{value:.6g}", *_ends(result.intervals[name])) for name, value in result.fit.parameters.items()]
    return table_section("Parameters", ("parameter", "value", "95% low", "95% high"), rows)


def _ends(interval: Interval) -> tuple[str, str]:
    low, high = ("not bounded" if end is None else f"{end:.6g}" for end in interval)
    return low, high


def _points(result: Result, held: Sequence[Point]) -> str:
    rows = []
    for kind, points in (("fitted", result.ladder.points), ("held out", held)):
        for point in points:
            fitted = float(result.fit.at([point.inputs[result.x]])[0])
            residual = _signed(100 * (point.loss / fitted - 1))
            rows.append(
                (
                    point.name,
                    kind,
                    f"{point.inputs[result.x]:.4g}",
                    f"{point.loss:.4f}",
                    f"{fitted:.4f}",
                    residual,
                )
            )
    return table_section("Runs", ("run", "use", result.x, "loss", "law", "residual %"), rows)


def _diagnostics(result: Result) -> str:
    fit, diagnostics = result.fit, result.fit.diagnostics
    unit = " of the loss" if fit.objective == "relative" else " nats per token"
    std = "none: no degree of freedom left" if fit.residual_std is None else f"{fit.residual_std:.4g}{unit}"
    rows = [
        ("objective", f"{OBJECTIVES[fit.objective]}: {fit.objective_value:.4g}"),
        ("residual standard deviation", std),
        ("degrees of freedom", str(fit.degrees_of_freedom)),
        ("starts that reached the optimum", f"{diagnostics.share_of_starts_at_optimum:.0%}"),
        ("gradient norm at the optimum", f"{diagnostics.gradient_norm:.1e}"),
        ("condition number of the scaled Jacobian", f"{diagnostics.condition_number:.3g}"),
        ("parameters at a bound", ", ".join(diagnostics.at_bound) or "none"),
    ]
    return table_section("Diagnostics", ("what", "value"), rows)


def _provenance(result: Result, command: str) -> str:
    made = result.provenance
    convention = result.ladder.convention
    rows = [
        ("law", f"{result.fit.law.name}: {result.fit.law.source}"),
        ("loss", convention["loss"]),
        ("FLOPs convention", convention["flops"]),
        ("parameters counted", convention["parameters"]),
        ("fitted", f"{made['date']}, numpy {made['numpy']}, scipy {made['scipy']}"),
        ("fitted with", made["command"]),
        ("reported", f"{datetime.now(timezone.utc):%Y-%m-%d %H:%M} UTC"),
        ("reported with", command),
    ]
    return table_section("Provenance", ("what", "value"), rows)


def _signed(value: float) -> str:
    return f"{value:+.2f}".replace("-", "−")
