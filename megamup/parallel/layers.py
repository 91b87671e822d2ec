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

from megamup.parallel.collectives import copy_to_axis, reduce_from_axis
from megamup.parallel.init import initial_shard, shard_bounds
from megamup.parallel.mesh import Axis, Mesh
from megamup.parameters import Parameter
from megamup.scales import Scales


@dataclass(frozen=True)
class Context:
    """What every layer is built from: the inventory, the table, the seed and this rank's place."""

    inventory: Mapping[str, Parameter]
    table: Mapping[str, Scales]
    seed: int
    mesh: Mesh
    dtype: torch.dtype
    """Type of the activations."""

    def parameter(self, name: str) -> nn.Parameter:
        """Build this rank's shard of the parameter called ``name``, with the inventory's entry on it."""
        spec = self.inventory[name]
        shard = nn.Parameter(initial_shard(spec, self.table[name], self.seed, self.mesh.tensor))
        tag(shard, spec, self.mesh.tensor)
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


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, multiplier: float) -> Tensor:
    """``multiplier * x Wᵀ + bias``: the forward multiplier belongs to the weight, not to the bias."""
    if multiplier == 1.0 or bias is None:
        y = F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
        return scaled(y, multiplier)
    return F.linear(x, weight.to(x.dtype)) * multiplier + bias.to(x.dtype)


class ColumnParallelLinear(nn.Module):
    """Y = X Wᵀ with the outputs cut: (..., d_in) -> (..., d_out / tensor).

    The caller has entered the sharded region once (`copy_to_axis`) for all column layers that share an input.
    """

    output_is_sharded = True

    def __init__(self, context: Context, name: str) -> None:
        super().__init__()
        self.name = name
        self.weight = context.parameter(f"{name}.weight")
        self.bias = context.optional(f"{name}.bias")
        self.multiplier = context.table[f"{name}.weight"].multiplier

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias, self.multiplier)


class RowParallelLinear(nn.Module):
    """Y = sum over ranks of X Wᵀ with the inputs cut: (..., d_in / tensor) -> (..., d_out), whole on every rank."""

    def __init__(self, context: Context, name: str) -> None:
        super().__init__()
        self.name, self.axis = name, context.mesh.tensor
        self.weight = context.parameter(f"{name}.weight")
        self.bias = context.optional(f"{name}.bias")
        self.multiplier = context.table[f"{name}.weight"].multiplier

    def forward(self, x: Tensor) -> Tensor:
        y = reduce_from_axis(linear(x, self.weight, None, self.multiplier), self.axis)
        return y if self.bias is None else y + self.bias.to(y.dtype)


class VocabParallelEmbedding(nn.Module):
    """Token embedding with the vocabulary cut: (batch, seq) -> (batch, seq, d_model), whole on every rank."""

    def __init__(self, context: Context, name: str) -> None:
        super().__init__()
        self.name, self.axis, self.dtype = name, context.mesh.tensor, context.dtype
        self.weight = context.parameter(name)
        self.multiplier = context.table[name].multiplier
        self.start, self.stop = shard_bounds(context.inventory[name], self.axis)

    def forward(self, tokens: Tensor) -> Tensor:
        if self.axis.size == 1:
            return scaled(F.embedding(tokens, self.weight).to(self.dtype), self.multiplier)
        elsewhere = (tokens < self.start) | (tokens >= self.stop)
        local = (tokens - self.start).masked_fill(elsewhere, 0)
        rows = F.embedding(local, self.weight).to(self.dtype).masked_fill(elsewhere[..., None], 0.0)
        return scaled(reduce_from_axis(rows, self.axis), self.multiplier)


def vocab_parallel_logits(x: Tensor, weight: Tensor, multiplier: float, axis: Axis) -> Tensor:
    """Logits of this rank's part of the vocabulary: (batch, seq, d_model) -> (batch, seq, vocab / tensor)."""
    return linear(copy_to_axis(x, axis), weight, None, multiplier)
