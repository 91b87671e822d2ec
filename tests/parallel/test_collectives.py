"""Collectives as autograd pairs: their definition forward, their adjoint backward, and what runs behind what."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megamup.config import Config
from megamup.kernels.attention import CAUSAL, Scores
from megamup.models.attention import Attention, Sight
from megamup.models.build import context
from megamup.mup import block_scales
from megamup.parallel.collectives import SEQ, copy_to_axis, enter, exchange, leave
from megamup.parallel.mesh import Axis, build_mesh
from megamup.parallel.products import column_gradients, column_products, row_product
from megamup.sections import Parallel
from megamup.train import distributed
from megamup.train.fork import run_ranks

RANKS = [2, 4]
BATCHES = [1, 3]
LONG, SHORT, WIDE = 8, 2, 4
"""Positions of the whole sequence and of a rank's stretch of 4, and what else is cut into 4 or is not."""


def tensor_axis(size: int) -> Axis:
    distributed.join()
    return build_mesh(Parallel(tensor=size)).tensor


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def reversed_strides(seed: int, *shape: int) -> Tensor:
    """Dims in memory from last to first."""
    return draw(seed, *reversed(shape)).permute(*reversed(range(len(shape))))


def every_second(seed: int, *shape: int) -> Tensor:
    """With gaps in memory."""
    return draw(seed, *shape[:-1], 2 * shape[-1])[..., ::2]


def expanded(seed: int, *shape: int) -> Tensor:
    """One number at every place, as the gradient of a sum is."""
    return draw(seed, 1).expand(shape)


STRIDES: dict[str, Callable[..., Tensor]] = {
    "contiguous": draw,
    "reversed": reversed_strides,
    "gaps": every_second,
    "expanded": expanded,
}


# --------------------------------------------------------------------------- forward by definition, backward adjoint


@dataclass(frozen=True)
class Pair:
    apply: Callable[[Tensor, Axis], Tensor]
    expected: Callable[[Sequence[Tensor], int], Tensor]
    """The output of one rank from the inputs of all."""
    shape: Callable[[int], tuple[int, ...]]
    """Of the input without its batch, for a number of ranks."""
    one_input: bool = False
    """All ranks hold the same input: one vector, not one a rank."""
    one_output: bool = False


def whole(_: int) -> tuple[int, ...]:
    return LONG, WIDE, 3


def stretch_of(size: int) -> tuple[int, ...]:
    return LONG // size, WIDE, 3


def part(x: Tensor, rank: int, ranks: int, dim: int) -> Tensor:
    return x.chunk(ranks, dim)[rank]


PAIRS = {
    "copy": Pair(copy_to_axis, lambda xs, rank: xs[rank], whole, one_input=True),
    "enter": Pair(partial(enter, sequence=False), lambda xs, rank: xs[rank], whole, one_input=True),
    "enter_sequence": Pair(partial(enter, sequence=True), lambda xs, rank: torch.cat(list(xs), SEQ), stretch_of),
    "leave": Pair(partial(leave, sequence=False), lambda xs, rank: sum_of(xs), whole, one_output=True),
    "leave_sequence": Pair(partial(leave, sequence=True), lambda xs, rank: part(sum_of(xs), rank, len(xs), SEQ), whole),
    "exchange": Pair(
        partial(exchange, cut=2, joined=1),
        lambda xs, rank: torch.cat([part(x, rank, len(xs), 2) for x in xs], 1),
        stretch_of,
    ),
    "exchange_back": Pair(
        partial(exchange, cut=1, joined=2),
        lambda xs, rank: torch.cat([part(x, rank, len(xs), 1) for x in xs], 2),
        whole,
    ),
}


def sum_of(xs: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(xs)).sum(0)


def products(one: bool, pieces: Sequence[tuple[Tensor, Tensor]]) -> float:
    """Inner product of what all ranks hold; of replicas, which must be alike, one counts."""
    if one:
        assert all(torch.equal(a, pieces[0][0]) and torch.equal(b, pieces[0][1]) for a, b in pieces), "replicas differ"
        pieces = pieces[:1]
    return float(sum((a * b).sum() for a, b in pieces))


