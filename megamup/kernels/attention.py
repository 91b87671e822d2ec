"""Attention, (batch, heads, seq, d_head) for queries and (batch, kv_heads, keys, d_head) for keys and values.

Every backend takes `Scores`, whose scale is μP's and not 1/√d_head, and a `Mask`. With fewer key-value heads (grouped
queries; Ainslie et al. 2023), consecutive query heads share one. Keys are as many as queries, but for a stack that
attends to another one's states.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from megamup.errors import MegamupError

if TYPE_CHECKING:  # importing it takes dynamo, seconds
    from torch.nn.attention.flex_attention import BlockMask


@dataclass(frozen=True, eq=False)
class Scores:
    """What a softmax is taken of: cap(scale · q·k) + bias."""

    scale: float
    soft_cap: float | None = None
    """c·tanh(x/c), which keeps x within ±c (Gemma team 2024)."""
    bias: Tensor | None = None
    """(1 or batch, heads, queries, keys); a learned one gets its gradient (Raffel et al. 2020, section 2.1)."""


@dataclass(frozen=True, eq=False)
class Mask:
    """Which positions a query sees. Its own, unless the keys are another stack's, is always among them.

    With ``key_documents`` every query needs a key of its document: one that sees nothing is a mean of nothing, NaN (or
    zero, of flash-attn). The padding of a decoder must therefore be of a document that the memory has.
    """

    window: int | None = None
    """How many of the latest positions, its own among them (Beltagy et al. 2020); default all."""
    documents: Tensor | None = None
    """(batch, queries), int: each token's document, which never falls along the sequence. A token sees its own alone.
    Not written to once it has been used: what backends derive from it is kept for the other layers."""
    causal: bool = True
    """No query sees a later position; there are as many keys as queries."""
    key_documents: Tensor | None = None
    """(batch, keys), where keys are another stack's; default ``documents``."""

    def __post_init__(self) -> None:
        if self.window is not None and self.window < 1:
            raise MegamupError(f"window={self.window}: a query sees its own position at least; give 1 or more, or None")
        if self.window is not None and not self.causal:
            raise MegamupError(
                f"window={self.window} counts the latest positions, but causal=False lets a query see later ones too; "
                "leave one of them out"
            )
        if self.key_documents is not None and (self.causal or self.documents is None):
            raise MegamupError(
                "key_documents are of another stack: they need documents of the queries, and causal=False"
            )

    @property
    def dense(self) -> bool:
        """Whether a kernel needs to be told more than ``causal``."""
        return self.window is not None or self.documents is not None

    @property
    def of_keys(self) -> Tensor | None:
        return self.documents if self.key_documents is None else self.key_documents

    def visible(self, queries: int, keys: int, device: torch.device) -> Tensor:
        """(queries, keys), or (batch, 1, queries, keys) with documents; bool."""
        behind = torch.arange(queries, device=device)[:, None] - torch.arange(keys, device=device)
        seen = behind >= 0 if self.causal else torch.ones_like(behind, dtype=torch.bool)
        if self.window is not None:
            seen = seen & (behind < self.window)
        if self.documents is None or self.of_keys is None:
            return seen
        return seen & (self.documents[:, None, :, None] == self.of_keys[:, None, None, :])


CAUSAL = Mask()

Attention = Callable[[Tensor, Tensor, Tensor, Scores, Mask], Tensor]
"""(query, key, value, scores, mask) -> the shape and type of the query."""


def lengths(query: Tensor, key: Tensor, mask: Mask) -> tuple[int, int]:
    """How many queries and keys there are, which must be the same where the mask is causal."""
    queries, keys = query.shape[2], key.shape[2]
    if mask.causal and queries != keys:
        raise MegamupError(f"a causal mask of {queries} queries and {keys} keys: give Mask(causal=False)")
    return queries, keys


def per_query_head(x: Tensor, query: Tensor) -> Tensor:
    """Keys or values, repeated for the query heads that share them: (batch, heads, keys, d_head)."""
    groups = query.shape[1] // x.shape[1]
    return x if groups == 1 else x.repeat_interleave(groups, dim=1)


