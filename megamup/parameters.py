"""Every parameter of a model, from its config alone: global name, logical shape, role, fan-in, partition dim.

The one inventory that the abc-table, the planner, the layers, the checkpoints and the tests read. Shapes are logical
(unsharded): a rank's tensor has ``shape[partition_dim] / tensor`` there, and under ZeRO-3 none of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Literal

from megamup.model import Model

Role = Literal["embedding", "query", "key_value", "hidden", "residual_out", "router", "readout", "gain", "bias"]
Axis = Literal["d_model", "d_heads", "d_ff"]


@dataclass(frozen=True)
class Parameter:
    name: str
    """Global name: the same in every layout."""
    shape: tuple[int, ...]
    role: Role
    fan_in: Axis | None = None
    """What the weight sums over; its growth over the base's is the table's n. None: a lookup or a vector."""
    partition_dim: int | None = None
    """Dim cut over the tensor axis; None: every tensor rank holds the whole."""
    branches: int = 0
    """Residual branches of its stack, if it is part of one."""

    @property
    def in_block(self) -> bool:
        """Part of a residual branch, whose number grows with depth."""
        return self.branches > 0

    @property
    def of_experts(self) -> bool:
        """Its first dim are experts, which ``parallel.expert`` shares out among ranks."""
        return ".moe.experts." in self.name

    @property
    def size(self) -> int:
        return prod(self.shape)


@dataclass(frozen=True)
class Stack:
    """Blocks on one residual stream."""

    prefix: str
    """Of its parameters' names."""
    layers: int
    cross: bool = False
    """Each block attends to the other stack's output, too."""

    @property
    def branches(self) -> int:
        return (3 if self.cross else 2) * self.layers

    def block(self, layer: int) -> str:
        return f"{self.prefix}blocks.{layer}"


def stacks(model: Model) -> tuple[Stack, ...]:
    if model.arch != "t5":
        return (Stack("", model.n_layers),)
    assert model.n_decoder_layers is not None
    return Stack("encoder.", model.n_layers), Stack("decoder.", model.n_decoder_layers, cross=True)


def parameters(model: Model) -> dict[str, Parameter]:
    """All parameters by global name, in the order of the forward pass."""
    found = [Parameter("embedding.token", (model.vocab_size, model.d_model), "embedding", partition_dim=0)]
    if model.positions == "learned":
        found.append(Parameter("embedding.position", (model.max_seq_len, model.d_model), "embedding"))
    if model.token_types:
        found.append(Parameter("embedding.type", (model.token_types, model.d_model), "embedding"))
    if model.norm_place == "after":
        found += norm(model, "embedding_norm")
    for stack in stacks(model):
        if model.positions == "relative":
            shape = (model.n_heads, model.relative_buckets)
            found.append(Parameter(f"{stack.prefix}relative.weight", shape, "bias", partition_dim=0))
        for layer in range(stack.layers):
            found += block(model, stack, layer)
        if model.norm_place == "before":
            found += norm(model, f"{stack.prefix}final_norm")
    return {parameter.name: parameter for parameter in found + head(model)}


def head(model: Model) -> list[Parameter]:
    """What reads the last hidden states. Of bert Devlin et al. 2018: a transform before the readout, and a pooler."""
    found = []
    if model.arch == "bert":
        found += whole(model, "transform", model.d_model, "hidden")
        found += norm(model, "transform_norm")
    if not model.tie_embeddings:
        shape = (model.vocab_size, model.d_model)
        found.append(Parameter("readout.weight", shape, "readout", "d_model", partition_dim=0))
    if model.arch == "bert":
        found.append(Parameter("readout.bias", (model.vocab_size,), "bias", partition_dim=0))
    if model.pair_head:
        found += whole(model, "pooler", model.d_model, "hidden") + whole(model, "pair", 2, "readout")
    return found


def block(model: Model, stack: Stack, layer: int) -> list[Parameter]:
    name = stack.block(layer)
    found = norm(model, f"{name}.attention_norm") + attention(model, f"{name}.attention")
    if stack.cross:
        found += norm(model, f"{name}.cross_norm") + attention(model, f"{name}.cross")
    if not model.parallel_block:
        found += norm(model, f"{name}.mlp_norm")
    found += experts(model, f"{name}.moe") if model.has_experts(layer) else mlp(model, f"{name}.mlp", model.d_ff)
    return [Parameter(p.name, p.shape, p.role, p.fan_in, p.partition_dim, branches=stack.branches) for p in found]


