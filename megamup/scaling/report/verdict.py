"""What a law said of runs that it was not fitted to, beside what they measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from megamup.scaling.analysis import Result, inputs_of, response_of
from megamup.scaling.runs import Ladder, Point


@dataclass(frozen=True)
class Verdict:
    """What the law said of one held-out run, and what the run measured (nats per token, where it is a loss)."""

    point: Point
    law: str
    predicted: float
    measured: float
    low: float
    high: float
    """NaN in `low` and `high` where the fit has no intervals."""

    @property
    def error_percent(self) -> float:
        """Predicted over measured, less one."""
        return 100 * (self.predicted / self.measured - 1)

    @property
    def inside(self) -> bool | None:
        """Whether the measured value lies within the interval; None without one."""
        if not self.low <= self.high:
            return None
        return self.low <= self.measured <= self.high


def judge(result: Result, held: Sequence[Point]) -> list[Verdict]:
    """The law's prediction of each held-out run, widened by what the backtest needed, beside its measured value.

    Raises:
        MegamupError: a run without one of the law's inputs.
    """
    if not held:
        return []
    ladder = Ladder(tuple(held), result.ladder.convention)
    prediction = result.predict(inputs_of(ladder, result.law))
    rows = zip(held, prediction.loss, response_of(ladder, result.law), prediction.low, prediction.high, strict=True)
    return [Verdict(point, result.law.formula, *map(float, numbers)) for point, *numbers in rows]


def cards(verdicts: Sequence[Verdict]) -> str:
    """A card for each verdict, or how to get one."""
    if not verdicts:
        return (
            "<p class='lead'>No run was held out, so nothing here tests the law beyond the runs it was "
            "fitted to. Fit with <code>--exclude</code> on the largest run and give it to <code>report "
            "--holdout</code>.</p>"
        )
    return f"<div class='cards'>{''.join(_card(verdict) for verdict in verdicts)}</div>"


def signed(value: float) -> str:
    """With two digits and its sign."""
    return f"{value:+.2f}".replace("-", "−")


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
        f"<div><dt>measured</dt><dd>{verdict.measured:.4f}</dd></div>"
        f"<div><dt>error</dt><dd>{signed(verdict.error_percent)}%</dd></div></dl>"
        f"<p><strong>{word}</strong> · {interval}</p></section>"
    )
