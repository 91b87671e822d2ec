"""Approach 1 gives back the frontier of the law that its curves lie on."""

from dataclasses import replace

import numpy as np
import pytest

from megamup.errors import MegamupError
from megamup.scaling.curves import Curve
from megamup.scaling.envelope import envelope
from megamup.scaling.fit import fit_law
from megamup.scaling.laws import get_law
from megamup.scaling.laws.examples import example
from megamup.scaling.runs import Point

TRUTH = example("chinchilla").truth
CHINCHILLA = get_law("chinchilla")
SIZES = np.geomspace(1e7, 1e9, 9)


def curve(n: float, last: float = 1e11) -> tuple[Point, Curve]:
    tokens = np.geomspace(1e8, last, 400)
    loss = CHINCHILLA.predict(TRUTH, np.stack([np.full_like(tokens, n), tokens], axis=-1))
    return Point(f"n{n:.3g}", {"N": float(n)}, float(loss[-1])), Curve(tokens / 1e6, tokens, 6 * n * tokens, loss)


def test_the_envelope_is_the_lowest_curve() -> None:
    curves = [curve(n) for n in SIZES]
    found = envelope(curves, convention={"flops": "6N"})
    assert found.flops.shape == (1500,)
    for c, best in list(zip(found.flops, found.loss, strict=True))[::97]:
        losses = [CHINCHILLA.predict(TRUTH, np.array([[n, c / 6 / n]]))[0] for n in SIZES if 1e8 <= c / 6 / n <= 1e11]
        assert best == pytest.approx(min(losses), rel=1e-5)
    assert found.ladder.convention == {"flops": "6N"}
    assert len(found.ladder) == int(found.kept.sum())


def test_optima_follow_the_law() -> None:
    found = envelope([curve(n) for n in SIZES])
    c, n, d = found.ladder.columns(["C", "N", "D"]).T
    np.testing.assert_allclose(6 * n * d, c, rtol=1e-3)
    ratio = n / np.array([float(CHINCHILLA.quantities({"C": budget})["N_opt"](TRUTH)) for budget in c])
    # Sizes are a factor 1.78 apart, and the best of them lies within half of one of the optimum.
    assert np.all((ratio > 1 / 1.5) & (ratio < 1.5))
    fit = fit_law(get_law("kaplan-nopt"), c, n)
    assert fit.parameters["b"] == pytest.approx(TRUTH[4] / (TRUTH[3] + TRUTH[4]), abs=0.04)
    # Points of one curve are one piece of evidence.
    assert set(found.ladder.runs.tolist()) == set(range(len(set(n))))


def test_budgets_where_the_best_may_be_beyond_are_left_out_and_counted() -> None:
    found = envelope([curve(n) for n in SIZES])
    sizes = found.ladder.columns(["N"])[:, 0]
    assert sizes.min() > SIZES[0]
    assert sizes.max() < SIZES[-1]
    assert 1500 - len(sizes) == sum(int(warning.split()[0]) for warning in found.warnings)
    assert "the smallest model measured there is the best" in found.warnings[0]


def test_a_curve_that_ended_early_does_not_hide_a_smaller_optimum() -> None:
    # Where the smaller neighbours have ended, the smallest that is left is no optimum.
    curves = [curve(n, 1e9 if n < 5e7 else 1e11) for n in SIZES]
    found = envelope(curves)
    for point in found.ladder.points:
        measured = [n for n in SIZES if point.inputs["C"] / 6 / n <= (1e9 if n < 5e7 else 1e11)]
        assert point.inputs["N"] > min(measured)


def test_what_is_missing_is_said() -> None:
    point, known = curve(1e8)
    with pytest.raises(MegamupError, match="has no N"):
        envelope([(replace(point, inputs={}), known)])
    with pytest.raises(MegamupError, match="has no FLOPs along its curve"):
        envelope([(point, replace(known, flops=np.full(400, np.nan)))])
    with pytest.raises(MegamupError, match="envelope: 0 sizes are best somewhere between smaller and larger ones"):
        envelope([curve(1e8), curve(2e8)])
