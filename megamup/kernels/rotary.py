"""Rotary positions (Su et al. 2021), in the half-split pairing that Hugging Face's Llama uses."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, cast

import torch
from torch import Tensor

Rotate = Callable[..., tuple[Tensor, Tensor]]
"""(query, key, theta, offset=0): both, (batch, heads, seq, d_head) and with kv_heads, of which the first position is
``offset``, turned."""


@lru_cache(maxsize=8)
def angles(
    seq: int, d_head: int, theta: float, device: torch.device, dtype: torch.dtype, offset: int = 0
) -> tuple[Tensor, Tensor]:
    """Cosines and sines of every position and pair: two of (seq, d_head), computed in fp32 (or fp64)."""
    exact = torch.promote_types(dtype, torch.float32)
    frequencies = theta ** (-torch.arange(0, d_head, 2, device=device, dtype=exact) / d_head)
    at = torch.arange(offset, offset + seq, device=device, dtype=exact)
    phase = at[:, None] * frequencies  # (seq, d_head / 2)
    phase = torch.cat((phase, phase), dim=-1)
    return phase.cos().to(dtype), phase.sin().to(dtype)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def table(x: Tensor, theta: float, dtype: torch.dtype, offset: int) -> tuple[Tensor, Tensor]:
    """`angles` for ``x``. torch.compile takes them as they are: traced, they would be computed again in every layer."""
    return angles(x.shape[-2], x.shape[-1], theta, x.device, dtype, offset)


def rotate(x: Tensor, theta: float, offset: int = 0) -> Tensor:
    """Turn each pair (x[i], x[i + d_head/2]) by its position's angle: (batch, heads, seq, d_head), same shape out."""
    cosine, sine = table(x, theta, x.dtype, offset)
    first, second = x.chunk(2, dim=-1)
    return cast(Tensor, x * cosine + torch.cat((-second, first), dim=-1) * sine)


def torch_rotate(query: Tensor, key: Tensor, theta: float, offset: int = 0) -> tuple[Tensor, Tensor]:
    return rotate(query, theta, offset), rotate(key, theta, offset)


def reference_rotate(query: Tensor, key: Tensor, theta: float, offset: int = 0) -> tuple[Tensor, Tensor]:
    """Pairs as complex numbers, times exp(i · position · theta^(-2i/d_head)), in fp32 (or fp64) until the end."""

    def turned(x: Tensor) -> Tensor:
        exact, pairs = torch.promote_types(x.dtype, torch.float32), x.shape[-1] // 2
        at = torch.arange(offset, offset + x.shape[-2], device=x.device, dtype=exact)
        frequencies = theta ** (-torch.arange(pairs, device=x.device, dtype=exact) / pairs)
        turns = torch.polar(torch.ones((), device=x.device, dtype=exact), at[:, None] * frequencies)
        first, second = x.to(exact).chunk(2, dim=-1)
        y = torch.complex(first, second) * turns  # (batch, heads, seq, d_head / 2)
        return torch.cat((y.real, y.imag), dim=-1).to(x.dtype)

    return turned(query), turned(key)


class _LigerRotate(torch.autograd.Function):
    """Liger's kernel on copies: it turns in place, and what it is given may be kept for recomputation or by a hook."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, cosine: Tensor, sine: Tensor) -> tuple[Tensor, Tensor]:
        from liger_kernel.ops.rope import rope_forward

        ctx.save_for_backward(cosine, sine)
        turned_query, turned_key, _, _ = rope_forward(own(query), own(key), cosine, sine)
        return turned_query, turned_key

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        from liger_kernel.ops.rope import rope_backward

        of_query, of_key = rope_backward(own(grads[0]), own(grads[1]), *ctx.saved_tensors)
        return of_query, of_key, None, None


def own(x: Tensor) -> Tensor:
    """A copy of (batch, heads, seq, d_head) that lies as (batch, seq, heads, d_head), which is what Liger turns."""
    return x.transpose(1, 2).clone(memory_format=torch.contiguous_format).transpose(1, 2)


def liger_rotate(query: Tensor, key: Tensor, theta: float, offset: int = 0) -> tuple[Tensor, Tensor]:
    """Liger's kernel, which computes in the table's type: fp32."""
    cosine, sine = table(query, theta, torch.float32, offset)
    return cast("tuple[Tensor, Tensor]", _LigerRotate.apply(query, key, cosine, sine))  # type: ignore[no-untyped-call]
