"""From runs to a result: which laws, what is completed, what is refused, what reductions give."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from megamup.errors import MegamupError
from megamup.scaling.analysis import (
    AUTO,
    analyse,
    analyse_reduced,
    check_names,
    completed,
    inputs_of,
    is_reduced,
    laws_named,
    sizes_of,
)
from megamup.scaling.curves import Curve
from megamup.scaling.fit_file import load_result, save_result
from megamup.scaling.laws.loss import CHINCHILLA, power
from megamup.scaling.runs import Ladder, Point
from megamup.scaling.text import fit_lines

CONVENTION = {"flops": "6N", "parameters": "total", "loss": "valid"}


def loss_of(n: float, d: float) -> float:
    """Hoffmann et al. 2022, approach 3."""
    return float(1.69 + 406.4 / n**0.34 + 410.7 / d**0.28)


def ladder(sizes: Sequence[float], tokens: Sequence[float], noise: float = 0.001) -> Ladder:
    random = np.random.default_rng(0)
    points = [
        Point(f"{n:.3g}-{d:.3g}", {"N": n, "D": d}, float(loss_of(n, d) * np.exp(noise * random.standard_normal())))
        for n in sizes
        for d in tokens
    ]
    return Ladder(tuple(points), CONVENTION)


GRID = ladder(np.geomspace(1e7, 1e9, 5).tolist(), np.geomspace(1e9, 1e11, 5).tolist())


def iso_ladder() -> Ladder:
    """Five budgets with seven sizes each, around Hoffmann et al.'s optimum."""
    points = []
    for c in np.geomspace(1e18, 1e21, 5):
        for n in 0.1 * c**0.5 * np.geomspace(0.3, 3, 7):
            d = float(c / 6 / n)
            points.append(Point(f"{c:.3g}-{n:.3g}", {"C": float(c), "N": float(n), "D": d}, loss_of(float(n), d)))
    return Ladder(tuple(points), CONVENTION)


def no_curves() -> Sequence[tuple[Point, Curve]]:
    raise AssertionError("asked for curves")


def test_auto_is_every_law_that_the_points_allow() -> None:
    names = [law.name for law in laws_named(AUTO, None, GRID)]
    assert {"power", "kaplan-n", "kaplan-d", "kaplan-nd", "chinchilla", "overtraining"} == set(names)
    assert laws_named("power", None, GRID)[0].inputs == ("N",)
    assert laws_named("power", "D", GRID)[0].inputs == ("D",)
    with pytest.raises(MegamupError, match="--law auto: the points have lr; expected N, D or C"):
        laws_named(AUTO, None, Ladder((Point("a", {"lr": 1.0}, 2.0),), CONVENTION))


def test_the_true_law_is_chosen_among_all() -> None:
    exact = ladder(np.geomspace(1e7, 1e9, 5).tolist(), np.geomspace(1e9, 1e11, 5).tolist(), noise=1e-5)
    result = analyse(exact, laws_named(AUTO, None, exact))
    assert result.law is CHINCHILLA
    assert {row.law for row in result.tried} >= {"power", "kaplan-nd", "chinchilla"}
    lines = "\n".join(fit_lines(result))
    assert "L = E + A/N^alpha + B/D^beta" in lines
    assert "held-out error %" in lines


def test_names_are_checked_before_anything_is_read() -> None:
    check_names("chinchilla,kaplan-nd")
    check_names("isoflop")
    check_names(AUTO)
    for text, message in (("chinchila", "did you mean 'chinchilla'"), ("isoflop,chinchilla", "is no single law")):
        with pytest.raises(MegamupError, match=message):
            check_names(text)


def test_tokens_and_flops_are_completed_with_a_warning() -> None:
    from_nd = completed(GRID, {"C"})
    assert from_nd.points[0].inputs["C"] == pytest.approx(6 * GRID.points[0].inputs["N"] * GRID.points[0].inputs["D"])
    assert "C is not given and taken as 6·N·D" in from_nd.warnings[-1]
    without = Ladder(tuple(Point(p.name, {"N": p.inputs["N"], "C": 1e20}, p.loss) for p in GRID.points), CONVENTION)
    assert completed(without, {"N", "D"}).points[0].inputs["D"] == pytest.approx(1e20 / 6 / 1e7)
    assert completed(GRID, {"N", "D"}) is GRID
    with pytest.raises(MegamupError, match=r"--law power: needs C, which 1 of 1 points lack \(first a\); they have N"):
        analyse(Ladder((Point("a", {"N": 1.0}, 2.0),), CONVENTION), [power("C")])


def test_runs_are_ordered_by_flops_else_by_their_product() -> None:
    assert sizes_of(GRID, CHINCHILLA) == pytest.approx(GRID.columns(["N", "D"]).prod(axis=1))
    assert sizes_of(iso_ladder(), CHINCHILLA) == pytest.approx(iso_ladder().columns(["C"])[:, 0])


