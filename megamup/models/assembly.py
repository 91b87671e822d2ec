"""The pieces of which an architecture's list of layers is put together."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from megamup.config import Config
from megamup.models.blocks import Block
from megamup.models.embeddings import PositionEmbedding, RelativePositions, TokenEmbedding
from megamup.models.heads import Reading, Readout, tied_readout
from megamup.models.network import LayerSpec
from megamup.models.norm import Norm
from megamup.models.recompute import recompute
from megamup.mup import block_scales
from megamup.parallel.layers import Context
from megamup.parallel.loss import CrossEntropy
from megamup.parameters import Stack

TOKEN = "token"
"""Key of the token embedding, which a tied readout and t5's two stacks share."""


@dataclass(frozen=True)
class Assembly:
    """Layers of one model."""

    context: Context
    config: Config
    loss: CrossEntropy

    def embedding(self, tokens: str = "tokens") -> list[LayerSpec]:
        """Ids by this name to the residual stream, with learned positions where the model has them."""
        model = self.config.model
        shared = TOKEN if model.tie_embeddings or model.arch == "t5" else None
        layers = [LayerSpec(TokenEmbedding, (self.context,), shared=shared, reads=(tokens,))]
        if model.positions == "learned":
            layers.append(LayerSpec(PositionEmbedding, (self.context,)))
        return layers

    def blocks(self, stack: Stack, *reads: str) -> list[LayerSpec]:
        """A stack's blocks, each reading the residual stream and what else is named, after what they all share."""
        model, layers = self.config.model, []
        if model.positions == "relative":
            layers.append(LayerSpec(RelativePositions, (self.context, stack.prefix), writes="relative"))
            reads = (*reads, "relative")
        for layer in range(stack.layers):
            scales, again = block_scales(self.config, layer), recompute(self.config.train.recompute, layer)
            names = ("hidden", *reads)
            arguments = (self.context, model, stack, layer, scales, again, names)
            layers.append(LayerSpec(Block, arguments, reads=names))
        return layers

    def first_norm(self) -> list[LayerSpec]:
        """Where norms stand after sums, the first sum is that of the embeddings."""
        return [self.norm("embedding_norm")] if self.config.model.norm_place == "after" else []

    def last_norm(self, stack: Stack, writes: str = "hidden") -> list[LayerSpec]:
        """Where norms stand before branches, nothing has normed the last sum."""
        before = self.config.model.norm_place == "before"
        return [self.norm(f"{stack.prefix}final_norm", writes)] if before else []

    def norm(self, name: str, writes: str = "hidden") -> LayerSpec:
        return LayerSpec(Norm, (self.context, self.config.model, name), writes=writes)

    def readout(self, *reads: str) -> LayerSpec:
        """The last layer, whose output is the model's."""
        reading = Reading.of(self.config, self.context.mesh, self.loss)
        names = ("hidden", *reads)
        if not self.config.model.tie_embeddings:
            return LayerSpec(Readout, (self.context, reading), reads=names, writes="output")
        read = partial(tied_readout, reading)
        return LayerSpec(TokenEmbedding, (self.context,), shared=TOKEN, borrow=read, reads=names, writes="output")
