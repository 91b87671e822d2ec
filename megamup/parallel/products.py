"""Products with weights that are cut over the tensor axis, each one operator together with its collective.

As one operator, a collective runs beside the products that don't wait for it whether or not torch compiles what is
around, and activation checkpointing keeps the result alone: neither a gathered input nor partial sums of the whole.
(Shoeybi et al. 2019, section 3; with ``sequence`` Korthikanti et al. 2022, section 4.2.2.)

Under ``sequence`` positions come first in memory, (seq, batch, d), as stretches of them are what is sent.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from megamup.parallel.collectives import SEQ, start_all_gather, start_all_reduce, start_reduce_scatter
from megamup.parallel.mesh import Axis


def column_products(x: Tensor, weights: tuple[Tensor, ...], axis: Axis, sequence: bool) -> tuple[Tensor, ...]:
    """``x Wᵀ`` for every weight, entering the sharded region once.

    Args:
        x: (batch, seq, d_in), or with ``sequence`` this rank's stretch of it.
        weights: (d_out / size, d_in) each.

    Returns:
        (batch, seq, d_out / size) each.
    """
    if axis.size == 1:
        return tuple(F.linear(x, weight) for weight in weights)
    return tuple(column_operator(x, list(weights), axis.name, axis.size, sequence))


def row_product(x: Tensor, weight: Tensor, axis: Axis, sequence: bool) -> Tensor:
    """The ranks' sum of ``x Wᵀ``, leaving the sharded region.

    Args:
        x: (batch, seq, d_in / size).
        weight: (d_out, d_in / size).

    Returns:
        (batch, seq, d_out), or with ``sequence`` this rank's stretch of it.
    """
    if axis.size == 1:
        return F.linear(x, weight)
    return cast(Tensor, row_operator(x, weight, axis.name, axis.size, sequence))


def rows(x: Tensor, sequence: bool) -> Tensor:
    """(batch, seq, d) -> (batch · seq, d), or with ``sequence`` (seq · batch, d)."""
    return (x.transpose(0, SEQ) if sequence else x).flatten(0, 1)


def unrows(x: Tensor, like: Tensor, seq: int, sequence: bool) -> Tensor:
    """Undoes `rows`: (tokens, d) -> (batch, seq, d), with the batch of ``like``."""
    batch = like.shape[0]
    return x.view(seq, batch, -1).transpose(0, SEQ) if sequence else x.view(batch, seq, -1)


# ------------------------------------------------------------------- column


def apply_column(x: Tensor, weights: list[Tensor], group: str, size: int, sequence: bool) -> list[Tensor]:
    whole = start_all_gather(x, group, size)() if sequence else x
    tokens = rows(whole, sequence)
    return [unrows(tokens @ weight.t(), whole, whole.shape[SEQ], sequence) for weight in weights]


column_operator = torch.library.custom_op("megamup::column_products", apply_column, mutates_args=())


@column_operator.register_fake
def _(x: Tensor, weights: list[Tensor], group: str, size: int, sequence: bool) -> list[Tensor]:
    batch, seq = x.shape[0], x.shape[SEQ] * (size if sequence else 1)
    return [unrows(x.new_empty(batch * seq, len(weight)), x, seq, sequence) for weight in weights]


def column_gradients(
    grads: list[Tensor], x: Tensor, weights: list[Tensor], group: str, size: int, sequence: bool
) -> list[Tensor]:
    """Gradients of the input and of each weight.

    With ``sequence`` the input is gathered again while its gradient is computed; the sum of that over the axis runs
    while the weights' are.
    """
    gathering = start_all_gather(x, group, size) if sequence else lambda: x
    of_rows = [rows(grad, sequence) for grad in grads]
    of_tokens = of_rows[0] @ weights[0]
    for grad, weight in zip(of_rows[1:], weights[1:], strict=True):
        of_tokens.addmm_(grad, weight)
    seq = grads[0].shape[SEQ]
    of_input = unrows(of_tokens, x, seq, sequence)
    reducing = (start_reduce_scatter if sequence else start_all_reduce)(of_input, group, size)
    tokens = rows(gathering(), sequence)
    of_weights = [grad.t() @ tokens for grad in of_rows]
    return [reducing(), *of_weights]


column_gradients_operator = torch.library.custom_op("megamup::column_gradients", column_gradients, mutates_args=())


@column_gradients_operator.register_fake
def _(grads: list[Tensor], x: Tensor, weights: list[Tensor], group: str, size: int, sequence: bool) -> list[Tensor]:
    return [x.new_empty(x.shape), *(weight.new_empty(weight.shape) for weight in weights)]


def save_column(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    x, weights, *ctx.at = inputs
    ctx.save_for_backward(x, *weights)


def column_backward(ctx: Any, grads: list[Tensor]) -> tuple[Any, ...]:
    x, *weights = ctx.saved_tensors
    of_input, *of_weights = column_gradients_operator(grads, x, weights, *ctx.at)
    return of_input, of_weights, None, None, None


column_operator.register_autograd(column_backward, setup_context=save_column)


# ------------------------------------------------------------------- row


def apply_row(x: Tensor, weight: Tensor, group: str, size: int, sequence: bool) -> Tensor:
    partial = unrows(rows(x, sequence) @ weight.t(), x, x.shape[SEQ], sequence)
    return (start_reduce_scatter if sequence else start_all_reduce)(partial, group, size)()


row_operator = torch.library.custom_op("megamup::row_product", apply_row, mutates_args=())


@row_operator.register_fake
def _(x: Tensor, weight: Tensor, group: str, size: int, sequence: bool) -> Tensor:
    return x.new_empty(x.shape[0], x.shape[SEQ] // (size if sequence else 1), len(weight))


def row_gradients(
    grad: Tensor, x: Tensor, weight: Tensor, group: str, size: int, sequence: bool
) -> tuple[Tensor, Tensor]:
    whole = start_all_gather(grad, group, size)() if sequence else grad
    of_rows = rows(whole, sequence)
    return unrows(of_rows @ weight, x, x.shape[SEQ], sequence), of_rows.t() @ rows(x, sequence)


row_gradients_operator = torch.library.custom_op("megamup::row_gradients", row_gradients, mutates_args=())


@row_gradients_operator.register_fake
def _(grad: Tensor, x: Tensor, weight: Tensor, group: str, size: int, sequence: bool) -> tuple[Tensor, Tensor]:
    tokens = x.new_empty(x.shape[0] * x.shape[SEQ], x.shape[-1])
    return unrows(tokens, x, x.shape[SEQ], sequence), weight.new_empty(weight.shape)


def save_row(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, *ctx.at = inputs
    ctx.save_for_backward(x, weight)


def row_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    of_input, of_weight = row_gradients_operator(grad, *ctx.saved_tensors, *ctx.at)
    return of_input, of_weight, None, None, None


row_operator.register_autograd(row_backward, setup_context=save_row)
