"""From runs to a law one can bet on: checked, chosen, fitted, backtested, with what is doubtful in words."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from megamup.errors import MegamupError
from megamup.scaling.backtest import Backtest, backtest
from megamup.scaling.choice import CANDIDATES, Choice, choose
from megamup.scaling.curve_backtest import CurveEvidence
from megamup.scaling.curve_table import CurveTable, curve_table
from megamup.scaling.delta import outliers
from megamup.scaling.fit import Data, Fit, check_enough, fit_law, warnings_of
from megamup.scaling.identifiability import check, check_fit
from megamup.scaling.laws import LAWS, POWER_INPUTS, REDUCTIONS, get_law
from megamup.scaling.laws.base import FloatArray, Law
from megamup.scaling.laws.frontier import FLOPS_PER_PARAMETER_AND_TOKEN
from megamup.scaling.laws.loss import power
from megamup.scaling.reduction import Curves, reduce_runs
from megamup.scaling.runs import Ladder
from megamup.scaling.uncertainty import Interval, Prediction, no_interval_reason, parameter_intervals, predict

AUTO, PUBLISHED = "auto", "published"
MOST_NAMES = 8

OF_THE_DATA_SET = ("kaplan-d", "kaplan-nd")
"""Laws whose D is the data set's size: what is seen again doesn't count (Kaplan et al. 2020, section 1.3)."""


@dataclass(frozen=True)
class Tried:
    """One row of the table of what was tried."""

    law: str
    objective: str
    rms_error: float | None
    """Root mean square of log(predicted / measured) over the next larger runs, held out; None without any."""
    trials: int
    """Predictions of held-out runs."""


@dataclass(frozen=True)
class Result:
    """A fit with where its points came from and how far it may be believed: what a fit file holds."""

    fit: Fit
    ladder: Ladder
    intervals: dict[str, Interval]
    backtest: Backtest
    tried: tuple[Tried, ...]
    reason: str
    """Why this law and objective."""
    warnings: list[str]
    provenance: dict[str, str]
    """The command, the date (UTC) and the versions the fit was made with."""
    seed: int = 0
    method: str = "profile"
    """How intervals are found, one of `uncertainty.METHODS`."""
    reduction: str | None = None
    """The key of `REDUCTIONS` by which runs became the ladder's points; None where they are the runs' own."""
    runs: Ladder | None = None
    """The runs before the reduction."""
    companions: tuple[Result, ...] = ()
    """Other laws of the same reduction."""
    curve_evidence: CurveEvidence | None = None
    """Of a law of whole curves: the schedules, and what holding them out has shown, in place of the backtest."""
    curves: CurveTable | None = None
    """Training losses of the ladder's runs while they trained, for the band of a larger run (`forecast.band`)."""

    @property
    def law(self) -> Law:
        return self.fit.law

    def predict(self, inputs: FloatArray) -> Prediction:
        """The law and the interval of one new run at `inputs` (m, d), widened by what the backtest needed."""
        return predict(self.fit, inputs, method=self.method).widened(self.backtest.inflation)


def known_inputs(ladder: Ladder) -> set[str]:
    """Inputs that all points have."""
    return set.intersection(*(set(point.inputs) for point in ladder.points)) if ladder.points else set()


def check_names(text: str) -> None:
    """Refuse names that stand for no law, before anything is read.

    Raises:
        MegamupError: an unknown name, or a reduction among several.
    """
    names = text.split(",")
    for name in names if text != AUTO else []:
        if name not in REDUCTIONS or len(names) > 1:
            get_law(name)


def laws_named(text: str, x: str | None, ladder: Ladder) -> list[Law]:
    """The laws called `text`, several divided by commas; ``auto`` is every law of the loss that the points allow.

    Args:
        x: the input of `power`; default C where the points have it, else N, else D.

    Raises:
        MegamupError: no such law, or none that the points allow.
    """
    known = known_inputs(ladder)
    own = x or next((key for key in POWER_INPUTS if key in known), None)
    if text != AUTO:
        return [get_law(name, own if name == "power" else x) for name in text.split(",")]
    possible: list[Law] = [power(own)] if own is not None else []
    possible += [law for law in LAWS.values() if law.name != "power" and law.response == "L"]
    laws = [law for law in possible if set(law.inputs) <= known]
    if not laws:
        raise MegamupError(f"--law auto: the points have {', '.join(sorted(known)) or 'no inputs'}; expected N, D or C")
    return laws


