"""What a fit says of a run, a budget or a loss that the user names: values with their intervals."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from megamup.errors import MegamupError
from megamup.scaling.analysis import Result
from megamup.scaling.laws.base import FloatArray
from megamup.scaling.laws.frontier import FLOPS_PER_PARAMETER_AND_TOKEN
from megamup.scaling.runs import Ladder
from megamup.scaling.uncertainty import no_interval_reason, quantity_intervals

OPTIMUM = {"N": "N_opt", "D": "D_opt"}
"""What a law whose response is N or D gives."""


@dataclass(frozen=True)
class Estimate:
    """One quantity; ends are None where the points set none."""

    name: str
    value: float
    low: float | None
    high: float | None
    new_run: bool
    """Whether the interval holds one new run, noise included; else it is the law's. The backtest has widened both."""


def estimate(result: Result, at: Mapping[str, float]) -> list[Estimate]:
    """The law's response at its inputs, or what follows from the law at a budget C or a loss L, response first.

    Where the law takes C, and N and D are given, C is N·D times what it is in the fitted points (6 where unknown).

    Raises:
        MegamupError: keys that the law can do nothing with.
    """
    law = result.law
    given = _with_flops(result, at)
    if set(given) == set(law.inputs):
        return [_response(result, law.response, [given[key] for key in law.inputs])]
    quantities = law.quantities(given)
    if not quantities:
        raise MegamupError(
            f"--at: {','.join(f'{key}={value:g}' for key, value in at.items())} given; the law {law.name} takes "
            f"{_and(law.inputs)}{_elsewhere(result)}"
        )
    intervals = quantity_intervals(result.fit, quantities, method=result.method)
    unknown = [name for name, (value, _, _) in intervals.items() if not np.isfinite(value)]
    if unknown:
        raise MegamupError(
            f"--at: {','.join(f'{key}={value:g}' for key, value in at.items())}: the law {law.formula} gives no "
            f"{_and(tuple(unknown))} there; expected a loss above its floor "
            f"({', '.join(f'{k} = {v:.4g}' for k, v in result.fit.parameters.items())}), or a smaller budget"
        )
    found = [Estimate(name, *_widened(result, *ends), new_run=False) for name, ends in intervals.items()]
    if law.response == "L" and "L" in quantities and {OPTIMUM.get(key) for key in law.inputs} <= set(quantities):
        best = [intervals[OPTIMUM[key]][0] for key in law.inputs]
        found = [_response(result, "L", best), *(e for e in found if e.name != "L")]
    return found


def answers(result: Result, at: Mapping[str, float]) -> bool:
    """Whether the law can do something with these keys."""
    given = _with_flops(result, at)
    return set(given) == set(result.law.inputs) or bool(result.law.quantities(given))


def flops_per_product(result: Result) -> float:
    """C over N·D: the median of the fitted points where they have all three, else 6."""
    ratios = [
        point.inputs["C"] / (point.inputs["N"] * point.inputs["D"])
        for point in result.ladder.points
        if {"N", "D", "C"} <= point.inputs.keys()
    ]
    return float(np.median(ratios)) if ratios else FLOPS_PER_PARAMETER_AND_TOKEN


def flops_of(ladder: Ladder) -> FloatArray | None:
    """C of all points (n,); None where one has none."""
    return ladder.columns(["C"])[:, 0] if all("C" in point.inputs for point in ladder.points) else None


def beyond(result: Result, at: Mapping[str, float]) -> float | None:
    """How many times the largest fitted run `at` is, by N·D or by the law's first input; None if unknown."""
    law = result.law
    if not set(law.inputs) <= set(_with_flops(result, at)):
        return None
    keys = [key for key in law.inputs if key in ("N", "D")] or [law.inputs[0]]
    here = np.prod([_with_flops(result, at)[key] for key in keys])
    columns = [list(law.inputs).index(key) for key in keys]
    return float(here / result.fit.inputs[:, columns].prod(axis=1).max())


def _with_flops(result: Result, at: Mapping[str, float]) -> dict[str, float]:
    if "C" in result.law.inputs and "C" not in at and {"N", "D"} <= set(at):
        rest = {key: value for key, value in at.items() if key not in ("N", "D") or key in result.law.inputs}
        return rest | {"C": flops_per_product(result) * at["N"] * at["D"]}
    return dict(at)


def _response(result: Result, name: str, inputs: list[float]) -> Estimate:
    prediction = result.predict(np.array([inputs]))
    if not np.isfinite(prediction.loss[0]):
        raise MegamupError(
            f"--at: the law {result.law.formula} has no finite value there; expected inputs nearer the runs"
        )
    known = no_interval_reason(result.fit) is None
    low, high = (float(end[0]) if known else None for end in (prediction.low, prediction.high))
    return Estimate(OPTIMUM.get(name, name), float(prediction.loss[0]), low, high, new_run=True)


def _widened(
    result: Result, value: float, low: float | None, high: float | None
) -> tuple[float, float | None, float | None]:
    """Both ends as many times farther, in logs, as larger runs have shown the law's intervals to be short."""
    factor = result.backtest.inflation
    below, above = (None if end is None else value * (end / value) ** factor for end in (low, high))
    return value, below, above


def _elsewhere(result: Result) -> str:
    """What else the law answers, in words."""
    others = [key for key in (("C",), ("L",), ("C", "M")) if result.law.quantities(dict.fromkeys(key, 1.0))]
    return (
        "".join(f", or {_and(keys)}" for keys in others)
        + ": give "
        + ",".join(f"{key}=NUMBER" for key in result.law.inputs)
    )


def _and(names: tuple[str, ...]) -> str:
    return " and ".join(names)
