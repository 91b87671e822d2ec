"""Rotary positions (Su et al. 2021), in the half-split pairing that Hugging Face's Llama uses."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor


@lru_cache(maxsize=8)
def angles(seq: int, d_head: int, theta: float, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines of every position and pair: two of (seq, d_head), computed in fp32."""
    frequencies = theta ** (-torch.arange(0, d_head, 2, device=device, dtype=torch.float32) / d_head)
    phase = torch.arange(seq, device=device, dtype=torch.float32)[:, None] * frequencies  # (seq, d_head / 2)
    phase = torch.cat((phase, phase), dim=-1)
    return phase.cos().to(dtype), phase.sin().to(dtype)


def rotate(x: Tensor, theta: float) -> Tensor:
    """Turn each pair (x[i], x[i + d_head/2]) by its position's angle: (batch, heads, seq, d_head), same shape out."""
    cosine, sine = angles(x.shape[-2], x.shape[-1], theta, x.device, x.dtype)
    first, second = x.chunk(2, dim=-1)
    return x * cosine + torch.cat((-second, first), dim=-1) * sine
