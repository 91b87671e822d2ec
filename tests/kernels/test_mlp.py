"""Activations against the plain ones in float64, and against their definitions. Liger's: test_liger.py."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from megamup.kernels.mlp import (
    reference_geglu,
    reference_gelu,
    reference_swiglu,
    torch_geglu,
    torch_gelu,
    torch_swiglu,
)
from tests.kernels.comparison import Function, distance, draw

PRECISIONS = [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 2e-2)]
PAIRS: dict[str, tuple[Function, Function]] = {
    "gelu": (torch_gelu, reference_gelu),
    "swiglu": (torch_swiglu, reference_swiglu),
    "geglu": (torch_geglu, reference_geglu),
}


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS)
@pytest.mark.parametrize("name", PAIRS)
def test_backends_are_the_reference(name: str, dtype: torch.dtype, tolerance: float) -> None:
    inputs = [3 * draw(2, 7, 48), draw(2, 7, 48, seed=2)][: 1 if name == "gelu" else 2]
    backend, reference = PAIRS[name]
    assert distance(backend, reference, inputs, dtype) < tolerance
    assert distance(reference, reference, inputs, dtype) < tolerance


def test_by_hand() -> None:
    gate, up = torch.tensor([1.5, -0.5]), torch.tensor([2.0, 4.0])
    normal = [0.5 * (1 + math.erf(x / math.sqrt(2))) for x in gate.tolist()]
    torch.testing.assert_close(reference_gelu(gate), torch.tensor([1.5 * normal[0], -0.5 * normal[1]]))
    torch.testing.assert_close(reference_geglu(gate, up), torch.tensor([3 * normal[0], -2 * normal[1]]))
    logistic = [1 / (1 + math.exp(-x)) for x in gate.tolist()]
    torch.testing.assert_close(reference_swiglu(gate, up), torch.tensor([3 * logistic[0], -2 * logistic[1]]))


@pytest.mark.parametrize(
    ("fault", "name"),
    [
        (lambda x: F.gelu(x, approximate="tanh"), "gelu"),
        (lambda gate, up: torch_swiglu(up, gate), "swiglu"),
        (torch_geglu, "swiglu"),
    ],
    ids=["tanh approximation", "gate and up exchanged", "another activation"],
)
def test_a_fault_is_seen(fault: Function, name: str) -> None:
    inputs = [3 * draw(2, 7, 48), draw(2, 7, 48, seed=2)][: 1 if name == "gelu" else 2]
    assert distance(fault, PAIRS[name][1], inputs) > 5e-5
