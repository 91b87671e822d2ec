"""Learning rate and batch size by model and data: Step Law (Li et al. 2025, arXiv:2503.04715)."""

from __future__ import annotations

from megamup.scaling.laws.base import LARGEST_EXPONENT, Exponent, SumOfPowers, Term

STEP_LAW = "Li et al. 2025, Step Law, arXiv:2503.04715, eq. 1"
_ANY = (-LARGEST_EXPONENT, LARGEST_EXPONENT)

STEP_LAW_LR = SumOfPowers(
    name="step-law-lr",
    formula="lr = c·N^a·D^b",
    inputs=("N", "D"),
    terms=(Term("c", {"N": ("a", 1.0), "D": ("b", 1.0)}),),
    exponents=(Exponent("a", *_ANY), Exponent("b", *_ANY)),
    source=STEP_LAW,
    response="lr",
)

STEP_LAW_BATCH = SumOfPowers(
    name="step-law-batch",
    formula="B = c·D^b",
    inputs=("D",),
    terms=(Term("c", {"D": ("b", 1.0)}),),
    exponents=(Exponent("b", *_ANY),),
    source=STEP_LAW,
    response="B",
)
