"""From token ids to the residual stream, and what tells positions and texts apart."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megamup.model import Model
from megamup.parallel.layers import Context, VocabParallelEmbedding, on_stretch, scaled


class TokenEmbedding(VocabParallelEmbedding):
    """(batch, seq) -> (batch, seq, d_model). When tied, the readout borrows its weight."""

    def __init__(self, context: Context) -> None:
        super().__init__(context, "embedding.token")


class PositionEmbedding(nn.Module):
    """Adds learned positions: (batch, seq, d_model), or a stretch of it, -> the same."""

    name = "embedding.position"

    def __init__(self, context: Context) -> None:
        super().__init__()
        self.mesh, self.output_is_sharded = context.mesh, context.mesh.sequence
        self.weight = context.parameter("embedding.position")
        self.multiplier = context.table["embedding.position"].multiplier

    def forward(self, x: Tensor) -> Tensor:
        start = self.mesh.stretch * x.shape[1]
        rows = on_stretch(self.weight, self.mesh)[start : start + x.shape[1]]
        return x + scaled(rows.to(x.dtype), self.multiplier)


class TypeEmbedding(nn.Module):
    """Adds which text a token is in (Devlin et al. 2018): (batch, seq, d_model), or a stretch of it, -> the same; types
    are (batch, seq)."""

    name = "embedding.type"

    def __init__(self, context: Context) -> None:
        super().__init__()
        self.mesh, self.output_is_sharded = context.mesh, context.mesh.sequence
        self.weight = context.parameter("embedding.type")
        self.multiplier = context.table["embedding.type"].multiplier

    def forward(self, x: Tensor, types: Tensor) -> Tensor:
        if self.mesh.sequence:
            types = types.chunk(self.mesh.tensor.size, 1)[self.mesh.tensor.rank]
        rows = F.embedding(types, on_stretch(self.weight, self.mesh))
        return x + scaled(rows.to(x.dtype), self.multiplier)


class FirstType(TypeEmbedding):
    """`TypeEmbedding` where a batch holds single texts: all tokens are of type 0."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return x + scaled(on_stretch(self.weight, self.mesh)[0].to(x.dtype), self.multiplier)


class RelativePositions(nn.Module):
    """A stack's table of biases on attention logits, one a head and bucket of distances (Raffel et al. 2020, section
    2.1): (heads / tensor, buckets). It travels with the stream, and each block looks its own biases up."""

    def __init__(self, context: Context, prefix: str) -> None:
        super().__init__()
        self.weight = context.parameter(f"{prefix}relative.weight")
        self.multiplier = context.table[f"{prefix}relative.weight"].multiplier

    def forward(self, hidden: Tensor) -> Tensor:
        return self.weight * self.multiplier


def relative_bias(table: Tensor, model: Model, queries: int, keys: int, causal: bool) -> Tensor:
    """The biases of every pair of positions: (heads, buckets) -> (1, heads, queries, keys)."""
    at = bucket(queries, keys, causal, model.relative_buckets, model.relative_distance, table.device)
    return table[:, at][None]


def bucket(queries: int, keys: int, causal: bool, buckets: int, farthest: int, device: torch.device) -> Tensor:
    """Which bucket the distance of each query to each key falls into: half of them one distance each, the others
    logarithmically wider up to ``farthest``; without ``causal`` later keys have half of all. (queries, keys) int64.

    As Mesh TensorFlow's T5 and Hugging Face's have it.
    """
    ahead = torch.arange(keys, device=device) - torch.arange(queries, device=device)[:, None]  # (queries, keys)
    first = torch.zeros_like(ahead)
    if causal:
        distance = -ahead.clamp(max=0)
    else:
        buckets //= 2
        first = (ahead > 0) * buckets
        distance = ahead.abs()
    exact = buckets // 2
    octaves = torch.log(distance.clamp(min=1).float() / exact) / math.log(farthest / exact)
    wide = (exact + (octaves * (buckets - exact)).long()).clamp(max=buckets - 1)
    return first + torch.where(distance < exact, distance, wide)
