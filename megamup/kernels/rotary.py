"""Rotary positions (Su et al. 2021), in the half-split pairing that Hugging Face's Llama uses."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, cast

import torch
from torch import Tensor

from megamup.errors import MegamupError
from megamup.model import RopeScaling


@dataclass(frozen=True)
class Rotation:
    """How fast each pair turns along the sequence."""

    theta: float
    """Pair i of d_head / 2 turns by theta^(-2i / d_head) a position."""
    scaling: RopeScaling | None = None


Rotate = Callable[[Tensor, Tensor, Rotation], tuple[Tensor, Tensor]]
"""(query, key, rotation): both, (batch, heads, seq, d_head) and with kv_heads, of positions 0 to seq - 1, turned."""


def frequencies(rotation: Rotation, d_head: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Radians a position of each pair: (d_head / 2,). Scaled as Hugging Face's functions of these names do.

    Raises:
        MegamupError: ``ntk`` with a single pair, whose exponent d_head / (d_head - 2) there is not.
    """
    scaling, theta = rotation.scaling, rotation.theta
    if scaling is not None and scaling.kind == "ntk":  # the slowest pair as if positions were over the factor
        if d_head == 2:
            raise MegamupError("model.rope_scaling.kind=ntk needs model.d_head of 4 or more, which is 2")
        theta = theta * scaling.factor ** (d_head / (d_head - 2))
    pairs = theta ** (-torch.arange(0, d_head, 2, device=device, dtype=dtype) / d_head)
    if scaling is None or scaling.kind == "ntk":
        return pairs
    if scaling.kind == "linear":
        return pairs / scaling.factor
    kept = kept_by_yarn(scaling, theta, pairs) if scaling.kind == "yarn" else kept_by_llama3(scaling, pairs)
    return pairs * kept + pairs / scaling.factor * (1 - kept)


def kept_by_yarn(scaling: RopeScaling, theta: float, pairs: Tensor) -> Tensor:
    """How much of each pair's frequency stays: a ramp over pairs from those that turn ``beta_fast`` times within the
    original length to those that turn ``beta_slow`` times (Peng et al. 2023, section 3.2; ends rounded as they do)."""
    d_head = 2 * len(pairs)

    def pair_that_turns(times: float) -> float:
        return d_head * math.log(scaling.original_max_seq_len / (times * 2 * math.pi)) / (2 * math.log(theta))

    first = max(math.floor(pair_that_turns(scaling.beta_fast)), 0)
    last = min(math.ceil(pair_that_turns(scaling.beta_slow)), d_head - 1)
    width = last - first if last != first else 0.001
    at = torch.arange(len(pairs), device=pairs.device, dtype=pairs.dtype)
    return 1 - ((at - first) / width).clamp(0, 1)


def kept_by_llama3(scaling: RopeScaling, pairs: Tensor) -> Tensor:
    """The same over the turns within the original length themselves (Llama 3.1's code)."""
    turns = scaling.original_max_seq_len * pairs / (2 * math.pi)
    return ((turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)).clamp(0, 1)


def temper(rotation: Rotation) -> float:
    """What cosines and sines are multiplied by: √(1/t) of yarn's temperature (Peng et al. 2023, equation 22), so that
    attention logits grow by its square; else 1."""
    scaling = rotation.scaling
    return 0.1 * math.log(scaling.factor) + 1.0 if scaling is not None and scaling.kind == "yarn" else 1.0


@lru_cache(maxsize=8)
def angles(
    rotation: Rotation, seq: int, d_head: int, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Cosines and sines of every position and pair: two of (seq, d_head), computed in fp32 (or fp64)."""
    exact, factor = torch.promote_types(dtype, torch.float32), temper(rotation)
    at = torch.arange(seq, device=device, dtype=exact)
    phase = at[:, None] * frequencies(rotation, d_head, device, exact)  # (seq, d_head / 2)
    phase = torch.cat((phase, phase), dim=-1)
    return (factor * phase.cos()).to(dtype), (factor * phase.sin()).to(dtype)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def table(
    theta: float, scaling: RopeScaling | None, seq: int, d_head: int, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """`angles`. torch.compile takes them as they are: traced, they would be computed again in every layer.

    By the parts of a `Rotation`: each layer has one of its own, and an object is a constant by its identity.
    """
    return angles(Rotation(theta, scaling), seq, d_head, device, dtype)


def table_for(x: Tensor, rotation: Rotation, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    found = table(rotation.theta, rotation.scaling, x.shape[-2], x.shape[-1], x.device, dtype)
    return cast("tuple[Tensor, Tensor]", found)


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """Turn each pair (x[i], x[i + d_head/2]) by its position's angle: (batch, heads, seq, d_head), same shape out."""
    cosine, sine = table_for(x, rotation, x.dtype)
    first, second = x.chunk(2, dim=-1)
    return x * cosine + torch.cat((-second, first), dim=-1) * sine


def torch_rotate(query: Tensor, key: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor]:
    return rotate(query, rotation), rotate(key, rotation)


def reference_rotate(query: Tensor, key: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor]:
    """Pairs as complex numbers, times exp(i · position · frequency), in fp32 (or fp64) until the end."""

    def turned(x: Tensor) -> Tensor:
        exact = torch.promote_types(x.dtype, torch.float32)
        at = torch.arange(x.shape[-2], device=x.device, dtype=exact)
        phase = at[:, None] * frequencies(rotation, x.shape[-1], x.device, exact)
        turns = torch.polar(torch.full_like(phase, temper(rotation)), phase)
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


def liger_rotate(query: Tensor, key: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor]:
    """Liger's kernel, which computes in the table's type: fp32."""
    cosine, sine = table_for(query, rotation, torch.float32)
    return cast("tuple[Tensor, Tensor]", _LigerRotate.apply(query, key, cosine, sine))  # type: ignore[no-untyped-call]
