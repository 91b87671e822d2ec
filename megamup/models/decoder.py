"""GPT and Llama as one flat list of layers, for one engine or cut into pipeline stages."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from megamup.config import Config
from megamup.models.blocks import Block, Norm, PositionEmbedding, Readout, TokenEmbedding
from megamup.mup import block_scales, readout_multiplier, table
from megamup.parallel.layers import Context, vocab_parallel_logits
from megamup.parallel.mesh import SINGLE, Mesh
from megamup.parameters import parameters


@dataclass(frozen=True)
class LayerSpec:
    """A layer that isn't built yet: a pipeline stage builds only its own."""

    module: Callable[..., nn.Module]
    arguments: tuple[Any, ...] = ()
    shared: str | None = None
    """Layers of the same key share one module, and its gradient where they sit on different stages."""
    borrow: Callable[[nn.Module, Tensor], Tensor] | None = field(default=None)
    """What to compute with a shared module in place of its forward."""

    def build(self) -> nn.Module:
        return self.module(*self.arguments)


def context(config: Config, mesh: Mesh) -> Context:
    dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
    return Context(parameters(config.model), table(config), config.run.seed, mesh, dtype)


def decoder_layers(config: Config, mesh: Mesh) -> list[LayerSpec]:
    """The model, (batch, seq) token ids in, (batch, seq, vocab / tensor) logits out, as a flat list."""
    model, built_from = config.model, context(config, mesh)
    tied = "token" if model.tie_embeddings else None
    layers = [LayerSpec(TokenEmbedding, (built_from,), shared=tied)]
    if model.arch == "gpt":
        layers.append(LayerSpec(PositionEmbedding, (built_from,)))
    layers += [
        LayerSpec(Block, (built_from, model, layer, block_scales(config, layer))) for layer in range(model.n_layers)
    ]
    layers.append(LayerSpec(Norm, (built_from, model, "final_norm")))
    if not model.tie_embeddings:
        return [*layers, LayerSpec(Readout, (built_from,))]
    multiplier = readout_multiplier(config)

    def tied_readout(embedding: nn.Module, x: Tensor) -> Tensor:
        assert isinstance(embedding, TokenEmbedding)
        return vocab_parallel_logits(x, embedding.weight, multiplier, mesh.tensor)

    return [*layers, LayerSpec(TokenEmbedding, (built_from,), shared=tied, borrow=tied_readout)]


class Decoder(nn.Module):
    """The list run from first to last, where there is no pipeline."""

    def __init__(self, specs: list[LayerSpec]) -> None:
        super().__init__()
        self.layers = nn.ModuleList()
        self.calls: list[Callable[[Tensor], Tensor]] = []
        shared: dict[str, nn.Module] = {}
        for spec in specs:
            module = shared[spec.shared] if spec.shared in shared else spec.build()
            if spec.shared is not None and spec.shared not in shared:
                shared[spec.shared] = module
            if module not in self.layers:
                self.layers.append(module)
            self.calls.append(module if spec.borrow is None else _Borrowed(spec.borrow, module))

    def forward(self, x: Tensor) -> Tensor:
        for call in self.calls:
            x = call(x)
        return x


@dataclass(frozen=True)
class _Borrowed:
    call: Callable[[nn.Module, Tensor], Tensor]
    module: nn.Module

    def __call__(self, x: Tensor) -> Tensor:
        return self.call(self.module, x)


def build_decoder(config: Config, mesh: Mesh = SINGLE) -> Decoder:
    """Build the whole model on this rank's tensor shard."""
    return Decoder(decoder_layers(config, mesh))
