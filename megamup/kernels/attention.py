"""Causal attention, (batch, heads, seq, d_head) for queries and (batch, kv_heads, seq, d_head) for keys and values.

Every backend takes μP's scale, which is not 1/√d_head, and a `Mask`. With fewer key-value heads (grouped queries;
Ainslie et al. 2023), consecutive query heads share one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from megamup.errors import MegamupError

if TYPE_CHECKING:  # importing it takes dynamo, seconds
    from torch.nn.attention.flex_attention import BlockMask


@dataclass(frozen=True, eq=False)
class Mask:
    """Which earlier positions a query sees; none ever sees a later one.

    What a backend derives from the documents is computed once a mask, so one mask should serve all layers of a batch.
    """

    window: int | None = None
    """How many of the latest positions, its own among them (Beltagy et al. 2020); default all."""
    documents: Tensor | None = None
    """(batch, seq), int: each token's document, which never falls along the sequence. A token sees its own alone."""

    def __post_init__(self) -> None:
        if self.window is not None and self.window < 1:
            raise MegamupError(f"window={self.window}: a query sees its own position at least; give 1 or more, or None")

    @property
    def plain(self) -> bool:
        return self.window is None and self.documents is None

    def visible(self, seq: int, device: torch.device) -> Tensor:
        """Query x key: (seq, seq), or (batch, 1, seq, seq) with documents; bool."""
        at = torch.arange(seq, device=device)
        behind = at[:, None] - at  # (seq, seq)
        seen = behind >= 0 if self.window is None else (behind >= 0) & (behind < self.window)
        if self.documents is None:
            return seen
        return seen & (self.documents[:, None, :, None] == self.documents[:, None, None, :])

    @cached_property
    def boundaries(self) -> Tensor:
        """Where documents begin in the batch laid end to end, then its length, int32: flash-attn's ``cu_seqlens``.

        Padded with empty documents to a power of two, so that compiled code sees few lengths. Waits for the device.
        """
        assert self.documents is not None
        documents = self.documents
        starts = torch.ones_like(documents, dtype=torch.bool)
        starts[:, 1:] = documents[:, 1:] != documents[:, :-1]
        first = starts.flatten().nonzero()[:, 0]
        padded = 1 << (len(first) - 1).bit_length()
        return F.pad(first, (0, padded + 1 - len(first)), value=documents.numel()).to(torch.int32)

    @cached_property
    def document_blocks(self) -> BlockMask:
        """flex attention's sparse blocks, with documents."""
        assert self.documents is not None
        batch, seq = self.documents.shape
        return blocks_of(self, batch, seq, self.documents.device)


CAUSAL = Mask()

Attention = Callable[[Tensor, Tensor, Tensor, float, Mask], Tensor]
"""(query, key, value, scale, mask) -> the shape and type of the query."""


def per_query_head(x: Tensor, query: Tensor) -> Tensor:
    """Keys or values, repeated for the query heads that share them: (batch, heads, seq, d_head)."""
    groups = query.shape[1] // x.shape[1]
    return x if groups == 1 else x.repeat_interleave(groups, dim=1)


def reference(query: Tensor, key: Tensor, value: Tensor, scale: float, mask: Mask = CAUSAL) -> Tensor:
    """softmax(scale · QKᵀ + mask) V in plain sight, in fp32 (or fp64); what every backend is compared with."""
    exact = torch.promote_types(query.dtype, torch.float32)
    q, k, v = (x.to(exact) for x in (query, per_query_head(key, query), per_query_head(value, query)))
    logits = scale * (q @ k.transpose(-2, -1))  # (batch, heads, seq, seq)
    hidden = ~mask.visible(logits.shape[-1], logits.device)
    return (logits.masked_fill(hidden, float("-inf")).softmax(-1) @ v).to(query.dtype)


# torch tries its own flash kernel first; on Hopper and later cuDNN's is about 1.5 times as fast (Shah et al. 2024,
# figure 5). One that can't take the inputs is passed over.
CUDNN_FIRST = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


