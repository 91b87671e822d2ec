"""Liger's fused readout and cross-entropy (Hsu et al. 2024): logits exist a few rows at a time, on one tensor rank.

`megamup.parallel.loss` has the reference and our own over a vocabulary that is cut over tensor ranks.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

IGNORED = -100


def liger(hidden: Tensor, weight: Tensor, targets: Tensor, weights: Tensor, multiplier: float) -> Tensor:
    """Sum of weights · cross-entropy(multiplier · hidden Wᵀ), a scalar in fp32.

    Where all weights but zeros are equal, as a mask's are, gradients are computed with the loss. Else logits are
    computed again in the backward pass, since each row's gradient has to be weighted before rows are summed.

    Args:
        hidden: (tokens, d_model).
        weight: (vocab, d_model), of any float type; its gradient is summed over rows in fp32.
        targets: (tokens,), int64.
        weights: (tokens,), or one number.
        multiplier: the readout's.
    """
    matrix = weight.to(hidden.dtype)
    scaled = hidden if multiplier == 1.0 else hidden * multiplier
    if weights.dim() == 0:
        return fused(scaled, matrix, targets, "sum") * weights
    factor = weights.amax()
    if bool(((weights == 0) | (weights == factor)).all()):
        return fused(scaled, matrix, targets.masked_fill(weights == 0, IGNORED), "sum") * factor
    return (fused(scaled, matrix, targets, "none") * weights).sum()


def fused(hidden: Tensor, weight: Tensor, targets: Tensor, reduction: str) -> Tensor:
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    bias = class_weights = softcap = None
    z_loss, smoothing, return_z_loss = 0.0, 0.0, False
    loss, *_ = LigerFusedLinearCrossEntropyFunction.apply(
        hidden, weight, targets, bias, class_weights, IGNORED, z_loss, smoothing, reduction, softcap, return_z_loss,
        torch.float32,  # type of the sums over rows
    )  # fmt: skip
    return cast(Tensor, loss)
