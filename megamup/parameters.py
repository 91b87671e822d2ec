"""Every parameter of a model, from its config alone: global name, logical shape, role, fan-in, partition dim.

The one inventory that the abc-table, the planner, the layers, the checkpoints and the tests read. Shapes are logical
(unsharded): a rank's tensor has ``shape[partition_dim] / tensor`` there, and under ZeRO-3 none of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Literal

from megamup.sections import Model

Role = Literal["embedding", "query", "key_value", "hidden", "residual_out", "readout", "gain", "bias"]
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

    @property
    def in_block(self) -> bool:
        """Part of a residual branch, whose number grows with depth."""
        return self.name.startswith("blocks.")

    @property
    def size(self) -> int:
        return prod(self.shape)


def parameters(model: Model) -> dict[str, Parameter]:
    """All parameters by global name, in the order of the forward pass."""
    found = [Parameter("embedding.token", (model.vocab_size, model.d_model), "embedding", partition_dim=0)]
    if model.arch == "gpt":
        found.append(Parameter("embedding.position", (model.max_seq_len, model.d_model), "embedding"))
    for layer in range(model.n_layers):
        found += block(model, f"blocks.{layer}")
    found += norm(model, "final_norm")
    if not model.tie_embeddings:
        found.append(
            Parameter("readout.weight", (model.vocab_size, model.d_model), "readout", "d_model", partition_dim=0)
        )
    return {parameter.name: parameter for parameter in found}


def block(model: Model, name: str) -> list[Parameter]:
    heads, kv_heads = model.n_heads * model.d_head, model.n_kv_heads * model.d_head
    inner = ("up",) if model.arch == "gpt" else ("gate", "up")
    found = norm(model, f"{name}.attention_norm")
    found += column(model, f"{name}.attention.query", heads, "query")
    found += column(model, f"{name}.attention.key", kv_heads, "key_value")
    found += column(model, f"{name}.attention.value", kv_heads, "key_value")
    found += row(model, f"{name}.attention.output", heads, "d_heads")
    found += norm(model, f"{name}.mlp_norm")
    for part in inner:
        found += column(model, f"{name}.mlp.{part}", model.d_ff)
    return found + row(model, f"{name}.mlp.down", model.d_ff, "d_ff")


def norm(model: Model, name: str) -> list[Parameter]:
    found = [Parameter(f"{name}.weight", (model.d_model,), "gain")]
    if model.bias and model.arch == "gpt":  # RMSNorm has none
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


def count(model: Model) -> dict[str, int]:
    """Numbers of parameters: total; non_embedding (without token and position tables and readout: Kaplan's N)."""
    sizes = {name: parameter.size for name, parameter in parameters(model).items()}
    outside = sum(size for name, size in sizes.items() if name.startswith(("embedding.", "readout.")))
    total = sum(sizes.values())
    return {"total": total, "non_embedding": total - outside}
