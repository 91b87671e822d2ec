"""Grids of learning rates and batches give back Step Law's own optimum."""

import numpy as np
import pytest

from megamup.errors import MegamupError
from megamup.scaling.fit import fit_law
from megamup.scaling.laws import get_law
from megamup.scaling.laws.base import FloatArray
from megamup.scaling.laws.examples import example
from megamup.scaling.optimum import optima
from megamup.scaling.runs import Ladder, Point

MODELS = [(n, d) for n in (1e8, 4e8, 1.6e9) for d in (2e9, 1e10, 5e10)]
FACTORS = np.geomspace(0.25, 4, 5)


def best(name: str, *at: float) -> float:
    known = example(name)
    return float(known.law.predict(known.truth, np.array([at]))[0])


def grid(rates: FloatArray = FACTORS, batches: FloatArray = FACTORS * 1.1) -> Ladder:
    """Runs around the optimum of each model, whose losses are parabolas with a tilt between rate and batch."""
    points = []
    for n, d in MODELS:
        rate, batch = best("step-law-lr", n, d), best("step-law-batch", d)
        for x in rates * 1.2:
            for z in batches:
                u, v = np.log(x), np.log(z)
                loss = 2.5 + 0.02 * (u - 0.3 * v) ** 2 + 0.03 * v**2
                points.append(Point(f"{n}{d}{x}{z}", {"N": n, "D": d, "lr": rate * x, "B": batch * z}, float(loss)))
    return Ladder(tuple(points), {"parameters": "total"})


def test_step_laws_parameters_come_back() -> None:
    found = optima(grid())
    assert found.warnings == ()
    assert found.ladder.convention == {"parameters": "total"}
    columns = found.ladder.columns(["N", "D", "lr", "B"])
    rate = fit_law(get_law("step-law-lr"), columns[:, :2], columns[:, 2])
    np.testing.assert_allclose(list(rate.parameters.values()), example("step-law-lr").truth, rtol=1e-6)
    batch = fit_law(get_law("step-law-batch"), columns[:, 1], columns[:, 3])
    np.testing.assert_allclose(list(batch.parameters.values()), example("step-law-batch").truth, rtol=1e-6)
    np.testing.assert_allclose(found.ladder.losses, 2.5, rtol=1e-9)


def test_one_batch_gives_the_rate_alone() -> None:
    found = optima(grid(batches=np.array([1.0])))
    for n, d, rate, batch in found.ladder.columns(["N", "D", "lr", "B"]):
        assert rate == pytest.approx(best("step-law-lr", n, d))
        assert batch == pytest.approx(best("step-law-batch", d))


def test_grids_that_miss_the_optimum_are_left_out_and_refused() -> None:
    with pytest.raises(MegamupError, match=r"no N and D has its best learning rate[\s\S]*lies outside those tried"):
        optima(grid(rates=FACTORS * 100))
    beside = grid()
    some = tuple(
        p for p in beside.points if p.inputs["N"] > 2e8 or p.inputs["lr"] > best("step-law-lr", 1e8, p.inputs["D"])
    )
    found = optima(Ladder(some, {}))
    assert len(found.ladder) + len(found.warnings) == len(MODELS)
    assert all("N=1e+08" in warning for warning in found.warnings)
    assert found.warnings


def test_a_table_of_optima_is_taken_as_it_is() -> None:
    table = optima(grid()).ladder
    again = optima(table)
    assert again.ladder is table
    assert again.warnings == ("every N and D has one run, which is taken as its optimum",)
