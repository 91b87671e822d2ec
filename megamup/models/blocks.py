"""The layers of a decoder, each a module from one tensor to one tensor: a list of them is a model.

Modules that compute something of their own have a ``name``, the same in every layout, by which probes find them.
"""

from __future__ import annotations

from torch import Tensor, nn

from megamup.kernels.attention import CAUSAL
from megamup.kernels.attention import Attention as AttentionKernel
from megamup.models.recompute import Recompute
from megamup.parallel.collectives import exchange
from megamup.parallel.layers import (
    ColumnParallelLinear,
    Context,
    RowParallelLinear,
    VocabParallelEmbedding,
    column_parallel,
    on_stretch,
    scaled,
)
from megamup.parallel.loss import CrossEntropy, Labels, Unread
from megamup.scales import BlockScales, Branch
from megamup.sections import Model


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


class Norm(nn.Module):
    """LayerNorm (gpt) or RMSNorm (llama) over d_model: (batch, seq, d_model), or a stretch of it, -> the same."""

    def __init__(self, context: Context, model: Model, name: str) -> None:
        super().__init__()
        self.name, self.mesh, self.kernels = name, context.mesh, context.kernels
        self.output_is_sharded = context.mesh.sequence
        self.weight = context.parameter(f"{name}.weight")
        self.bias = context.optional(f"{name}.bias")
        self.centred, self.eps = model.arch == "gpt", model.norm_eps

    def forward(self, x: Tensor) -> Tensor:
        weight = on_stretch(self.weight, self.mesh).to(x.dtype)
        if not self.centred:
            return self.kernels.rms_norm(x, weight, self.eps)
        bias = None if self.bias is None else on_stretch(self.bias, self.mesh).to(x.dtype)
        return self.kernels.layer_norm(x, weight, bias, self.eps)


class CoreAttention(nn.Module):
    """Mix values by softmax(scale · q·k): (batch, heads / ranks, seq, d_head) -> the same as queries."""

    output_is_sharded = True

    def __init__(self, name: str, scales: BlockScales, attention: AttentionKernel) -> None:
        super().__init__()
        self.name, self.scale, self.gain = name, scales.attention_logits, scales.attention_output
        self.attention = attention

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return scaled(self.attention(query, key, value, self.scale, CAUSAL), self.gain)


class Attention(nn.Module):
    """Causal grouped-query attention; a tensor rank holds whole heads.

    Between context ranks, each of which has a stretch of the sequence, stretches are exchanged for heads and back
    (Jacobs et al. 2023): a rank attends over the whole sequence with heads / (tensor · context) heads.
    """

    HEADS, SEQ = 1, 2

    def __init__(self, context: Context, model: Model, name: str, scales: BlockScales) -> None:
        super().__init__()
        self.mesh, self.kernels, self.d_head = context.mesh, context.kernels, model.d_head
        self.theta = model.rope_theta if model.arch == "llama" else None
        self.query = ColumnParallelLinear(context, f"{name}.query")
        self.key = ColumnParallelLinear(context, f"{name}.key")
        self.value = ColumnParallelLinear(context, f"{name}.value")
        self.core = CoreAttention(f"{name}.core", scales, context.kernels.attention)
        self.output = RowParallelLinear(context, f"{name}.output")

    def forward(self, x: Tensor) -> Tensor:
        projected = column_parallel(x, (self.query, self.key, self.value), self.mesh, self.kernels)
        query, key, value = (self.heads(y) for y in projected)
        if self.theta is not None:
            query, key = self.kernels.rotate(query, key, self.theta)
        mixed = self.core(query, key, value)  # (batch, heads / ranks, seq, d_head)
        mixed = exchange(mixed, self.mesh.context, cut=self.SEQ, joined=self.HEADS)
        return self.output(mixed.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]

    def heads(self, y: Tensor) -> Tensor:
        """(batch, stretch, heads · d_head) -> (batch, heads / context, seq, d_head)"""
        y = y.unflatten(-1, (-1, self.d_head)).transpose(1, 2)
        return exchange(y, self.mesh.context, cut=self.HEADS, joined=self.SEQ)


class Mlp(nn.Module):
    """GELU(x Wᵤ) W_d (gpt) or SwiGLU (Shazeer 2020): (SiLU(x W_g) · x Wᵤ) W_d (llama)."""

    def __init__(self, context: Context, model: Model, name: str, scales: BlockScales) -> None:
        super().__init__()
        self.mesh, self.kernels = context.mesh, context.kernels
        self.temper, self.gain = scales.activation_input, scales.activation_output
        self.gate = ColumnParallelLinear(context, f"{name}.gate") if model.arch == "llama" else None
        self.up = ColumnParallelLinear(context, f"{name}.up")
        self.down = RowParallelLinear(context, f"{name}.down")

    def forward(self, x: Tensor) -> Tensor:
        layers = (self.up,) if self.gate is None else (self.up, self.gate)
        projected = column_parallel(x, layers, self.mesh, self.kernels)  # each (batch, seq, d_ff / tensor)
        return self.down(self.activated(*projected))  # type: ignore[no-any-return]

    def activated(self, up: Tensor, gate: Tensor | None = None) -> Tensor:
        """f(m·x)/m: u-μP's m is how far from linear f is."""
        if gate is None:
            inner = self.kernels.gelu(scaled(up, self.temper))
        else:
            inner = self.kernels.swiglu(scaled(gate, self.temper), up)
        return scaled(inner, self.gain / self.temper)


class Block(nn.Module):
    """Pre-norm transformer block: (batch, seq, d_model), or a stretch of it, -> the same."""

    def __init__(self, context: Context, model: Model, layer: int, scales: BlockScales, recompute: Recompute) -> None:
        super().__init__()
        self.name = name = f"blocks.{layer}"
        self.output_is_sharded = context.mesh.sequence
        self.attention_norm = Norm(context, model, f"{name}.attention_norm")
        self.attention = Attention(context, model, f"{name}.attention", scales)
        self.mlp_norm = Norm(context, model, f"{name}.mlp_norm")
        self.mlp = Mlp(context, model, f"{name}.mlp", scales)
        self.scales, self.recompute = scales, recompute

    def forward(self, x: Tensor) -> Tensor:
        return self.recompute(self.transform, x)

    def transform(self, x: Tensor) -> Tensor:
        x = joined(x, self.attention(self.attention_norm(x)), self.scales.attention)
        return joined(x, self.mlp(self.mlp_norm(x)), self.scales.mlp)


def joined(x: Tensor, added: Tensor, at: Branch) -> Tensor:
    return scaled(x, at.skip) + scaled(added, at.branch)


class Readout(nn.Module):
    """Final hidden states to logits, or with labels straight to their loss: (batch, seq, d_model), or a stretch."""

    name = "readout"

    def __init__(self, context: Context, loss: CrossEntropy) -> None:
        super().__init__()
        self.mesh, self.loss = context.mesh, loss
        self.weight = context.parameter("readout.weight")
        self.multiplier = context.table["readout.weight"].multiplier

    def forward(self, x: Tensor, labels: Labels | None = None) -> Unread | Tensor:
        unread = Unread(x, self.weight, self.multiplier, self.mesh)
        return unread if labels is None else self.loss(unread, labels)
