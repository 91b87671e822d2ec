"""The models of a ladder: one shape at many widths, as μP carries hyperparameters between them."""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from megamup.config import Config
from megamup.flops import flops_per_token
from megamup.model import Model
from megamup.parameters import count

WIDEST = 2**17
"""No model is wider."""


@dataclass(frozen=True)
class Point:
    """One run of a ladder, before it is a config."""

    model: Model
    tokens: float
    """At most; a run has whole steps."""
    sequences: int
    """Of a global batch."""
    epochs: float | None = None
    """How often the run sees its share of the data; None: as often as it sees all of it."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Config keys that this kind of ladder sets besides."""


@dataclass(frozen=True)
class Family:
    """The configs' model at any width: heads of one size, d_ff in proportion, depth fixed or by ``aspect``."""

    config: Config
    tokens_per_parameter: float
    aspect: float | None = None
    """d_model / n_layers."""

    @cached_property
    def step(self) -> int:
        """Widths are multiples of this: whole key heads, which the tensor ranks can share."""
        model = self.config.model
        return model.d_model // math.gcd(model.d_model, model.n_kv_heads) * self.config.parallel.tensor

    @cached_property
    def smallest(self) -> int:
        return -(-self.config.model.d_model // self.step) * self.step

    def model(self, width: int) -> Model:
        base, tensor = self.config.model, self.config.parallel.tensor
        growth, rest = divmod(base.d_ff * self.step, base.d_model)
        unit = math.lcm(math.gcd(base.d_ff, 16, 0 if rest else growth), tensor)  # exact wherever it can be
        shape: dict[str, Any] = {
            "d_model": width,
            "n_heads": base.n_heads * width // base.d_model,
            "n_kv_heads": base.n_kv_heads * width // base.d_model,
            "d_ff": max(1, round(base.d_ff * width / base.d_model / unit)) * unit,
            "n_layers": base.n_layers if self.aspect is None else max(1, round(width / self.aspect)),
        }
        if base.moe is not None and base.moe.d_expert is not None:  # as d_ff
            inner = max(1, round(base.moe.d_expert * width / base.d_model / tensor)) * tensor
            shape["moe"] = base.moe.model_dump() | {"d_expert": inner}
        if base.n_decoder_layers is not None:  # in proportion
            shape["n_decoder_layers"] = max(1, round(base.n_decoder_layers * shape["n_layers"] / base.n_layers))
        return Model.model_validate(base.model_dump() | shape)

    def models(self, widest: float, sizes: int, span: float) -> list[Model] | None:
        """Widths in equal ratios up to ``widest``, smallest first; None where two would be one, or one too small."""
        wanted = [widest * span ** (i / (sizes - 1) - 1) for i in range(sizes)] if sizes > 1 else [widest]
        widths = sorted({round(width / self.step) * self.step for width in wanted})
        return [self.model(width) for width in widths] if len(widths) == sizes and widths[0] >= self.smallest else None

    def tokens(self, model: Model) -> float:
        return self.tokens_per_parameter * count(model)["non_embedding"]

    def flops_per_token(self, model: Model) -> float:
        return flops_per_token(model, self.config.lengths, self.config.train.flops_convention)

    def steps(self, point: Point) -> int:
        return int(point.tokens * (1 + 1e-12) / (point.sequences * self.config.sequence_tokens))

    def flops(self, point: Point) -> float:
        """Of the whole run; less than a step more than its metrics will count."""
        return self.flops_per_token(point.model) * point.tokens

    def own_flops(self, width: int) -> float:
        """Of a width's run on its own ``tokens_per_parameter``."""
        model = self.model(width)
        return self.flops_per_token(model) * self.tokens(model)

    def affordable(self, flops: float) -> range:
        """The widths whose `own_flops` are at most ``flops``, smallest first."""
        high = self.smallest
        while high < WIDEST and self.own_flops(high) <= flops:
            high *= 2
        widths = range(self.smallest, high, self.step)
        return widths[: bisect_right(widths, flops, key=self.own_flops)]

    def width_for(self, flops: float) -> float | None:
        """The width, between two that exist, whose `own_flops` are ``flops``; None below the smallest."""
        widths = self.affordable(flops)
        if not widths:
            return None
        low, high = widths[-1], widths[-1] + self.step
        below, above = self.own_flops(low), self.own_flops(high)
        return float(low * (high / low) ** (math.log(flops / below) / math.log(above / below)))
