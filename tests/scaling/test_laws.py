"""Every law of the registry: its gradient, its centring, its bounds."""

import numpy as np
import pytest

from megamup.errors import MegamupError
from megamup.scaling.laws import LAWS, Law, get_law


@pytest.mark.parametrize("law", LAWS.values(), ids=list(LAWS))
def test_gradient_of_the_terms_is_that_of_finite_differences(law: Law) -> None:
    exponents = np.array([(low * high) ** 0.5 * np.sign(low) for low, high in law.exponent_bounds])
    log_x = np.linspace(-3, 3, 7)[:, np.newaxis]
    gradient = law.terms_gradient(exponents, log_x)
    step = 1e-6
    for index in range(len(exponents)):
        shift = step * np.eye(len(exponents))[index]
        difference = (law.terms(exponents + shift, log_x) - law.terms(exponents - shift, log_x)) / (2 * step)
        np.testing.assert_allclose(gradient[index], difference, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("law", LAWS.values(), ids=list(LAWS))
def test_uncentred_coefficients_give_the_same_loss(law: Law) -> None:
    exponents = np.array([(low * high) ** 0.5 * np.sign(low) for low, high in law.exponent_bounds])
    log_x = np.log(np.geomspace(1e6, 1e9, 5))[:, np.newaxis]
    centre = log_x.mean(axis=0)
    coefficients = np.arange(1.0, 1 + len(law.coefficients))
    centred = law.terms(exponents, log_x - centre) @ coefficients
    own = law.terms(exponents, log_x) @ (coefficients * law.uncentre(exponents, centre))
    np.testing.assert_allclose(own, centred, rtol=1e-13)


@pytest.mark.parametrize("law", LAWS.values(), ids=list(LAWS))
def test_declarations_agree(law: Law) -> None:
    assert sorted(law.parameters) == sorted(law.coefficients + law.exponents)
    assert len(law.exponent_bounds) == len(law.exponents)
    assert all(low < high and low * high > 0 for low, high in law.exponent_bounds)


def test_unknown_law_names_those_there_are() -> None:
    with pytest.raises(MegamupError, match=r"law: 'powr' is unknown; expected one of .*power"):
        get_law("powr")