@pytest.mark.parametrize(
    ("sizes", "tokens", "message"),
    [
        (np.geomspace(1e7, 1e9, 8).tolist(), [2e10], "all 8 points have D = 2e\\+10.*add runs such as N=.*D="),
        ([1e8], np.geomspace(1e9, 1e11, 8).tolist(), "all 8 points have N = 1e\\+08.*add runs such as"),
    ],
)
def test_what_the_points_cannot_tell_is_refused_with_runs_to_add(
    sizes: list[float], tokens: list[float], message: str
) -> None:
    with pytest.raises(MegamupError, match=message):
        analyse(ladder(sizes, tokens), [CHINCHILLA])


def test_isoflop_gives_the_optimum_and_its_companions() -> None:
    result = analyse_reduced("isoflop", iso_ladder(), no_curves)
    assert (result.law.response, result.reduction) == ("N", "isoflop")
    assert [companion.law.response for companion in result.companions] == ["D", "L"]
    # N_opt ~ C^(beta/(alpha+beta)); the parabola is not the law, hence 2%.
    assert result.fit.parameters["b"] == pytest.approx(0.28 / 0.62, rel=0.02)
    assert result.companions[0].fit.parameters["b"] == pytest.approx(0.34 / 0.62, rel=0.02)
    assert result.runs is not None
    assert len(result.runs.points) == 35


def test_a_reduced_result_comes_back_from_its_file(tmp_path: Path) -> None:
    result = analyse_reduced("isoflop", iso_ladder(), no_curves)
    path = tmp_path / "fit.json"
    save_result(result, path)
    loaded = load_result(path)
    assert loaded.reduction == "isoflop"
    assert loaded.fit.parameters == pytest.approx(result.fit.parameters)
    assert [c.law.name for c in loaded.companions] == [c.law.name for c in result.companions]
    assert loaded.runs is not None
    assert result.runs is not None
    assert loaded.runs.hash() == result.runs.hash()


def test_a_reduction_without_enough_left_says_what_was_left_out() -> None:
    with pytest.raises(MegamupError, match=r"isoflop: 0 of .* budgets have an optimum"):
        analyse_reduced("isoflop", completed(ladder([1e7, 1e8], [1e9, 1e10]), {"C"}), no_curves)


def test_published_is_the_objective_of_the_laws_source() -> None:
    assert analyse(GRID, [CHINCHILLA], objective="published").fit.objective.name == "huber"
    with pytest.raises(MegamupError, match="--objective published: the laws have different ones"):
        analyse(GRID, laws_named("chinchilla,kaplan-nd", None, GRID), objective="published")


def test_kaplans_data_is_the_data_set() -> None:
    """Points that repeat their data count it once under Kaplan's laws, and as seen under the others."""
    points = tuple(Point(p.name, p.inputs | {"U": 2e9}, p.loss) for p in GRID.points)
    repeated = Ladder(points, CONVENTION)
    (kaplan,) = laws_named("kaplan-nd", None, repeated)
    assert inputs_of(repeated, kaplan)[:, 1].max() == 2e9
    assert inputs_of(repeated, CHINCHILLA)[:, 1].max() == pytest.approx(1e11)


def test_steps_by_batch_at_shared_losses_need_no_curves() -> None:
    """Kaplan et al.'s B_crit = 2e8·L^-4.76, as a table of steps."""
    points = []
    for loss in (4.0, 3.5, 3.0):
        for batch in 2.0 ** np.arange(12, 20):
            steps = 1000 * (4 / loss) ** 8 * (1 + 2e8 * loss**-4.76 / batch)
            points.append(Point(f"{loss}-{batch}", {"B": float(batch), "S": float(steps)}, loss))
    table = Ladder(tuple(points), CONVENTION)
    assert is_reduced("critical-batch", table)
    assert not is_reduced("critical-batch", GRID)
    result = analyse(table, laws_named("critical-batch", None, table))
    assert result.fit.parameters["B_star"] == pytest.approx(2e8, rel=1e-6)
    assert result.fit.parameters["alpha_B"] == pytest.approx(1 / 4.76, rel=1e-6)


def test_largest_runs_that_leave_the_law_widen_its_intervals() -> None:
    """They look like outliers of a robust fit; the backtest must count them all the same."""
    flops = np.logspace(17, 23, 20)
    loss = (1.7 + 2 * (flops / 1e17) ** -0.15) * np.exp(0.0003 * np.random.default_rng(0).standard_normal(20))
    loss[-2:] *= [1.01, 1.02]
    points = tuple(Point(f"{c:.2g}", {"C": float(c)}, float(y)) for c, y in zip(flops, loss, strict=True))
    for objective in (AUTO, "huber"):
        result = analyse(Ladder(points, CONVENTION), [power("C")], objective=objective)
        assert result.backtest.inflation > 3
        assert {f"{c:.2g}" for c in flops[-2:]} <= {trial.run for trial in result.backtest.trials}
