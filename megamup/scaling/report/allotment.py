"""What fitted laws call for at chosen budgets: the callables that `allocation.allocate` takes, from results."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from megamup.cluster import Cluster
from megamup.scaling.allocation import Allocation, Optimum, allocate
from megamup.scaling.analysis import Result
from megamup.scaling.figures.frontier import has_frontier
from megamup.scaling.report.subject import Subject
from megamup.scaling.uncertainty import no_interval_reason, quantity_values

OfOptimum = Callable[[Optimum], float]


def allotments(
    subjects: Sequence[Subject], budgets: Sequence[float], cluster: Cluster | None
) -> list[tuple[str, list[Allocation]]]:
    """For each law that tells N and D at a budget its label, and a row for each budget; empty without budgets.

    Raises:
        MegamupError: a budget that isn't finite and above 0, or at which a law says nothing.
    """
    if not budgets:
        return []
    results = [subject.result for subject in subjects]
    batch, lr = law_of("B", results), law_of("lr", results)
    return [
        (label, allocate(budgets, optimum, batch=batch, lr=lr, cluster=cluster))
        for label, optimum in optima_of(subjects)
    ]


def optima_of(subjects: Sequence[Subject]) -> list[tuple[str, Callable[[float], Optimum]]]:
    """N*, D* and the loss at a budget: of each law of N and D, then of the powers of C from approach 1 or 2."""
    found: list[tuple[str, Callable[[float], Optimum]]] = [
        (subject.label, partial(_parametric, subject.result)) for subject in subjects if has_frontier(subject.result)
    ]
    of_budget = [subject for subject in subjects if subject.result.law.inputs == ("C",)]
    n, d = (next((s for s in of_budget if s.result.law.response == key), None) for key in ("N", "D"))
    if n is not None and d is not None:
        own = [*n.result.companions, *(s.result for s in of_budget)]  # first the loss of the same reduction
        loss = next((result for result in own if result.law.response == "L"), None)
        found.append((n.label, partial(_by_powers, n.result, d.result, loss)))
    return found


def law_of(response: str, results: Sequence[Result]) -> OfOptimum | None:
    """The batch B (tokens) or the rate lr that a law among the results gives at an optimum; None without one."""
    for result in results:
        if result.law.name == "critical-batch" and response == "B":
            return lambda at: quantity_values(result.fit, result.law.quantities({"L": _loss(at)}))["B_crit"]
        if result.law.response == response and set(result.law.inputs) <= {"N", "D", "C", "L"}:
            return lambda at: _follow(result, at)
    return None


def _parametric(result: Result, budget: float) -> Optimum:
    values = quantity_values(result.fit, result.law.quantities({"C": budget}))
    by_key = {"N": values["N_opt"], "D": values["D_opt"]}
    inputs = np.array([[by_key[key] for key in result.law.inputs]])
    return Optimum(budget, by_key["N"], by_key["D"], *_new_run(result, inputs))


def _by_powers(n: Result, d: Result, loss: Result | None, budget: float) -> Optimum:
    at = np.array([[budget]])
    found = (None, None, None) if loss is None else _new_run(loss, at)
    return Optimum(budget, float(n.fit.at(at)[0]), float(d.fit.at(at)[0]), *found)


def _new_run(result: Result, inputs: np.ndarray[tuple[int, int], np.dtype[np.float64]]) -> tuple[float, ...]:
    """The loss of one new run with its interval, where there is one."""
    prediction = result.predict(inputs)
    loss = float(prediction.loss[0])
    if no_interval_reason(result.fit) is not None:
        return (loss,)
    return loss, float(prediction.low[0]), float(prediction.high[0])


def _follow(result: Result, at: Optimum) -> float:
    known = {"N": at.parameters, "D": at.tokens, "C": at.flops}
    return float(result.fit.at([[_loss(at) if key == "L" else known[key] for key in result.law.inputs]])[0])


def _loss(at: Optimum) -> float:
    return float("nan") if at.loss is None else at.loss
