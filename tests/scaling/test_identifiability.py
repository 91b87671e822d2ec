"""What is refused before and after a fit, which runs are asked for, and that these runs are enough."""

from __future__ import annotations

import csv
import re
from pathlib import Path

import numpy as np
import pytest

from megamup.errors import MegamupError
from megamup.scaling.fit import Data, Fit, fit_law
from megamup.scaling.identifiability import check, check_fit
from megamup.scaling.laws.base import FloatArray, SumOfPowers
from megamup.scaling.laws.batch import CRITICAL_BATCH
from megamup.scaling.laws.examples import NAMES, example
from megamup.scaling.laws.loss import CHINCHILLA, OVERTRAINING, power

NOISE = 0.003
N = np.geomspace(1e7, 1e9, 12)


def data_of(*columns: FloatArray) -> Data:
    x = np.stack(columns, axis=1)
    return Data(x, np.linspace(4, 3, len(x)), np.arange(len(x)))


def chinchilla_loss(x: FloatArray) -> FloatArray:
    return np.asarray(1.7 + 400 * x[:, 0] ** -0.34 + 410 * x[:, 1] ** -0.28)


def power_fit(factor: float, seed: int = 1, noise: float = NOISE, points: int = 6) -> Fit:
    """Of a ladder over `factor` of compute, from 3e10 FLOPs on."""
    c = np.geomspace(3e10, 3e10 * factor, points)
    loss = (1.6 + 2.5 * (c / 3e10) ** -0.17) * (1 + noise * np.random.default_rng(seed).standard_normal(points))
    return fit_law(power("C"), c, loss)


def asked_for(message: str) -> FloatArray:
    """The runs (k, d) that a message tells to add."""
    runs = re.findall(r"[A-Z]=[^ ]+", message.partition("add runs such as ")[2])
    return np.array([[float(part.partition("=")[2]) for part in run.split(",") if part] for run in runs])


@pytest.mark.parametrize(
    ("law", "d", "expected"),
    [
        (CHINCHILLA, np.full(12, 2e10), r"all 12 points have D = 2e\+10; .*can't tell apart E, B and beta: add runs"),
        (CHINCHILLA, 20 * N, r"all 12 points have D/N = 20; .*can't tell apart the terms in N and D: add runs"),
        (OVERTRAINING, 20 * N, r"all 12 points have D/N = 20; .*can't tell apart a and b: add runs"),
        (CHINCHILLA, 20 * N * 1.004 ** (np.arange(12) % 3), r"all 12 points have D/N = 20"),
        (CHINCHILLA, 1e4 * N**0.7, r"lie on one line, D rising as N\^0.7;"),
    ],
)
def test_points_that_cannot_do_are_refused_with_runs_that_can(law: SumOfPowers, d: FloatArray, expected: str) -> None:
    data = data_of(N, d)
    with pytest.raises(MegamupError, match=expected) as refused:
        check(law, data)
    added = asked_for(str(refused.value))
    assert 1 <= len(added) <= 2
    # Of sizes that the ladder has, four times off in the other direction, and enough.
    assert np.all(np.abs(added[:, :1] / N - 1).min(axis=1) < 0.01)
    more = np.concatenate([data.inputs, added])
    check(law, data_of(*more.T))
    fit = fit_law(CHINCHILLA, more, chinchilla_loss(more)) if law is CHINCHILLA else None
    assert fit is None or fit.parameters["beta"] == pytest.approx(0.28, rel=1e-5)


def test_one_size_asks_for_other_sizes() -> None:
    with pytest.raises(
        MegamupError, match=r"all 12 points have N = 1e\+08; .*can't tell apart E, A and alpha"
    ) as refused:
        check(CHINCHILLA, data_of(np.full(12, 1e8), np.geomspace(1e9, 1e11, 12)))
    assert sorted(asked_for(str(refused.value))[:, 0]) == pytest.approx([2.5e7, 4e8], rel=0.01)


@pytest.mark.parametrize("name", NAMES)
def test_every_law_is_determined_by_a_believable_design(name: str) -> None:
    one = example(name)
    check(one.law, Data(one.inputs, one.response, np.arange(len(one.inputs))))
    noisy = one.response * (1 + NOISE * np.random.default_rng(0).standard_normal(len(one.response)))
    check_fit(fit_law(one.law, one.inputs, noisy, starts=8))


def test_one_loss_tells_no_slope_of_the_critical_batch() -> None:
    x = np.stack([2.0 ** np.arange(14, 20), np.full(6, 3.2)], axis=1)
    law = CRITICAL_BATCH.bound_to({"B": x[:, 0], "L": x[:, 1]})
    with pytest.raises(MegamupError, match=r"have L = 3.2; .*can't determine alpha_B: add points of other B and L"):
        check(law, Data(x, 1e4 * (1 + 2.0**16 / x[:, 0]), np.arange(6)))


def test_too_few_points_are_counted_first() -> None:
    with pytest.raises(MegamupError, match=r"2 given; the law chinchilla has the 5 parameters"):
        check(CHINCHILLA, data_of(N[:2], 20 * N[:2]))


def test_runs_of_one_budget_may_be_fitted() -> None:
    # N falls as D rises: the terms can't change places, and five points have five different effects.
    check(CHINCHILLA, data_of(N, 1e18 / N))


