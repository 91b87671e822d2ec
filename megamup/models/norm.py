"""Norms of the residual stream, and of query and key heads."""

from __future__ import annotations

from torch import Tensor, nn

from megamup.model import Model
from megamup.parallel.collectives import copy_to_axis
from megamup.parallel.layers import Context, on_stretch


class Norm(nn.Module):
    """LayerNorm or RMSNorm over d_model: (batch, seq, d_model), or a stretch of it, -> the same."""

    def __init__(self, context: Context, model: Model, name: str) -> None:
        super().__init__()
        self.name, self.mesh, self.kernels = name, context.mesh, context.kernels
        self.output_is_sharded = context.mesh.sequence
        self.weight = context.parameter(f"{name}.weight")
        self.bias = context.optional(f"{name}.bias")
        self.centred, self.eps = model.norm == "layer", model.norm_eps

    def forward(self, x: Tensor) -> Tensor:
        weight = on_stretch(self.weight, self.mesh).to(x.dtype)
        if not self.centred:
            return self.kernels.rms_norm(x, weight, self.eps)
        bias = None if self.bias is None else on_stretch(self.bias, self.mesh).to(x.dtype)
        return self.kernels.layer_norm(x, weight, bias, self.eps)


class HeadNorm(nn.Module):
    """RMSNorm of each head, one gain for all (Dehghani et al. 2023): (batch, heads / ranks, seq, d_head), same out."""

    output_is_sharded = True

    def __init__(self, context: Context, model: Model, name: str) -> None:
        super().__init__()
        self.name, self.axis, self.kernels, self.eps = name, context.mesh.tensor, context.kernels, model.norm_eps
        self.weight = context.parameter(f"{name}.weight")

    def forward(self, x: Tensor) -> Tensor:
        # Each tensor rank has some of the heads, so its gradient is a part of the gain's.
        weight = copy_to_axis(self.weight, self.axis).to(x.dtype)
        return self.kernels.rms_norm(x, weight, self.eps)
