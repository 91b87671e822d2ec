"""Attention of a block, to its own stack or to the other's, over whole heads of a tensor rank."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from megamup.kernels.attention import Attention as AttentionKernel
from megamup.kernels.attention import Mask, Scores
from megamup.kernels.rotary import Rotation
from megamup.model import Model
from megamup.models.embeddings import relative_bias
from megamup.models.norm import HeadNorm
from megamup.parallel.collectives import exchange
from megamup.parallel.layers import ColumnParallelLinear, Context, RowParallelLinear, column_parallel, scaled
from megamup.scales import BlockScales


@dataclass(frozen=True)
class Sight:
    """What a query can see besides what a batch says: the same for all batches."""

    causal: bool
    window: int | None = None

    def mask(self, documents: Tensor | None, of_keys: Tensor | None = None) -> Mask:
        return Mask(self.window, documents, causal=self.causal, key_documents=of_keys)


class CoreAttention(nn.Module):
    """Mix values by softmax(scale · q·k): (batch, heads / ranks, seq, d_head) -> the same as queries."""

    output_is_sharded = True

    def __init__(
        self,
        name: str,
        scales: BlockScales,
        attention: AttentionKernel,
        causal: bool = True,
        soft_cap: float | None = None,
    ) -> None:
        super().__init__()
        self.name, self.scale, self.gain = name, scales.attention_logits, scales.attention_output
        self.attention, self.causal, self.soft_cap = attention, causal, soft_cap

    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: Mask, bias: Tensor | None = None) -> Tensor:
        scores = Scores(self.scale, self.soft_cap, bias)
        return scaled(self.attention(query, key, value, scores, mask), self.gain)


class Attention(nn.Module):
    """Grouped-query attention of a sequence to itself, or to a memory; a tensor rank holds whole heads.

    Between context ranks, each of which has a stretch of the sequence, stretches are exchanged for heads and back
    (Jacobs et al. 2023): a rank attends over the whole sequence with heads / (tensor · context) heads.
    """

    HEADS, SEQ = 1, 2

    def __init__(self, context: Context, model: Model, name: str, scales: BlockScales, sight: Sight) -> None:
        super().__init__()
        self.mesh, self.kernels, self.model, self.sight = context.mesh, context.kernels, model, sight
        self.rotation = Rotation(model.rope_theta, model.rope_scaling) if model.positions == "rotary" else None
        self.query = ColumnParallelLinear(context, f"{name}.query")
        self.key = ColumnParallelLinear(context, f"{name}.key")
        self.value = ColumnParallelLinear(context, f"{name}.value")
        self.query_norm = HeadNorm(context, model, f"{name}.query_norm") if model.qk_norm else None
        self.key_norm = HeadNorm(context, model, f"{name}.key_norm") if model.qk_norm else None
        cap = model.attention_soft_cap
        self.core = CoreAttention(f"{name}.core", scales, context.kernels.attention, sight.causal, cap)
        self.output = RowParallelLinear(context, f"{name}.output")

    def forward(
        self,
        x: Tensor,
        memory: Tensor | None = None,
        *,
        documents: Tensor | None = None,
        memory_documents: Tensor | None = None,
        relative: Tensor | None = None,
    ) -> Tensor:
        """
        Args:
            x: (batch, seq, d_model), or a stretch of it; so is what comes out.
            memory: (batch, memory seq, d_model), or a stretch, where keys and values are the other stack's.
            documents: (batch, seq), of the whole sequence.
            memory_documents: (batch, memory seq).
            relative: the stack's table (heads / tensor, buckets).
        """
        query, key, value = (self.heads(y) for y in self.project(x, memory))
        if self.query_norm is not None and self.key_norm is not None:
            query, key = self.query_norm(query), self.key_norm(key)
        if self.rotation is not None:
            query, key = self.kernels.rotate(query, key, self.rotation)
        bias = None if relative is None else self.bias(relative, query.shape[self.SEQ], key.shape[self.SEQ], x)
        mixed = self.core(query, key, value, self.sight.mask(documents, memory_documents), bias)
        mixed = exchange(mixed, self.mesh.context, cut=self.SEQ, joined=self.HEADS)
        return self.output(mixed.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]

    def project(self, x: Tensor, memory: Tensor | None) -> list[Tensor]:
        if memory is None:
            return column_parallel(x, (self.query, self.key, self.value), self.mesh, self.kernels)
        query = column_parallel(x, (self.query,), self.mesh, self.kernels)
        return query + column_parallel(memory, (self.key, self.value), self.mesh, self.kernels)

    def heads(self, y: Tensor) -> Tensor:
        """(batch, stretch, heads · d_head) -> (batch, heads / context, seq, d_head)"""
        y = y.unflatten(-1, (-1, self.model.d_head)).transpose(1, 2)
        return exchange(y, self.mesh.context, cut=self.HEADS, joined=self.SEQ)

    def bias(self, relative: Tensor, queries: int, keys: int, x: Tensor) -> Tensor:
        """(1, heads / ranks, queries, keys), of the activations' type."""
        context = self.mesh.context
        mine = relative.chunk(context.size)[context.rank]
        return relative_bias(mine.to(x.dtype), self.model, queries, keys, self.sight.causal)
