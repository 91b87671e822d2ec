"""Tokens to their experts and back, also on other ranks, and products of each expert's tokens with its own weight.

Tokens are sorted by expert, so that an expert's are neighbours, and no expert has a capacity: none is dropped, as what
would be depends on which tokens share a micro batch (Gale et al. 2022, MegaBlocks). All shapes are fixed, since every
token has as many experts; how many tokens an expert has is known on the device alone. Only where ranks share out the
experts, they have to know how many rows they send each other (Lepikhin et al. 2021, GShard, without its capacities).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from megamup.parallel.mesh import Axis

GROUPED = (9, 0)
"""CUDA capability whose ``torch._grouped_mm`` is used. Before Hopper it is the same loop as ours; on Blackwell (torch
2.13) an expert without tokens gets a gradient that isn't zero (pytorch #172439)."""
GROUPED_MULTIPLE = 8
"""Of its matrices' sides: 16 bytes of bf16. Under ZeRO a weight may lie at any place of a flat buffer."""


@dataclass(frozen=True)
class Routes:
    """Where each choice of an expert stands among all of them, sorted by expert; a token has top_k choices."""

    order: Tensor
    """(tokens · top_k,): which choice stands at a place."""
    place: Tensor
    """(tokens · top_k,): at which place a choice stands."""
    counts: Tensor
    """(experts,) int64: an expert's choices."""
    top_k: int

    @property
    def ends(self) -> Tensor:
        """(experts,) int32: where an expert's choices end."""
        return self.counts.cumsum(0).to(torch.int32)


def routes(chosen: Tensor, experts: int) -> Routes:
    """Sort the choices by expert, and an expert's by token.

    Args:
        chosen: (tokens, top_k), int64.
        experts: how many there are.
    """
    choices = chosen.flatten()
    order = choices.argsort(stable=True)
    counts = torch.zeros(experts, dtype=torch.int64, device=chosen.device)
    counts = counts.scatter_add(0, choices, torch.ones_like(choices))
    # By scattering places, which is cheaper than a second sort.
    place = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    return Routes(order, place, counts, chosen.shape[-1])