def response_of(ladder: Ladder, law: Law) -> FloatArray:
    """What the law is fitted to: (n,), the loss or an input."""
    return ladder.losses if law.response == "L" else ladder.columns([law.response])[:, 0]


def inputs_of(ladder: Ladder, law: Law) -> FloatArray:
    """The law's inputs (n, d).

    Raises:
        MegamupError: points that lack one.
    """
    for key in (*law.inputs, *(() if law.response == "L" else (law.response,))):
        lacking = [point.name for point in ladder.points if key != "L" and key not in point.inputs]
        if lacking:
            has = ", ".join(sorted(known_inputs(ladder)))
            raise MegamupError(
                f"--law {law.name}: needs {key}, which {len(lacking)} of {len(ladder.points)} points lack (first "
                f"{lacking[0]}); they have {has}: name its column (--columns {key}=COLUMN), or choose another law"
            )
    columns = {key: ladder.losses if key == "L" else ladder.columns([key])[:, 0] for key in law.inputs}
    if law.name in OF_THE_DATA_SET and "U" in known_inputs(ladder):
        columns["D"] = np.minimum(columns["D"], ladder.columns(["U"])[:, 0])
    return np.column_stack(list(columns.values()))


def completed(ladder: Ladder, needed: set[str]) -> Ladder:
    """The ladder with D or C from C = 6·N·D, where it is needed and all points have the other two; with a warning."""
    known = known_inputs(ladder)
    missing = next((key for key in ("D", "C") if key in needed and key not in known), None)
    other = {"D": "C", "C": "D"}.get(missing or "")
    if missing is None or not {"N", other} <= known:
        return ladder
    flops = FLOPS_PER_PARAMETER_AND_TOKEN
    points = []
    for point in ladder.points:
        n, x = point.inputs["N"], point.inputs[str(other)]
        value = x / (flops * n) if missing == "D" else flops * n * x
        points.append(replace(point, inputs=point.inputs | {missing: value}))
    formula = "C/(6·N)" if missing == "D" else "6·N·D"
    warning = f"{missing} is not given and taken as {formula}; name its column where the runs counted otherwise"
    convention = ladder.convention | ({"flops": "6N"} if missing == "C" else {})
    return replace(ladder, points=tuple(points), convention=convention, warnings=(*ladder.warnings, warning))


def sizes_of(ladder: Ladder, law: Law) -> FloatArray:
    """What orders runs from small to large (n,): FLOPs where known, else N·D, else the law's first input."""
    known = known_inputs(ladder)
    if "C" in known:
        return ladder.columns(["C"])[:, 0]
    if {"N", "D"} <= known:
        return np.asarray(ladder.columns(["N", "D"]).prod(axis=1))
    return inputs_of(ladder, law)[:, 0]


def analyse(
    ladder: Ladder,
    laws: Sequence[Law],
    *,
    objective: str = AUTO,
    seed: int = 0,
    method: str = "profile",
    provenance: dict[str, str] | None = None,
) -> Result:
    """Fit the law whose held-out error is least, under the objective whose held-out error is least.

    Args:
        laws: one, or several to choose from; all of the same response.
        method: how intervals are found, one of `uncertainty.METHODS`.
        objective: a name that `get_objective` knows, ``published`` (as the law's source fitted), or ``auto``.

    Raises:
        MegamupError: points that don't determine the law, with what to add.
    """
    ladder = completed(ladder, {key for law in laws for key in law.inputs})
    prepared: list[tuple[Law, Data, FloatArray]] = []
    for law in laws:
        x = inputs_of(ladder, law)
        bound = law.bound_to(dict(zip(law.inputs, x.T, strict=True)))
        data = Data(x, response_of(ladder, law), ladder.runs)
        check_enough(bound, x)
        check(bound, data)
        prepared.append((bound, data, sizes_of(ladder, law)))
    names = [point.name for point in ladder.points]
    choice = choose(prepared, _objectives(objective, laws), names)
    chosen = choice.chosen
    (data,) = (data for law, data, _ in prepared if law is chosen.law)
    fit = fit_law(
        chosen.law, data.inputs, data.response, objective=chosen.objective, seed=seed, runs=data.runs.tolist()
    )
    found = check_fit(fit)
    test = backtest(fit.law, data, fit.objective, sizes_of(ladder, fit.law), names)
    intervals = parameter_intervals(fit, method=method)
    return Result(
        fit=fit,
        ladder=ladder,
        intervals=intervals,
        backtest=test,
        tried=_table(choice),
        reason=choice.reason,
        warnings=[
            *ladder.warnings,
            *_outlier_warnings(fit, names),
            *warnings_of(fit),
            *found,
            *_interval_warnings(fit, intervals),
            *test.warnings(),
        ],
        provenance=provenance or {},
        seed=seed,
        method=method,
        curves=curve_table(ladder) if fit.law.response == "L" else None,
    )


