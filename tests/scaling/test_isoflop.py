"""Approach 2 gives back the exponents of the law that its runs lie on."""

import numpy as np
import pytest

from megamup.errors import MegamupError
from megamup.scaling.fit import fit_law
from megamup.scaling.isoflop import isoflop
from megamup.scaling.laws import get_law
from megamup.scaling.laws.examples import example
from megamup.scaling.runs import Ladder, Point

BUDGETS = np.geomspace(1e19, 1e21, 5)
TRUTH = example("chinchilla").truth
CHINCHILLA = get_law("chinchilla")


def runs(budget: float, factors: np.ndarray, noise: float = 0.0) -> list[Point]:
    """Runs of one budget at multiples of its best size."""
    random = np.random.default_rng(int(budget / 1e15))
    best = float(CHINCHILLA.quantities({"C": budget})["N_opt"](TRUTH))
    points = []
    for factor in factors:
        n = best * factor
        d = budget / 6 / n
        loss = float(CHINCHILLA.predict(TRUTH, np.array([[n, d]]))[0]) * (1 + noise * random.standard_normal())
        points.append(Point(f"{budget:.3g}x{factor:.3g}", {"C": budget, "N": float(n), "D": float(d)}, loss))
    return points


def ladder(*groups: list[Point]) -> Ladder:
    return Ladder(tuple(point for group in groups for point in group), {"flops": "6N"})


def test_optima_follow_the_law() -> None:
    # The law is no parabola: within a factor 2 around the optimum it is one to 1%.
    found = isoflop(ladder(*(runs(budget, np.geomspace(0.5, 2, 7)) for budget in BUDGETS)))
    assert found.warnings == ()
    at = found.ladder.columns(["C", "N", "D"])
    for (c, n, d), loss in zip(at, found.ladder.losses, strict=True):
        expected = {key: float(q(TRUTH)) for key, q in CHINCHILLA.quantities({"C": c}).items()}
        assert n == pytest.approx(expected["N_opt"], rel=0.02)
        assert d == pytest.approx(expected["D_opt"], rel=0.02)
        assert loss == pytest.approx(expected["L"], rel=1e-4)
    alpha, beta = TRUTH[3:]
    for name, exponent in (("kaplan-nopt", beta / (alpha + beta)), ("dopt", alpha / (alpha + beta))):
        column = 1 if name == "kaplan-nopt" else 2
        fit = fit_law(get_law(name), at[:, 0], at[:, column])
        assert fit.parameters["b"] == pytest.approx(exponent, abs=0.005)


def test_runs_near_a_budget_belong_to_it_and_the_convention_stays() -> None:
    points = runs(1e20, np.geomspace(0.5, 2, 5))
    moved = [
        Point(p.name, p.inputs | {"C": p.inputs["C"] * factor}, p.loss)
        for p, factor in zip(points, (1, 1.05, 1.02, 0.97, 1.01), strict=True)
    ]
    found = isoflop(ladder(moved, runs(1e21, np.geomspace(0.5, 2, 5))))
    assert [len(budget.parameters) for budget in found.budgets] == [5, 5]
    assert found.ladder.convention == {"flops": "6N"}


def test_budgets_without_an_optimum_are_left_out_and_named() -> None:
    good = [runs(budget, np.geomspace(0.5, 2, 5)) for budget in BUDGETS[:3]]
    found = isoflop(ladder(*good, runs(BUDGETS[3], np.geomspace(4, 16, 5)), runs(BUDGETS[4], np.array([0.5, 2.0]))))
    assert len(found.ladder) == 3
    assert len(found.budgets) == 5
    assert "lies outside those tried" in found.warnings[0]
    assert "2 different values of the 3 that a parabola takes" in found.warnings[1]


def test_too_few_optima_are_refused() -> None:
    lonely = runs(1e19, np.geomspace(0.5, 2, 5))
    with pytest.raises(MegamupError, match=r"isoflop: 1 of 2 budgets have an optimum[\s\S]*lies outside those tried"):
        isoflop(ladder(lonely, runs(1e20, np.geomspace(3, 12, 5))))
    with pytest.raises(MegamupError, match=r"D .*is not known of"):
        isoflop(Ladder(tuple(Point(p.name, {"C": 1e19, "N": p.inputs["N"]}, p.loss) for p in lonely), {}))