@pytest.mark.parametrize("factor", [1.05, 1.2, 1.5])
def test_a_range_too_narrow_for_its_noise_is_refused(factor: float) -> None:
    with pytest.raises(
        MegamupError, match=rf"C spans a factor {factor}; expected 3 or more: .*determines b"
    ) as refused:
        check_fit(power_fit(factor))
    low, high = sorted(asked_for(str(refused.value))[:, 0])
    assert low == pytest.approx(3e10 / 4, rel=0.01)
    assert high == pytest.approx(3e10 * factor * 4, rel=0.01)


def test_a_narrow_range_without_noise_determines_the_law() -> None:
    fit = power_fit(1.2, noise=0.0)
    assert check_fit(fit) == []
    assert fit.parameters["b"] == pytest.approx(-0.17, rel=1e-6)


def test_known_noise_judges_a_fit_without_freedom() -> None:
    exact = power_fit(1.2, noise=0.0, points=3)
    assert check_fit(exact) == []
    with pytest.raises(MegamupError, match=r"spans a factor 1\.2; "):
        check_fit(exact, noise=NOISE)
    assert check_fit(power_fit(1e4, noise=0.0, points=3), noise=NOISE) == []


def test_a_narrow_ratio_is_refused_as_a_narrow_input_is() -> None:
    random = np.random.default_rng(0)
    n = np.geomspace(1e9, 4e9, 8)
    x = np.stack([n, 20 * n * np.linspace(1, 1.3, 8)[random.permutation(8)]], axis=1)
    fit = fit_law(CHINCHILLA, x, chinchilla_loss(x) * (1 + NOISE * random.standard_normal(8)))
    check(CHINCHILLA, fit.data)
    with pytest.raises(MegamupError, match=r"D/N spans a factor 1\.\d+; expected 3 or more: .*(alpha|beta)") as refused:
        check_fit(fit)
    assert asked_for(str(refused.value))[:, 0] == pytest.approx([1e9, 1e9], rel=0.01)


def test_a_rank_lost_at_the_optimum_names_what_trades() -> None:
    # With beta at 0.005 over a factor 1.0001 of D, B/D^beta is a constant, as E is.
    n, d = np.meshgrid(np.geomspace(1e7, 1e9, 4), 1e10 * np.array([1.0, 1.03, 1.06]))
    x = np.stack([n.ravel(), d.ravel()], axis=1)
    fit = fit_law(CHINCHILLA, x, 1 + 400 * x[:, 0] ** -0.34 + 2 * x[:, 1] ** -0.006)
    with pytest.raises(
        MegamupError, match=r"can't tell a rise of .*from a fall of .*condition number .*expected below"
    ):
        check_fit(fit)


def test_weak_parameters_are_a_warning() -> None:
    (warning,) = check_fit(power_fit(3.0))
    assert warning.startswith("barely known, at 95%: ")
    assert "b to ±" in warning
    assert "add runs over a wider range" in warning
    # The same noise over four decades of compute determines all three.
    assert check_fit(power_fit(1e4)) == []


def test_ladders_like_the_demo_s_pass() -> None:
    for seed in range(20):
        fit = power_fit(33, seed)
        check(fit.law, fit.data)
        assert len(check_fit(fit)) <= 1


def test_published_ladders_pass(published: Path) -> None:
    with (published / "olmo_ladder" / "ladder_losses_final.csv").open(newline="") as file:
        rows = {row["run"]: row for row in csv.DictReader(file)}

    def points(names: list[str], keys: tuple[str, ...]) -> FloatArray:
        return np.array([[float(rows[name][key]) for key in keys] for name in names])

    sizes = ("190M", "370M", "760M", "1B")
    ladder = [f"{size}-{k}xC" for size in sizes for k in (1, 2, 5, 10)]
    for objective in ("log", "huber"):
        fit = fit_law(CHINCHILLA, points(ladder, ("N", "D")), points(ladder, ("c4_en",))[:, 0], objective=objective)
        check(fit.law, fit.data)
        check_fit(fit)
    # Four runs at 20 tokens a parameter: nothing is wrong with a law in one input.
    four = [f"{size}-1xC" for size in sizes]
    for key in ("N", "flops"):
        fit = fit_law(power("C"), points(four, (key,)), points(four, ("c4_en",))[:, 0])
        check(fit.law, fit.data)
        check_fit(fit)


def test_gadre_s_five_points_pass(published: Path) -> None:
    with (published / "gadre_overtraining" / "models_104.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["train_dataset"] == "rpj"]
    small = "d=96_l=8_h=4"
    wanted = {(small, 1.0), ("d=512_l=8_h=4", 1.0), ("d=576_l=24_h=8", 1.0), ("d=1024_l=24_h=8", 1.0), (small, 16.0)}
    chosen = [row for row in rows if (row["model"], float(row["chinchilla_multiplier"])) in wanted]
    n = np.array([float(row["N"]) for row in chosen])
    d = 20 * n * np.array([float(row["chinchilla_multiplier"]) for row in chosen])
    loss = [float(row["loss_c4_val"]) for row in chosen]
    fit = fit_law(OVERTRAINING, np.stack([n, d], axis=1), loss, objective="loss")
    check(fit.law, fit.data)
    # One degree of freedom says little about anything: weak, and said so, but not refused.
    assert len(check_fit(fit)) == 1
