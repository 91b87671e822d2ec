"""Laws with their published parameters give their papers' figures."""

from __future__ import annotations

import numpy as np
import pytest

from megamup.scaling.laws import get_law
from megamup.scaling.laws.examples import PF_DAY, example

HOFFMANN = np.array([1.69, 406.4, 410.7, 0.34, 0.28])
BESIROGLU = np.array([1.8172, 482.01, 2085.43, 0.3478, 0.3658])
KAPLAN_ND = np.array([6.4e13, 1.8e13, 0.076, 0.103])


def loss(name: str, *at: float) -> float:
    known = example(name)
    return float(known.law.predict(known.truth, np.array([at]))[0])


def test_kaplans_single_laws() -> None:
    # L = 1 at the scale, and the factor of a decade is 10^-alpha (Kaplan et al. 2020, section 1.2: doubling N lowers L
    # by 2^-0.076 = 0.95).
    assert loss("kaplan-n", 8.8e13) == pytest.approx(1)
    assert loss("kaplan-n", 2e9) / loss("kaplan-n", 1e9) == pytest.approx(0.949, abs=5e-4)
    assert loss("kaplan-n", 1e9) == pytest.approx((8.8e13 / 1e9) ** 0.076)
    assert loss("kaplan-d", 5.4e13) == pytest.approx(1)
    assert loss("kaplan-cmin", 3.1e8 * PF_DAY) == pytest.approx(1)


def test_kaplans_optimum_by_compute() -> None:
    # Table 6: at one PF-day 1.3e9 parameters, 2.0e6 tokens a batch, 5.4e3 steps.
    for name, expected in (("kaplan-nopt-cmin", 1.3e9), ("kaplan-batch", 2.0e6), ("kaplan-smin", 5.4e3)):
        assert loss(name, PF_DAY) == pytest.approx(expected)


def test_kaplan_nd_tends_to_its_limits_and_tells_the_data_that_avoid_overfitting() -> None:
    assert loss("kaplan-nd", 1e9, 1e30) == pytest.approx((6.4e13 / 1e9) ** 0.076, rel=1e-6)
    assert loss("kaplan-nd", 1e30, 1e9) == pytest.approx((1.8e13 / 1e9) ** 0.103, rel=1e-6)
    # Section 4.2: D = 5e3·N^0.74 keeps the loss within 2% of that of endless data.
    assert loss("kaplan-nd", 1e9, 5e3 * 1e9**0.74) / loss("kaplan-nd", 1e9, 1e30) == pytest.approx(1.02, abs=0.005)


def test_chinchillas_own_budget() -> None:
    # Hoffmann et al. 2022, table A3, approach 3: 40.0B parameters for Gopher's 5.76e23 FLOPs.
    found = {name: float(q(HOFFMANN)) for name, q in get_law("chinchilla").quantities({"C": 5.76e23}).items()}
    # The published coefficients are rounded: exponent 0.4516 for the paper's 0.46.
    g = (0.34 * 406.4 / (0.28 * 410.7)) ** (1 / 0.62)
    assert found["N_opt"] == pytest.approx(g * (5.76e23 / 6) ** (0.28 / 0.62), rel=1e-12)
    assert found["N_opt"] == pytest.approx(32.2e9, rel=0.01)
    assert 6 * found["N_opt"] * found["D_opt"] == pytest.approx(5.76e23)
    assert found["D_per_N"] == pytest.approx(found["D_opt"] / found["N_opt"])
    # Chinchilla itself, 70B at 1.4T tokens, which the law gives 1.937 (quoted by Besiroglu et al. 2024).
    assert loss_of(HOFFMANN, 70e9, 1.4e12) == pytest.approx(1.937, abs=1e-3)


def loss_of(parameters: np.ndarray, n: float, d: float) -> float:
    return float(get_law("chinchilla").predict(parameters, np.array([[n, d]]))[0])


