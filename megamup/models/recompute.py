"""Activation checkpointing: what a block keeps for its backward pass, and what it computes again (Chen et al. 2016)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, cast

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

Transform = Callable[..., Tensor]
Recompute = Callable[..., Tensor]
"""Applies a block's transform to its inputs, the residual stream first, and decides what of it is kept."""

aten, collectives = torch.ops.aten, torch.ops._c10d_functional
KEPT = {
    aten.mm.default,
    aten.addmm.default,
    aten.bmm.default,
    aten._scaled_mm.default,
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_flash_attention_for_cpu.default,
    aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_cudnn_attention.default,
    collectives.all_reduce.default,
    collectives.all_gather_into_tensor.default,
    collectives.reduce_scatter_tensor.default,
    collectives.all_to_all_single.default,
    collectives.wait_tensor.default,
}
"""What ``selective`` keeps: the results of matrix products and attention, dear to compute, and of collectives, dear to
send. All else (norms, activation functions, rotations, sums) is cheap to repeat (Korthikanti et al. 2022)."""
KEPT_BY_NAME = ("megamup::", "flash_attn::", "flash_attn_3::", "flex_attention")
"""The same of parallel/products.py, and of libraries that may not be there, by the beginning of an operator's name."""


def policy(_: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    kept = operator in KEPT or operator.name().startswith(KEPT_BY_NAME)
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


def keep_all(transform: Transform, *inputs: Tensor) -> Tensor:
    return transform(*inputs)


def full(transform: Transform, *inputs: Tensor) -> Tensor:
    """Keep the block's inputs alone."""
    return cast(Tensor, checkpoint(transform, *inputs, use_reentrant=False, preserve_rng_state=False))


def selective(transform: Transform, *inputs: Tensor) -> Tensor:
    contexts = partial(create_selective_checkpoint_contexts, policy)
    return cast(
        Tensor, checkpoint(transform, *inputs, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)
    )


def recompute(setting: Literal["none", "selective", "full"] | int, layer: int) -> Recompute:
    """How block ``layer`` treats its activations under ``train.recompute``."""
    if isinstance(setting, int):
        return full if layer % setting == 0 else keep_all
    return {"none": keep_all, "selective": selective, "full": full}[setting]
