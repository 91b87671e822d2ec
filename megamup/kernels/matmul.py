"""Products of the blocks' linear layers: (..., d_in) and a weight (d_out, d_in) to (..., d_out).

In ``fp8`` the three products of a layer (its output, the gradient of its input, the gradient of its weight) take 8-bit
floats and give bf16: inputs and weights as e4m3, gradients as e5m2, which has less precision and more range
(Micikevicius et al. 2022). Each tensor has one scale, taken from its own largest element at every use, so that nothing
depends on width, on μP's multipliers or on the loss's scale. Scales are powers of two: they move exponents and round
nothing, so an element is rounded the same whatever shares its scale (its shard, its micro batch), unless it is about
2^14 times smaller than the largest, where e4m3 has fewer digits (2^29 in e5m2). Nothing is said between ranks.

It is torchao's ``tensorwise`` recipe with ``round_scales_to_power_of_2``, to the bit, and the product is the one that
torchao calls, torch's own. A CPU has it too: products in fp32 of the same 8-bit operands. torchao itself works on
``nn.Linear`` modules; the function inside, which it calls not public, keeps the transpose of a weight for backward,
with which a weight that ZeRO 3 gathered would stay in memory.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

Linear = Callable[[Tensor, Tensor], Tensor]

FIRST_CAPABILITY = (8, 9)
"""CUDA devices from Ada on multiply 8-bit floats."""
EMULATED = "fp8 (emulated)"
"""What a run on a CPU says that it computes with."""
SMALLEST = 2.0**-60
"""A tensor whose elements are all smaller, such as zeros, is scaled as if this were its largest."""


def torch_linear(x: Tensor, weight: Tensor) -> Tensor:
    return F.linear(x, weight)


@dataclass(frozen=True)
class Scaled:
    """A matrix in 8-bit floats: ``bits · unit``."""

    bits: Tensor
    unit: Tensor
    """A power of two, fp32: ()"""

    def t(self) -> Scaled:
        return Scaled(self.bits.t(), self.unit)


def value(x: Tensor) -> Scaled:
    """Rows of activations or a weight: (rows, columns)."""
    return in_8_bits(x, torch.float8_e4m3fn)


def gradient(x: Tensor) -> Scaled:
    """Rows of an output's gradient: (rows, columns)."""
    return in_8_bits(x, torch.float8_e5m2)


def in_8_bits(x: Tensor, dtype: torch.dtype) -> Scaled:
    """Times the largest power of two with which nothing overflows. What isn't finite makes the whole NaN."""
    largest = x.abs().amax().float().clamp(min=SMALLEST)
    exponent = (torch.finfo(dtype).max / largest).log2().floor()
    return Scaled((x.float() * exponent.exp2()).to(dtype), exponent.neg().exp2())


def product(a: Scaled, b: Scaled, *, fast: bool = False) -> Tensor:
    """(m, k) and (k, n) to (m, n), bf16.

    Args:
        fast: on Hopper, add up in the tensor cores' own registers, which keep about 14 bits of a sum; without it they
            are emptied into fp32 as it grows. torchao's recipe does so for outputs and not for gradients.
    """
    # Hopper multiplies rows of the first by columns of the second, both contiguous: a copy of bytes where they are not.
    rows, columns = a.bits.contiguous(), b.bits.t().contiguous().t()
    return torch._scaled_mm(
        rows, columns, scale_a=a.unit, scale_b=b.unit, out_dtype=torch.bfloat16, use_fast_accum=fast
    )


class _Fp8Linear(torch.autograd.Function):
    """Keeps its arguments for backward and not their 8 bits: the weight itself, which ZeRO 3 drops in between."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        y = product(value(x.flatten(0, -2)), value(weight).t(), fast=True)
        return y.view(*x.shape[:-1], len(weight))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        of_output = gradient(grads[0].flatten(0, -2))
        of_input = product(of_output, value(weight)).view(x.shape) if ctx.needs_input_grad[0] else None
        of_weight = product(of_output.t(), value(x.flatten(0, -2))) if ctx.needs_input_grad[1] else None
        return of_input, of_weight


def fp8_linear(x: Tensor, weight: Tensor) -> Tensor:
    """``x Wᵀ`` and its gradients in 8-bit floats: bf16 (..., d_in) and (d_out, d_in) to (..., d_out).

    Sides are multiples of `kernel_rules.FP8_MULTIPLE`, rows too where there is a backward pass. Meant for compiled
    blocks: there the scaling is fused with what computes the tensor, run eagerly it takes more time than 8 bits save.
    """
    return cast(Tensor, _Fp8Linear.apply(x, weight))  # type: ignore[no-untyped-call]
