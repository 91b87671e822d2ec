"""What `predict` answers: a run, a budget, a loss."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from megamup.errors import MegamupError
from megamup.scaling.analysis import Result, analyse
from megamup.scaling.backtest import Backtest, Trial
from megamup.scaling.estimate import beyond, estimate, flops_per_product
from megamup.scaling.laws.loss import CHINCHILLA, power
from megamup.scaling.runs import Ladder, Point

TRUTH = {"E": 1.69, "A": 406.4, "B": 410.7, "alpha": 0.34, "beta": 0.28}
CONVENTION = {"flops": "6N", "parameters": "total", "loss": "valid"}


def ladder(noise: float = 0.001, flops: float | None = 6.0) -> Ladder:
    random = np.random.default_rng(0)
    points = []
    for n in np.geomspace(1e7, 1e9, 6):
        for d in np.geomspace(1e9, 1e11, 5):
            loss = TRUTH["E"] + TRUTH["A"] / n ** TRUTH["alpha"] + TRUTH["B"] / d ** TRUTH["beta"]
            inputs = {"N": float(n), "D": float(d)} | ({} if flops is None else {"C": float(flops * n * d)})
            points.append(Point(f"{n:.0f}-{d:.0f}", inputs, float(loss * np.exp(noise * random.standard_normal()))))
    return Ladder(tuple(points), CONVENTION)


@pytest.fixture(scope="module")
def chinchilla() -> Result:
    return analyse(ladder(), [CHINCHILLA], objective="log")


def test_a_run(chinchilla: Result) -> None:
    at = {"N": 1e10, "D": 2e11}
    (found,) = estimate(chinchilla, at)
    expected = TRUTH["E"] + TRUTH["A"] / 1e10 ** TRUTH["alpha"] + TRUTH["B"] / 2e11 ** TRUTH["beta"]
    assert (found.name, found.new_run) == ("L", True)
    assert found.low is not None
    assert found.high is not None
    assert found.low < expected < found.high
    assert found.value == pytest.approx(expected, rel=0.01)
    assert beyond(chinchilla, at) == pytest.approx(20)


def test_a_budget_gives_its_optimum(chinchilla: Result) -> None:
    """Hoffmann et al.'s closed form, and no neighbour on the budget's line is better."""
    found = {one.name: one for one in estimate(chinchilla, {"C": 1e21})}
    assert list(found) == ["L", "N_opt", "D_opt", "D_per_N"]
    p = chinchilla.fit.parameters
    g = (p["alpha"] * p["A"] / (p["beta"] * p["B"])) ** (1 / (p["alpha"] + p["beta"]))
    assert found["N_opt"].value == pytest.approx(g * (1e21 / 6) ** (p["beta"] / (p["alpha"] + p["beta"])), rel=1e-9)
    assert found["N_opt"].value * found["D_opt"].value == pytest.approx(1e21 / 6)
    assert found["D_per_N"].value == pytest.approx(found["D_opt"].value / found["N_opt"].value)
    for factor in (0.9, 1.1):
        n = factor * found["N_opt"].value
        assert estimate(chinchilla, {"N": n, "D": 1e21 / 6 / n})[0].value > found["L"].value
    for one in found.values():
        assert one.low is not None
        assert one.high is not None
        assert one.low < one.value < one.high


def test_a_loss_gives_the_budget_that_reaches_it(chinchilla: Result) -> None:
    (loss, *_) = estimate(chinchilla, {"C": 1e21})
    found = {one.name: one.value for one in estimate(chinchilla, {"L": loss.value})}
    assert found["C"] == pytest.approx(1e21, rel=1e-6)


def test_flops_follow_from_n_and_d_as_in_the_points() -> None:
    result = analyse(ladder(flops=7.0), [power("C")], objective="log")
    assert flops_per_product(result) == pytest.approx(7)
    by_product, by_flops = estimate(result, {"N": 1e9, "D": 1e10}), estimate(result, {"C": 7e19})
    assert by_product[0].value == pytest.approx(by_flops[0].value, rel=1e-12)


def test_six_where_the_points_have_no_flops(chinchilla: Result) -> None:
    assert flops_per_product(analyse(ladder(flops=None), [CHINCHILLA], objective="log")) == 6
    assert chinchilla.fit.parameters["E"] == pytest.approx(TRUTH["E"], rel=0.05)


def test_other_keys_are_refused_with_those_that_serve(chinchilla: Result) -> None:
    with pytest.raises(MegamupError, match="--at: B=1000 given; the law chinchilla takes N and D, or C, or L"):
        estimate(chinchilla, {"B": 1e3})


def test_a_loss_below_the_floor_is_refused(chinchilla: Result) -> None:
    with pytest.raises(MegamupError, match=r"--at: L=1: the law .* gives no C.* above its floor"):
        estimate(chinchilla, {"L": 1.0})


def test_the_backtest_widens_what_follows_from_the_law_too(chinchilla: Result) -> None:
    short = Trial("r", 5, 2.0, 2.0, 2.4, 1.9, 2.1, next_rung=True)
    plain, wider = (replace(chinchilla, backtest=Backtest(trials, 1)) for trials in ((), (short,)))
    factor = wider.backtest.inflation
    assert factor > 3
    for own, wide in zip(estimate(plain, {"C": 1e21}), estimate(wider, {"C": 1e21}), strict=True):
        assert own.value == wide.value
        ends = np.array([own.low, own.high, wide.low, wide.high], dtype=np.float64) / own.value
        assert np.log(ends[2:]) == pytest.approx(factor * np.log(ends[:2]), rel=1e-6)
