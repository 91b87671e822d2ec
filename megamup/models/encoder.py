"""BERT (Devlin et al. 2018): a stack that sees both ways, and a transform before the readout of masked tokens."""

from __future__ import annotations

from megamup.models.assembly import Assembly
from megamup.models.embeddings import FirstType, TypeEmbedding
from megamup.models.heads import ReadoutBias, Transform
from megamup.models.network import LayerSpec
from megamup.models.pairs import PairHead
from megamup.parameters import stacks


def encoder_layers(at: Assembly) -> list[LayerSpec]:
    model = at.config.model
    (stack,) = stacks(model)
    documents = ("documents",) if at.config.data.documents else ()
    layers = [*at.embedding(), *types(at), *at.first_norm(), *at.blocks(stack, *documents), *at.last_norm(stack)]
    if model.pair_head:
        layers.append(LayerSpec(PairHead, (at.context,), reads=("hidden", "pair")))
    layers.append(LayerSpec(ReadoutBias, (at.context,), writes="readout_bias"))
    return [*layers, LayerSpec(Transform, (at.context, model)), at.readout("readout_bias")]


def types(at: Assembly) -> list[LayerSpec]:
    if not at.config.model.token_types:
        return []
    if at.config.objective.pairs == "none":
        return [LayerSpec(FirstType, (at.context,))]
    return [LayerSpec(TypeEmbedding, (at.context,), reads=("hidden", "token_types"))]