def test_besiroglus_fit_wants_twenty_tokens_a_parameter() -> None:
    # arXiv:2404.10102, section 4: consistent with about 20 tokens a parameter at Chinchilla's budget.
    ratio = get_law("chinchilla").quantities({"C": 5.76e23})["D_per_N"]
    assert float(ratio(BESIROGLU)) == pytest.approx(20, rel=0.1)
    assert float(ratio(HOFFMANN)) > 70


def test_step_laws_own_example() -> None:
    # arXiv:2503.04715: lr = 1.79·N^-0.713·D^0.307, B = 0.58·D^0.571; 1B parameters at 100B tokens.
    assert loss("step-law-lr", 1e9, 1e11) == pytest.approx(1.79 * 1e9**-0.713 * 1e11**0.307)
    assert loss("step-law-lr", 1e9, 1e11) == pytest.approx(1.62e-3, rel=0.01)
    assert loss("step-law-batch", 1e11) == pytest.approx(1.11e6, rel=0.01)


def muennighoff(p: np.ndarray, n: float, d: float, u: float) -> float:
    """arXiv:2305.16264, eq. 5 and 6 and section 3.1, number by number."""
    e, a, b, alpha, beta, r_d, r_n = p
    u_d = min(d, u)
    g = (alpha * a / (beta * b)) ** (1 / (alpha + beta))
    u_n = min(n, g * (g * u_d) ** (beta / alpha))  # N_opt of the budget whose D_opt is U_D
    seen_d = u_d + u_d * r_d * (1 - np.exp(-(d / u_d - 1) / r_d))
    seen_n = u_n + u_n * r_n * (1 - np.exp(-(n / u_n - 1) / r_n))
    return float(e + a / seen_n**alpha + b / seen_d**beta)


@pytest.mark.parametrize("exponents", [(0.353, 0.353), (0.34, 0.28)])
def test_repeated_data_is_as_the_paper_writes_it(exponents: tuple[float, float]) -> None:
    known = example("data-constrained")
    p = np.array([*known.truth[:3], *exponents, *known.truth[5:]])
    expected = [muennighoff(p, n, d, u) for n, d, u in known.inputs.tolist()]
    np.testing.assert_allclose(known.law.predict(p, known.inputs), expected, rtol=1e-12)


def test_four_epochs_are_nearly_as_good_as_new_data_and_forty_worth_little() -> None:
    # Muennighoff et al. 2023, abstract: 4 epochs of repeated data change the loss little; by 40 their worth is gone.
    known = example("data-constrained")

    def of(tokens: float, unique: float) -> float:
        return float(known.law.predict(known.truth, np.array([[1e9, tokens, unique]]))[0])

    fresh, repeated = of(4e10, 4e10), of(4e10, 1e10)
    once = of(1e10, 1e10)
    assert (repeated - fresh) / (once - fresh) < 0.1
    assert (of(4e11, 1e10) - of(8e11, 1e10)) / (of(4e11, 4e11) - of(8e11, 8e11)) < 0.2


@pytest.mark.parametrize(
    ("name", "parameters"), [("chinchilla", BESIROGLU), ("kaplan-nd", KAPLAN_ND), ("overtraining", None)]
)
def test_the_frontier_is_the_least_of_a_fine_grid(name: str, parameters: np.ndarray | None) -> None:
    law, budget = get_law(name), 1e21
    p = example(name).truth if parameters is None else parameters
    found = {key: float(q(p)) for key, q in law.quantities({"C": budget}).items()}
    n = np.geomspace(1e6, 1e13, 200_001)
    losses = law.predict(p, np.stack([n, budget / 6 / n], axis=-1))
    assert found["N_opt"] == pytest.approx(n[np.argmin(losses)], rel=1e-4)
    assert losses.min() * (1 - 1e-8) < found["L"] <= losses.min()
    # And back: the compute that reaches this loss.
    back = law.quantities({"L": found["L"]})
    assert float(back["C"](p)) == pytest.approx(budget, rel=1e-7)
    assert float(back["N_opt"](p)) == pytest.approx(found["N_opt"], rel=1e-7)


