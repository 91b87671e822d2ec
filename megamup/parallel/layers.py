"""Linear layers and the embedding, cut over the tensor axis.

Each asks the inventory for its parameters by global name, so logical shape, role and partition dim have one home,
and the table for its scales. Weights are cast to the activations' type on use: under ZeRO 1-3 DeepSpeed has already
made them bf16 (a no-op here), at ZeRO 0 they are their own fp32 masters.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megamup.kernels.choice import Kernels
from megamup.parallel.collectives import copy_to_axis, enter, leave
from megamup.parallel.init import Source, initial_shard, own_experts, shard_bounds
from megamup.parallel.mesh import Axis, Mesh
from megamup.parallel.products import column_products, row_product
from megamup.parameters import Parameter
from megamup.scales import Scales

EXPERTS = "experts"
"""By which DeepSpeed knows the ranks that hold the same experts."""


@dataclass(frozen=True)
class Context:
    """What every layer is built from: the inventory, the table, the seed, this rank's place and the kernels."""

    inventory: Mapping[str, Parameter]
    table: Mapping[str, Scales]
    seed: int
    mesh: Mesh
    dtype: torch.dtype
    """Type of the activations."""
    kernels: Kernels
    micro_batches: int = 1
    """Of a training step on each rank; what layers add to the gradients themselves is one of so many parts."""
    source: Source | None = None
    """Of the initial weights; None: they are drawn."""

    def parameter(self, name: str) -> nn.Parameter:
        """Build this rank's shard of the parameter called ``name``, with the inventory's entry on it."""
        spec, axis = self.inventory[name], self.mesh.tensor
        if self.source is None:
            shard = nn.Parameter(initial_shard(spec, self.table[name], self.seed, axis, self.mesh.expert))
        else:
            shard = nn.Parameter(self.source.shard(spec, axis)[own_experts(spec, self.mesh.expert)].clone())
        tag(shard, spec, axis)
        if spec.of_experts and self.mesh.expert.size > 1:
            share_out(shard)
        return shard

    def optional(self, name: str) -> nn.Parameter | None:
        return self.parameter(name) if name in self.inventory else None


def tag(shard: nn.Parameter, spec: Parameter, axis: Axis) -> None:
    """Write the inventory's entry on a shard, and tell DeepSpeed whether this rank counts it in a gradient norm."""
    shard.spec = spec  # type: ignore[attr-defined]
    # DeepSpeed counts a parameter where this is set, or on rank 0 of the model-parallel group. With a pipeline that
    # group spans the stages, so a replicated parameter counts on tensor rank 0 *of its stage*.
    counted = spec.partition_dim is not None or axis.rank == 0
    shard.tensor_model_parallel = shard.model_parallel = counted  # type: ignore[attr-defined]


def share_out(shard: nn.Parameter) -> None:
    """Tell DeepSpeed that a parameter isn't alike on all replicas, but on those of a group."""
    shard.allreduce, shard.group_name = False, EXPERTS  # type: ignore[attr-defined]


def shared_out(shard: nn.Parameter) -> bool:
    """Whether replicas differ in it: experts, where ranks share them out."""
    return not getattr(shard, "allreduce", True)


def counted(shard: nn.Parameter) -> bool:
    """Whether this rank counts the shard where ranks add up, so that each logical element counts once.

    Of replicas tensor rank 0's count, of a tied weight its first stage's, of placeholders none.
    """
    return bool(shard.model_parallel) and not getattr(shard, "ds_pipe_replicated", False)  # type: ignore[attr-defined]


def spec_of(shard: nn.Parameter) -> Parameter:
    """The inventory's entry of a shard."""
    return cast(Parameter, shard.spec)  # type: ignore[attr-defined]


def scaled(x: Tensor, multiplier: float) -> Tensor:
    return x if multiplier == 1.0 else x * multiplier


class ColumnParallelLinear(nn.Module):
    """Y = X Wᵀ with the outputs cut: (batch, seq, d_in) -> (batch, seq, d_out / tensor); see `column_parallel`.

    Called with X Wᵀ, it adds what is its own: the forward multiplier, which belongs to the weight, and the bias.
    """

    output_is_sharded = True

    def __init__(self, context: Context, name: str) -> None:
        super().__init__()
        self.name = name
        self.weight = context.parameter(f"{name}.weight")
        self.bias = context.optional(f"{name}.bias")
        self.multiplier = context.table[f"{name}.weight"].multiplier

    def forward(self, product: Tensor) -> Tensor:
        y = scaled(product, self.multiplier)
        return y if self.bias is None else y + self.bias.to(y.dtype)


def column_parallel(x: Tensor, layers: tuple[ColumnParallelLinear, ...], at: Mesh, kernels: Kernels) -> list[Tensor]:
    """Apply column layers that share an input, entering the sharded region once for all."""
    weights = tuple(layer.weight.to(x.dtype) for layer in layers)
    if kernels.overlaps:
        products = column_products(x, weights, at.tensor, at.sequence)
    else:
        x = enter(x, at.tensor, at.sequence)
        products = tuple(kernels.linear(x, weight) for weight in weights)
    return [layer(product) for layer, product in zip(layers, products, strict=True)]


class RowParallelLinear(nn.Module):
    """Y = sum over ranks of X Wᵀ with the inputs cut: (batch, seq, d_in / tensor) -> (batch, seq, d_out), the whole on
    every rank, or its stretch of the sequence."""

    def __init__(self, context: Context, name: str) -> None:
        super().__init__()
        self.name, self.mesh, self.kernels = name, context.mesh, context.kernels
        self.output_is_sharded = context.mesh.sequence
        self.weight = context.parameter(f"{name}.weight")
        self.bias = context.optional(f"{name}.bias")
        self.multiplier = context.table[f"{name}.weight"].multiplier

    def forward(self, x: Tensor) -> Tensor:
        weight, at = self.weight.to(x.dtype), self.mesh
        if self.kernels.overlaps:
            y = row_product(x, weight, at.tensor, at.sequence)
        else:
            y = leave(self.kernels.linear(x, weight), at.tensor, at.sequence)
        y = scaled(y, self.multiplier)
        return y if self.bias is None else y + on_stretch(self.bias, self.mesh).to(y.dtype)


class VocabParallelEmbedding(nn.Module):
    """Token embedding with the vocabulary cut: (batch, seq) -> (batch, seq, d_model), the whole on every rank, or its
    stretch of the sequence."""

    def __init__(self, context: Context, name: str) -> None:
        super().__init__()
        self.name, self.mesh, self.dtype = name, context.mesh, context.dtype
        self.output_is_sharded = context.mesh.sequence
        self.weight = context.parameter(name)
        self.multiplier = context.table[name].multiplier
        self.start, self.stop = shard_bounds(context.inventory[name], self.mesh.tensor)

    def forward(self, tokens: Tensor) -> Tensor:
        if self.mesh.tensor.size == 1:
            return scaled(F.embedding(tokens, self.weight).to(self.dtype), self.multiplier)
        elsewhere = (tokens < self.start) | (tokens >= self.stop)
        local = (tokens - self.start).masked_fill(elsewhere, 0)
        rows = F.embedding(local, self.weight).to(self.dtype).masked_fill(elsewhere[..., None], 0.0)
        return scaled(leave(rows, self.mesh.tensor, self.mesh.sequence), self.multiplier)


def on_stretch(replicated: Tensor, at: Mesh) -> Tensor:
    """A replicated parameter where tensor ranks apply it to stretches of the sequence: its gradient is their sum."""
    return copy_to_axis(replicated, at.tensor) if at.sequence else replicated
