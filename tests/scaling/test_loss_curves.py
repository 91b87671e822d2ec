"""Curves: what smoothing keeps, and what is read between and beyond records."""

import numpy as np
import pytest

from megamup.errors import MegamupError
from megamup.scaling.curves import Curve, FloatArray, at, parse_at, parse_smoothing, sample, smoothed, steps_to

PER_STEP = 512.0


def curve_of(loss: FloatArray, tokens: FloatArray) -> Curve:
    return Curve(tokens / PER_STEP, tokens, 6e3 * tokens, loss)


@pytest.fixture
def power() -> Curve:
    """E + B·D^-0.3 at 4,000 records, even in tokens."""
    tokens = PER_STEP * np.arange(1.0, 4001.0)
    return curve_of(1.7 + 40 * tokens**-0.3, tokens)


def test_constant_weights_are_those_of_pandas_debiased_average() -> None:
    pandas = pytest.importorskip("pandas")
    loss = np.random.default_rng(0).normal(3, 0.1, 200)
    ours = smoothed(curve_of(loss, np.arange(1.0, 201.0)), parse_smoothing("weight=0.9")).loss
    np.testing.assert_allclose(ours, pandas.Series(loss).ewm(alpha=0.1, adjust=True).mean(), rtol=1e-12)


def test_half_lives_are_what_they_say() -> None:
    tokens, loss = np.array([50.0, 100.0]), np.array([1.0, 0.0])
    for text in ("tokens=50", "share=0.5", "weight=0.5"):
        # The first record has half the weight of the second.
        assert smoothed(curve_of(loss, tokens), parse_smoothing(text)).loss[-1] == pytest.approx(1 / 3)


def test_a_share_of_the_tokens_keeps_a_power_law_with_its_exponent(power: Curve) -> None:
    late = slice(400, None)  # where the window holds tens of records
    logs = np.log(power.tokens[late])

    def reducible(text: str) -> tuple[float, float]:
        excess = np.log(smoothed(power, parse_smoothing(text)).loss[late] - 1.7)
        slope, constant = np.polyfit(logs, excess, 1)
        return float(slope), float(np.abs(excess - slope * logs - constant).max())

    slope, bend = reducible("share=0.05")
    assert slope == pytest.approx(-0.3, abs=1e-3)
    assert bend < 1e-3
    assert reducible("tokens=1e5")[1] > 10 * bend  # a fixed window bends the start


def test_averages_do_not_depend_on_how_densely_a_run_logs(power: Curve) -> None:
    sparse = Curve(*(values[9::10] for values in (power.step, power.tokens, power.flops, power.loss)))

    def apart(text: str) -> float:
        dense_end, sparse_end = (smoothed(curve, parse_smoothing(text)).loss[-1] for curve in (power, sparse))
        return abs(float(dense_end / sparse_end) - 1)

    assert max(apart("share=0.1"), apart("tokens=2e5")) < 2e-4
    assert apart("weight=0.99") > 2e-3  # counts records


@pytest.mark.parametrize(
    ("text", "meaning"),
    [
        ("none", "not smoothed"),
        ("weight=0.9", "debiased EMA of weight 0.9, a half-life of 6.58 logged records"),
        ("tokens=1e8", "debiased EMA with a half-life of 1e+08 tokens"),
        ("share=0.02", "debiased EMA with a half-life of 0.02 of the tokens seen"),
    ],
)
def test_smoothing_states_its_half_life(text: str, meaning: str) -> None:
    smoothing = parse_smoothing(text)
    assert smoothing.meaning == meaning
    assert parse_smoothing(str(smoothing)) == smoothing


@pytest.mark.parametrize("text", ["weight=1", "weight=-0.1", "share=0", "tokens=0", "tokens=inf", "0.9", "ema=0.9", ""])
def test_smoothing_of_another_form_is_refused(text: str) -> None:
    with pytest.raises(MegamupError, match=r"--smooth: .*; expected none, weight=W or share=W"):
        parse_smoothing(text)


def test_the_loss_between_records_is_linear_in_log_tokens() -> None:
    curve = curve_of(np.array([4.0, 3.0]), np.array([1e3, 1e5]))
    moment = at(curve, tokens=1e4)
    assert moment.loss == pytest.approx(3.5)
    assert moment.step == pytest.approx(1e4 / PER_STEP)
    assert moment.flops == pytest.approx(6e7)
    assert at(curve, flops=6e7) == pytest.approx(moment)
    assert at(curve, step=1e4 / PER_STEP) == pytest.approx(moment)
    assert at(curve, fraction=0.1) == pytest.approx(moment)


def test_nothing_is_extrapolated() -> None:
    curve = curve_of(np.array([4.0, 3.0]), np.array([1e3, 1e5]))
    assert at(curve, tokens=1e5).loss == 3.0
    for tokens in (999.0, 1.001e5):
        with pytest.raises(MegamupError, match=r"tokens=.* is outside the curve, which goes from 1000 to 100000"):
            at(curve, tokens=tokens)


def test_a_curve_without_flops_is_not_read_by_them() -> None:
    curve = Curve(np.array([1.0, 2.0]), np.array([1e3, 1e5]), np.full(2, np.nan), np.array([4.0, 3.0]))
    with pytest.raises(MegamupError, match=r"flops=1e\+06, but the run has no flops for every record"):
        at(curve, flops=1e6)


def test_steps_to_a_loss_are_those_of_its_first_crossing(power: Curve) -> None:
    loss = 2.5
    exact = (40 / (loss - 1.7)) ** (1 / 0.3) / PER_STEP
    assert steps_to(power, loss) == pytest.approx(exact, rel=1e-5)
    assert steps_to(power, 1.7) is None
    spiked = curve_of(np.array([4.0, 3.0, 3.5, 2.9]), PER_STEP * np.arange(1.0, 5.0))
    assert 1 < (steps_to(spiked, 3.2) or 0) < 2


def test_a_crossing_before_the_first_record_is_no_crossing(power: Curve) -> None:
    with pytest.raises(
        MegamupError, match=r"loss 9: the run is at .* at its first record .*; expected to see it cross"
    ):
        steps_to(power, 9.0)


def test_samples_are_log_spaced_after_warm_up_to_the_last_record(power: Curve) -> None:
    tokens = np.array([moment.tokens for moment in sample(power, 20, warmup_steps=1000)])
    np.testing.assert_allclose(tokens, np.geomspace(1000 * PER_STEP, 4000 * PER_STEP, 20))
    assert sample(power, 2)[0].tokens == 200 * PER_STEP  # 5% of the run, where warm-up isn't known


def test_more_samples_than_records_are_refused(power: Curve) -> None:
    with pytest.raises(
        MegamupError, match=r"--at curve:50: 11 records lie after warm-up .*; expected at least as many"
    ):
        sample(power, 50, warmup_steps=3990)


@pytest.mark.parametrize(
    "text", ["final", "best", "step=5000", "tokens=1e+09", "flops=1e+18", "fraction=0.5", "curve:20"]
)
def test_moments_are_read_as_they_are_written(text: str) -> None:
    parsed = parse_at(text)
    assert parse_at(str(parsed)) == parsed


@pytest.mark.parametrize(
    "text", ["last", "step", "step=0", "step=x", "fraction=1.5", "curve:1", "curve:2.5", "curve=20"]
)
def test_moments_of_another_form_are_refused(text: str) -> None:
    with pytest.raises(MegamupError, match=r"--at: .*; expected final, best, step=5000"):
        parse_at(text)
