"""Causal attention, (batch, heads, seq, d_head) for queries and (batch, kv_heads, seq, d_head) for keys and values."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def reference(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """softmax(scale · QKᵀ + causal mask) V in plain sight, in fp32; what every backend is compared with."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    logits = scale * (query.float() @ key.float().transpose(-2, -1))  # (batch, heads, seq, seq)
    seq = logits.shape[-1]
    future = torch.ones(seq, seq, dtype=torch.bool, device=logits.device).triu(1)
    return (logits.masked_fill(future, float("-inf")).softmax(-1) @ value.float()).to(query.dtype)


def sdpa(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """torch's fused attention; ``scale`` is μP's, passed on rather than left at 1/√d_head."""
    grouped = query.shape[1] != key.shape[1]
    return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=grouped)


attention = sdpa