def reference(query: Tensor, key: Tensor, value: Tensor, scores: Scores, mask: Mask = CAUSAL) -> Tensor:
    """softmax(cap(scale · QKᵀ) + bias, where visible) V in plain sight, in fp32 (or fp64): what others are compared
    with."""
    exact = torch.promote_types(query.dtype, torch.float32)
    q, k, v = (x.to(exact) for x in (query, per_query_head(key, query), per_query_head(value, query)))
    logits = scores.scale * (q @ k.transpose(-2, -1))  # (batch, heads, queries, keys)
    if scores.soft_cap is not None:
        logits = scores.soft_cap * torch.tanh(logits / scores.soft_cap)
    if scores.bias is not None:
        logits = logits + scores.bias.to(exact)
    hidden = ~mask.visible(*lengths(query, key, mask), logits.device)
    return (logits.masked_fill(hidden, float("-inf")).softmax(-1) @ v).to(query.dtype)


# ----------------------------------------------------------------------------- torch's fused attention

# torch tries its own flash kernel first; on Hopper and later cuDNN's is about 1.5 times as fast (Shah et al. 2024,
# figure 5). One that can't take the inputs is passed over.
CUDNN_FIRST = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]
# cuDNN's adds a bias and has no gradient for it, without a word (torch's derivatives.yaml), so it isn't asked. On CUDA
# the second is taken, on a CPU the first, or the last where the bias needs its gradient.
WITH_A_BIAS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def sdpa(query: Tensor, key: Tensor, value: Tensor, scores: Scores, mask: Mask = CAUSAL) -> Tensor:
    """torch's fused attention; a window, documents and a bias become a dense mask. It has no soft cap."""
    if scores.soft_cap is not None:
        raise MegamupError("torch's fused attention has no soft cap; take flash_attn, flex or reference")
    queries, keys = lengths(query, key, mask)
    if scores.bias is not None:
        return biased(query, key, value, scores.scale, scores.bias, mask)
    if not mask.dense:
        grouped, causal = query.shape[1] != key.shape[1], mask.causal
        return F.scaled_dot_product_attention(
            query, key, value, is_causal=causal, scale=scores.scale, enable_gqa=grouped
        )
    # On CUDA the kernel that takes dense masks knows no groups: without heads of their own all scores would be kept.
    key, value = per_query_head(key, query), per_query_head(value, query)
    visible = mask.visible(queries, keys, query.device)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=visible, scale=scores.scale)


def biased(query: Tensor, key: Tensor, value: Tensor, scale: float, bias: Tensor, mask: Mask) -> Tensor:
    """The bias and the mask as one matrix that is added: (1 or batch, heads, queries, keys), of the query's type."""
    key, value = per_query_head(key, query), per_query_head(value, query)
    added = bias.to(query.dtype)
    if mask.causal or mask.dense:
        added = added.masked_fill(~mask.visible(query.shape[2], key.shape[2], query.device), float("-inf"))
    with sdpa_kernel(WITH_A_BIAS):
        return F.scaled_dot_product_attention(query, key, value, attn_mask=added, scale=scale)


def cudnn_sdpa(query: Tensor, key: Tensor, value: Tensor, scores: Scores, mask: Mask = CAUSAL) -> Tensor:
    """`sdpa` with cuDNN's kernel where it can."""
    with sdpa_kernel(CUDNN_FIRST, set_priority=True):
        return sdpa(query, key, value, scores, mask)


# ----------------------------------------------------------------------------- flex attention


def blocks_of(mask: Mask, queries: int, keys: int, device: torch.device) -> BlockMask | None:
    """Which blocks of the scores are computed; None: all."""
    from torch.nn.attention.flex_attention import create_block_mask

    window, causal, documents, of_keys = mask.window, mask.causal, mask.documents, mask.of_keys
    if not causal and documents is None:
        return None

    def visible(sequence: Tensor, head: Tensor, at: Tensor, seen: Tensor) -> Tensor:
        allowed = at >= seen if causal else at >= 0
        if window is not None:
            allowed = allowed & (at - seen < window)
        if documents is not None and of_keys is not None:
            allowed = allowed & (documents[sequence, at] == of_keys[sequence, seen])
        return allowed

    batch = None if documents is None else documents.shape[0]
    return create_block_mask(visible, batch, None, queries, keys, device=device)


@lru_cache(maxsize=8)
def kept_blocks(
    window: int | None,
    causal: bool,
    documents: Tensor | None,
    key_documents: Tensor | None,
    queries: int,
    keys: int,
    device: torch.device,
) -> BlockMask | None:
    """`blocks_of`, once for all layers. A tensor is found again as the object it is."""
    return blocks_of(Mask(window, documents, causal, key_documents), queries, keys, device)


