"""Laws of whole curves: their sums against loops as the papers write them, and a schedule predicted from others."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from megamup.errors import MegamupError
from megamup.scaling.fit import fit_law
from megamup.scaling.laws.annealing import ANNEALING, MULTI_POWER, CurveLaw, predict_curve
from megamup.scaling.laws.base import FloatArray
from megamup.scaling.laws.examples import SCHEDULES, cosine, example, grid, wsd
from megamup.scaling.laws.schedules import Schedules, schedule_of

WARMUP = 50
SHARP = np.concatenate([np.linspace(1e-5, 3e-4, WARMUP), np.full(350, 3e-4), np.full(200, 9e-5), np.full(200, 3e-5)])
SMOOTH = cosine(1500, 3e-4, WARMUP)


def luo(p: FloatArray, rate: FloatArray, t: int) -> float:
    """arXiv:2503.12811, eq. 2 and 3, step by step; the fall of the rate begins after the warm-up."""
    l0, a, alpha, b, c, beta, gamma = p
    won = 0.0
    for k in range(WARMUP, t):
        area = rate[k:t].sum()
        won += b * (rate[k - 1] - rate[k]) * (1 - (1 + c * rate[k] ** -gamma * area) ** -beta)
    return float(l0 + a * rate[:t].sum() ** -alpha - won)


def tissue(p: FloatArray, rate: FloatArray, t: int, decay: float) -> float:
    """arXiv:2408.11029, eq. 1 and its momentum m_i = decay·m_{i-1} + (η_{i-1} - η_i), step by step."""
    l0, a, alpha, c = p
    momentum = total = 0.0
    for k in range(WARMUP, t):
        momentum = decay * momentum + (rate[k - 1] - rate[k])
        total += momentum
    return float(l0 + a * rate[:t].sum() ** -alpha - c * total)


@pytest.mark.parametrize("rate", [SHARP, SMOOTH], ids=["steps", "cosine"])
@pytest.mark.parametrize("share", [0.3, 0.52, 0.76, 1.0])
def test_sums_are_those_of_the_papers(rate: FloatArray, share: float) -> None:
    t = round(share * len(rate))
    at = np.array([[1.0, t]])
    truth = example("annealing").truth
    law: CurveLaw = replace(ANNEALING, schedules=Schedules([rate]))
    assert law.predict(truth, at)[0] == pytest.approx(tissue(truth, rate, t, ANNEALING.decay), rel=1e-12)
    truth = example("multi-power").truth
    law = replace(MULTI_POWER, schedules=Schedules([rate]))
    # In blocks: exact for sharp falls, within 1e-4 nats for smooth ones.
    assert law.predict(truth, at)[0] == pytest.approx(luo(truth, rate, t), abs=1e-9 if rate is SHARP else 1e-4)


@pytest.mark.parametrize("name", ["annealing", "multi-power"])
def test_a_schedule_is_predicted_from_others(name: str) -> None:
    # Fitted to a cosine and to a constant rate with 0.2% noise, a warm-up, stable, decay curve follows.
    known = example(name)
    law = known.law
    assert isinstance(law, CurveLaw)
    fitted = replace(law, schedules=Schedules([SCHEDULES.rates[0], SCHEDULES.rates[2]]))
    inputs = grid(np.array([1.0, 2.0]), np.rint(np.geomspace(200, 4000, 60)))
    noise = 1 + 2e-3 * np.random.default_rng(3).standard_normal(len(inputs))
    fit = fit_law(fitted, inputs, fitted.predict(known.truth, inputs) * noise, objective="log", starts=8)
    held = wsd(4000, 3e-4, 100, 800)
    steps, predicted = predict_curve(law, fit.parameters, held)
    expected = replace(law, schedules=Schedules([held])).predict(known.truth, np.column_stack([steps**0, steps]))
    assert predicted == pytest.approx(expected, rel=5e-3)
    # The decay is seen: the loss falls faster in it than before.
    assert predicted[-1] < predicted[np.searchsorted(steps, 3200)] - 0.05


def test_a_schedule_that_ends_at_zero_has_a_loss() -> None:
    schedule = cosine(1000, 3e-4, 50, end=0.0)
    known = example("multi-power")
    assert isinstance(known.law, CurveLaw)
    _, predicted = predict_curve(known.law, dict(zip(known.law.parameters, known.truth, strict=True)), schedule)
    assert np.all(np.isfinite(predicted))


def test_logged_rates_become_a_schedule() -> None:
    schedule = schedule_of([1, 11, 21], [0.0, 1e-3, 5e-4])
    assert schedule.shape == (21,)
    assert schedule[5] == pytest.approx(5e-4)
    assert schedule[-1] == 5e-4
    # Before the first record: a warm-up from 0, a constant rate, a fall from no more than the peak.
    np.testing.assert_allclose(schedule_of([10, 20], [1e-3, 2e-3]), np.arange(1, 21) * 1e-4)
    np.testing.assert_allclose(schedule_of([10, 20], [1e-3, 1e-3]), 1e-3)
    np.testing.assert_allclose(schedule_of([10, 20], [1e-3, 5e-4])[:10], 1e-3)


@pytest.mark.parametrize("rate", [SHARP, SMOOTH, SCHEDULES.rates[1]], ids=["steps", "cosine", "wsd"])
def test_knots_give_back_the_schedule(rate: FloatArray) -> None:
    knots = Schedules([rate]).knots()
    np.testing.assert_allclose(Schedules.from_knots(knots).rates[0], rate, rtol=1e-6)
    if rate is SHARP:
        assert len(knots[0]["step"]) < 10


def test_a_warm_up_is_no_annealing() -> None:
    at = np.array([1.0]), np.array([float(WARMUP)])
    assert Schedules([SMOOTH]).momenta(*at, 0.999)[0] == 0
    assert not Schedules([SMOOTH]).falls(*at).fall.any()
    assert Schedules([SMOOTH]).areas(*at)[0] == pytest.approx(SMOOTH[:WARMUP].sum())


def test_what_is_missing_is_said() -> None:
    with pytest.raises(MegamupError, match="annealing: no schedules given"):
        fit_law(ANNEALING, [[1, 2], [1, 3], [1, 4], [1, 5]], [3.0, 2.9, 2.8, 2.7])
    with pytest.raises(MegamupError, match="curve: 2 is unknown; expected 1 to 1"):
        Schedules([SMOOTH]).areas(np.array([2.0]), np.array([5.0]))
    with pytest.raises(MegamupError, match="step: 1501 of curve 1 is beyond its schedule of 1500 steps"):
        Schedules([SMOOTH]).areas(np.array([1.0]), np.array([1501.0]))
    with pytest.raises(MegamupError, match="before the first learning rate above 0"):
        Schedules([[0.0, 1e-3]]).areas(np.array([1.0]), np.array([1.0]))
    with pytest.raises(MegamupError, match="curve 1: expected a finite learning rate >= 0"):
        Schedules([[1e-3, -1e-3]])
    with pytest.raises(MegamupError, match="schedules: none given"):
        Schedules([])
    with pytest.raises(MegamupError, match="no value for alpha, C; expected all of L0, A, alpha, C"):
        predict_curve(ANNEALING, {"L0": 1.0, "A": 1.0}, SMOOTH)
