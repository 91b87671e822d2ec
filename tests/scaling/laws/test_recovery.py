"""Every law of the registry: found again from points on it, its gradient, its units, its parameters there and back."""

from __future__ import annotations

import numpy as np
import pytest

from megamup.errors import MegamupError
from megamup.scaling.fit import fit_law, warnings_of
from megamup.scaling.laws import LAWS, REDUCTIONS, get_law
from megamup.scaling.laws.annealing import CurveLaw
from megamup.scaling.laws.base import SumOfPowers
from megamup.scaling.laws.examples import NAMES, Example, example

ALL_STARTS = 1.0
MOST_STARTS = 0.9  # of laws with products of exponents: some ends lie where a term is gone


@pytest.fixture(params=NAMES)
def known(request: pytest.FixtureRequest) -> Example:
    return example(request.param)


def centre_of(known: Example) -> np.ndarray:
    return np.asarray(np.log(known.inputs).mean(axis=0))


@pytest.mark.parametrize("objective", ["log", "loss", "huber"])
def test_exact_points_give_back_the_parameters(known: Example, objective: str) -> None:
    starts = 8 if isinstance(known.law, CurveLaw) else 32
    fit = fit_law(known.law, known.inputs, known.response, objective=objective, starts=starts)
    np.testing.assert_allclose(list(fit.parameters.values()), known.truth, rtol=1e-8)
    wanted = ALL_STARTS if isinstance(known.law, SumOfPowers) else MOST_STARTS
    assert fit.diagnostics.share_of_starts_at_optimum >= (wanted if starts == 32 else 0.75)
    assert warnings_of(fit) == []


def test_jacobian_is_that_of_central_differences(known: Example) -> None:
    # Off the truth, where no symmetry of the design can hide a mistake.
    centre = centre_of(known)
    theta = known.law.internal(known.truth, centre) * 1.03 + 0.01
    log_x = np.log(known.inputs) - centre
    step = 1e-6
    shifts = step * np.eye(len(theta))
    difference = [
        (known.law.log_value(theta + s, log_x) - known.law.log_value(theta - s, log_x)) / (2 * step) for s in shifts
    ]
    expected = np.stack(difference, axis=-1)
    np.testing.assert_allclose(known.law.jacobian(theta, log_x), expected, atol=1e-7 * np.abs(expected).max())


def test_a_batch_of_parameters_is_each_of_them(known: Example) -> None:
    centre = centre_of(known)
    theta = known.law.internal(known.truth, centre) * np.array([[1.0], [1.02], [0.97]])
    log_x = np.log(known.inputs) - centre
    for what in (known.law.log_value, known.law.jacobian):
        np.testing.assert_allclose(what(theta, log_x), [what(each, log_x) for each in theta], rtol=1e-12)


def test_parameters_there_and_back(known: Example) -> None:
    centre = centre_of(known)
    theta = known.law.internal(known.truth, centre)
    np.testing.assert_allclose(known.law.public(theta, centre), known.truth, rtol=1e-12)
    centred = np.exp(known.law.log_value(theta, np.log(known.inputs) - centre))
    np.testing.assert_allclose(centred, known.response, rtol=1e-12)


@pytest.mark.parametrize("name", [name for name, law in LAWS.items() if not isinstance(law, CurveLaw)])
def test_the_unit_of_inputs_does_not_matter(name: str) -> None:
    known = example(name)
    # D and U are one unit; a loss is in nats, and levels are looked up by it.
    factor = np.array(
        [1.0 if key == "L" else {"N": 1e-6, "D": 1e-9, "U": 1e-9}.get(key, 1e-12) for key in known.law.inputs]
    )
    noise = 1 + 1e-3 * np.random.default_rng(0).standard_normal(len(known.response))
    own = fit_law(known.law, known.inputs, known.response * noise, objective="log")
    other = fit_law(known.law, known.inputs * factor, known.response * noise, objective="log")
    np.testing.assert_allclose(other.at(known.inputs * factor), own.at(known.inputs), rtol=1e-8)


def test_declarations_agree(known: Example) -> None:
    law = known.law
    low, high = law.bounds
    assert len(low) == len(high) == len(law.parameters) == len(known.truth)
    assert np.all(low < high)
    unit = np.random.default_rng(0).uniform(0.001, 0.999, (50, len(law.parameters)))
    starts = law.starts(np.log(known.inputs) - centre_of(known), np.log(known.response), unit)
    assert np.all((starts >= low) & (starts <= high))
    assert law.name in LAWS
    assert "arXiv:" in law.source
    # Every parameter (one for all levels) stands in the formula.
    assert all(name.partition("[")[0] in law.formula for name in law.parameters)


def test_names_of_laws_and_reductions() -> None:
    assert get_law("power", "N").inputs == ("N",)
    assert get_law("power").inputs == ("C",)
    assert {law.name for reduction in REDUCTIONS.values() for law in reduction.laws} <= LAWS.keys()
    with pytest.raises(
        MegamupError, match=r"law: 'chinchila' is unknown; expected one of .*; did you mean 'chinchilla'"
    ):
        get_law("chinchila")
    with pytest.raises(MegamupError, match=r"law: 'isoflop' is no single law; .* kaplan-nopt, dopt, power"):
        get_law("isoflop")
    with pytest.raises(MegamupError, match=r"x: 'Q' is unknown; expected one of C, N, D, S"):
        get_law("power", "Q")
    with pytest.raises(MegamupError, match=r"x: 'N': the law chinchilla is one of N, D"):
        get_law("chinchilla", "N")
