"""Rows of the allocation table against arithmetic and published runs."""

from __future__ import annotations

import json
import math

import pytest

from megamup.cluster import Cluster
from megamup.errors import MegamupError
from megamup.flops import BF16_PEAKS
from megamup.scaling.allocation import Allocation, Optimum, allocate, as_json, table_rows


def chinchilla(budget: float) -> Optimum:
    """20 tokens a parameter at C = 6·N·D."""
    parameters = math.sqrt(budget / 120)
    return Optimum(budget, parameters, 20 * parameters, loss=2.0, low=1.9, high=2.1)


def one(budget: float, **laws: object) -> Allocation:
    (row,) = allocate([budget], chinchilla, **laws)  # type: ignore[arg-type]
    return row


def test_llama3_405b_published() -> None:
    """Llama team 2024: 3.8e25 FLOPs on 16,384 H100 at an MFU of 38-43%; the model card: 30.84M H100-hours in all."""
    cluster = Cluster(devices=16_384, peak=BF16_PEAKS["H100"], mfu=38)
    row = one(3.8e25, cluster=cluster)
    assert row.device_hours is not None
    assert row.days is not None
    assert row.device_hours < 30.84e6 < 1.15 * row.device_hours  # the rest is restarts, evaluation and the like
    assert row.days == pytest.approx(row.device_hours / 24 / 16_384)
    assert row.cost is None


def test_row_by_hand() -> None:
    """1.2e20 FLOPs: a billion parameters on 20 billion tokens."""
    row = one(
        1.2e20,
        batch=lambda at: at.tokens / 9_999.5,
        lr=lambda at: at.parameters**-0.5,
        cluster=Cluster(devices=8, peak=1e14, mfu=50, price=2.0),
    )
    assert row.optimum.parameters == pytest.approx(1e9)
    assert row.tokens_per_parameter == pytest.approx(20)
    assert row.steps == 10_000  # rounded up, so that the data is seen
    assert row.lr == pytest.approx(1e9**-0.5)
    hours = 1.2e20 / 4e14 / 3600
    assert row.days == pytest.approx(hours / 24)
    assert row.device_hours == pytest.approx(8 * hours)
    assert row.cost == pytest.approx(2 * 8 * hours)
    header, shown = table_rows([row])
    cells = dict(zip(header, shown, strict=True))
    assert (cells["N*"], cells["D*"], cells["steps"], cells["cost"]) == ("1e+09", "2e+10", "10,000", "1,333")
    assert cells["95% interval"] == "1.9000 to 2.1000"


def test_what_is_unknown_is_not_printed() -> None:
    (row,) = allocate([1e20], lambda budget: Optimum(budget, 1e9, 2e10))
    known = ("C (FLOPs)", "N*", "D*", "D*/N*")
    header, shown = table_rows([row])
    assert {name: cell for name, cell in zip(header, shown, strict=True) if name not in known} == dict.fromkeys(
        header[4:], "-"
    )
    unknown = {"batch_tokens", "steps", "lr", "loss", "low", "high", "days", "device_hours", "cost"}
    written = json.loads(json.dumps(as_json([row])))[0]
    assert {key for key, value in written.items() if value is None} == unknown


def test_without_mfu_there_are_no_days() -> None:
    row = one(1e20, cluster=Cluster(devices=8, peak=1e14, price=2.0))
    assert (row.days, row.device_hours, row.cost) == (None, None, None)


def test_budgets_keep_their_order_and_scale() -> None:
    rows = allocate([1e22, 1e20], chinchilla, cluster=Cluster(8, 1e14, 40))
    assert [row.optimum.flops for row in rows] == [1e22, 1e20]
    assert rows[0].days == pytest.approx(100 * rows[1].days)  # type: ignore[operator]


@pytest.mark.parametrize(
    ("budget", "optimum", "message"),
    [
        (0.0, chinchilla, "budget: 0.0 is no amount"),
        (math.inf, chinchilla, "budget: inf"),
        (1e20, lambda c: Optimum(c, math.nan, 1e10), r"parameters at a budget of 1e\+20 FLOPs: nan"),
        (1e20, lambda c: Optimum(c, 1e9, -1.0), "tokens at a budget"),
    ],
)
def test_amounts_that_cannot_be_are_refused(budget: float, optimum: object, message: str) -> None:
    with pytest.raises(MegamupError, match=message):
        allocate([budget], optimum)  # type: ignore[arg-type]


def test_a_law_that_breaks_is_named() -> None:
    with pytest.raises(MegamupError, match=r"batch at a budget of 1e\+20 FLOPs: 0"):
        one(1e20, batch=lambda at: 0.0)
    with pytest.raises(MegamupError, match=r"lr at a budget of 1e\+20 FLOPs: -1"):
        one(1e20, lr=lambda at: -1.0)
