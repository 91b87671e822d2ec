"""Readout and cross-entropy over a vocabulary that is cut over the tensor axis.

Full logits never exist: each rank has its part of the vocabulary, and `fused` of that only some rows at a time (as
Liger's kernel does; Hsu et al. 2024), in which it computes the gradients too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from megamup.kernels import cross_entropy
from megamup.parallel.collectives import all_reduce, enter, start_all_reduce
from megamup.parallel.layers import scaled
from megamup.parallel.mesh import Axis, Mesh

LOGITS_AT_A_TIME = {"cpu": 2**21, "cuda": 2**25}
"""Logits of `fused` that exist at a time, by device: 8 MiB in fp32, which a processor's caches hold (larger pieces cost
it a third more, most of it page faults), or 128 MiB, which fill a GPU."""

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
        self.rows_of_logits: RowsOfLogits = losses_and_gradients

    def forward(self, unread: Unread, labels: Labels) -> Tensor:
        (targets, weights), axis = labels, unread.mesh.tensor
        if self.backend == "reference":
            return (vocab_parallel_cross_entropy(unread.logits(), targets, axis) * weights).sum()
        hidden = enter(unread.hidden, axis, unread.mesh.sequence).flatten(0, 1)  # (tokens, d_model)
        targets, weights = targets.flatten(), weights.flatten() if weights.dim() else weights
        if self.backend == "liger":
            return cross_entropy.liger(hidden, unread.weight, targets, weights, unread.multiplier)
        return fused(hidden, unread.weight, targets, weights, unread.multiplier, axis, self.rows_of_logits)


class _VocabParallelCrossEntropy(torch.autograd.Function):
    """-log softmax(logits)[target] from three reductions over the axis: max, target's logit, sum of exponentials."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, axis: Axis) -> Tensor:
        start = axis.rank * logits.shape[-1]
        shifted = logits.float() - all_reduce(logits.amax(-1), axis, dist.ReduceOp.MAX)[..., None].float()
        elsewhere = (targets < start) | (targets >= start + logits.shape[-1])
        local = (targets - start).masked_fill(elsewhere, 0)
        picked = shifted.gather(-1, local[..., None])[..., 0].masked_fill(elsewhere, 0.0)  # (batch, seq)
        exponentials = shifted.exp_()
        picked, total = all_reduce(torch.stack((picked, exponentials.sum(-1))), axis).unbind()
        ctx.save_for_backward(exponentials.div_(total[..., None]), local, elsewhere)
        ctx.dtype = logits.dtype
        return total.log() - picked

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


RowsOfLogits = Callable[[Tensor, Tensor, Tensor, float, Axis], tuple[Tensor, Tensor]]


def losses_and_gradients(
    logits: Tensor, targets: Tensor, weights: Tensor, multiplier: float, axis: Axis
) -> tuple[Tensor, Tensor]:
    """Losses, and gradients of their weighted sum by the products that ``multiplier`` makes logits of.

    Args:
        logits: (rows, vocab / tensor), before the multiplier; overwritten where they are fp32.
        targets: (rows,), global ids.
        weights: (rows,) or one number.

    Returns:
        (rows,), and (rows, vocab / tensor) of the logits' type.
    """
    x = logits.float()
    if multiplier != 1.0:
        x = x.mul_(multiplier)
    local = targets - axis.rank * x.shape[-1]
    here = (local >= 0) & (local < x.shape[-1])
    local = local.clamp(0, x.shape[-1] - 1)[:, None]
    highest = reduced(x.amax(-1), axis, "max")
    picked = (x.gather(-1, local)[:, 0] - highest) * here
    exponentials = x.sub_(highest[:, None]).exp_()
    picked, total = reduced(torch.stack((picked, exponentials.sum(-1))), axis, "sum").unbind()
    scale = multiplier * weights
    gradient = exponentials.mul_((scale / total)[:, None])
    gradient.scatter_add_(-1, local, -(here * scale)[:, None])
    return total.log() - picked, gradient.to(logits.dtype)


def reduced(x: Tensor, axis: Axis, op: str) -> Tensor:
    return x if axis.size == 1 else start_all_reduce(x, axis.name, axis.size, op)()


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
        rows_of_logits: RowsOfLogits,
        wanted: bool,
    ) -> Tensor:
        of_hidden = torch.empty_like(hidden) if wanted else None
        of_weight = torch.zeros_like(weight, dtype=torch.float32) if wanted else None
        matrix = weight.to(hidden.dtype)
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        step = max(1, LOGITS_AT_A_TIME[hidden.device.type] // weight.shape[0])
        for start in range(0, len(hidden), step):
            rows = slice(start, start + step)
            logits = hidden[rows] @ matrix.t()  # (rows, vocab / tensor)
            at = weights[rows] if weights.dim() else weights
            losses, gradient = rows_of_logits(logits, targets[rows], at, multiplier, axis)
            total += (losses * at).sum()
            if of_hidden is not None and of_weight is not None:
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
        return of_hidden.mul_(grads[0]), of_weight, None, None, None, None, None, None


def fused(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    weights: Tensor,
    multiplier: float,
    axis: Axis,
    rows_of_logits: RowsOfLogits = losses_and_gradients,
) -> Tensor:
    """Sum of ``weights`` x losses, without the logits: differentiable once.

    Args:
        hidden: (tokens, d_model); its gradient is this rank's part of the sum over the axis.
        weight: (vocab / tensor, d_model), this rank's part of the readout.
        targets: (tokens,), global token ids.
        weights: (tokens,) or one number, fp32.
        multiplier: on the logits.
        axis: the tensor axis.
        rows_of_logits: `losses_and_gradients`, or what torch.compile made of it.

    Returns:
        One number in nats, fp32, the same on every rank of the axis.
    """
    # Asked here: in a Function's forward gradients are always off, and `needs_input_grad` is of the inputs alone.
    wanted = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    arguments = (hidden, weight, targets, weights, multiplier, axis, rows_of_logits, wanted)
    return cast(Tensor, _Fused.apply(*arguments))  # type: ignore[no-untyped-call]
