"""Norms against the plain ones in float64, and against what they are for. Liger's: test_liger.py."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from megamup.kernels.norm import (
    LayerNorm,
    RmsNorm,
    reference_layer_norm,
    reference_rms_norm,
    torch_layer_norm,
    torch_rms_norm,
)
from tests.kernels.comparison import distance, draw, heads

EPS = 0.1
"""Large, so that one left out or added outside the root is seen."""
PRECISIONS = [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 2e-2)]


def rms_inputs() -> list[Tensor]:
    return [draw(2, 7, 48), draw(48, seed=2)]


def layer_inputs() -> list[Tensor]:
    return [draw(2, 7, 48) + 3, draw(48, seed=2), draw(48, seed=3)]


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS)
@pytest.mark.parametrize("backend", [reference_rms_norm, torch_rms_norm])
def test_rms_norm(backend: RmsNorm, dtype: torch.dtype, tolerance: float) -> None:
    mine, exact = (lambda x, w, call=call: call(x, w, EPS) for call in (backend, reference_rms_norm))
    assert distance(mine, exact, rms_inputs(), dtype) < tolerance


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS)
@pytest.mark.parametrize("backend", [reference_rms_norm, torch_rms_norm])
def test_rms_norm_of_heads(backend: RmsNorm, dtype: torch.dtype, tolerance: float) -> None:
    """Rows of d_head, laid out as a projection leaves them: (batch, heads, seq, d_head)."""
    mine, exact = (lambda x, w, call=call: call(x, w, EPS) for call in (backend, reference_rms_norm))
    for d_head in (2, 16):
        query, *_ = heads(6, 2, d_head=d_head)
        assert distance(mine, exact, [query, draw(d_head, seed=2)], dtype) < tolerance


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS)
@pytest.mark.parametrize("backend", [reference_layer_norm, torch_layer_norm])
def test_layer_norm(backend: LayerNorm, dtype: torch.dtype, tolerance: float, biased: bool) -> None:
    mine, exact = (lambda x, w, b=None, call=call: call(x, w, b, EPS) for call in (backend, reference_layer_norm))
    assert distance(mine, exact, layer_inputs()[: 2 + biased], dtype) < tolerance


def test_by_hand() -> None:
    x, weight, bias = torch.tensor([[3.0, 4.0]]), torch.tensor([2.0, 1.0]), torch.tensor([0.0, 10.0])
    rms = math.sqrt(12.5 + EPS)
    torch.testing.assert_close(reference_rms_norm(x, weight, EPS), torch.tensor([[6 / rms, 4 / rms]]))
    deviation = math.sqrt(0.25 + EPS)
    expected = torch.tensor([[-1 / deviation, 10 + 0.5 / deviation]])
    torch.testing.assert_close(reference_layer_norm(x, weight, bias, EPS), expected)


@pytest.mark.parametrize("rms_norm", [reference_rms_norm, torch_rms_norm])
@pytest.mark.parametrize("layer_norm", [reference_layer_norm, torch_layer_norm])
def test_fp32_weights_of_bf16_activations(rms_norm: RmsNorm, layer_norm: LayerNorm) -> None:
    """As at ZeRO 0: the result has the activations' type, the weight's gradient the weight's."""
    x, weight, bias = (t.float().requires_grad_() for t in layer_inputs())
    for y in (rms_norm(x.bfloat16(), weight, EPS), layer_norm(x.bfloat16(), weight, bias, EPS)):
        assert y.dtype == torch.bfloat16
        (gradient,) = torch.autograd.grad(y.float().square().sum(), weight)
        assert gradient.dtype == torch.float32
