"""Readout and cross-entropy over a vocabulary that is cut over the tensor axis.

Full logits never exist: each rank has its part of the vocabulary, and `fused` of that only some rows at a time (as
Liger's kernel does; Hsu et al. 2024), in which it computes the gradients too.

A z-loss (Chowdhery et al. 2022, section 5: a factor on log² of the softmax's denominator, which keeps logits from
drifting) adds its gradients alone: the loss that is returned stays the cross-entropy.
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
class Head:
    """From the readout's products to logits and what is minimized: logits are cap(multiplier · product + bias)."""

    multiplier: float = 1.0
    soft_cap: float | None = None
    """c·tanh(x/c), which keeps x within ±c (Gemma team 2024)."""
    z_loss: float = 0.0
    """Factor on logsumexp² of the logits."""


@dataclass(frozen=True)
class Unread:
    """A model's output before its logits, which are the largest tensor of all: a loss needs but some at a time."""

    hidden: Tensor
    """(batch, seq, d_model), or this tensor rank's stretch of it."""
    weight: Tensor
    """(vocab / tensor, d_model)"""
    multiplier: float
    mesh: Mesh
    soft_cap: float | None = None
    """As `Head` says."""
    bias: Tensor | None = None
    """(vocab / tensor,)"""

    def logits(self) -> Tensor:
        """(batch, seq, vocab / tensor)"""
        return self.read(enter(self.hidden, self.mesh.tensor, self.mesh.sequence))

    def pieces(self, size: int) -> Iterator[Tensor]:
        """The logits, about ``size`` of them at a time: (tokens, vocab / tensor)."""
        hidden = enter(self.hidden, self.mesh.tensor, self.mesh.sequence).flatten(0, 1)
        return map(self.read, hidden.split(max(1, size // self.weight.shape[0])))

    def read(self, hidden: Tensor) -> Tensor:
        logits = scaled(F.linear(hidden, self.weight.to(hidden.dtype)), self.multiplier)
        if self.bias is not None:
            logits = logits + self.bias.to(logits.dtype)
        return logits if self.soft_cap is None else self.soft_cap * torch.tanh(logits / self.soft_cap)


class CrossEntropy(nn.Module):
    """Sum of weights x losses of a model's output: one number in nats, fp32, the same on every tensor rank.

    A module so that what watches a model finds its output here, whatever the layout.

    Args:
        backend: of ``kernels.cross_entropy``.
        z_loss: the factor of a z-loss, whose gradients are added; 0 for none.
    """

    def __init__(self, backend: str, z_loss: float = 0.0) -> None:
        super().__init__()
        self.backend, self.z_loss = backend, z_loss
        self.rows_of_logits: RowsOfLogits = losses_and_gradients

    def forward(self, unread: Unread, labels: Labels) -> Tensor:
        (targets, weights), axis = labels, unread.mesh.tensor
        if self.backend == "reference":
            losses = vocab_parallel_cross_entropy(unread.logits(), targets, axis, self.z_loss)
            return (losses * weights).sum()
        hidden = enter(unread.hidden, axis, unread.mesh.sequence).flatten(0, 1)  # (tokens, d_model)
        targets, weights = targets.flatten(), weights.flatten() if weights.dim() else weights
        if self.backend == "liger":
            assert unread.soft_cap is None
            assert not self.z_loss
            return cross_entropy.liger(hidden, unread.weight, targets, weights, unread.multiplier, unread.bias)
        head = Head(unread.multiplier, unread.soft_cap, self.z_loss)
        return fused(hidden, unread.weight, targets, weights, head, axis, unread.bias, self.rows_of_logits)


class _VocabParallelCrossEntropy(torch.autograd.Function):
    """-log softmax(logits)[target] from three reductions over the axis: max, target's logit, sum of exponentials."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, axis: Axis, z_loss: float) -> Tensor:
        start = axis.rank * logits.shape[-1]
        highest = all_reduce(logits.amax(-1), axis, dist.ReduceOp.MAX).float()
        shifted = logits.float() - highest[..., None]
        elsewhere = (targets < start) | (targets >= start + logits.shape[-1])
        local = (targets - start).masked_fill(elsewhere, 0)
        picked = shifted.gather(-1, local[..., None])[..., 0].masked_fill(elsewhere, 0.0)  # (batch, seq)
        exponentials = shifted.exp_()
        picked, total = all_reduce(torch.stack((picked, exponentials.sum(-1))), axis).unbind()
        growth = 1 + 2 * z_loss * (highest + total.log()) if z_loss else None  # of the softmax's share in the gradient
        ctx.save_for_backward(exponentials.div_(total[..., None]), local, elsewhere, growth)
        ctx.dtype = logits.dtype
        return total.log() - picked

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        softmax, local, elsewhere, growth = ctx.saved_tensors
        here = (~elsewhere).to(softmax.dtype)[..., None]
        share = softmax if growth is None else softmax * growth[..., None]
        gradient = share.scatter_add(-1, local[..., None], -here)
        return gradient.mul_(grads[0][..., None]).to(ctx.dtype), None, None, None


def vocab_parallel_cross_entropy(logits: Tensor, targets: Tensor, axis: Axis, z_loss: float = 0.0) -> Tensor:
    """Loss of every token, in nats and fp32: the plain reference of `fused`.

    Args:
        logits: (..., vocab / tensor), this rank's part of the vocabulary.
        targets: (...), global token ids; below zero where no token is meant, whose loss is to be weighted by zero.
        axis: the tensor axis.
        z_loss: adds the gradients of this times logsumexp² to each token's, and nothing to its loss.

    Returns:
        (...), the same on every rank of the axis.
    """
    return cast(Tensor, _VocabParallelCrossEntropy.apply(logits, targets, axis, z_loss))  # type: ignore[no-untyped-call]


Gradients = tuple[Tensor, Tensor | None]
"""By the products that logits are made of, (rows, vocab / tensor), and by the bias, (vocab / tensor,), if there is."""
RowsOfLogits = Callable[
    [Tensor, Tensor, Tensor, Tensor | None, Head, Axis, bool],
    tuple[Tensor, Gradients | None],
]


def losses_and_gradients(
    products: Tensor, targets: Tensor, weights: Tensor, bias: Tensor | None, head: Head, axis: Axis, wanted: bool
) -> tuple[Tensor, Gradients | None]:
    """Losses, and gradients of their weighted sum by the products that logits are made of.

    Args:
        products: (rows, vocab / tensor); overwritten where they are fp32.
        targets: (rows,), global ids, or below zero.
        weights: (rows,) or one number.
        bias: (vocab / tensor,)
        head: what makes logits of products.
        axis: the tensor axis.
        wanted: whether gradients are.

    Returns:
        (rows,), and where they are wanted the gradients: the products' of their type, the bias's in fp32.
    """
    x = products.float()
    if head.multiplier != 1.0:
        x = x.mul_(head.multiplier)
    if bias is not None:
        x = x.add_(bias)
    slope = None  # of the cap, at each logit
    if head.soft_cap is not None:
        x = x.div_(head.soft_cap).tanh_()
        slope = 1 - x.square() if wanted else None
        x = x.mul_(head.soft_cap)
    local = targets - axis.rank * x.shape[-1]
    here = (local >= 0) & (local < x.shape[-1])
    local = local.clamp(0, x.shape[-1] - 1)[:, None]
    highest = reduced(x.amax(-1), axis, "max")
    picked = (x.gather(-1, local)[:, 0] - highest) * here
    exponentials = x.sub_(highest[:, None]).exp_()
    picked, total = reduced(torch.stack((picked, exponentials.sum(-1))), axis, "sum").unbind()
    losses = total.log() - picked
    if not wanted:
        return losses, None
    scale = head.multiplier * weights
    share = scale / total
    if head.z_loss:
        share = share * (1 + 2 * head.z_loss * (highest + total.log()))
    gradient = exponentials.mul_(share[:, None])
    gradient.scatter_add_(-1, local, -(here * scale)[:, None])
    if slope is not None:
        gradient = gradient.mul_(slope)
    of_bias = None if bias is None else gradient.sum(0) / head.multiplier
    return losses, (gradient.to(products.dtype), of_bias)


def reduced(x: Tensor, axis: Axis, op: str) -> Tensor:
    return x if axis.size == 1 else start_all_reduce(x, axis.name, axis.size, op)()


class _Fused(torch.autograd.Function):
    """Gradients come with the loss, so that no row's logits are computed twice or kept; backward only scales them."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        weights: Tensor,
        head: Head,
        axis: Axis,
        rows_of_logits: RowsOfLogits,
        wanted: bool,
    ) -> Tensor:
        of_hidden = torch.empty_like(hidden) if wanted else None
        of_weight = torch.zeros_like(weight, dtype=torch.float32) if wanted else None
        of_bias = torch.zeros_like(bias, dtype=torch.float32) if wanted and bias is not None else None
        matrix = weight.to(hidden.dtype)
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        step = max(1, LOGITS_AT_A_TIME[hidden.device.type] // weight.shape[0])
        for start in range(0, len(hidden), step):
            rows = slice(start, start + step)
            products = hidden[rows] @ matrix.t()  # (rows, vocab / tensor)
            at = weights[rows] if weights.dim() else weights
            losses, gradients = rows_of_logits(products, targets[rows], at, bias, head, axis, wanted)
            total += (losses * at).sum()
            if gradients is not None and of_hidden is not None and of_weight is not None:
                gradient, of_bias_here = gradients
                torch.mm(gradient, matrix, out=of_hidden[rows])
                if hidden.dtype == torch.float32:
                    of_weight.addmm_(gradient.t(), hidden[rows])
                else:  # summed over the pieces in fp32
                    of_weight += gradient.t() @ hidden[rows]
                if of_bias is not None and of_bias_here is not None:
                    of_bias += of_bias_here
                del gradient
            del products, gradients  # before the next rows' exist
        ctx.dtype, ctx.bias_dtype = weight.dtype, None if bias is None else bias.dtype
        ctx.save_for_backward(of_hidden, of_weight, of_bias)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        of_hidden, of_weight, of_bias = ctx.saved_tensors
        of_weight = of_weight.mul_(grads[0]).to(ctx.dtype)
        if of_bias is not None:
            of_bias = of_bias.mul_(grads[0]).to(ctx.bias_dtype)
        return of_hidden.mul_(grads[0]), of_weight, of_bias, None, None, None, None, None, None


def fused(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    weights: Tensor,
    head: Head,
    axis: Axis,
    bias: Tensor | None = None,
    rows_of_logits: RowsOfLogits = losses_and_gradients,
) -> Tensor:
    """Sum of ``weights`` x losses, without the logits: differentiable once.

    Args:
        hidden: (tokens, d_model); its gradient is this rank's part of the sum over the axis.
        weight: (vocab / tensor, d_model), this rank's part of the readout.
        targets: (tokens,), global token ids; below zero where no token is meant, whose weight is to be zero.
        weights: (tokens,) or one number, fp32.
        head: what makes logits of products, and its z-loss.
        axis: the tensor axis.
        bias: (vocab / tensor,), on the logits.
        rows_of_logits: `losses_and_gradients`, or what torch.compile made of it.

    Returns:
        One number in nats, fp32, the same on every rank of the axis.
    """
    # Asked here: in a Function's forward gradients are always off, and `needs_input_grad` is of the inputs alone.
    learned = (hidden, weight) if bias is None else (hidden, weight, bias)
    wanted = torch.is_grad_enabled() and any(x.requires_grad for x in learned)
    arguments = (hidden, weight, bias, targets, weights, head, axis, rows_of_logits, wanted)
    return cast(Tensor, _Fused.apply(*arguments))  # type: ignore[no-untyped-call]
