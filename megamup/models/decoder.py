"""GPT and Llama: a causal stack."""

from __future__ import annotations

from megamup.models.assembly import Assembly
from megamup.models.network import LayerSpec
from megamup.parameters import stacks


def decoder_layers(at: Assembly) -> list[LayerSpec]:
    (stack,) = stacks(at.config.model)
    documents = ("documents",) if at.config.data.documents else ()
    return [*at.embedding(), *at.first_norm(), *at.blocks(stack, *documents), *at.last_norm(stack), at.readout()]
