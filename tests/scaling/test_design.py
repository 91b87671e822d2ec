"""Designs against brute force, against refits of simulated runs, and against the textbook's straight line."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest

from megamup.errors import MegamupError
from megamup.scaling.design import Design, candidate_grid, propose, run_flops
from megamup.scaling.fit import Data, Fit, fit_law, search
from megamup.scaling.laws.base import Exponent, FloatArray, Quantity, SumOfPowers, Term
from megamup.scaling.laws.loss import CHINCHILLA, OVERTRAINING, power
from megamup.scaling.uncertainty import delta_std

NOISE = 0.003
LINE = SumOfPowers("line", "L = a·C^b", ("C",), (Term("a", {"C": ("b", 1.0)}),), (Exponent("b", -3.0, 3.0),), "test")
TARGET = {"N": 1e10, "D": 2e11}


def chinchilla_loss(x: FloatArray) -> FloatArray:
    return np.asarray(1.7 + 400 * x[:, 0] ** -0.34 + 410 * x[:, 1] ** -0.28)


def chinchilla_fit(seed: int = 0, noise: float = NOISE) -> Fit:
    """Of 16 runs: four sizes up to 3e8, 10 to 80 tokens a parameter."""
    n, ratio = np.meshgrid(np.geomspace(1e7, 3e8, 4), [10.0, 20.0, 40.0, 80.0])
    x = np.stack([n.ravel(), (n * ratio).ravel()], axis=1)
    loss = chinchilla_loss(x) * (1 + noise * np.random.default_rng(seed).standard_normal(16))
    return fit_law(CHINCHILLA, x, loss)


def line_fit(x: FloatArray) -> Fit:
    log_y = 1 - 0.1 * np.log(x) + NOISE * np.random.default_rng(0).standard_normal(len(x))
    return fit_law(LINE, x, np.exp(log_y), starts=4)


def chosen(design: Design, key: str = "C") -> list[float]:
    return [run.inputs[key] for run in design.runs]


def test_straight_line_puts_runs_at_both_ends_in_the_textbook_s_share() -> None:
    # Hoel & Levine 1964, Ann. Math. Stat. 35:1553: to extrapolate a line from [-1, 1] to z, the share (z + 1)/2z of the
    # runs at the near end and the rest at the far one; here z = 2 and the shares are 3/4 and 1/4.
    candidates = np.geomspace(1, 100, 21)
    fit = line_fit(np.array([1.0, 10.0, 100.0]))

    def flops(x: FloatArray) -> FloatArray:
        return np.where(x[:, 0] < 500, 1.0, 1000.0)  # all alike, but for the target

    design = propose(fit, {"C": 1000.0}, budget=100, count=100, candidates=candidates, flops=flops, noise=NOISE)
    counts = Counter(np.round(chosen(design), 6))
    assert set(counts) == {1.0, 100.0}
    assert counts[100.0] == pytest.approx(75, abs=1)


@pytest.mark.parametrize("budget", [3e18, 1e19, 6e19])
@pytest.mark.parametrize("law", ["chinchilla", "power"])
def test_close_to_the_best_of_all_sets(law: str, budget: float) -> None:
    if law == "chinchilla":
        fit, target, count = chinchilla_fit(), dict(TARGET), 3
        n, d = np.meshgrid([1e7, 1e8, 3e8, 1e9], [2e8, 2e9, 6e9, 2e10])
        candidates = np.stack([n.ravel(), d.ravel()], axis=1)
    else:
        c = np.geomspace(1e16, 1e18, 6)
        random = np.random.default_rng(0)
        loss = (1.7 + 2 * (c / 1e16) ** -0.15) * (1 + NOISE * random.standard_normal(6))
        fit, target, count = fit_law(power("C"), c, loss), {"C": 1e21}, 4
        candidates = np.geomspace(1e16, 4e19, 10)[:, np.newaxis]
    design = propose(fit, target, budget=budget, count=count, candidates=candidates)
    cost = run_flops(fit.law, fit.data)(candidates)
    best = min(
        std_after(fit, target, candidates[list(rows)])
        for rows in itertools.combinations_with_replacement(range(len(candidates)), count)
        if cost[list(rows)].sum() <= budget
    )
    assert design.flops <= budget
    assert len(design.runs) <= count
    # The set left out runs that take off less than 0.1% of the variance.
    assert design.std_after <= best * 1.01


def std_after(fit: Fit, target: dict[str, float], added: FloatArray) -> float:
    """The target's standard error with `added` (k, d), by the textbook: g (J'J)^-1 g of all rows, no update formula."""
    x = np.array([[target[key] for key in fit.law.inputs]])
    points = np.concatenate([fit.inputs, added.reshape(-1, fit.inputs.shape[1])])
    jacobian = fit.law.jacobian(fit.theta, np.log(points) - fit.data.log_centre)
    gradient = fit.law.jacobian(fit.theta, np.log(x) - fit.data.log_centre)[0]
    assert fit.residual_std is not None
    variance = gradient @ np.linalg.solve(jacobian.T @ jacobian, gradient)
    return float(fit.residual_std * np.sqrt(variance) * fit.at(x)[0])


def test_before_is_the_delta_method_s_interval_and_after_that_of_all_runs() -> None:
    fit = chinchilla_fit()
    design = propose(fit, TARGET, budget=1e20)
    at = [[TARGET["N"], TARGET["D"]]]
    assert design.std_before == pytest.approx(float(delta_std(fit, at)[0] * fit.at(at)[0]), rel=1e-3)  # the ridge
    added = np.array([[run.inputs["N"], run.inputs["D"]] for run in design.runs])
    assert design.std_after == pytest.approx(std_after(fit, TARGET, added), rel=1e-3)
    # Student's quantile with 11 degrees of freedom.
    assert design.half_width_before == pytest.approx(2.201 * design.std_before, rel=1e-3)
    assert design.half_width_after < 0.6 * design.half_width_before
    assert design.runs[-1].half_width_after == design.half_width_after
    widths = [design.half_width_before, *[run.half_width_after for run in design.runs]]
    assert [run.half_width_before for run in design.runs] == widths[:-1]
    assert sum(run.share_of_budget for run in design.runs) == pytest.approx(design.flops / 1e20)


def test_the_spread_of_refits_shrinks_as_promised() -> None:
    # Around the true law: 300 draws of all losses, refitted with and without the proposed runs.
    truth = chinchilla_fit(noise=0.0)
    design = propose(truth, TARGET, budget=3e20, count=4, noise=NOISE)
    added = np.array([[run.inputs["N"], run.inputs["D"]] for run in design.runs])
    with_runs = np.concatenate([truth.inputs, added])
    spread = [simulated_std(truth, points, 300) for points in (truth.inputs, with_runs)]
    assert spread[0] == pytest.approx(design.std_before, rel=0.15)
    assert spread[1] == pytest.approx(design.std_after, rel=0.15)
    assert spread[1] / spread[0] == pytest.approx(design.std_after / design.std_before, rel=0.15)
    assert spread[1] < 0.6 * spread[0]


def simulated_std(truth: Fit, points: FloatArray, draws: int) -> float:
    """Spread of the prediction over fits to noisy losses at `points` (n, d)."""
    random = np.random.default_rng(1)
    target = np.log([[TARGET["N"], TARGET["D"]]]) - truth.data.log_centre
    found = []
    for _ in range(draws):
        loss = chinchilla_loss(points) * (1 + NOISE * random.standard_normal(len(points)))
        data = Data(points, loss, np.arange(len(points)), truth.data.log_centre)
        theta, _cost = search(truth.law, data, truth.objective, truth.theta[np.newaxis])
        found.append(float(np.exp(truth.law.log_value(theta, target)[0, 0])))
    return float(np.std(found))


def test_runs_come_by_gain_per_flop_and_cost_less_than_the_target() -> None:
    design = propose(chinchilla_fit(), TARGET, budget=1e30, count=6)
    assert all(run.flops < 6 * TARGET["N"] * TARGET["D"] for run in design.runs)
    gains = [run.gain_per_flop for run in design.runs]
    assert gains[0] == max(gains)
    assert all(run.inputs["N"] <= TARGET["N"] and run.inputs["D"] <= TARGET["D"] for run in design.runs)
    assert all(20 / 8 <= run.inputs["D"] / run.inputs["N"] <= 80 * 4 * 1.001 for run in design.runs)


def test_a_larger_budget_or_count_is_never_worse() -> None:
    fit = chinchilla_fit()
    by_budget = [propose(fit, TARGET, budget=budget).std_after for budget in (1e18, 1e19, 1e20, 1e21)]
    by_count = [propose(fit, TARGET, budget=1e20, count=count).std_after for count in (1, 2, 4, 8)]
    assert by_budget == sorted(by_budget, reverse=True)
    assert by_count == sorted(by_count, reverse=True)


def test_widening_of_a_backtest_scales_the_half_widths_alone() -> None:
    plain = propose(chinchilla_fit(), TARGET, budget=1e20)
    wide = propose(chinchilla_fit(), TARGET, budget=1e20, widening=1.7)
    assert [run.inputs for run in wide.runs] == [run.inputs for run in plain.runs]
    assert wide.half_width_after == pytest.approx(1.7 * plain.half_width_after)
    assert wide.std_after == plain.std_after


def test_points_that_cannot_tell_tokens_from_the_offset_get_runs_of_other_tokens() -> None:
    n = np.geomspace(1e7, 1e9, 8)
    x = np.stack([n, np.full(8, 2e10)], axis=1)
    loss = chinchilla_loss(x) * (1 + NOISE * np.random.default_rng(0).standard_normal(8))
    design = propose(fit_law(CHINCHILLA, x, loss), TARGET, budget=1e20, noise=NOISE)
    # At the target's own tokens beta doesn't matter.
    assert 2e11 in chosen(design, "D")
    # What isn't known is said to be unknown: by more than the loss itself.
    assert design.half_width_before > design.value
    assert design.half_width_after < design.half_width_before / 4


def test_a_term_on_its_bound_is_looked_for() -> None:
    # A pure power over a decade: the offset is fitted as 0, which is no proof that there is none.
    c = np.geomspace(1e17, 1e18, 6)
    loss = 3 * (c / 1e17) ** -0.1 - 0.02
    fit = fit_law(power("C"), c, loss)
    assert "c" in fit.diagnostics.at_bound
    design = propose(fit, {"C": 1e21}, budget=1e20, noise=NOISE)
    assert design.value == pytest.approx(float(fit.at([1e21])[0]))
    assert design.half_width_before > 0.1
    assert max(chosen(design)) > 1e19


def test_a_quantity_of_the_law_is_a_target() -> None:
    def derived(law: SumOfPowers, at: object) -> dict[str, Quantity]:
        del law
        return {"x": lambda p: p[..., 0] * 2} if at == {"y": 1.0} else {}

    law = SumOfPowers(LINE.name, LINE.formula, LINE.inputs, LINE.terms, LINE.exponents, LINE.source, derived=derived)
    x = np.geomspace(1, 100, 5)
    fit = fit_law(law, x, 3 * x**-0.1 * np.exp(NOISE * np.random.default_rng(0).standard_normal(5)))
    design = propose(fit, {"y": 1.0}, budget=100, count=3, noise=NOISE)
    assert design.target == "x at y=1"
    assert design.value == pytest.approx(2 * fit.parameters["a"])
    # a is the line at C = 1: its standard error is that of the line there, doubled.
    assert fit.residual_std is not None
    std = float(delta_std(fit, [1.0])[0]) * NOISE / fit.residual_std
    assert design.std_before == pytest.approx(design.value * std, rel=1e-5)


def test_cost_of_runs_by_their_inputs() -> None:
    x = np.array([[1e7, 2e8], [1e8, 2e9]])
    data = Data(x, np.ones(2), np.arange(2))
    np.testing.assert_allclose(run_flops(CHINCHILLA, data)(x), 6 * x[:, 0] * x[:, 1])
    np.testing.assert_allclose(run_flops(CHINCHILLA, data, flops=7 * x[:, 0] * x[:, 1])(x), 7 * x[:, 0] * x[:, 1])
    ladder = Data(x[:, :1], np.ones(2), np.arange(2))
    # At 20 tokens a parameter a ladder in N costs as N².
    cost = run_flops(power("N"), ladder, flops=120 * x[:, 0] ** 2)
    np.testing.assert_allclose(cost(np.array([[1e9]])), 120e18)
    with pytest.raises(MegamupError, match=r"doesn't follow from N, .* give runs that carry C"):
        run_flops(power("N"), ladder)


def test_limits_bound_the_grid() -> None:
    fit = chinchilla_fit()
    cost = run_flops(fit.law, fit.data)
    grid = candidate_grid(fit, TARGET, 1e20, cost, limits={"N": (2e7, 5e7)})
    assert grid[:, 0].min() == pytest.approx(2e7)
    assert grid[:, 0].max() == pytest.approx(5e7)


def test_targets_noise_and_budgets_that_cannot_be_are_refused() -> None:
    fit = chinchilla_fit()
    with pytest.raises(MegamupError, match=r"at: N=1e\+10 with the quantity L is no target .* expected N=..., D=..."):
        propose(fit, {"N": 1e10}, budget=1e20)
    with pytest.raises(MegamupError, match=r"budget: 1e\+12 FLOPs for 5 runs pays for none of the .* raise the budget"):
        propose(fit, TARGET, budget=1e12)
    with pytest.raises(MegamupError, match="noise: -1; expected a number above 0"):
        propose(fit, TARGET, budget=1e20, noise=-1)
    exact = fit_law(LINE, [1.0, 10.0], [3.0, 2.5])
    with pytest.raises(MegamupError, match=r"noise: 2 points determine 2 parameters .* give the noise"):
        propose(exact, {"C": 1e3}, budget=100)
    assert propose(exact, {"C": 1e3}, budget=100, noise=NOISE).runs


def test_curves_count_as_their_runs() -> None:
    # Forty points of two... of ten runs: no more evidence than ten, or the runs proposed would seem to add nothing.
    x = np.repeat(np.geomspace(1, 100, 10), 4)
    y = np.exp(1 - 0.1 * np.log(x) + NOISE * np.random.default_rng(0).standard_normal(40))
    fit = fit_law(LINE, x, y, runs=list(np.repeat(range(10), 4)), starts=4)
    ten = fit_law(LINE, x[::4], y[::4], starts=4)
    both = [propose(f, {"C": 1000.0}, budget=500, count=2, noise=NOISE).std_before for f in (fit, ten)]
    assert both[0] == pytest.approx(both[1], rel=0.02)


def test_overtraining_from_few_runs() -> None:
    n = np.array([1e7, 8e7, 1.5e8, 4e8, 1e7])
    x = np.stack([n, n * np.array([20, 20, 20, 20, 320])], axis=1)
    loss = 1.8 + 166 * n**-0.27 + 367 * (6**0.5 * x[:, 1]) ** -0.27
    loss *= 1 + 0.003 * np.random.default_rng(0).standard_normal(5)
    design = propose(fit_law(OVERTRAINING, x, loss, objective="loss"), {"N": 7e9, "D": 1.4e11}, budget=1e20)
    assert 1 <= len(design.runs) <= 5
    assert design.half_width_after < design.half_width_before / 3
