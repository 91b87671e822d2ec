"""Collectives as autograd pairs: what goes forward, and its adjoint coming back.

Over the tensor axis (Shoeybi et al. 2019, Megatron-LM, section 3; with sequence parallelism Korthikanti et al. 2022,
section 4.2.2) and over the context axis (Jacobs et al. 2023, DeepSpeed-Ulysses). They are torch's functional
collectives: started here and waited for there, so that something can be computed in between, and taken into its graph
by torch.compile, which moves the waiting itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives  # defines the operators
from torch import Tensor

from megamup.parallel.mesh import Axis

SEQ = 1
"""The dim of positions in (batch, seq, ...)."""
Pending = Callable[[], Tensor]
"""A collective that was started: a call waits for it."""


def all_reduce(x: Tensor, axis: Axis, op: Any = dist.ReduceOp.SUM) -> Tensor:
    """Reduce a copy of ``x`` over the axis; outside autograd."""
    if axis.group is None:
        return x
    x = x.detach().clone(memory_format=torch.contiguous_format)
    dist.all_reduce(x, op=op, group=axis.group)
    return x


# ------------------------------------------------------------------- started, outside autograd


def start_all_reduce(x: Tensor, group: str, size: int, op: str = "sum") -> Pending:
    """The ranks' sum (or ``max``), the same on each."""
    started = torch.ops._c10d_functional.all_reduce(x.contiguous(), op, group)
    return lambda: cast(Tensor, torch.ops._c10d_functional.wait_tensor(started))


def start_all_gather(x: Tensor, group: str, size: int) -> Pending:
    """The ranks' stretches in order: (batch, seq / size, ...) -> (batch, seq, ...), positions first in memory."""
    first = x.transpose(0, SEQ).contiguous()  # the stretches follow each other in memory; free where batch = 1
    started = torch.ops._c10d_functional.all_gather_into_tensor(first, size, group)
    return lambda: cast(Tensor, torch.ops._c10d_functional.wait_tensor(started)).transpose(0, SEQ)


def start_reduce_scatter(x: Tensor, group: str, size: int) -> Pending:
    """This rank's stretch of the ranks' sum: (batch, seq, ...) -> (batch, seq / size, ...)."""
    first = x.transpose(0, SEQ).contiguous()
    started = torch.ops._c10d_functional.reduce_scatter_tensor(first, "sum", size, group)
    # Contiguous, as pipeline stages send what lies in memory.
    return lambda: cast(Tensor, torch.ops._c10d_functional.wait_tensor(started)).transpose(0, SEQ).contiguous()


def all_to_all(x: Tensor, axis: Axis, cut: int, joined: int) -> Tensor:
    """Cut dim ``cut`` into a part for each rank, and join what the ranks send along dim ``joined``."""
    parts = torch.stack(x.chunk(axis.size, cut))  # (rank, ..., cut / size, ...)
    even = [1] * axis.size
    received = torch.ops._c10d_functional.all_to_all_single(parts, even, even, axis.name)
    return torch.cat(torch.ops._c10d_functional.wait_tensor(received).unbind(), joined)


# ------------------------------------------------------------------- autograd pairs


class _Copy(torch.autograd.Function):
    """Forward: identity. Backward: sum over the axis (f)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return start_all_reduce(grads[0], ctx.axis.name, ctx.axis.size)(), None


class _Reduce(torch.autograd.Function):
    """Forward: sum over the axis. Backward: identity (g)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        return start_all_reduce(x, axis.name, axis.size)()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


class _Gather(torch.autograd.Function):
    """Forward: all stretches. Backward: this rank's stretch of the sum."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return start_all_gather(x, axis.name, axis.size)()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return start_reduce_scatter(grads[0], ctx.axis.name, ctx.axis.size)(), None


class _ReduceScatter(torch.autograd.Function):
    """Forward: this rank's stretch of the sum. Backward: all stretches."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return start_reduce_scatter(x, axis.name, axis.size)()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return start_all_gather(grads[0], ctx.axis.name, ctx.axis.size)(), None


class _Exchange(torch.autograd.Function):
    """Forward: all-to-all. Backward: the all-to-all that undoes it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis, cut: int, joined: int) -> Tensor:
        ctx.axis, ctx.cut, ctx.joined = axis, cut, joined
        return all_to_all(x, axis, cut, joined)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        return all_to_all(grads[0], ctx.axis, ctx.joined, ctx.cut), None, None, None


def copy_to_axis(x: Tensor, axis: Axis) -> Tensor:
    """Enter a sharded region: each rank uses ``x`` for its own share, so the gradients add up.

    Likewise for a replicated parameter that each rank applies to its own stretch of the sequence.
    """
    return x if axis.size == 1 else cast(Tensor, _Copy.apply(x, axis))  # type: ignore[no-untyped-call]


def enter(x: Tensor, axis: Axis, sequence: bool) -> Tensor:
    """Enter a sharded region: (batch, seq, ...) or, with ``sequence``, a stretch of it in; (batch, seq, ...) out."""
    if axis.size > 1 and sequence:
        return cast(Tensor, _Gather.apply(x, axis))  # type: ignore[no-untyped-call]
    return copy_to_axis(x, axis)


def leave(x: Tensor, axis: Axis, sequence: bool) -> Tensor:
    """Leave a sharded region: the ranks' partial sums become the whole, or with ``sequence`` its stretch on each."""
    if axis.size == 1:
        return x
    return cast(Tensor, (_ReduceScatter if sequence else _Reduce).apply(x, axis))  # type: ignore[no-untyped-call]


def exchange(x: Tensor, axis: Axis, cut: int, joined: int) -> Tensor:
    """Hold less of dim ``cut`` and all of dim ``joined``, of which each rank of the axis had a stretch."""
    if axis.size == 1:
        return x
    return cast(Tensor, _Exchange.apply(x, axis, cut, joined))  # type: ignore[no-untyped-call]
