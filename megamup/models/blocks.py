"""The layers of a decoder, each a module from one tensor to one tensor: a list of them is a model.

Modules that compute something of their own have a ``name``, the same in every layout, by which probes find them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from megamup.kernels.attention import attention
from megamup.kernels.rotary import rotate
from megamup.parallel.collectives import copy_to_axis
from megamup.parallel.layers import (
    ColumnParallelLinear,
    Context,
    RowParallelLinear,
    VocabParallelEmbedding,
    scaled,
    vocab_parallel_logits,
)
from megamup.scales import BlockScales, Branch
from megamup.sections import Model


class TokenEmbedding(VocabParallelEmbedding):
    """(batch, seq) -> (batch, seq, d_model). When tied, the readout borrows its weight."""

    def __init__(self, context: Context) -> None:
        super().__init__(context, "embedding.token")


class PositionEmbedding(nn.Module):
    """Adds learned positions: (batch, seq, d_model) -> the same."""

    name = "embedding.position"

    def __init__(self, context: Context) -> None:
        super().__init__()
        self.weight = context.parameter("embedding.position")
        self.multiplier = context.table["embedding.position"].multiplier

    def forward(self, x: Tensor) -> Tensor:
        return x + scaled(self.weight[: x.shape[1]].to(x.dtype), self.multiplier)


class Norm(nn.Module):
    """LayerNorm (gpt) or RMSNorm (llama) over d_model, every rank the whole."""

    def __init__(self, context: Context, model: Model, name: str) -> None:
        super().__init__()
        self.name = name
        self.weight = context.parameter(f"{name}.weight")
        self.bias = context.optional(f"{name}.bias")
        self.centred, self.eps = model.arch == "gpt", model.norm_eps

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.to(x.dtype)
        if not self.centred:
            return F.rms_norm(x, weight.shape, weight, self.eps)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.layer_norm(x, weight.shape, weight, bias, self.eps)


class CoreAttention(nn.Module):
    """Mix values by softmax(scale · q·k): (batch, heads / tensor, seq, d_head) -> the same as queries."""

    output_is_sharded = True

    def __init__(self, name: str, scales: BlockScales) -> None:
        super().__init__()
        self.name, self.scale, self.gain = name, scales.attention_logits, scales.attention_output

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return scaled(attention(query, key, value, self.scale), self.gain)


class Attention(nn.Module):
    """Causal grouped-query attention; a tensor rank holds whole heads."""

    def __init__(self, context: Context, model: Model, name: str, scales: BlockScales) -> None:
        super().__init__()
        self.axis, self.d_head = context.mesh.tensor, model.d_head
        self.theta = model.rope_theta if model.arch == "llama" else None
        self.query = ColumnParallelLinear(context, f"{name}.query")
        self.key = ColumnParallelLinear(context, f"{name}.key")
        self.value = ColumnParallelLinear(context, f"{name}.value")
        self.core = CoreAttention(f"{name}.core", scales)
        self.output = RowParallelLinear(context, f"{name}.output")

    def forward(self, x: Tensor) -> Tensor:
        batch, seq, _ = x.shape
        x = copy_to_axis(x, self.axis)

        def heads(y: Tensor) -> Tensor:  # (batch, seq, heads · d_head) -> (batch, heads, seq, d_head)
            return y.view(batch, seq, -1, self.d_head).transpose(1, 2)

        query, key, value = heads(self.query(x)), heads(self.key(x)), heads(self.value(x))
        if self.theta is not None:
            query, key = rotate(query, self.theta), rotate(key, self.theta)
        mixed = self.core(query, key, value)  # (batch, heads / tensor, seq, d_head)
        return self.output(mixed.transpose(1, 2).reshape(batch, seq, -1))  # type: ignore[no-any-return]


class Mlp(nn.Module):
    """GELU(x Wᵤ) W_d (gpt) or SwiGLU (Shazeer 2020): (SiLU(x W_g) · x Wᵤ) W_d (llama)."""

    def __init__(self, context: Context, model: Model, name: str, scales: BlockScales) -> None:
        super().__init__()
        self.axis = context.mesh.tensor
        self.temper, self.gain = scales.activation_input, scales.activation_output
        self.gate = ColumnParallelLinear(context, f"{name}.gate") if model.arch == "llama" else None
        self.up = ColumnParallelLinear(context, f"{name}.up")
        self.down = RowParallelLinear(context, f"{name}.down")

    def forward(self, x: Tensor) -> Tensor:
        x = copy_to_axis(x, self.axis)
        up = self.up(x)  # (batch, seq, d_ff / tensor)
        inner = self.activated(F.gelu, up) if self.gate is None else self.activated(F.silu, self.gate(x)) * up
        return self.down(scaled(inner, self.gain))  # type: ignore[no-any-return]

    def activated(self, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """f(m·x)/m: u-μP's m is how far from linear f is."""
        return scaled(function(scaled(x, self.temper)), 1 / self.temper)


class Block(nn.Module):
    """Pre-norm transformer block: (batch, seq, d_model) -> the same."""

    def __init__(self, context: Context, model: Model, layer: int, scales: BlockScales) -> None:
        super().__init__()
        self.name = name = f"blocks.{layer}"
        self.attention_norm = Norm(context, model, f"{name}.attention_norm")
        self.attention = Attention(context, model, f"{name}.attention", scales)
        self.mlp_norm = Norm(context, model, f"{name}.mlp_norm")
        self.mlp = Mlp(context, model, f"{name}.mlp", scales)
        self.scales = scales

    def forward(self, x: Tensor) -> Tensor:
        x = joined(x, self.attention(self.attention_norm(x)), self.scales.attention)
        return joined(x, self.mlp(self.mlp_norm(x)), self.scales.mlp)


def joined(x: Tensor, added: Tensor, at: Branch) -> Tensor:
    return scaled(x, at.skip) + scaled(added, at.branch)


class Readout(nn.Module):
    """(batch, seq, d_model) -> (batch, seq, vocab / tensor)."""

    name = "readout"
    output_is_sharded = True

    def __init__(self, context: Context) -> None:
        super().__init__()
        self.axis = context.mesh.tensor
        self.weight = context.parameter("readout.weight")
        self.multiplier = context.table["readout.weight"].multiplier

    def forward(self, x: Tensor) -> Tensor:
        return vocab_parallel_logits(x, self.weight, self.multiplier, self.axis)
