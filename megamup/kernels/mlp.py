"""Activations between an MLP's products, by the names of ``model.activation``: (..., d_ff) in, the same shape and type
out. Gated ones (Shazeer 2020) take (gate, up), the others (up).

GELU is x·Φ(x) with the normal distribution's Φ (Hendrycks & Gimpel 2016), exact by erf or, as ``_tanh``, in the paper's
approximation, which is another function (5e-4 off). ReLU squared is So et al. 2021's.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Activation = Callable[..., Tensor]
"""(gate, up) where it is gated, (up) where not"""
Function = Callable[[Tensor], Tensor]


def gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def relu2(x: Tensor) -> Tensor:
    return F.relu(x).square()


def gated(function: Function) -> Activation:
    """function(gate) · up"""

    def activation(gate: Tensor, up: Tensor) -> Tensor:
        return function(gate) * up

    return activation


TORCH: dict[str, Activation] = {
    "gelu": F.gelu,
    "gelu_tanh": gelu_tanh,
    "relu": F.relu,
    "relu2": relu2,
    "swiglu": gated(F.silu),
    "geglu": gated(F.gelu),
    "geglu_tanh": gated(gelu_tanh),
}


def plain(formula: Function) -> Activation:
    """``formula``, times ``up`` where it is gated, in fp32 (or fp64) until the end."""

    def activation(x: Tensor, *up: Tensor) -> Tensor:
        exact = x.to(torch.promote_types(x.dtype, torch.float32))
        y = formula(exact)
        for factor in up:
            y = y * factor.to(exact.dtype)
        return y.to(x.dtype)

    return activation


def normal_gelu(x: Tensor) -> Tensor:
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def approximate_gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


REFERENCE: dict[str, Activation] = {
    "gelu": plain(normal_gelu),
    "gelu_tanh": plain(approximate_gelu),
    "relu": plain(lambda x: x * (x > 0)),
    "relu2": plain(lambda x: x * x * (x > 0)),
    "swiglu": plain(lambda x: x * torch.sigmoid(x)),
    "geglu": plain(normal_gelu),
    "geglu_tanh": plain(approximate_gelu),
}


def liger_swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """Liger's kernel. Backward computes silu again and writes the gradients over ``gate`` and ``up``: one pass only."""
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    return LigerSiLUMulFunction.apply(gate, up)  # type: ignore[no-any-return]


def liger_geglu_tanh(gate: Tensor, up: Tensor) -> Tensor:
    """Liger's kernel, which does as `liger_swiglu`'s."""
    from liger_kernel.ops.geglu import LigerGELUMulFunction

    return LigerGELUMulFunction.apply(gate, up)  # type: ignore[no-any-return]


LIGER: dict[str, Activation] = {"swiglu": liger_swiglu, "geglu_tanh": liger_geglu_tanh}
