"""Mixture of experts in place of a block's MLP (Shazeer et al. 2017): a router sends each token to a few of many MLPs.

μP: the router sums over d_model into a fixed number of logits, so it is a readout inside a block; an expert's layers
are those of an MLP. Which experts a token goes to follows from the router's logits, whose size width doesn't change.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from megamup.model import Model, Moe
from megamup.parallel.auxiliary import inject, load_balance, loss_weight, router_z
from megamup.parallel.collectives import copy_to_axis, enter, leave
from megamup.parallel.experts import Routes, combine, product, routes, spread, trip
from megamup.parallel.layers import Context, scaled
from megamup.scales import BlockScales

Product = Callable[[Tensor, Tensor], Tensor]
"""Rows (rows, d_in) with weights (number, d_out, d_in)."""


class Losses(NamedTuple):
    """What keeps a router healthy; means over a micro batch's sequences, of which a context rank has a part."""

    balance: Tensor
    z: Tensor


class Router(nn.Module):
    """Logits of the experts in fp32, alike on all tensor ranks: (batch, seq, d_model) -> (batch, seq, experts)."""

    def __init__(self, context: Context, moe: Moe, name: str) -> None:
        super().__init__()
        self.name, self.mesh, self.moe = f"{name}.router", context.mesh, moe
        self.weight = context.parameter(f"{self.name}.weight")
        self.multiplier = context.table[f"{self.name}.weight"].multiplier

    def forward(self, x: Tensor) -> Tensor:
        # It reads what has entered the sharded region, where a tensor rank has its part of every gradient.
        matrix = copy_to_axis(self.weight, self.mesh.tensor)
        return scaled(F.linear(x.float(), matrix.float()), self.multiplier)

    def choose(self, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(weights, chosen experts, probabilities): (batch, seq, top_k) twice, best first; (batch, seq, experts)."""
        probabilities = logits.softmax(-1)
        weights, chosen = probabilities.topk(self.moe.top_k)
        if self.moe.normalize:
            weights = weights / weights.sum(-1, keepdim=True)
        return weights, chosen, probabilities

    def losses(self, logits: Tensor, chosen: Tensor, probabilities: Tensor) -> Losses:
        balance = load_balance(probabilities, chosen, self.mesh.context).mean()
        return Losses(balance, router_z(logits, self.mesh.context).mean())


class Mlps(nn.Module):
    """Several MLPs as one tensor a matrix, each cut over the tensor axis as an MLP is."""

    def __init__(self, context: Context, model: Model, name: str, scales: BlockScales) -> None:
        super().__init__()
        self.kernels, self.table, self.prefix = context.kernels, context.table, name
        self.temper, self.gain = scales.activation_input, scales.activation_output
        self.gate = context.parameter(f"{name}.gate") if model.gated else None
        self.up = context.parameter(f"{name}.up")
        self.down = context.parameter(f"{name}.down")

    def forward(self, rows: Tensor, column: Product, row: Product) -> Tensor:
        """(rows, d_model) -> the same, of which each tensor rank has a part: they add up."""
        first, *up = (self.multiply(part, rows, column) for part in ("gate", "up") if getattr(self, part) is not None)
        inner = self.kernels.activation(scaled(first, self.temper), *up)
        return self.multiply("down", scaled(inner, self.gain / self.temper), row)

    def multiply(self, part: str, rows: Tensor, compute: Product) -> Tensor:
        matrices = getattr(self, part)
        return scaled(compute(rows, matrices.to(rows.dtype)), self.table[f"{self.prefix}.{part}"].multiplier)


def to_all(rows: Tensor, weights: Tensor) -> Tensor:
    """Every row with every weight, side by side: (rows, number · d_out)."""
    return F.linear(rows, weights.flatten(0, 1))


def from_all(rows: Tensor, weights: Tensor) -> Tensor:
    """The sum over the weights, each with its part of a row (rows, number · d_in): (rows, d_out)."""
    return F.linear(rows, weights.transpose(0, 1).flatten(1))


class Experts(nn.Module):
    """(batch, seq, d_model), or a stretch, -> the same: the weighted sum of a token's experts, and all shared ones."""

    def __init__(self, context: Context, model: Model, name: str, scales: BlockScales) -> None:
        super().__init__()
        moe = model.moe
        assert moe is not None
        self.name, self.mesh, self.moe = name, context.mesh, moe
        self.output_is_sharded = context.mesh.sequence
        self.router = Router(context, moe, name)
        self.experts = Mlps(context, model, f"{name}.experts", scales)
        self.shared = Mlps(context, model, f"{name}.shared", scales) if moe.shared else None
        self.loss_weight = loss_weight(context.mesh, context.micro_batches)

    def forward(self, x: Tensor) -> Tensor:
        whole = enter(x, self.mesh.tensor, self.mesh.sequence)  # (batch, seq / context, d_model)
        weights, chosen = self.route(whole)
        tokens, at = whole.flatten(0, 1), routes(chosen.flatten(0, 1), self.moe.experts)
        mixed = combine(self.visit(spread(tokens, at), at), weights.flatten(0, 1), at)
        if self.shared is not None:
            mixed = mixed + self.shared(tokens, to_all, from_all)
        return leave(mixed.view_as(whole), self.mesh.tensor, self.mesh.sequence)

    def visit(self, rows: Tensor, at: Routes) -> Tensor:
        """What experts make of their rows, here or on the ranks that hold them: (choices, d_model), the same out."""
        if self.mesh.expert.size == 1:
            return self.compute(rows, at)
        journey = trip(at.counts, self.mesh.expert)
        return journey.back(self.compute(journey.go(rows), journey.at))

    def compute(self, rows: Tensor, at: Routes) -> Tensor:
        each = partial(product, ends=at.ends)
        return self.experts(rows, each, each)  # type: ignore[no-any-return]

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Weights and experts of every token, (batch, seq, top_k) each; the losses come in where weights go out."""
        logits = self.router(x)
        weights, chosen, probabilities = self.router.choose(logits)
        if self.moe.balance or self.moe.router_z:
            losses = self.router.losses(logits, chosen, probabilities)
            loss = self.moe.balance * losses.balance + self.moe.router_z * losses.z
            weights = inject(weights, loss, self.loss_weight)
        return weights, chosen