def attention(model: Model, name: str) -> list[Parameter]:
    heads, kv_heads = model.n_heads * model.d_head, model.n_kv_heads * model.d_head
    found = column(model, f"{name}.query", heads, "query")
    found += column(model, f"{name}.key", kv_heads, "key_value")
    found += column(model, f"{name}.value", kv_heads, "key_value")
    if model.qk_norm:
        found += [Parameter(f"{name}.{part}_norm.weight", (model.d_head,), "gain") for part in ("query", "key")]
    return found + row(model, f"{name}.output", heads, "d_heads")


def mlp(model: Model, name: str, d_ff: int) -> list[Parameter]:
    found = []
    for part in ("gate", "up") if model.gated else ("up",):
        found += column(model, f"{name}.{part}", d_ff)
    return found + row(model, f"{name}.down", d_ff, "d_ff")


def experts(model: Model, name: str) -> list[Parameter]:
    """A router, and experts as one tensor a matrix, each cut over the tensor axis as an MLP is; without biases."""
    moe = model.moe
    assert moe is not None
    inner = moe.d_expert or model.d_ff
    found = [Parameter(f"{name}.router.weight", (moe.experts, model.d_model), "router", "d_model")]
    for kind, number in (("experts", moe.experts), ("shared", moe.shared)):
        if not number:
            continue
        for part in ("gate", "up") if model.gated else ("up",):
            shape = (number, inner, model.d_model)
            found.append(Parameter(f"{name}.{kind}.{part}", shape, "hidden", "d_model", partition_dim=1))
        shape = (number, model.d_model, inner)
        found.append(Parameter(f"{name}.{kind}.down", shape, "residual_out", "d_ff", partition_dim=2))
    return found


def norm(model: Model, name: str) -> list[Parameter]:
    found = [Parameter(f"{name}.weight", (model.d_model,), "gain")]
    if model.bias and model.norm == "layer":  # RMSNorm has none
        found.append(Parameter(f"{name}.bias", (model.d_model,), "bias"))
    return found


def column(model: Model, name: str, d_out: int, role: Role = "hidden") -> list[Parameter]:
    """A linear layer that is cut along its outputs, so the bias is cut too."""
    found = [Parameter(f"{name}.weight", (d_out, model.d_model), role, "d_model", partition_dim=0)]
    if model.bias:
        found.append(Parameter(f"{name}.bias", (d_out,), "bias", partition_dim=0))
    return found


def row(model: Model, name: str, d_in: int, fan_in: Axis) -> list[Parameter]:
    """A linear layer that is cut along its inputs; the bias, added after the sum, is whole."""
    found = [Parameter(f"{name}.weight", (model.d_model, d_in), "residual_out", fan_in, partition_dim=1)]
    if model.bias:
        found.append(Parameter(f"{name}.bias", (model.d_model,), "bias"))
    return found


def whole(model: Model, name: str, d_out: int, role: Role) -> list[Parameter]:
    """A linear layer that every tensor rank holds whole."""
    found = [Parameter(f"{name}.weight", (d_out, model.d_model), role, "d_model")]
    if model.bias:
        found.append(Parameter(f"{name}.bias", (d_out,), "bias"))
    return found


def count(model: Model) -> dict[str, int]:
    """Numbers of parameters: total; non_embedding (without lookup tables and readout: Kaplan's N); and active, of the
    total those that one token meets, where there are experts."""
    found = parameters(model)
    total = sum(parameter.size for parameter in found.values())
    outside = sum(p.size for p in found.values() if p.name.startswith(("embedding.", "readout.")))
    idle = 0
    if model.moe is not None:
        routed = sum(parameter.size for parameter in found.values() if ".moe.experts." in parameter.name)
        idle = routed * (model.moe.experts - model.moe.top_k) // model.moe.experts
    counts = {"total": total, "non_embedding": total - outside}
    return counts | {"active": total - idle} if idle else counts