def _objectives(wanted: str, laws: Sequence[Law]) -> tuple[str, ...]:
    if wanted != PUBLISHED:
        return CANDIDATES if wanted == AUTO else (wanted,)
    if len({law.published_objective for law in laws}) > 1:
        names = ", ".join(f"{law.name}: {law.published_objective}" for law in laws)
        raise MegamupError(f"--objective {PUBLISHED}: the laws have different ones ({names}); expected one law")
    return (laws[0].published_objective,)


def is_reduced(name: str, ladder: Ladder) -> bool:
    """Whether points are what the reduction to `critical-batch` leaves: steps by batch, several at each loss."""
    if name != "critical-batch" or not {"B", "S"} <= known_inputs(ladder):
        return False
    return bool(np.unique(ladder.losses, return_counts=True)[1].min() > 1)


def analyse_reduced(
    name: str,
    ladder: Ladder,
    curves: Callable[[], Curves],
    *,
    objective: str = AUTO,
    seed: int = 0,
    method: str = "profile",
    provenance: dict[str, str] | None = None,
) -> Result:
    """Reduce runs as `name`, a key of `REDUCTIONS`, says, and fit its laws: the first, with the others as companions.

    A law for which too few points are left is named in a warning; without the first there is no result.

    Raises:
        MegamupError: as `reduce_runs`; too few points are left for the first law.
    """
    ladder = completed(ladder, set(REDUCTIONS[name].inputs))
    reduced = reduce_runs(name, ladder, curves)
    found: list[Result] = []
    warnings = list(reduced.warnings)
    for law, points in reduced.parts:
        try:
            result = analyse(points, [law], objective=objective, seed=seed, method=method, provenance=provenance)
        except MegamupError as error:
            if not found:
                raise MegamupError(f"--law {name}: {error}{_listed(warnings)}") from None
            warnings.append(f"{law.formula} is not fitted: {error}")
        else:
            found.append(result)
    main, *others = found
    return replace(main, warnings=[*warnings, *main.warnings], reduction=name, runs=ladder, companions=tuple(others))


def _listed(warnings: Sequence[str]) -> str:
    return "".join(f"; {warning}" for warning in warnings)


def _table(choice: Choice) -> tuple[Tried, ...]:
    return tuple(
        Tried(
            candidate.law.name,
            candidate.objective.name,
            candidate.backtest.rms_error,
            len(candidate.backtest.trials),
        )
        for candidate in choice.tried
    )


def _outlier_warnings(fit: Fit, names: Sequence[str]) -> list[str]:
    found = [name for name, out in zip(names, outliers(fit), strict=True) if out]
    if not found:
        return []
    shown = ", ".join(found[:MOST_NAMES]) + (f" and {len(found) - MOST_NAMES} more" if len(found) > MOST_NAMES else "")
    return [
        f"{len(found)} of {len(names)} points are outliers, which hardly move the law and aren't counted as noise; "
        f"if they are the largest runs, the law bends there: {shown}"
    ]


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
    offsets = [name for name in fit.law.parameters if fit.law.may_vanish(name)]
    return found + [
        f"{name}, the loss that no scale removes, may be 0 within its interval: the range is too narrow to see it"
        for name in offsets
        if intervals[name][0] == 0 and name not in fit.diagnostics.at_bound
    ]
