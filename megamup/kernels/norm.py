"""Norms over the last dim, d_model or a head's d_head: (..., width) in, the same shape and type out. Weights, (width,),
may have another type: fp32 masters.

RMSNorm: Zhang & Sennrich 2019. LayerNorm: Ba et al. 2016.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

RmsNorm = Callable[[Tensor, Tensor, float], Tensor]
"""(x, weight, eps)"""
LayerNorm = Callable[[Tensor, Tensor, Tensor | None, float], Tensor]
"""(x, weight, bias, eps)"""


def reference_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """weight · x / √(mean x² + eps), in fp32 (or fp64) until the end."""
    exact = x.to(torch.promote_types(x.dtype, torch.float32))
    return (weight.to(exact.dtype) * exact * (exact.square().mean(-1, keepdim=True) + eps).rsqrt()).to(x.dtype)


def reference_layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """weight · (x - mean x) / √(var x + eps) + bias, in fp32 (or fp64) until the end."""
    exact = x.to(torch.promote_types(x.dtype, torch.float32))
    centred = exact - exact.mean(-1, keepdim=True)
    y = weight.to(exact.dtype) * centred * (centred.square().mean(-1, keepdim=True) + eps).rsqrt()
    return (y if bias is None else y + bias.to(exact.dtype)).to(x.dtype)


def torch_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x, weight.shape, weight.to(x.dtype), eps)


def torch_layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    return F.layer_norm(x, weight.shape, weight.to(x.dtype), None if bias is None else bias.to(x.dtype), eps)


def liger_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Liger's kernel, in fp32 until the end as the reference is (it calls that mode ``gemma``).

    Not in place: Liger would write the input's gradient over the output's, which something else may still read.
    """
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    offset, in_place = 0.0, False
    return LigerRMSNormFunction.apply(x, weight, eps, offset, "gemma", in_place)  # type: ignore[no-any-return]


def liger_layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """Liger's kernel, in fp32 until the end; it always adds a bias, so without one zeros."""
    from liger_kernel.ops.layer_norm import LigerLayerNormFunction

    added = torch.zeros_like(weight) if bias is None else bias
    return LigerLayerNormFunction.apply(x, weight, added, eps)  # type: ignore[no-any-return]
