"""Steps against batch, from simulated runs of batches and learning rates, give back S_min, E_min and B_crit."""

from dataclasses import replace

import numpy as np
import pytest

from megamup.errors import MegamupError
from megamup.scaling.critical_batch import apply_critical_batch, critical_batch
from megamup.scaling.curves import Curve
from megamup.scaling.fit import fit_law
from megamup.scaling.laws import get_law
from megamup.scaling.runs import Ladder, Point

B_STAR, ALPHA_B = 3e7, 0.3
BATCHES = np.geomspace(3e4, 1e7, 6)
BEST_RATE = 1e-3


def b_crit(loss: np.ndarray) -> np.ndarray:
    return np.asarray(B_STAR * loss ** (-1 / ALPHA_B))


def run(batch: float, rate: float, seed: int | None = None) -> tuple[Point, Curve]:
    """A curve whose steps to each loss are S_min(L)·(1 + B_crit(L)/B), more at any but the best rate."""
    loss = np.linspace(6.0, 2.8, 400)
    least = 200 * (loss - 1.5) ** -2.0 * (1 + 0.3 * np.log(rate / BEST_RATE) ** 2)
    steps = least * (1 + b_crit(loss) / batch)
    if seed is not None:
        steps = steps * np.exp(0.01 * np.random.default_rng(seed).standard_normal())
    return Point(f"B{batch:.3g}lr{rate:g}", {"B": float(batch), "lr": rate}, 2.8), Curve(
        steps, steps * batch, steps * np.nan, loss
    )


def runs(rates: tuple[float, ...] = (5e-4, 1e-3, 2e-3)) -> list[tuple[Point, Curve]]:
    return [run(batch, rate) for batch in BATCHES for rate in rates]


def test_levels_and_laws_give_back_the_truth() -> None:
    found = critical_batch(runs(), levels=4, convention={"loss": "valid"})
    assert found.warnings == ()
    assert len(found.ladder) == 4 * 6
    for level in found.levels:
        assert level.b_crit == pytest.approx(float(b_crit(np.array(level.loss))), rel=2e-3)
        assert level.s_min == pytest.approx(200 * (level.loss - 1.5) ** -2.0, rel=2e-3)
        assert level.e_min == pytest.approx(level.s_min * level.b_crit)
        assert set(level.rates) == {BEST_RATE}
    losses = found.ladder.losses
    fit = fit_law(
        get_law("critical-batch"),
        np.column_stack([found.ladder.columns(["B"])[:, 0], losses]),
        found.ladder.columns(["S"])[:, 0],
    )
    assert fit.parameters["B_star"] == pytest.approx(B_STAR, rel=0.01)
    assert fit.parameters["alpha_B"] == pytest.approx(ALPHA_B, rel=0.005)
    by_loss = fit_law(get_law("batch-loss"), found.b_crit.losses, found.b_crit.columns(["B"])[:, 0])
    assert by_loss.parameters["alpha_B"] == pytest.approx(ALPHA_B, rel=0.005)
    assert found.ladder.convention == {"loss": "valid"}


def test_intervals_hold_the_truth() -> None:
    held = 0
    for trial in range(100):
        curves = [run(batch, BEST_RATE, seed=100 * trial + i) for i, batch in enumerate(BATCHES)]
        (level,) = critical_batch(curves, levels=1).levels
        assert level.b_crit_low is not None
        assert level.b_crit_high is not None
        held += bool(level.b_crit_low <= b_crit(np.array(level.loss)) <= level.b_crit_high)
    assert 88 <= held <= 100


def test_levels_are_reached_by_every_batch() -> None:
    short = [
        (point, replace(c, step=c.step[:250], tokens=c.tokens[:250], flops=c.flops[:250], loss=c.loss[:250]))
        for point, c in runs()
    ]
    mixed = short[:3] + runs()[3:]
    found = critical_batch(mixed, levels=3)
    lowest = found.levels[-1].loss
    assert lowest == pytest.approx(short[0][1].loss[-1], rel=1e-9)
    assert found.levels[0].loss > lowest


def test_steps_follow_from_tokens_where_they_are_not_logged() -> None:
    curves = [(point, replace(c, step=np.full_like(c.step, np.nan))) for point, c in runs()]
    known, derived = critical_batch(runs(), levels=2), critical_batch(curves, levels=2)
    np.testing.assert_allclose(derived.levels[0].steps, known.levels[0].steps, rtol=1e-9)


def test_a_best_rate_at_the_end_of_its_grid_is_warned_of() -> None:
    warnings = critical_batch(runs((2e-3, 4e-3)), levels=2).warnings
    assert len(warnings) == 6
    assert "the smallest learning rate tried (0.002) is the best at 2 of 2 losses; try ones beyond" in warnings[0]
    assert "one learning rate (0.001) was tried" in critical_batch(runs((1e-3,)), levels=2).warnings[0]


def test_batches_that_change_nothing_have_no_critical_one() -> None:
    curves = []
    for batch in BATCHES:
        point, c = run(1e9, BEST_RATE)
        curves.append(
            (
                replace(point, name=f"{batch}", inputs={"B": float(batch), "lr": BEST_RATE}),
                replace(c, step=c.step * (batch / 1e6) ** 0.1),
            )
        )
    found = critical_batch(curves, levels=2)
    assert len(found.b_crit) == 0
    assert any("no B_crit" in warning for warning in found.warnings)


def test_what_is_missing_is_said() -> None:
    point, c = run(1e6, 1e-3)
    with pytest.raises(MegamupError, match="has no lr; expected the peak learning rate"):
        critical_batch([(replace(point, inputs={"B": 1e6}), c)])
    with pytest.raises(MegamupError, match="2 different batches; expected at least 3"):
        critical_batch([run(1e6, 1e-3), run(2e6, 1e-3)])
    apart = [
        (p, replace(x, loss=x.loss + shift)) for (p, x), shift in zip(runs((1e-3,))[:3], (0.0, 5.0, 10.0), strict=True)
    ]
    with pytest.raises(MegamupError, match="no loss is crossed by every batch"):
        critical_batch(apart)


def test_points_at_the_limits_of_the_batch() -> None:
    # Kaplan et al. 2020, eq. 5.4 and 5.5: at B = B_crit a run has cost twice Cmin and taken twice Smin.
    critical = float(b_crit(np.array(3.0)))
    ladder = Ladder((Point("a", {"B": critical, "C": 2e18, "S": 1000.0}, 3.0),), {"flops": "6N"})
    (point,) = apply_critical_batch(ladder, B_STAR, ALPHA_B).points
    assert point.inputs["Cmin"] == pytest.approx(1e18)
    assert point.inputs["Smin"] == pytest.approx(500)
    with pytest.raises(MegamupError, match="neither C nor S is known"):
        apply_critical_batch(Ladder((Point("a", {"B": 1e6}, 3.0),), {}), B_STAR, ALPHA_B)