Case = tuple[str, int, str, str]
CASES: list[Case] = list(product(PAIRS, BATCHES, STRIDES, STRIDES))


def seed_of(rank: int, same: bool) -> int:
    return 100 if same else 100 + rank


def all_pairs(size: int) -> dict[Case, tuple[Tensor, Tensor, Tensor, Tensor]]:
    """{case: (input, output, gradient of the output, gradient of the input)} of this rank."""
    axis, found = tensor_axis(size), {}
    for case in CASES:
        name, batch, strides, grad_strides = case
        pair = PAIRS[name]
        x = STRIDES[strides](seed_of(axis.rank, pair.one_input), batch, *pair.shape(size)).requires_grad_()
        y = pair.apply(x, axis)
        grad = STRIDES[grad_strides](1000 + seed_of(axis.rank, pair.one_output), *y.shape)
        (x_grad,) = torch.autograd.grad(y, x, grad)
        found[case] = x.detach(), y.detach(), grad, x_grad
    return found


@pytest.mark.parametrize("size", RANKS)
def test_pairs_are_what_they_say_and_adjoint(size: int) -> None:
    """<A x, y> = <x, A* y>, summed over what the ranks hold, whatever the strides."""
    ranks = run_ranks(all_pairs, size, size)
    for case in CASES:
        pair = PAIRS[case[0]]
        inputs = [rank[case][0] for rank in ranks]
        for rank, found in enumerate(ranks):
            torch.testing.assert_close(
                found[case][1], pair.expected(inputs, rank), rtol=1e-12, atol=1e-12, msg=str(case)
            )
        # A replicated result's gradient is the same on all ranks, and counts once; each rank's own counts for itself.
        forward = products(pair.one_output, [(rank[case][1], rank[case][2]) for rank in ranks])
        backward = products(pair.one_input, [(rank[case][0], rank[case][3]) for rank in ranks])
        assert abs(forward) > 1e-3, case
        assert backward == pytest.approx(forward, rel=1e-10), case


def test_an_axis_of_one_rank_says_nothing() -> None:
    alone = Axis(0, 1, None)
    x = draw(0, 3, LONG, WIDE)
    for pair in PAIRS.values():
        assert pair.apply(x, alone) is x


# --------------------------------------------------------------------------- Ulysses against DeepSpeed's