def test_the_frontier_of_repeated_data_is_the_least_of_a_fine_grid() -> None:
    known, budget, unique = example("data-constrained"), 1e22, 2e9
    at = {"C": budget, "U": unique}
    found = {key: float(q(known.truth)) for key, q in known.law.quantities(at).items()}
    n = np.geomspace(1e7, 1e12, 200_001)
    losses = known.law.predict(known.truth, np.stack([n, budget / 6 / n, np.full_like(n, unique)], axis=-1))
    assert found["N_opt"] == pytest.approx(n[np.argmin(losses)], rel=1e-3)
    assert losses.min() * (1 - 1e-8) < found["L"] <= losses.min()
    assert found["epochs"] == pytest.approx(found["D_opt"] / unique)
    back = known.law.quantities({"L": found["L"], "U": unique})
    assert float(back["C"](known.truth)) == pytest.approx(budget, rel=1e-6)
    assert np.isnan(known.law.quantities({"L": 1.9, "U": unique})["C"](known.truth))


def test_enough_data_is_chinchilla() -> None:
    known = example("data-constrained")
    chinchilla = known.truth[:5]
    at = get_law("chinchilla").quantities({"C": 1e21})
    for key, quantity in known.law.quantities({"C": 1e21, "U": 1e14}).items():
        if key in at:
            assert float(quantity(known.truth)) == pytest.approx(float(at[key](chinchilla)), rel=1e-9)


def test_losses_that_are_never_reached_have_no_compute() -> None:
    for name, offset in (("chinchilla", 1.8172), ("overtraining", 1.83665), ("power", 1.75)):
        known = example(name)
        (value, *_) = (q(known.truth) for q in known.law.quantities({"L": offset}).values())
        assert np.isnan(value)


def test_what_reaches_a_loss() -> None:
    for name, x in (("power", 3e20), ("kaplan-n", 3e9)):
        known = example(name)
        (key,) = known.law.inputs
        assert float(known.law.quantities({"L": loss(name, x)})[key](known.truth)) == pytest.approx(x, rel=1e-9)


def test_overtraining_at_a_ratio() -> None:
    known = example("overtraining")
    n = (1e21 / 6 / 640) ** 0.5
    found = known.law.quantities({"C": 1e21, "M": 640.0})["L"](known.truth)
    # Gadre et al. 2024, eq. 4 as written: E + (a·M^-eta' + b·M^eta')·C^-eta' with C = 6·N²·M and eta' = 0.27285/2.
    a, b, eta = 166.21 * 6 ** (0.27285 / 2), 366.69, 0.27285 / 2
    assert float(found) == pytest.approx(1.83665 + (a * 640**eta + b * 640**-eta) * 1e21**-eta, rel=1e-9)
    assert float(found) == pytest.approx(loss("overtraining", n, 640 * n), rel=1e-12)


def test_critical_batch_of_kaplan() -> None:
    # Eq. 5.3 and figure 10: B_crit doubles for every 13% of the loss.
    quantity = get_law("critical-batch").quantities
    p = np.array([2.1e8, 0.21])
    at = float(quantity({"L": 3.0})["B_crit"](p))
    assert at == pytest.approx(2.1e8 / 3 ** (1 / 0.21))
    assert float(quantity({"L": 3.0 * (1 - 0.13)})["B_crit"](p)) / at == pytest.approx(2, rel=0.05)
    # At B_crit twice the least steps and twice the least examples are needed.
    known = example("critical-batch")
    steps = known.law.predict(known.truth, np.array([[float(2.1e8 / 3 ** (1 / 0.21)), 3.0]]))[0]
    assert steps == pytest.approx(2 * 6.1e3)
    # (S/S_min - 1)(E/E_min - 1) = 1 at every batch.
    s = known.response.reshape(6, 3)[:, 2] / 6.1e3
    e = known.response.reshape(6, 3)[:, 2] * known.inputs.reshape(6, 3, 2)[:, 2, 0] / (6.1e3 * at)
    np.testing.assert_allclose((s - 1) * (e - 1), 1, rtol=1e-9)


def test_a_loss_that_is_no_level_has_no_steps() -> None:
    assert np.isnan(loss("critical-batch", 1e6, 3.3))