def sdpa(query: Tensor, key: Tensor, value: Tensor, scale: float, mask: Mask = CAUSAL) -> Tensor:
    """torch's fused attention; a window or documents become a dense mask."""
    if mask.plain:
        grouped = query.shape[1] != key.shape[1]
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=grouped)
    # On CUDA the kernel that takes dense masks knows no groups: without heads of their own all scores would be kept.
    key, value = per_query_head(key, query), per_query_head(value, query)
    visible = mask.visible(query.shape[2], query.device)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=visible, scale=scale)


def cudnn_sdpa(query: Tensor, key: Tensor, value: Tensor, scale: float, mask: Mask = CAUSAL) -> Tensor:
    """`sdpa` with cuDNN's kernel where it can."""
    with sdpa_kernel(CUDNN_FIRST, set_priority=True):
        return sdpa(query, key, value, scale, mask)


def blocks_of(mask: Mask, batch: int | None, seq: int, device: torch.device) -> BlockMask:
    from torch.nn.attention.flex_attention import create_block_mask

    window, documents = mask.window, mask.documents

    def visible(sequence: Tensor, head: Tensor, at: Tensor, seen: Tensor) -> Tensor:
        allowed = at >= seen
        if window is not None:
            allowed = allowed & (at - seen < window)
        if documents is not None:
            allowed = allowed & (documents[sequence, at] == documents[sequence, seen])
        return allowed

    return create_block_mask(visible, batch, None, seq, seq, device=device)


@lru_cache(maxsize=8)
def blocks_without_documents(window: int | None, seq: int, device: torch.device) -> BlockMask:
    return blocks_of(Mask(window), None, seq, device)


@lru_cache(maxsize=1)
def compiled_flex() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def flex(query: Tensor, key: Tensor, value: Tensor, scale: float, mask: Mask = CAUSAL) -> Tensor:
    """torch's flex attention (Dong et al. 2024): blocks that a mask hides are skipped. On a CPU forward only."""
    from torch.nn.attention.flex_attention import flex_attention

    call = cast("Callable[..., Tensor]", flex_attention if query.device.type == "cpu" else compiled_flex())
    seq, device = query.shape[2], query.device
    if mask.documents is not None:
        blocks = mask.document_blocks
    elif torch.compiler.is_compiling():  # traced, and so fused: no dense mask is kept
        blocks = blocks_of(mask, None, seq, device)
    else:
        blocks = blocks_without_documents(mask.window, seq, device)
    grouped = query.shape[1] != key.shape[1]
    return call(query, key, value, block_mask=blocks, scale=scale, enable_gqa=grouped)


def flash_attn(query: Tensor, key: Tensor, value: Tensor, scale: float, mask: Mask = CAUSAL) -> Tensor:
    """FlashAttention-2 (Dao 2024), which wants (batch, seq, heads, d_head), and documents laid end to end."""
    from flash_attn import flash_attn_func, flash_attn_varlen_func

    q, k, v = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    batch, seq = q.shape[:2]
    window = (-1, -1) if mask.window is None else (mask.window - 1, 0)  # positions before and after its own
    if mask.documents is None:
        y = flash_attn_func(q, k, v, softmax_scale=scale, causal=True, window_size=window)
        return cast(Tensor, y.transpose(1, 2))
    starts = mask.boundaries
    again = starts.clone()  # torch.compile wants arguments that are not one tensor
    # ``seq`` bounds the longest document, whose own length would differ, and compile, batch by batch.
    y = flash_attn_varlen_func(
        q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), cu_seqlens_q=starts, cu_seqlens_k=again, max_seqlen_q=seq,
        max_seqlen_k=seq, softmax_scale=scale, causal=True, window_size=window,
    )  # fmt: skip
    return cast(Tensor, y.unflatten(0, (batch, seq)).transpose(1, 2))
