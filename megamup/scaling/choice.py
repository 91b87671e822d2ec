"""Which law and which objective: the pair whose predictions of held-out larger runs err least.

Candidates are compared on the same held-out runs (the folds of `backtest.py`). Of those whose errors can't be told from
the least (`STANDARD_ERRORS`) the simplest is taken: fewer parameters, then least squares on logs, which wastes
nothing where there are no outliers (Huber's loss at delta 1e-3 is nearly least absolute error and needs half as many
runs again). Where there are, Huber's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megamup.scaling.backtest import Backtest, backtest
from megamup.scaling.delta import outliers
from megamup.scaling.fit import Data, fit_law
from megamup.scaling.laws.base import FloatArray, Law
from megamup.scaling.objective import Objective, get_objective

CANDIDATES = ("log", "loss", "huber")
STANDARD_ERRORS = {False: 2.0, True: 1.0}
"""Over the folds, by whether there are outliers. Without them least squares on logs is best in theory, and it takes
two to leave it (folds share runs, so that one would be too few); with them neither has theory on its side, and it
takes one, as in Breiman et al. 1984, section 3.4.3."""


@dataclass(frozen=True)
class Candidate:
    """One law under one objective, judged by the runs that it was not fitted to."""

    law: Law
    objective: Objective
    backtest: Backtest

    @property
    def errors(self) -> dict[tuple[int, str], float]:
        """log(predicted / measured) of the next larger rungs, by (points fitted, run)."""
        return {(trial.fitted, trial.run): trial.error for trial in self.backtest.trials if trial.next_rung}


@dataclass(frozen=True)
class Choice:
    """The chosen candidate, all that were tried, and why."""

    chosen: Candidate
    tried: tuple[Candidate, ...]
    reason: str


def choose(laws: Sequence[tuple[Law, Data, FloatArray]], objectives: Sequence[str], names: Sequence[str]) -> Choice:
    """Backtest every law under every objective and choose.

    Args:
        laws: each with its data and its runs' sizes (n,), all of the same n points.
        objectives: names that `get_objective` knows; one of each means nothing is chosen.
        names: (n,), of the points.
    """
    most = max(len(law.parameters) for law, _, _ in laws)
    tried = tuple(
        Candidate(
            law,
            get_objective(name),
            backtest(law, data, get_objective(name), size, names, least=most + 1, intervals=False),
        )
        for law, data, size in laws
        for name in objectives
    )
    if len(tried) == 1:
        return Choice(tried[0], tried, "the only one asked for")
    outliers_of = {id(law): has_outliers(law, data) for law, data, _ in laws}
    ranked = sorted(tried, key=lambda c: _preference(c, outliers_of[id(c.law)]))
    judged = [candidate for candidate in ranked if candidate.errors]
    if not judged:
        why = "outliers among the residuals" if outliers_of[id(ranked[0].law)] else "no outliers among the residuals"
        return Choice(ranked[0], tried, f"too few runs to hold larger ones out; {why}")
    least = min(judged, key=lambda c: c.backtest.rms_error or math.inf)
    for candidate in judged:
        if candidate is least or not_told_from(candidate, least, STANDARD_ERRORS[outliers_of[id(candidate.law)]]):
            break
    if candidate is least:
        return Choice(candidate, tried, "least error on held-out larger runs")
    robust = candidate.objective.delta is not None and outliers_of[id(candidate.law)]
    why = "robust to the outliers seen" if robust else "simplest"
    return Choice(candidate, tried, f"{why} of those whose errors on held-out larger runs can't be told from the least")


def not_told_from(candidate: Candidate, best: Candidate, standard_errors: float) -> bool:
    """Whether the candidate's mean squared held-out error exceeds the best's by at most so many standard errors."""
    by_fold: dict[int, list[float]] = {}
    for fold, run in sorted(candidate.errors.keys() & best.errors.keys()):
        by_fold.setdefault(fold, []).append(candidate.errors[fold, run] ** 2 - best.errors[fold, run] ** 2)
    means = np.array([np.mean(values) for values in by_fold.values()])
    if len(means) < 2:
        return False
    return float(means.mean()) <= standard_errors * float(np.std(means, ddof=1)) / math.sqrt(len(means))


def has_outliers(law: Law, data: Data) -> bool:
    """Whether the Huber fit has any."""
    fit = fit_law(law, data.inputs, data.response, objective="huber", starts=8, runs=data.runs.tolist())
    return bool(outliers(fit).any())


def _preference(candidate: Candidate, with_outliers: bool) -> tuple[int, int]:
    names = ("huber", "log", "loss") if with_outliers else ("log", "loss", "huber")
    known = candidate.objective.name.partition(":")[0]
    return len(candidate.law.parameters), names.index(known) if known in names else len(names)
