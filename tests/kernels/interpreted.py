"""Liger's kernels against the references, through Triton's interpreter: test_liger.py runs it with TRITON_INTERPRET=1.

What the interpreter does otherwise than the compiler is evened out here: it leaves Python floats as they are where the
compiler makes them fp32 scalars, and has no device library.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megamup.kernels import cross_entropy, mlp, norm, rotary
from megamup.kernels.choice import choose
from megamup.kernels.rotary import Rotation
from megamup.model import RopeScaling
from tests.conftest import MakeConfig
from tests.kernels.comparison import distance, draw, heads, results

if os.environ.get("TRITON_INTERPRET") != "1":
    raise RuntimeError("run by tests/kernels/test_liger.py: Triton reads TRITON_INTERPRET when it is imported")

FP32, TOLERANCE, BF16_TOLERANCE = torch.float32, 1e-6, 2e-2
ROTATION = Rotation(500.0)
TEMPERED = Rotation(500.0, RopeScaling(kind="yarn", factor=4.0, original_max_seq_len=64))


@pytest.fixture(autouse=True, scope="module")
def as_the_compiler_does() -> None:
    from liger_kernel.ops import geglu, layer_norm, rms_norm
    from triton import language as tl
    from triton.runtime import interpreter

    plain = interpreter._implicit_cvt

    def converted(argument: Any) -> Any:
        if not isinstance(argument, float):
            return plain(argument)
        handle = interpreter.TensorHandle(np.array([argument], dtype=np.float32), tl.float32)
        return tl.core.tensor(handle, tl.float32)

    interpreter._implicit_cvt = converted
    # By the interpreter's own functions, which it sets while a kernel runs.
    rms_norm.rsqrt = layer_norm.rsqrt = lambda x: tl.rsqrt(x)
    geglu.tanh = lambda x: 1 - 2 / (tl.exp(2 * x) + 1)


@pytest.mark.parametrize(("dtype", "tolerance"), [(FP32, TOLERANCE), (torch.bfloat16, BF16_TOLERANCE)])
def test_rms_norm(dtype: torch.dtype, tolerance: float) -> None:
    mine, exact = (lambda x, w, call=call: call(x, w, 0.1) for call in (norm.liger_rms_norm, norm.reference_rms_norm))
    assert distance(mine, exact, [draw(2, 7, 48), draw(48, seed=2)], dtype) < tolerance


@pytest.mark.parametrize(("dtype", "tolerance"), [(FP32, TOLERANCE), (torch.bfloat16, BF16_TOLERANCE)])
def test_rms_norm_of_heads(dtype: torch.dtype, tolerance: float) -> None:
    """Short rows, (batch, heads, seq, d_head), that don't lie one after another."""
    mine, exact = (lambda x, w, call=call: call(x, w, 0.1) for call in (norm.liger_rms_norm, norm.reference_rms_norm))
    for d_head in (8, 12):
        query, *_ = heads(4, 4, seq=5, d_head=d_head)
        assert distance(mine, exact, [query, draw(d_head, seed=2)], dtype) < tolerance


@pytest.mark.parametrize(("dtype", "tolerance"), [(FP32, TOLERANCE), (torch.bfloat16, BF16_TOLERANCE)])
@pytest.mark.parametrize("biased", [True, False])
def test_layer_norm(biased: bool, dtype: torch.dtype, tolerance: float) -> None:
    mine, exact = (
        lambda x, w, b=None, call=call: call(x, w, b, 0.1)
        for call in (norm.liger_layer_norm, norm.reference_layer_norm)
    )
    inputs = [draw(2, 7, 48) + 3, draw(48, seed=2), draw(48, seed=3)]
    assert distance(mine, exact, inputs[: 2 + biased], dtype) < tolerance


def test_rms_norm_takes_fp32_weights() -> None:
    x, weight = draw(2, 7, 48).bfloat16(), draw(48, seed=2).float().requires_grad_()
    y = norm.liger_rms_norm(x, weight, 0.1)
    assert y.dtype == torch.bfloat16
    (gradient,) = torch.autograd.grad(y.float().sum(), weight)
    assert gradient.dtype == torch.float32


@pytest.mark.parametrize(("dtype", "tolerance"), [(FP32, 2e-6), (torch.float16, 2e-3)])
@pytest.mark.parametrize("name", mlp.LIGER)
def test_activation(name: str, dtype: torch.dtype, tolerance: float) -> None:
    """In fp16: NumPy, by which the interpreter computes, has no products of bf16."""
    inputs = [3 * draw(2, 7, 48), draw(2, 7, 48, seed=2)]
    assert distance(mlp.LIGER[name], mlp.REFERENCE[name], inputs, dtype) < tolerance


