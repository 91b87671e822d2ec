"""Activations between an MLP's products: (..., d_ff) in, the same shape and type out.

Liger's kernels have GELU's tanh approximation only, which is another function (5e-4 off) than the exact one that the
models use, so there is no Liger backend of `gelu` and `geglu`.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Gelu = Callable[[Tensor], Tensor]
Gated = Callable[[Tensor, Tensor], Tensor]
"""(gate, up)"""


def reference_gelu(x: Tensor) -> Tensor:
    """x·Φ(x) with the normal distribution's Φ by erf (Hendrycks & Gimpel 2016), in fp32 (or fp64) until the end."""
    exact = x.to(torch.promote_types(x.dtype, torch.float32))
    return (exact * 0.5 * (1 + torch.erf(exact / math.sqrt(2)))).to(x.dtype)


def reference_swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate)·up (Shazeer 2020), in fp32 (or fp64) until the end."""
    exact = gate.to(torch.promote_types(gate.dtype, torch.float32))
    return (exact * torch.sigmoid(exact) * up.to(exact.dtype)).to(gate.dtype)


def reference_geglu(gate: Tensor, up: Tensor) -> Tensor:
    """gelu(gate)·up (Shazeer 2020), in fp32 (or fp64) until the end."""
    exact = gate.to(torch.promote_types(gate.dtype, torch.float32))
    return (reference_gelu(exact) * up.to(exact.dtype)).to(gate.dtype)


def torch_gelu(x: Tensor) -> Tensor:
    return F.gelu(x)


def torch_swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def torch_geglu(gate: Tensor, up: Tensor) -> Tensor:
    return F.gelu(gate) * up


def liger_swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """Liger's kernel. Backward computes silu again and writes the gradients over ``gate`` and ``up``: one pass only."""
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    return LigerSiLUMulFunction.apply(gate, up)  # type: ignore[no-any-return]
