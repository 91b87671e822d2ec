"""Auxiliary losses: they add gradients, and nothing to the loss that is reported, which stays cross-entropy (law 8).

A layer puts its loss beside what goes on, and backward gives it its gradient there (as Megatron-LM's
``MoEAuxLossAutoScaler``), so that nothing but the stream travels between pipeline stages.

They are means over sequences of what one sequence's tokens give. So they are the same for any micro batches and data
ranks, unlike the usual load-balancing loss, a product of means over the tokens of a micro batch (Qiu et al. 2025).
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from megamup.parallel.collectives import start_all_reduce
from megamup.parallel.mesh import Axis, Mesh


class _Inject(torch.autograd.Function):
    """Forward: the first input. Backward: its gradient, and for the second a constant, whatever comes back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor, gradient: float) -> Tensor:
        ctx.gradient, ctx.dtype = gradient, loss.dtype
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        return grads[0], torch.full((), ctx.gradient, dtype=ctx.dtype, device=grads[0].device), None


def inject(x: Tensor, loss: Tensor, gradient: float) -> Tensor:
    """``x`` itself; where it has a gradient, ``gradient · loss`` has its own too.

    Args:
        x: any tensor that the training's loss depends on.
        loss: one number.
        gradient: of what is minimized by ``loss``, see `loss_weight`.
    """
    return cast(Tensor, _Inject.apply(x, loss, gradient))  # type: ignore[no-untyped-call]


def loss_weight(at: Mesh, micro_batches: int) -> float:
    """What a loss counts for in a rank's backward pass, to count once as a mean over the global batch's sequences.

    The loss is a mean over the sequences of a micro batch, of which a context rank computes its stretch's part, and
    every tensor rank the same where the gradients of the input are summed over the tensor axis. DeepSpeed divides what
    the loss it knows of gives by the micro batches of a step, and means gradients over data x context ranks.
    """
    return at.context.size / (micro_batches * at.tensor.size)


def load_balance(probabilities: Tensor, chosen: Tensor, context: Axis) -> Tensor:
    """Σ_e f_e·P_e of every sequence, e the experts (DeepSeek-AI 2024, equations 17 to 20; Fedus et al. 2021).

    f_e is the share of the sequence's choices that fell on e, times the number of experts; P_e the mean probability of
    e. It is 1 where either is even, and has a gradient by the probabilities only.

    Args:
        probabilities: (batch, seq, experts), or a context rank's stretch, fp32.
        chosen: (batch, seq, top_k), int64.
        context: ranks that hold the other stretches.

    Returns:
        (batch,), of which each context rank has a part: they add up.
    """
    batch, seq, experts = probabilities.shape
    counts = probabilities.new_zeros(batch, experts)
    counts.scatter_add_(1, chosen.flatten(1), counts.new_ones(()).expand(batch, chosen[0].numel()))
    if context.size > 1:
        counts = start_all_reduce(counts, context.name, context.size)()
    tokens = seq * context.size
    share = counts * (experts / (chosen.shape[-1] * tokens))
    return (share * probabilities.sum(1) / tokens).sum(-1)


def router_z(logits: Tensor, context: Axis) -> Tensor:
    """Mean over a sequence's tokens of logsumexp(logits)², which keeps logits small (Zoph et al. 2022, ST-MoE).

    Args:
        logits: (batch, seq, experts), or a context rank's stretch, fp32.

    Returns:
        (batch,), of which each context rank has a part: they add up.
    """
    return logits.logsumexp(-1).square().sum(1) / (logits.shape[1] * context.size)
