"""What a budget buys: model, data, batch, steps and rate that a law calls for, and the time and price on a cluster.

The laws come in as callables, so that any fitted law serves. A figure whose basis is missing (no cluster, no price, no
law for the batch) is None, and shown as "-".
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from megamup.cluster import Cluster, positive

HOURS_A_DAY, SECONDS_AN_HOUR = 24, 3600


@dataclass(frozen=True)
class Optimum:
    """What a law calls for at a budget."""

    flops: float
    """C, by the law's convention."""
    parameters: float
    """N*, by the law's convention."""
    tokens: float
    """D*."""
    loss: float | None = None
    """Predicted, in nats per token."""
    low: float | None = None
    high: float | None = None
    """Interval of the loss; None where the fit has none."""


@dataclass(frozen=True)
class Allocation:
    """One budget's row; None is unknown."""

    optimum: Optimum
    batch_tokens: float | None
    """Tokens of a global batch."""
    steps: int | None
    lr: float | None
    days: float | None
    device_hours: float | None
    cost: float | None

    @property
    def tokens_per_parameter(self) -> float:
        """D*/N*."""
        return self.optimum.tokens / self.optimum.parameters


Law = Callable[[Optimum], float]


def allocate(
    budgets: Sequence[float],
    optimum: Callable[[float], Optimum],
    *,
    batch: Law | None = None,
    lr: Law | None = None,
    cluster: Cluster | None = None,
) -> list[Allocation]:
    """A row for each budget (FLOPs of training).

    Days are C over what the cluster does in one. MFU counts PaLM's FLOPs, so they are as good as the law's C is near
    those: 6·N·D leaves the attention scores out, a few percent at the usual lengths.

    Args:
        optimum: N*, D* and the loss at a budget C.
        batch: tokens of a global batch at an optimum, such as B_crit of its loss.
        lr: the peak learning rate at an optimum.

    Raises:
        MegamupError: a budget, or what a law says of it, that isn't finite and above 0.
    """
    return [_allocate(budget, optimum, batch, lr, cluster) for budget in budgets]


def _allocate(
    budget: float, optimum: Callable[[float], Optimum], batch: Law | None, lr: Law | None, cluster: Cluster | None
) -> Allocation:
    at = optimum(positive(budget, "budget"))
    where = f"at a budget of {budget:.4g} FLOPs"
    positive(at.parameters, f"parameters {where}")
    positive(at.tokens, f"tokens {where}")
    batch_tokens = None if batch is None else positive(batch(at), f"batch {where}")
    steps = None if batch_tokens is None else math.ceil(at.tokens / batch_tokens)
    rate = None if lr is None else positive(lr(at), f"lr {where}")
    speed = None if cluster is None else cluster.flops_per_s
    if cluster is None or speed is None:
        return Allocation(at, batch_tokens, steps, rate, None, None, None)
    hours = at.flops / speed / SECONDS_AN_HOUR
    device_hours = hours * cluster.devices
    cost = None if cluster.price is None else device_hours * cluster.price
    return Allocation(at, batch_tokens, steps, rate, hours / HOURS_A_DAY, device_hours, cost)


def table_rows(allocations: Sequence[Allocation]) -> list[tuple[str, ...]]:
    """A line a budget, the header first."""
    header = ("C (FLOPs)", "N*", "D*", "D*/N*", "batch (tokens)", "steps", "lr", "loss", "95% interval", "days")
    rows: list[tuple[str, ...]] = [(*header, "device-hours", "cost")]
    for row in allocations:
        at = row.optimum
        interval = "-" if at.low is None or at.high is None else f"{at.low:.4f} to {at.high:.4f}"
        rows.append(
            (
                f"{at.flops:.3g}",
                f"{at.parameters:.3g}",
                f"{at.tokens:.3g}",
                f"{row.tokens_per_parameter:.3g}",
                _shown(row.batch_tokens, ".3g"),
                _shown(row.steps, ",d"),
                _shown(row.lr, ".3g"),
                _shown(at.loss, ".4f"),
                interval,
                _shown(row.days, ".3g"),
                _shown(row.device_hours, ",.0f"),
                _shown(row.cost, ",.0f"),
            )
        )
    return rows


def as_json(allocations: Sequence[Allocation]) -> list[dict[str, Any]]:
    """The rows as JSON objects; unknown is null."""
    return [
        {
            "flops": row.optimum.flops,
            "parameters": row.optimum.parameters,
            "tokens": row.optimum.tokens,
            "tokens_per_parameter": row.tokens_per_parameter,
            "batch_tokens": row.batch_tokens,
            "steps": row.steps,
            "lr": row.lr,
            "loss": row.optimum.loss,
            "low": row.optimum.low,
            "high": row.optimum.high,
            "days": row.days,
            "device_hours": row.device_hours,
            "cost": row.cost,
        }
        for row in allocations
    ]


def _shown(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