def deepspeeds_attention(attention: Attention, x: Tensor, axis: Axis) -> Tensor:
    """`Attention.forward` with DeepSpeed's exchange of stretches for heads: (batch, stretch, d_model) in and out."""
    from deepspeed.sequence.layer import DistributedAttention

    def local(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        query, key, value = (y.transpose(1, 2) for y in (query, key, value))  # (batch, heads / ranks, seq, d_head)
        if attention.rotation is not None:
            query, key = attention.kernels.rotate(query, key, attention.rotation)
        return attention.kernels.attention(query, key, value, Scores(attention.core.scale), CAUSAL).transpose(1, 2)

    layers = (attention.query, attention.key, attention.value)
    query, key, value = (
        F.linear(x, layer.weight.to(x.dtype)).unflatten(-1, (-1, attention.model.d_head)) for layer in layers
    )
    mixed = DistributedAttention(local, axis.group, scatter_idx=2, gather_idx=1)(query, key, value, 0)
    return F.linear(mixed.flatten(2), attention.output.weight.to(x.dtype))


def both_attentions(config: Config) -> list[list[list[Tensor]]]:
    """Output, gradient of the input and of every weight, of ours and of DeepSpeed's."""
    distributed.join()
    mesh = build_mesh(config.parallel)
    sight = Sight(causal=True)
    attention = Attention(context(config, mesh), config.model, "blocks.0.attention", block_scales(config, 0), sight)

    def results(function: Callable[[Tensor], Tensor], batch: int) -> list[Tensor]:
        stretch = config.seq_len // mesh.context.size
        x = draw(mesh.context.rank, batch, stretch, config.model.d_model).requires_grad_()
        y = function(x)
        gradients = torch.autograd.grad(y, [x, *attention.parameters()], draw(10 + mesh.context.rank, *y.shape))
        return [y.detach(), *gradients]

    theirs = partial(deepspeeds_attention, attention, axis=mesh.context)
    return [[results(attention, batch), results(theirs, batch)] for batch in BATCHES]


@pytest.mark.parametrize(
    ("ranks", "heads", "kv_heads"),
    [(2, 2, 2), (2, 8, 4), (2, 8, 2), (4, 8, 4)],
)
def test_ulysses_is_deepspeeds(make_config: Any, ranks: int, heads: int, kv_heads: int) -> None:
    """With one head a rank, with several, and with fewer key heads than query heads."""
    config = make_config(
        f"parallel.context={ranks}", f"model.n_heads={heads}", f"model.n_kv_heads={kv_heads}", "data.seq_len=32"
    )
    for rank in run_ranks(both_attentions, ranks, config):
        for ours, theirs in rank:
            for mine, expected in zip(ours, theirs, strict=True):
                torch.testing.assert_close(mine, expected, rtol=1e-6, atol=1e-6)


# --------------------------------------------------------------------------- products of one input

D_IN, D_OUT = 6, (8, 4, 4)


def whole_products(batch: int, strides: str) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Input, weights and the outputs' gradients, whole; the same on every rank."""
    weights = [draw(20 + at, rows, D_IN) for at, rows in enumerate(D_OUT)]
    return (
        STRIDES[strides](10, batch, LONG, D_IN),
        weights,
        [STRIDES[strides](30 + at, batch, LONG, rows) for at, rows in enumerate(D_OUT)],
    )


PRODUCTS = [(1, "contiguous"), (3, "contiguous"), (3, "reversed"), (1, "gaps"), (3, "expanded")]
"""Batch and strides."""


def all_products(size: int) -> dict[tuple[bool, int, str], list[Tensor]]:
    axis = tensor_axis(size)
    return {
        (sequence, *case): one_ranks_products(axis, sequence, *case) for sequence in (False, True) for case in PRODUCTS
    }


def one_ranks_products(axis: Axis, sequence: bool, batch: int, strides: str) -> list[Tensor]:
    """This rank's outputs, and gradients of the input (or its stretch) and of its parts of the weights."""
    size = axis.size
    x, weights, grads = whole_products(batch, strides)
    x = part(x, axis.rank, size, SEQ) if sequence else x
    x.requires_grad_()
    mine = tuple(part(weight, axis.rank, size, 0).requires_grad_() for weight in weights)
    outputs = column_products(x, mine, axis, sequence)
    of = torch.autograd.grad(outputs, [x, *mine], [part(grad, axis.rank, size, -1) for grad in grads])
    return [y.detach() for y in (*outputs, *of)]


@pytest.mark.parametrize("size", RANKS)
def test_column_products_are_linears(size: int) -> None:
    ranks = run_ranks(all_products, size, size)
    for batch, strides in PRODUCTS:
        x, weights, grads = whole_products(batch, strides)
        leaves = [y.requires_grad_() for y in (x, *weights)]
        outputs = [F.linear(x, weight) for weight in weights]
        x_grad, *weight_grads = torch.autograd.grad(outputs, leaves, grads)
        for rank, sequence in product(range(size), (False, True)):
            expected = [part(y, rank, size, -1) for y in outputs]
            expected.append(part(x_grad, rank, size, SEQ) if sequence else x_grad)
            expected += [part(grad, rank, size, 0) for grad in weight_grads]
            for mine, right in zip(ranks[rank][sequence, batch, strides], expected, strict=True):
                torch.testing.assert_close(mine, right.detach(), rtol=1e-10, atol=1e-10)


def all_rows(size: int) -> dict[tuple[bool, int, str], list[Tensor]]:
    axis = tensor_axis(size)
    return {(sequence, *case): one_ranks_row(axis, sequence, *case) for sequence in (False, True) for case in PRODUCTS}


def whole_row(batch: int, strides: str) -> tuple[Tensor, Tensor, Tensor]:
    """Input, weight and the output's gradient, whole."""
    return STRIDES[strides](10, batch, LONG, 8), draw(20, D_IN, 8), STRIDES[strides](30, batch, LONG, D_IN)


def one_ranks_row(axis: Axis, sequence: bool, batch: int, strides: str) -> list[Tensor]:
    """The output (or its stretch), and gradients of this rank's parts of input and weight."""
    x, weight, grad = whole_row(batch, strides)
    mine = [part(y, axis.rank, axis.size, -1).requires_grad_() for y in (x, weight)]
    y = row_product(mine[0], mine[1], axis, sequence)
    of = torch.autograd.grad(y, mine, part(grad, axis.rank, axis.size, SEQ) if sequence else grad)
    return [z.detach() for z in (y, *of)]


@pytest.mark.parametrize("size", RANKS)
def test_row_product_is_a_linear(size: int) -> None:
    ranks = run_ranks(all_rows, size, size)
    for batch, strides in PRODUCTS:
        x, weight, grad = whole_row(batch, strides)
        leaves = [y.requires_grad_() for y in (x, weight)]
        y = F.linear(x, weight)
        of = torch.autograd.grad(y, leaves, grad)
        for rank, sequence in product(range(size), (False, True)):
            expected = [part(y, rank, size, SEQ) if sequence else y, *(part(g, rank, size, -1) for g in of)]
            for mine, right in zip(ranks[rank][sequence, batch, strides], expected, strict=True):
                torch.testing.assert_close(mine, right.detach(), rtol=1e-10, atol=1e-10)


# --------------------------------------------------------------------------- what runs behind what


class Events(TorchDispatchMode):
    """Names of the products and collectives in the order in which they are started, and of the waits."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: list[str] = []
        self.started: dict[int, str] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if func.namespace == "_c10d_functional" and name != "wait_tensor":
            self.started[result.untyped_storage().data_ptr()] = name
            self.names.append(name)
        elif name == "wait_tensor":
            self.names.append("wait for " + self.started[args[0].untyped_storage().data_ptr()])
        elif name in ("mm", "bmm", "addmm_"):
            self.names.append(f"product {tuple(result.shape)}")
        return result


def backward_events(sequence: bool) -> list[list[str]]:
    axis = tensor_axis(2)
    seq = LONG // 2 if sequence else LONG
    found = []
    for batch in BATCHES:
        x, weights = draw(0, batch, seq, D_IN), [draw(at, rows, D_IN) for at, rows in enumerate((5, 7))]
        grads = [draw(at, batch, LONG, rows) for at, rows in enumerate((5, 7))]
        with Events() as events:
            column_gradients(grads, x, weights, axis.name, axis.size, sequence)
        found.append(events.names)
    return found


OF_WEIGHTS = [f"product (5, {D_IN})", f"product (7, {D_IN})"]


def test_the_inputs_gradient_travels_while_the_weights_are_computed() -> None:
    for rank in run_ranks(backward_events, 2, False):
        for batch, names in zip(BATCHES, rank, strict=True):
            of_input = [f"product ({batch * LONG}, {D_IN})"] * 2
            assert names == [*of_input, "all_reduce", *OF_WEIGHTS, "wait for all_reduce"]


def test_with_sequence_the_input_is_gathered_behind_its_gradient() -> None:
    gather, scatter = "all_gather_into_tensor", "reduce_scatter_tensor"
    for rank in run_ranks(backward_events, 2, True):
        for batch, names in zip(BATCHES, rank, strict=True):
            of_input = [f"product ({batch * LONG}, {D_IN})"] * 2
            assert names == [gather, *of_input, scatter, f"wait for {gather}", *OF_WEIGHTS, f"wait for {scatter}"]