def changed_score(scores: Scores) -> Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor] | None:
    """What flex attention does with a score, which it has scaled; None: nothing."""
    cap, bias = scores.soft_cap, scores.bias
    if cap is None and bias is None:
        return None
    shared = bias is not None and bias.shape[0] == 1

    def change(score: Tensor, sequence: Tensor, head: Tensor, at: Tensor, seen: Tensor) -> Tensor:
        if cap is not None:
            score = cap * torch.tanh(score / cap)
        if bias is not None:
            score = score + bias[0 if shared else sequence, head, at, seen]
        return score

    return change


@lru_cache(maxsize=1)
def compiled_flex() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def flex(query: Tensor, key: Tensor, value: Tensor, scores: Scores, mask: Mask = CAUSAL) -> Tensor:
    """torch's flex attention (Dong et al. 2024): blocks that a mask hides are skipped. On a CPU forward only."""
    from torch.nn.attention.flex_attention import flex_attention

    (queries, keys), device = lengths(query, key, mask), query.device
    plain = cast("Callable[..., Tensor]", flex_attention)
    options = {
        "scale": scores.scale,
        "score_mod": changed_score(scores),
        "enable_gqa": query.shape[1] != key.shape[1],
    }
    if torch.compiler.is_compiling():  # traced, and so fused: no dense mask is kept
        return plain(query, key, value, block_mask=blocks_of(mask, queries, keys, device), **options)
    blocks = kept_blocks(mask.window, mask.causal, mask.documents, mask.key_documents, queries, keys, device)
    if device.type == "cpu":
        return plain(query, key, value, block_mask=blocks, **options)
    # Compiled also where blocks are told to run as they are (monitored steps): uncompiled, it keeps all scores.
    with torch.compiler.set_stance("default"):
        return compiled_flex()(query, key, value, block_mask=blocks, **options)


# ----------------------------------------------------------------------------- flash-attn


@lru_cache(maxsize=4)
def boundaries(documents: Tensor, of_keys: Tensor) -> tuple[Tensor, Tensor]:
    """flash-attn's ``cu_seqlens`` of queries and keys: where each document begins in the batch laid end to end, and
    the whole length; int32. Documents that only one of them has are empty in the other.

    Padded with empty documents to a power of two, so that kernels see few lengths. Waits for the device, once for all
    layers; a tensor is found again as the object it is.
    """
    lowest = torch.minimum(documents.amin(), of_keys.amin())
    span = torch.maximum(documents.amax(), of_keys.amax()) - lowest + 1
    rows = torch.arange(len(documents), device=documents.device)[:, None]
    ends = [((x - lowest) + rows * span).flatten() for x in (documents, of_keys)]  # each one sorted
    present = torch.cat(ends).unique()
    padded = 1 << (len(present) - 1).bit_length()
    starts = [torch.searchsorted(x, present) for x in ends]
    fill = padded + 1 - len(present)
    of_queries, of_all_keys = (F.pad(at, (0, fill), value=len(x)) for at, x in zip(starts, ends, strict=True))
    return of_queries.to(torch.int32), of_all_keys.to(torch.int32)


def flash_attn(query: Tensor, key: Tensor, value: Tensor, scores: Scores, mask: Mask = CAUSAL) -> Tensor:
    """FlashAttention-2 (Dao 2024), which wants (batch, seq, heads, d_head), and documents laid end to end."""
    from flash_attn import flash_attn_func, flash_attn_varlen_func

    if scores.bias is not None:
        raise MegamupError("flash-attn adds no bias to scores; take sdpa, flex or reference")
    queries, keys = lengths(query, key, mask)
    q, k, v = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    options = {
        "softmax_scale": scores.scale,
        "causal": mask.causal,
        "window_size": (-1, -1) if mask.window is None else (mask.window - 1, 0),  # positions before and after its own
        "softcap": scores.soft_cap or 0.0,
    }
    if mask.documents is None or mask.of_keys is None:
        return cast(Tensor, flash_attn_func(q, k, v, **options).transpose(1, 2))
    of_queries, of_keys = boundaries(mask.documents, mask.of_keys)
    # The lengths bound the longest document, whose own length would differ, and compile, batch by batch.
    y = flash_attn_varlen_func(
        q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), cu_seqlens_q=of_queries, cu_seqlens_k=of_keys,
        max_seqlen_q=queries, max_seqlen_k=keys, **options,
    )  # fmt: skip
    return cast(Tensor, y.unflatten(0, (len(query), queries)).transpose(1, 2))
