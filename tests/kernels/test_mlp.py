"""Activations against the plain ones in float64, and against their definitions. Liger's: test_liger.py."""

from __future__ import annotations

import math
from typing import get_args

import pytest
import torch
import torch.nn.functional as F

from megamup.kernel_rules import LIGER_ACTIVATIONS
from megamup.kernels.mlp import LIGER, REFERENCE, TORCH
from megamup.model import GATED, Model
from tests.kernels.comparison import Function, apart, distance, draw, results

PRECISIONS = [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 2e-2)]


def inputs(name: str) -> list[torch.Tensor]:
    return [3 * draw(2, 7, 48), draw(2, 7, 48, seed=2)][: 2 if name in GATED else 1]


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS)
@pytest.mark.parametrize("name", TORCH)
def test_backends_are_the_reference(name: str, dtype: torch.dtype, tolerance: float) -> None:
    for backend in (TORCH, REFERENCE):
        assert distance(backend[name], REFERENCE[name], inputs(name), dtype) < tolerance


def test_every_name_of_the_config_has_them() -> None:
    names = set(get_args(Model.model_fields["activation"].annotation))
    assert set(TORCH) == set(REFERENCE) == names
    assert tuple(LIGER) == LIGER_ACTIVATIONS


def test_by_hand() -> None:
    gate, up = torch.tensor([1.5, -0.5]), torch.tensor([2.0, 4.0])
    normal = [0.5 * (1 + math.erf(x / math.sqrt(2))) for x in gate.tolist()]
    root = math.sqrt(2 / math.pi)
    near = [0.5 * (1 + math.tanh(root * (x + 0.044715 * x**3))) for x in gate.tolist()]
    logistic = [1 / (1 + math.exp(-x)) for x in gate.tolist()]
    expected = {
        "gelu": [1.5 * normal[0], -0.5 * normal[1]],
        "gelu_tanh": [1.5 * near[0], -0.5 * near[1]],
        "relu": [1.5, 0.0],
        "relu2": [2.25, 0.0],
        "swiglu": [3 * logistic[0], -2 * logistic[1]],
        "geglu": [3 * normal[0], -2 * normal[1]],
        "geglu_tanh": [3 * near[0], -2 * near[1]],
    }
    for name, values in expected.items():
        found = REFERENCE[name](*([gate, up] if name in GATED else [gate]))
        torch.testing.assert_close(found, torch.tensor(values))


@pytest.mark.parametrize(
    ("fault", "name"),
    [
        (lambda x: F.gelu(x, approximate="tanh"), "gelu"),
        (F.gelu, "gelu_tanh"),
        (lambda gate, up: TORCH["swiglu"](up, gate), "swiglu"),
        (TORCH["geglu"], "swiglu"),
        (TORCH["geglu"], "geglu_tanh"),
        (TORCH["relu"], "relu2"),
    ],
    ids=["tanh", "no tanh", "gate and up exchanged", "another activation", "gated without tanh", "not squared"],
)
def test_a_fault_is_seen(fault: Function, name: str) -> None:
    assert distance(fault, REFERENCE[name], inputs(name)) > 5e-5


@pytest.mark.parametrize("name", TORCH)
def test_compiled_as_one_graph(name: str) -> None:
    torch.compiler.reset()
    compiled = torch.compile(TORCH[name], fullgraph=True, dynamic=False, backend="aot_eager")
    assert apart(results(compiled, inputs(name)), results(TORCH[name], inputs(name))) < 1e-14
