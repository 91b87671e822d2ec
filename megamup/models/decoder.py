"""GPT and Llama as one flat list of layers, for one engine or cut into pipeline stages."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from megamup.config import Config
from megamup.kernels.choice import choose
from megamup.models.blocks import Block, Norm, PositionEmbedding, Readout, TokenEmbedding
from megamup.models.recompute import recompute
from megamup.mup import block_scales, readout_multiplier, table
from megamup.parallel.layers import Context
from megamup.parallel.loss import CrossEntropy, Labels, Unread
from megamup.parallel.mesh import SINGLE, Mesh
from megamup.parameters import parameters


@dataclass(frozen=True)
class LayerSpec:
    """A layer that isn't built yet: a pipeline stage builds only its own."""

    module: Callable[..., nn.Module]
    arguments: tuple[Any, ...] = ()
    shared: str | None = None
    """Layers of the same key share one module, and its gradient where they sit on different stages."""
    borrow: Callable[..., Unread | Tensor] | None = field(default=None)
    """What to compute with a shared module in place of its forward."""

    def build(self) -> nn.Module:
        return self.module(*self.arguments)


def context(config: Config, mesh: Mesh, device: str = "cpu") -> Context:
    dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
    kernels = choose(config, device)
    return Context(parameters(config.model), table(config), config.run.seed, mesh, dtype, kernels)


def decoder_layers(built_from: Context, config: Config, loss: CrossEntropy) -> list[LayerSpec]:
    """The model as a flat list: (batch, seq) token ids in, `Unread` out, or with labels the loss."""
    model = config.model
    tied = "token" if model.tie_embeddings else None
    layers = [LayerSpec(TokenEmbedding, (built_from,), shared=tied)]
    if model.arch == "gpt":
        layers.append(LayerSpec(PositionEmbedding, (built_from,)))
    for layer in range(model.n_layers):
        arguments = (built_from, model, layer, block_scales(config, layer), recompute(config.train.recompute, layer))
        layers.append(LayerSpec(Block, arguments))
    layers.append(LayerSpec(Norm, (built_from, model, "final_norm")))
    if not model.tie_embeddings:
        return [*layers, LayerSpec(Readout, (built_from, loss))]
    read = partial(tied_readout, loss, readout_multiplier(config), built_from.mesh)
    return [*layers, LayerSpec(TokenEmbedding, (built_from,), shared=tied, borrow=read)]


def tied_readout(
    loss: CrossEntropy, multiplier: float, mesh: Mesh, embedding: nn.Module, x: Tensor, labels: Labels | None = None
) -> Unread | Tensor:
    """What `Readout` does, with the token embedding's weight."""
    assert isinstance(embedding, TokenEmbedding)
    unread = Unread(x, embedding.weight, multiplier, mesh)
    return unread if labels is None else loss(unread, labels)


class Decoder(nn.Module):
    """The list run from first to last, where there is no pipeline."""

    def __init__(self, specs: list[LayerSpec], loss: CrossEntropy) -> None:
        super().__init__()
        self.loss = loss
        self.layers = nn.ModuleList()
        self.calls: list[Callable[..., Any]] = []
        shared: dict[str, nn.Module] = {}
        for spec in specs:
            module = shared[spec.shared] if spec.shared in shared else spec.build()
            if spec.shared is not None and spec.shared not in shared:
                shared[spec.shared] = module
            if module not in self.layers:
                self.layers.append(module)
            self.calls.append(module if spec.borrow is None else partial(spec.borrow, module))

    def forward(self, tokens: Tensor, labels: Labels | None = None) -> Tensor:
        """(batch, seq) token ids to logits (batch, seq, vocab / tensor), or with labels to their loss.

        ZeRO 3 has the readout's weight only while the model is called, so the loss is computed in here.
        """
        *body, read = self.calls
        x = tokens
        for call in body:
            x = call(x)
        found = read(x, labels)
        return found.logits() if isinstance(found, Unread) else cast(Tensor, found)


def build_decoder(config: Config, mesh: Mesh = SINGLE) -> Decoder:
    """Build the whole model on this rank's tensor shard."""
    built_from = context(config, mesh)
    loss = CrossEntropy(built_from.kernels.names["cross_entropy"])
    return Decoder(decoder_layers(built_from, config, loss), loss)
