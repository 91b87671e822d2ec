"""From the last hidden states to logits, or with labels straight to their loss."""

from __future__ import annotations

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from megamup.config import Config
from megamup.model import Model
from megamup.models.norm import Norm
from megamup.mup import readout_multiplier
from megamup.parallel.layers import Context, on_stretch, scaled
from megamup.parallel.loss import CrossEntropy, Labels, Unread
from megamup.parallel.mesh import Mesh


class Reading(NamedTuple):
    """How hidden states are read, besides by which weight."""

    loss: CrossEntropy
    multiplier: float
    soft_cap: float | None
    mesh: Mesh

    @classmethod
    def of(cls, config: Config, mesh: Mesh, loss: CrossEntropy) -> Reading:
        return cls(loss, readout_multiplier(config), config.model.logit_soft_cap, mesh)

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None, labels: Labels | None) -> Unread | Tensor:
        unread = Unread(x, weight, self.multiplier, self.mesh, soft_cap=self.soft_cap, bias=bias)
        return unread if labels is None else self.loss(unread, labels)


class Readout(nn.Module):
    """(batch, seq, d_model), or a stretch of it, and a bias (vocab / tensor) if any -> `Unread`, or the loss."""

    name = "readout"

    def __init__(self, context: Context, reading: Reading) -> None:
        super().__init__()
        self.reading, self.loss = reading, reading.loss
        self.weight = context.parameter("readout.weight")

    def forward(self, x: Tensor, bias: Tensor | None = None, labels: Labels | None = None) -> Unread | Tensor:
        return self.reading(x, self.weight, bias, labels)


def tied_readout(
    reading: Reading, embedding: nn.Module, x: Tensor, bias: Tensor | None = None, labels: Labels | None = None
) -> Unread | Tensor:
    """What `Readout` does, with the token embedding's weight."""
    assert isinstance(embedding.weight, Tensor)
    return reading(x, embedding.weight, bias, labels)


class ReadoutBias(nn.Module):
    """A bias of the logits, written to the stream: a tied readout has no parameter of its own. (vocab / tensor)"""

    def __init__(self, context: Context) -> None:
        super().__init__()
        self.bias = context.parameter("readout.bias")

    def forward(self, hidden: Tensor) -> Tensor:
        return self.bias * 1.0


class Transform(nn.Module):
    """What BERT does before its readout: norm(GELU(x W + b)). (batch, seq, d_model), or a stretch, -> the same."""

    name = "transform"

    def __init__(self, context: Context, model: Model) -> None:
        super().__init__()
        self.mesh, self.kernels, self.output_is_sharded = context.mesh, context.kernels, context.mesh.sequence
        self.weight, self.bias = context.parameter("transform.weight"), context.optional("transform.bias")
        self.multiplier = context.table["transform.weight"].multiplier
        self.norm = Norm(context, model, "transform_norm")

    def forward(self, x: Tensor) -> Tensor:
        y = scaled(F.linear(x, on_stretch(self.weight, self.mesh).to(x.dtype)), self.multiplier)
        if self.bias is not None:
            y = y + on_stretch(self.bias, self.mesh).to(x.dtype)
        return self.norm(F.gelu(y))  # type: ignore[no-any-return]
