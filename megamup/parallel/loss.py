"""Cross-entropy over logits whose vocabulary is cut over the tensor axis; full logits never exist."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from megamup.parallel.collectives import all_reduce
from megamup.parallel.mesh import Axis


class _VocabParallelCrossEntropy(torch.autograd.Function):
    """-log softmax(logits)[target] from three reductions of (batch, seq): max, target's logit, sum of exponentials."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, axis: Axis) -> Tensor:
        logits = logits.float()  # (batch, seq, vocab / tensor)
        start = axis.rank * logits.shape[-1]
        shifted = logits - all_reduce(logits.amax(-1), axis, dist.ReduceOp.MAX)[..., None]
        elsewhere = (targets < start) | (targets >= start + logits.shape[-1])
        local = (targets - start).masked_fill(elsewhere, 0)
        picked = shifted.gather(-1, local[..., None])[..., 0].masked_fill(elsewhere, 0.0)  # (batch, seq)
        exponentials = shifted.exp_()
        total = exponentials.sum(-1)
        picked, total = all_reduce(torch.stack((picked, total)), axis).unbind()
        ctx.save_for_backward(exponentials.div_(total[..., None]), local, elsewhere)
        return total.log() - picked

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        softmax, local, elsewhere = ctx.saved_tensors
        here = (~elsewhere).to(softmax.dtype)[..., None]
        gradient = softmax.scatter_add(-1, local[..., None], -here)
        return gradient.mul_(grads[0][..., None]), None, None


def vocab_parallel_cross_entropy(logits: Tensor, targets: Tensor, axis: Axis) -> Tensor:
    """Loss of every token, in nats and fp32.

    Args:
        logits: (batch, seq, vocab / tensor), this rank's part of the vocabulary.
        targets: (batch, seq), global token ids.
        axis: the tensor axis.

    Returns:
        (batch, seq), the same on every rank of the axis.
    """
    return cast(Tensor, _VocabParallelCrossEntropy.apply(logits, targets, axis))  # type: ignore[no-untyped-call]
