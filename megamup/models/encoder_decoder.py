"""T5 (Raffel et al. 2020): an encoder whose output every block of a decoder reads, in one list of layers.

The embedding of token ids and, tied, the readout are one module. Between pipeline stages travel: in the encoder its
stream, the relative biases and the decoder's ids; in the decoder its stream, the memory and the relative biases.
"""

from __future__ import annotations

from megamup.models.assembly import Assembly
from megamup.models.network import LayerSpec
from megamup.parameters import stacks


def encoder_decoder_layers(at: Assembly) -> list[LayerSpec]:
    encoder, decoder = stacks(at.config.model)
    within: tuple[str, ...] = ()
    across: tuple[str, ...] = ("memory",)
    if at.config.data.documents:
        within, across = ("documents",), ("memory", "documents", "decoder_documents")
    layers = [*at.embedding("tokens"), *at.blocks(encoder, *within), *at.last_norm(encoder, writes="memory")]
    layers += [*at.embedding("decoder_tokens"), *at.blocks(decoder, *across), *at.last_norm(decoder)]
    return [*layers, at.readout()]
