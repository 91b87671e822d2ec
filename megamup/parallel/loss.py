"""Readout and cross-entropy over a vocabulary that is cut over the tensor axis.

Full logits never exist: each rank has its part of the vocabulary, and `fused` of that only some rows at a time (as
Liger's kernel does; Hsu et al. 2024), in which it computes the gradients too.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from megamup.kernels import cross_entropy
from megamup.parallel.collectives import all_reduce, enter
from megamup.parallel.layers import scaled
from megamup.parallel.mesh import Axis, Mesh

LOGITS_AT_A_TIME = 2**25
"""Logits of `fused` that exist at a time: 128 MiB in fp32."""

Labels = tuple[Tensor, Tensor]
"""Targets (batch, seq), int64; and the weights of their losses (batch, seq), or one number."""


@dataclass(frozen=True)
class Unread:
    """A model's output before its logits, which are the largest tensor of all: a loss needs but some at a time."""

    hidden: Tensor
    """(batch, seq, d_model), or this tensor rank's stretch of it."""
    weight: Tensor
    """(vocab / tensor, d_model)"""
    multiplier: float
    mesh: Mesh

    def logits(self) -> Tensor:
        """(batch, seq, vocab / tensor)"""
        return self.read(enter(self.hidden, self.mesh.tensor, self.mesh.sequence))

    def pieces(self, size: int) -> Iterator[Tensor]:
        """The logits, about ``size`` of them at a time: (tokens, vocab / tensor)."""
        hidden = enter(self.hidden, self.mesh.tensor, self.mesh.sequence).flatten(0, 1)
        return map(self.read, hidden.split(max(1, size // self.weight.shape[0])))

    def read(self, hidden: Tensor) -> Tensor:
        return scaled(F.linear(hidden, self.weight.to(hidden.dtype)), self.multiplier)


class CrossEntropy(nn.Module):
    """Sum of weights x losses of a model's output: one number in nats, fp32, the same on every tensor rank.

    A module so that what watches a model finds its output here, whatever the layout.
    """

    def __init__(self, backend: str) -> None:
        super().__init__()
        self.backend = backend

    def forward(self, unread: Unread, labels: Labels) -> Tensor:
        (targets, weights), axis = labels, unread.mesh.tensor
        if self.backend == "reference":
            return (vocab_parallel_cross_entropy(unread.logits(), targets, axis) * weights).sum()
        hidden = enter(unread.hidden, axis, unread.mesh.sequence).flatten(0, 1)  # (tokens, d_model)
        targets, weights = targets.flatten(), weights.flatten() if weights.dim() else weights
        if self.backend == "liger":
            return cross_entropy.liger(hidden, unread.weight, targets, weights, unread.multiplier)
        return fused(hidden, unread.weight, targets, weights, unread.multiplier, axis)


def softmax_and_losses(logits: Tensor, targets: Tensor, axis: Axis) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Softmax and -log softmax[target] from three reductions over the axis: max, target's logit, sum of exponentials.

    Args:
        logits: (rows, vocab / tensor), fp32; overwritten.
        targets: (rows,), global ids.

    Returns:
        This rank's part of the softmax (rows, vocab / tensor), losses in nats (rows,), each target's place in this
        rank's part (rows,), and whether it lies elsewhere (rows,).
    """
    start = axis.rank * logits.shape[-1]
    logits -= all_reduce(logits.amax(-1), axis, dist.ReduceOp.MAX)[..., None]
    elsewhere = (targets < start) | (targets >= start + logits.shape[-1])
    local = (targets - start).masked_fill(elsewhere, 0)
    picked = logits.gather(-1, local[..., None])[..., 0].masked_fill(elsewhere, 0.0)
    exponentials = logits.exp_()
    total = exponentials.sum(-1)
    picked, total = all_reduce(torch.stack((picked, total)), axis).unbind()
    return exponentials.div_(total[..., None]), total.log() - picked, local, elsewhere


class _VocabParallelCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, axis: Axis) -> Tensor:
        fp32 = logits.float() if logits.dtype != torch.float32 else logits.clone()
        softmax, losses, local, elsewhere = softmax_and_losses(fp32, targets, axis)
        ctx.save_for_backward(softmax, local, elsewhere)
        ctx.dtype = logits.dtype
        return losses

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        softmax, local, elsewhere = ctx.saved_tensors
        here = (~elsewhere).to(softmax.dtype)[..., None]
        gradient = softmax.scatter_add(-1, local[..., None], -here)
        return gradient.mul_(grads[0][..., None]).to(ctx.dtype), None, None


def vocab_parallel_cross_entropy(logits: Tensor, targets: Tensor, axis: Axis) -> Tensor:
    """Loss of every token, in nats and fp32: the plain reference of `fused`.

    Args:
        logits: (..., vocab / tensor), this rank's part of the vocabulary.
        targets: (...), global token ids.
        axis: the tensor axis.

    Returns:
        (...), the same on every rank of the axis.
    """
    return cast(Tensor, _VocabParallelCrossEntropy.apply(logits, targets, axis))  # type: ignore[no-untyped-call]


class _Fused(torch.autograd.Function):
    """Gradients come with the loss, so that no row's logits are computed twice or kept; backward only scales them."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        weights: Tensor,
        multiplier: float,
        axis: Axis,
        wanted: bool,
    ) -> Tensor:
        of_hidden = torch.empty_like(hidden) if wanted else None
        of_weight = torch.zeros_like(weight, dtype=torch.float32) if wanted else None
        matrix = weight.to(hidden.dtype)
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        step = max(1, LOGITS_AT_A_TIME // weight.shape[0])
        for start in range(0, len(hidden), step):
            rows = slice(start, start + step)
            logits = (hidden[rows] @ matrix.t()).float().mul_(multiplier)  # (rows, vocab / tensor)
            gradient, losses, local, elsewhere = softmax_and_losses(logits, targets[rows], axis)
            at = weights[rows] if weights.dim() else weights
            total += (losses * at).sum()
            if of_hidden is None or of_weight is None:
                continue
            gradient.scatter_add_(-1, local[:, None], -(~elsewhere).to(gradient.dtype)[:, None])
            gradient *= (multiplier * at)[..., None]
            gradient = gradient.to(hidden.dtype)
            torch.mm(gradient, matrix, out=of_hidden[rows])
            if hidden.dtype == torch.float32:
                of_weight.addmm_(gradient.t(), hidden[rows])
            else:  # summed over the pieces in fp32
                of_weight += gradient.t() @ hidden[rows]
            del logits, gradient  # before the next rows' exist
        ctx.dtype = weight.dtype
        ctx.save_for_backward(of_hidden, of_weight)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        of_hidden, of_weight = ctx.saved_tensors
        of_weight = of_weight.mul_(grads[0]).to(ctx.dtype)
        return of_hidden.mul_(grads[0]), of_weight, None, None, None, None, None


def fused(hidden: Tensor, weight: Tensor, targets: Tensor, weights: Tensor, multiplier: float, axis: Axis) -> Tensor:
    """Sum of ``weights`` x losses, without the logits: differentiable once.

    Args:
        hidden: (tokens, d_model); its gradient is this rank's part of the sum over the axis.
        weight: (vocab / tensor, d_model), this rank's part of the readout.
        targets: (tokens,), global token ids.
        weights: (tokens,) or one number, fp32.
        multiplier: on the logits.
        axis: the tensor axis.

    Returns:
        One number in nats, fp32, the same on every rank of the axis.
    """
    # Asked here: in a Function's forward gradients are always off, and `needs_input_grad` is of the inputs alone.
    wanted = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    loss: Any = _Fused.apply(hidden, weight, targets, weights, multiplier, axis, wanted)  # type: ignore[no-untyped-call]
    return cast(Tensor, loss)