class _Spread(torch.autograd.Function):
    """Forward: a row for every choice, by expert. Backward: the sum of a token's. (Plain indexing would add up rows in
    an order that a GPU doesn't keep.)"""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, place: Tensor, top_k: int) -> Tensor:
        ctx.save_for_backward(place)
        ctx.top_k = top_k
        return x[order // top_k]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (place,) = ctx.saved_tensors
        return grads[0][place].unflatten(0, (-1, ctx.top_k)).sum(1), None, None, None


class _Unsort(torch.autograd.Function):
    """Forward: rows by token again. Backward: by expert."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, order: Tensor, place: Tensor) -> Tensor:
        ctx.save_for_backward(order)
        return y[place]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (order,) = ctx.saved_tensors
        return grads[0][order], None, None


def spread(x: Tensor, at: Routes) -> Tensor:
    """A token's row for each of its choices, sorted by expert: (tokens, d) -> (tokens · top_k, d)."""
    return cast(Tensor, _Spread.apply(x, at.order, at.place, at.top_k))  # type: ignore[no-untyped-call]


def combine(y: Tensor, weights: Tensor, at: Routes) -> Tensor:
    """The weighted sum of what a token's experts say, summed in fp32.

    Args:
        y: (tokens · top_k, d), sorted by expert.
        weights: (tokens, top_k), fp32.

    Returns:
        (tokens, d), of y's type.
    """
    by_token: Tensor = unsorted(y, at).unflatten(0, (-1, at.top_k))
    return (by_token * weights[..., None]).sum(1).to(y.dtype)


def unsorted(y: Tensor, at: Routes) -> Tensor:
    """Rows in the order of the choices: (tokens · top_k, d), the same shape out."""
    return cast(Tensor, _Unsort.apply(y, at.order, at.place))  # type: ignore[no-untyped-call]


# ------------------------------------------------------------------- between ranks


def all_to_all(x: Tensor, sent: list[int], received: list[int], axis: Axis) -> Tensor:
    """So many rows to each rank of the axis, so many from each; outside autograd."""
    started = torch.ops._c10d_functional.all_to_all_single(x.contiguous(), received, sent, axis.name)
    return cast(Tensor, torch.ops._c10d_functional.wait_tensor(started))


class _Travel(torch.autograd.Function):
    """Forward: rows to the ranks of their experts. Backward: their gradients back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, sent: list[int], received: list[int], axis: Axis) -> Tensor:
        ctx.sent, ctx.received, ctx.axis = sent, received, axis
        return all_to_all(x, sent, received, axis)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        return all_to_all(grads[0], ctx.received, ctx.sent, ctx.axis), None, None, None


@dataclass(frozen=True)
class Trip:
    """Rows on their way to the ranks that hold their experts, and back."""

    axis: Axis
    sent: list[int]
    """Rows to each rank."""
    received: list[int]
    at: Routes
    """How the rows that came here are sorted by this rank's experts; they come by rank."""

    def go(self, rows: Tensor) -> Tensor:
        """(choices, d), sorted by expert -> (choices of this rank's experts, d), sorted by expert."""
        return spread(self.travel(rows, self.sent, self.received), self.at)

    def back(self, y: Tensor) -> Tensor:
        """Undoes `go`."""
        return self.travel(unsorted(y, self.at), self.received, self.sent)

    def travel(self, rows: Tensor, sent: list[int], received: list[int]) -> Tensor:
        return cast(Tensor, _Travel.apply(rows, sent, received, self.axis))  # type: ignore[no-untyped-call]


def trip(counts: Tensor, axis: Axis) -> Trip:
    """Tell the ranks how many rows come to their experts. Waits for the device.

    Args:
        counts: (experts,), rows of this rank by expert; a rank of the axis holds the same number of experts.
        axis: ranks that share out the experts.
    """
    even = [len(counts) // axis.size] * axis.size
    coming = all_to_all(counts, even, even, axis).view(axis.size, -1)  # (ranks, experts / ranks)
    sent, received = torch.stack((counts.view(axis.size, -1).sum(1), coming.sum(1))).tolist()
    experts = torch.arange(even[0], device=counts.device).repeat(axis.size)
    arriving = experts.repeat_interleave(coming.flatten(), output_size=sum(received))
    return Trip(axis, sent, received, routes(arriving[:, None], even[0]))


# ------------------------------------------------------------------- products


def grouped(rows: Tensor, weight: Tensor) -> bool:
    """Whether one kernel computes all experts' products."""
    aligned = all(side % GROUPED_MULTIPLE == 0 for side in weight.shape[1:]) and weight.data_ptr() % 16 == 0
    on_gpu = rows.is_cuda and rows.dtype == torch.bfloat16 and len(rows) > 0
    return bool(on_gpu and aligned and torch.cuda.get_device_capability(rows.device) == GROUPED)


def product(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Each row times its expert's weight, x Wᵀ; differentiable. One operator, whose result selective recomputation
    keeps, and in which torch.compile sees no number of tokens.

    Args:
        rows: (choices, d_in), sorted by expert.
        weight: (experts, d_out, d_in), of the rows' type.
        ends: (experts,) int32, where an expert's rows end; the last is their number.

    Returns:
        (choices, d_out)
    """
    return cast(Tensor, expert_product(rows, weight, ends))


def each(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """``rows @ weight[expert]`` of weights (experts, d_in, d_out)."""
    if grouped(rows, weight):
        return torch._grouped_mm(rows, weight, offs=ends)
    y = rows.new_empty(len(rows), weight.shape[-1])
    start = 0
    for expert, end in enumerate(ends.tolist()):
        torch.mm(rows[start:end], weight[expert], out=y[start:end])
        start = end
    return y


def apply_product(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    return each(rows, weight.transpose(1, 2), ends)


def weight_gradient(grad: Tensor, rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """(experts, d_out, d_in): zero of an expert without tokens."""
    if grouped(rows, weight):
        return torch._grouped_mm(grad.t(), rows, offs=ends)
    of_weight = torch.empty_like(weight, memory_format=torch.contiguous_format)
    start = 0
    for expert, end in enumerate(ends.tolist()):
        torch.mm(grad[start:end].t(), rows[start:end], out=of_weight[expert])
        start = end
    return of_weight


def product_gradients(grad: Tensor, rows: Tensor, weight: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
    grad = grad.contiguous()
    return each(grad, weight, ends), weight_gradient(grad, rows, weight, ends)


expert_product = torch.library.custom_op("megamup::expert_product", apply_product, mutates_args=())
expert_gradients = torch.library.custom_op("megamup::expert_gradients", product_gradients, mutates_args=())


@expert_product.register_fake
def _(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    return rows.new_empty(len(rows), weight.shape[1])


@expert_gradients.register_fake
def _(grad: Tensor, rows: Tensor, weight: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
    return rows.new_empty(rows.shape), weight.new_empty(weight.shape)


def save_product(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def product_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
    return *expert_gradients(grad, *ctx.saved_tensors), None


expert_product.register_autograd(product_backward, setup_context=save_product)
