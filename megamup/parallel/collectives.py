"""Collectives over the tensor axis as autograd pairs: what goes forward, and its adjoint coming back.

(Shoeybi et al. 2019, Megatron-LM, section 3: the conjugate operators f and g.)
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from megamup.parallel.mesh import Axis


def all_reduce(x: Tensor, axis: Axis, op: Any = dist.ReduceOp.SUM) -> Tensor:
    """Reduce a copy of ``x`` over the axis; outside autograd."""
    if axis.group is None:
        return x
    x = x.detach().clone(memory_format=torch.contiguous_format)
    dist.all_reduce(x, op=op, group=axis.group)
    return x


class _Copy(torch.autograd.Function):
    """Forward: identity. Backward: sum over the axis (f)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return all_reduce(grads[0], ctx.axis), None


class _Reduce(torch.autograd.Function):
    """Forward: sum over the axis. Backward: identity (g)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        return all_reduce(x, axis)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


def copy_to_axis(x: Tensor, axis: Axis) -> Tensor:
    """Enter a sharded region: each rank uses ``x`` for its own share, so the gradients add up."""
    return x if axis.size == 1 else cast(Tensor, _Copy.apply(x, axis))  # type: ignore[no-untyped-call]


def reduce_from_axis(x: Tensor, axis: Axis) -> Tensor:
    """Leave a sharded region: the ranks' partial sums become the whole on each of them."""
    return x if axis.size == 1 else cast(Tensor, _Reduce.apply(x, axis))  # type: ignore[no-untyped-call]
