"""The MLP of a block."""

from __future__ import annotations

from torch import Tensor, nn

from megamup.model import Model
from megamup.parallel.layers import ColumnParallelLinear, Context, RowParallelLinear, column_parallel, scaled
from megamup.scales import BlockScales


class Mlp(nn.Module):
    """f(x Wᵤ) W_d, or gated (Shazeer 2020): (f(x W_g) · x Wᵤ) W_d."""

    def __init__(self, context: Context, model: Model, name: str, scales: BlockScales) -> None:
        super().__init__()
        self.mesh, self.kernels = context.mesh, context.kernels
        self.temper, self.gain = scales.activation_input, scales.activation_output
        self.gate = ColumnParallelLinear(context, f"{name}.gate") if model.gated else None
        self.up = ColumnParallelLinear(context, f"{name}.up")
        self.down = RowParallelLinear(context, f"{name}.down")

    def forward(self, x: Tensor) -> Tensor:
        layers = (self.up,) if self.gate is None else (self.gate, self.up)
        projected = column_parallel(x, layers, self.mesh, self.kernels)  # each (batch, seq, d_ff / tensor)
        return self.down(self.activated(*projected))  # type: ignore[no-any-return]

    def activated(self, first: Tensor, *up: Tensor) -> Tensor:
        """f(m·x)/m, times what is gated: u-μP's m is how far from linear f is."""
        inner = self.kernels.activation(scaled(first, self.temper), *up)
        return scaled(inner, self.gain / self.temper)