@pytest.mark.parametrize(("n_heads", "n_kv_heads"), [(4, 4), (6, 2), (4, 1)])
@pytest.mark.parametrize("rotation", [ROTATION, TEMPERED], ids=["plain", "yarn"])
def test_rotate(n_heads: int, n_kv_heads: int, rotation: Rotation) -> None:
    mine, exact = (
        lambda q, k, call=call: call(q, k, rotation) for call in (rotary.liger_rotate, rotary.reference_rotate)
    )
    query, key, _ = heads(n_heads, n_kv_heads, seq=9)
    assert distance(mine, exact, [query, key], FP32) < 1e-5
    assert distance(mine, exact, [query, key], torch.bfloat16) < BF16_TOLERANCE


def test_inputs_and_gradients_of_outputs_are_left_alone() -> None:
    """A residual stream, a recomputed block and a hook read them after the kernel has."""
    query, key, _ = (x.float().requires_grad_() for x in heads(4, 2, seq=9))
    x, weight = draw(2, 7, 48).float().requires_grad_(), draw(48, seed=2).float().requires_grad_()
    for inputs, outputs in (
        ([query, key], rotary.liger_rotate(query, key, ROTATION)),
        ([x, weight], (norm.liger_rms_norm(x, weight, 0.1),)),
        ([x, weight], (norm.liger_layer_norm(x, weight, None, 0.1),)),
    ):
        # As attention returns them, (batch, seq, heads, d_head) in memory: what a kernel could write over.
        gradients = [torch.ones_like(y) + 0.5 for y in outputs]
        kept = [y.detach().clone() for y in inputs]
        torch.autograd.grad(outputs, inputs, gradients)
        assert all(torch.equal(x.detach(), y) for x, y in zip(inputs, kept, strict=True))
        assert all(bool((gradient == 1.5).all()) for gradient in gradients)


def weightings() -> dict[str, Tensor]:
    uniform = torch.rand(21, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return {"number": torch.tensor(0.3), "mask": (uniform > 0.4) * 0.7, "any": uniform, "nothing": torch.zeros(21)}


def targets() -> Tensor:
    return torch.randint(0, 50, (21,), generator=torch.Generator().manual_seed(4))


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("weighting", ["number", "mask", "any"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(FP32, TOLERANCE), (torch.bfloat16, BF16_TOLERANCE)])
def test_cross_entropy(dtype: torch.dtype, tolerance: float, weighting: str, biased: bool) -> None:
    weights = weightings()[weighting]

    def exact(hidden: Tensor, weight: Tensor, *bias: Tensor) -> Tensor:
        losses = F.cross_entropy(0.5 * hidden @ weight.t() + sum(bias), targets(), reduction="none")
        return (losses * weights.double()).sum()

    def mine(hidden: Tensor, weight: Tensor, *bias: Tensor) -> Tensor:
        loss = cross_entropy.liger(hidden, weight, targets(), weights.float(), 0.5, *bias)
        assert loss.dtype == torch.float32
        return loss.to(hidden.dtype)

    inputs = [draw(21, 24), draw(50, 24, seed=2), draw(50, seed=3)]
    assert distance(mine, exact, inputs[: 2 + biased], dtype) < tolerance


@pytest.mark.parametrize("weighting", ["mask", "any"])
def test_a_target_below_zero_is_none(weighting: str) -> None:
    hidden, weight, weights = draw(21, 24).float(), draw(50, 24, seed=2).float(), weightings()[weighting].float()
    weights[::4] = 0.0
    written = [targets().masked_fill(weights == 0, value) for value in (-1, 7)]
    first, second = (
        results(lambda h, w, t=t: cross_entropy.liger(h, w, t, weights, 1.0), [hidden, weight]) for t in written
    )
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))
    assert first[0] > 0


def test_the_multiplier_rounds_no_hidden_states() -> None:
    """With fp32 masters a multiplier costs nothing: the loss is exact where multiplier x weight is, in bf16."""
    hidden = draw(21, 24).bfloat16()
    product = draw(50, 24, seed=2).bfloat16().float()
    weights, multiplier = torch.tensor(0.3), 0.7
    found = cross_entropy.liger(hidden, product / multiplier, targets(), weights, multiplier)
    assert found == cross_entropy.liger(hidden, product, targets(), weights, 1.0)


def test_cross_entropy_of_nothing_is_nothing() -> None:
    hidden, weight = draw(21, 24).float(), draw(50, 24, seed=2).float()
    of = lambda h, w: cross_entropy.liger(h, w, targets(), weightings()["nothing"], 1.0)  # noqa: E731
    assert all(bool((x == 0).all()) for x in results(of, [hidden, weight]))


def test_liger_is_chosen_where_it_is_asked_for(make_config: MakeConfig) -> None:
    asked = {f"kernels.{op}": "liger" for op in ("norm", "mlp", "rotary", "cross_entropy")}
    config = make_config(*(f"{key}={value}" for key, value in asked.items()))
    kernels = choose(config, "cpu")
    assert kernels.rms_norm is norm.liger_rms_norm
    assert kernels.activation is mlp.liger_swiglu
    assert kernels.rotate is rotary.liger_rotate
    assert {key: kernels.names[key.removeprefix("kernels.")] for key in asked} == asked
    assert "liger" not in choose(make_config(), "cpu").names.values()
