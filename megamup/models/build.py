"""A config's model: its list of layers, whatever the architecture."""

from __future__ import annotations

from pathlib import Path

import torch

from megamup.config import Config, micro_batches
from megamup.kernels.choice import choose
from megamup.models.assembly import Assembly
from megamup.models.decoder import decoder_layers
from megamup.models.encoder import encoder_layers
from megamup.models.encoder_decoder import encoder_decoder_layers
from megamup.models.network import LayerSpec, Network
from megamup.mup import table
from megamup.parallel.layers import Context
from megamup.parallel.loss import CrossEntropy
from megamup.parallel.mesh import SINGLE, Mesh
from megamup.parallel.stored import StoredWeights
from megamup.parameters import parameters

ARCHITECTURES = {
    "gpt": decoder_layers,
    "llama": decoder_layers,
    "bert": encoder_layers,
    "t5": encoder_decoder_layers,
}
"""An architecture is a list of layers; all else about it is in the ``model`` section."""


def context(config: Config, mesh: Mesh, device: str = "cpu") -> Context:
    dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
    kernels = choose(config, device)
    _, accumulated = micro_batches(config, mesh.data.size * config.parallel.replica_ranks)
    inventory, source = parameters(config.model), stored_weights(config)
    return Context(inventory, table(config), config.run.seed, mesh, dtype, kernels, accumulated, source)


def stored_weights(config: Config) -> StoredWeights | None:
    """The folder of ``train.init``, None where weights are drawn. Raises MegamupError as `StoredWeights.open`."""
    init = config.train.init
    return None if init is None else StoredWeights.open(Path(init), parameters(config.model))


def model_layers(built_from: Context, config: Config, loss: CrossEntropy) -> list[LayerSpec]:
    """The model as a flat list: the batch's inputs in, `Unread` out, or with labels the loss."""
    return ARCHITECTURES[config.model.arch](Assembly(built_from, config, loss))


def build_network(config: Config, mesh: Mesh = SINGLE) -> Network:
    """Build the whole model on this rank's tensor shard."""
    built_from = context(config, mesh)
    loss = cross_entropy(built_from, config)
    return Network(model_layers(built_from, config, loss), loss)


def cross_entropy(built_from: Context, config: Config) -> CrossEntropy:
    return CrossEntropy(built_from.kernels.names["cross_entropy"], z_loss=config.objective.z_loss)
