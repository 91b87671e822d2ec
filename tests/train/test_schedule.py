"""The learning rate over a run, at the steps that define each kind."""

from __future__ import annotations

import math
from typing import Literal

import pytest

from megamup.sections import Schedule
from megamup.train.schedule import lr_factor

Kind = Literal["constant", "linear", "cosine", "wsd"]
KINDS: tuple[Kind, ...] = ("constant", "linear", "cosine", "wsd")


@pytest.mark.parametrize("kind", KINDS)
def test_warm_up_is_linear_and_ends_at_the_peak(kind: Kind) -> None:
    schedule = Schedule(kind=kind, warmup_steps=10)
    assert lr_factor(schedule, 0, 111) == 1 / 11  # the first update is not wasted on 0
    assert [lr_factor(schedule, step, 111) for step in range(11)] == [(step + 1) / 11 for step in range(11)]


@pytest.mark.parametrize("kind", KINDS)
def test_without_warm_up_the_first_update_is_at_the_peak(kind: Kind) -> None:
    assert lr_factor(Schedule(kind=kind), 0, 100) == 1.0


@pytest.mark.parametrize(
    ("kind", "middle", "quarter"),
    [("constant", 1.0, 1.0), ("linear", 0.6, 0.8), ("cosine", 0.6, 0.2 + 0.8 * (1 + math.sqrt(0.5)) / 2)],
)
def test_values_between_warm_up_and_last(kind: Kind, middle: float, quarter: float) -> None:
    """110 updates of which 10 warm up, peak at 10 and last at 110: the middle is update 60, a quarter is 35."""
    schedule = Schedule(kind=kind, warmup_steps=10, min_ratio=0.2)
    assert lr_factor(schedule, 60, 111) == pytest.approx(middle)
    assert lr_factor(schedule, 35, 111) == pytest.approx(quarter)


@pytest.mark.parametrize("kind", ["linear", "cosine", "wsd"])
@pytest.mark.parametrize("min_ratio", [0.0, 0.1, 1.0])
def test_a_decay_ends_at_min_ratio(kind: Kind, min_ratio: float) -> None:
    schedule = Schedule(kind=kind, warmup_steps=7, min_ratio=min_ratio)
    assert lr_factor(schedule, 99, 100) == pytest.approx(min_ratio)
    assert lr_factor(schedule, 500, 100) == pytest.approx(min_ratio)


def test_constant_ignores_min_ratio() -> None:
    assert lr_factor(Schedule(kind="constant", min_ratio=0.0), 99, 100) == 1.0


def test_wsd_holds_then_decays_over_its_share() -> None:
    """20% of 100 updates: 0 to 79 at the peak, then 20 equal steps down to the last, number 99."""
    schedule = Schedule(kind="wsd", warmup_steps=5, min_ratio=0.0, decay_fraction=0.2)
    values = [lr_factor(schedule, step, 100) for step in range(100)]
    assert values[5:80] == [1.0] * 75
    assert values[80:] == pytest.approx([1 - n / 20 for n in range(1, 21)])


def test_wsd_that_decays_longer_than_it_may_starts_after_warm_up() -> None:
    schedule = Schedule(kind="wsd", warmup_steps=50, min_ratio=0.5, decay_fraction=1.0)
    assert lr_factor(schedule, 50, 100) == 1.0
    assert lr_factor(schedule, 51, 100) == pytest.approx(1 - 0.5 / 49)
    assert lr_factor(schedule, 99, 100) == pytest.approx(0.5)


@pytest.mark.parametrize("kind", KINDS)
def test_bounds_and_monotony_over_many_runs(kind: Kind) -> None:
    for steps in (1, 2, 3, 7, 50, 101):
        for warmup in sorted({0, 1, steps // 3, steps - 1, steps}):
            for min_ratio in (0.0, 0.3):
                schedule = Schedule(kind=kind, warmup_steps=warmup, min_ratio=min_ratio)
                values = [lr_factor(schedule, step, steps) for step in range(steps)]
                assert all(0.0 <= value <= 1.0 for value in values), (steps, warmup)
                assert values[:warmup] == sorted(values[:warmup])
                assert values[warmup:] == sorted(values[warmup:], reverse=True), (steps, warmup)
                if warmup < steps:
                    assert values[warmup] == 1.0
