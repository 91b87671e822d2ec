"""Liger's fused readout and cross-entropy (Hsu et al. 2024): logits exist a few rows at a time, on one tensor rank.

`megamup.parallel.loss` has the reference and our own over a vocabulary that is cut over tensor ranks.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

IGNORED = -100


def liger(
    hidden: Tensor, weight: Tensor, targets: Tensor, weights: Tensor, multiplier: float, bias: Tensor | None = None
) -> Tensor:
    """Sum of weights · cross-entropy(multiplier · hidden Wᵀ + bias), a scalar in fp32.

    Where all weights but zeros are equal, as a mask's are, gradients are computed with the loss. Else logits are
    computed again in the backward pass, since each row's gradient has to be weighted before rows are summed.

    The multiplier is applied to the weight before that is cast, so that masters in fp32 are rounded once, as they would
    be without it. bf16 weights are rounded a second time unless it is a power of two; so would hidden states be.

    Args:
        hidden: (tokens, d_model).
        weight: (vocab, d_model), of any float type; its gradient is summed over rows in fp32.
        targets: (tokens,), int64; below zero where no token is meant.
        weights: (tokens,), or one number.
        multiplier: the readout's.
        bias: (vocab,)
    """
    matrix = (weight if multiplier == 1.0 else weight * multiplier).to(hidden.dtype)
    added = None if bias is None else bias.to(hidden.dtype)
    if weights.dim() == 0:
        return fused(hidden, matrix, added, targets.masked_fill(targets < 0, IGNORED), "sum") * weights
    factor = weights.amax()
    counted = targets.masked_fill((targets < 0) | (weights == 0), IGNORED)
    if bool(((weights == 0) | (weights == factor)).all()):
        return fused(hidden, matrix, added, counted, "sum") * factor
    return (fused(hidden, matrix, added, counted, "none") * weights).sum()


def fused(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, reduction: str) -> Tensor:
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    class_weights = softcap = None
    z_loss, smoothing, return_z_loss = 0.0, 0.0, False
    loss, *_ = LigerFusedLinearCrossEntropyFunction.apply(
        hidden, weight, targets, bias, class_weights, IGNORED, z_loss, smoothing, reduction, softcap, return_z_loss,
        torch.float32,  # type of the sums over rows
    )  # fmt: skip
    return cast(Tensor, loss)
