"""What fitted laws call for at chosen budgets: the callables that `allocation.allocate` takes, from results."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from megamup.scaling.allocation import Allocation, Cluster, Optimum, allocate
from megamup.scaling.analysis import Result
from megamup.scaling.figures.frontier import has_frontier
from megamup.scaling.uncertainty import no_interval_reason, quantity_values

OfOptimum = Callable[[Optimum], float]


def allotments(results: Sequence[Result], budgets: Sequence[float], cluster: Cluster | None) -> list[Allocation]:
    """A row for each budget; empty where no law tells N and D at one.

    Raises:
        MegamupError: a budget that isn't finite and above 0, or at which a law says nothing.
    """
    optimum = optimum_of(results)
    if optimum is None:
        return []
    return allocate(budgets, optimum, batch=law_of("B", results), lr=law_of("lr", results), cluster=cluster)


def optimum_of(results: Sequence[Result]) -> Callable[[float], Optimum] | None:
    """N*, D* and the loss at a budget: of the first law of N and D, else of powers of C; None without any."""
    for result in results:
        if has_frontier(result):
            return lambda budget: _parametric(result, budget)
    of = {(result.law.response, result.law.inputs): result for result in results}
    n, d, loss = (of.get((response, ("C",))) for response in ("N", "D", "L"))
    if n is None or d is None:
        return None
    return lambda budget: _by_powers(n, d, loss, budget)


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
