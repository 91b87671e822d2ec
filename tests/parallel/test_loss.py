"""The readout fused with its loss, against the plain vocab-parallel loss and torch's in float64; without the logits."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megamup.parallel import loss
from megamup.parallel.loss import CrossEntropy, Head, Unread, fused, losses_and_gradients
from megamup.parallel.mesh import SINGLE, Axis, build_mesh
from megamup.sections import Parallel
from megamup.train import distributed
from megamup.train.fork import run_ranks

BATCH, SEQ, D_MODEL, VOCAB = 2, 48, 8, 64


@dataclass(frozen=True)
class Case:
    multiplier: float = 1.0
    weights: str = "tokens"
    """``tokens``: one each, some of them zero; ``one``: a number for all."""
    logits: int | None = None
    """At a time; default what the module says."""
    dtype: torch.dtype = torch.float32
    """Of the hidden states."""
    soft_cap: float | None = None
    z_loss: float = 0.0
    bias: bool = False


CASES = {
    "plain": Case(),
    "multiplier": Case(multiplier=0.37),
    "one weight": Case(weights="one", multiplier=2.5),
    "pieces": Case(logits=10 * VOCAB),  # the last piece is smaller
    "row by row": Case(logits=1, multiplier=0.37),
    "pieces, one weight": Case(logits=7 * VOCAB, weights="one"),
    "bf16": Case(dtype=torch.bfloat16, multiplier=0.5),
    "bf16, pieces": Case(dtype=torch.bfloat16, logits=10 * VOCAB, multiplier=0.5),
    "soft cap": Case(soft_cap=1.5, multiplier=0.8),
    "z-loss": Case(z_loss=0.3, multiplier=0.7),
    "z-loss, one weight": Case(z_loss=0.3, weights="one"),
    "bias": Case(bias=True, multiplier=0.37),
    "all": Case(soft_cap=2.0, z_loss=0.1, bias=True, multiplier=1.7, logits=10 * VOCAB),
    "all, bf16": Case(soft_cap=2.0, z_loss=0.1, bias=True, multiplier=1.7, logits=10 * VOCAB, dtype=torch.bfloat16),
}


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def inputs(case: Case) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states, weight (fp32, but of values that bf16 has), targets of every part of the vocabulary, weights."""
    hidden, weight = draw(1, BATCH, SEQ, D_MODEL).to(case.dtype), draw(2, VOCAB, D_MODEL).bfloat16().float()
    targets = torch.arange(BATCH * SEQ).mul(7).remainder(VOCAB).view(BATCH, SEQ)
    weights = torch.tensor(0.7) if case.weights == "one" else draw(3, BATCH, SEQ).abs()
    if weights.dim():
        weights[:, ::5] = 0.0
    return hidden, weight, targets, weights


def in_float64(case: Case) -> list[Tensor]:
    """Loss, and the gradients of what is minimized by hidden states and weight, and by the bias if there is one."""
    hidden, weight, targets, weights = inputs(case)
    leaves = [x.double().requires_grad_() for x in (hidden, weight, *([bias()] if case.bias else []))]
    logits = case.multiplier * leaves[0] @ leaves[1].t() + sum(leaves[2:])
    if case.soft_cap is not None:
        logits = case.soft_cap * torch.tanh(logits / case.soft_cap)
    losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(BATCH, SEQ)
    minimized = losses + case.z_loss * logits.logsumexp(-1).square()
    return [(losses * weights).sum().detach(), *torch.autograd.grad((minimized * weights).sum(), leaves)]


def bias() -> Tensor:
    return draw(4, VOCAB).bfloat16().float()


def found(case: Case, backend: str, axis: Axis) -> list[Tensor]:
    """The same of this rank's part of the vocabulary, gathered; the loss's gradient is 3, as if it were scaled."""
    hidden, weight, targets, weights = inputs(case)
    whole = [weight, bias()] if case.bias else [weight]
    mine = [x.chunk(axis.size)[axis.rank].clone().requires_grad_() for x in whole]
    at = replace(SINGLE, tensor=axis)
    unread = Unread(
        hidden.requires_grad_(), mine[0], case.multiplier, at, case.soft_cap, mine[1] if case.bias else None
    )
    total = CrossEntropy(backend, case.z_loss)(unread, (targets, weights))
    assert total.dtype == torch.float32
    of_hidden, *of_mine = torch.autograd.grad(total, [hidden, *mine], torch.tensor(3.0))
    assert [x.dtype for x in (of_hidden, *of_mine)] == [case.dtype, *(torch.float32 for _ in mine)]
    return [total.detach(), of_hidden / 3, *(gathered(x, axis) / 3 for x in of_mine)]


def gathered(x: Tensor, axis: Axis) -> Tensor:
    """The parts of all ranks, joined along the first dim."""
    if axis.size == 1:
        return x
    parts = [torch.empty_like(x) for _ in range(axis.size)]
    dist.all_gather(parts, x.contiguous(), group=axis.group)
    return torch.cat(parts)


def all_cases(size: int) -> dict[tuple[str, str], list[Tensor]]:
    distributed.join()
    axis, results = build_mesh(Parallel(tensor=size)).tensor, {}
    at_a_time = loss.LOGITS_AT_A_TIME
    for name, case in CASES.items():
        pieces = at_a_time if case.logits is None else {"cpu": max(1, case.logits // size)}
        loss.LOGITS_AT_A_TIME = pieces  # of this process
        for backend in ("fused", "reference"):
            results[name, backend] = found(case, backend, axis)
    return results


@pytest.mark.parametrize("size", [1, 2, 4])
def test_loss_and_gradients_are_torchs_in_float64(size: int) -> None:
    ranks = run_ranks(all_cases, size, size)
    for name, case in CASES.items():
        expected = in_float64(case)
        # bf16 rounds logits and their gradients to 8 bits; these are sums of many.
        tolerance = 2e-2 if case.dtype == torch.bfloat16 else 3e-6
        for backend in ("fused", "reference"):
            results = [rank[name, backend] for rank in ranks]
            assert all(torch.equal(result[0], results[0][0]) for result in results), "ranks differ in the loss"
            for mine, right in zip(results[0], expected, strict=True):
                apart = (mine.double() - right).abs().max() / right.abs().max()
                assert apart < tolerance, f"{name}, {backend}: {apart}"


def test_the_pieces_say_nothing_about_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    """In bf16 the weight's gradient is summed over the pieces in fp32: many pieces are no less exact than one."""
    case = Case(dtype=torch.bfloat16)
    expected = in_float64(case)[2]
    distances = []
    for logits in (BATCH * SEQ * VOCAB, 4 * VOCAB):
        monkeypatch.setattr(loss, "LOGITS_AT_A_TIME", {"cpu": logits})
        distances.append(float((found(case, "fused", SINGLE.tensor)[2] - expected).square().mean().sqrt()))
    assert distances[1] < 1.2 * distances[0]


def test_a_token_of_weight_zero_has_no_say() -> None:
    hidden, weight, targets, weights = inputs(Case())
    hidden.requires_grad_()
    arguments = (weight, targets.flatten(), weights.flatten(), Head(), SINGLE.tensor)
    total = fused(hidden.flatten(0, 1), *arguments)
    (gradient,) = torch.autograd.grad(total, hidden)
    assert (gradient[:, ::5] == 0).all()
    assert (gradient[:, 1::5] != 0).all()
    other = hidden.detach().clone()
    other[:, ::5] = 100.0
    assert fused(other.flatten(0, 1), *arguments) == total


@pytest.mark.parametrize("backend", ["fused", "reference"])
def test_a_target_below_zero_is_none(backend: str) -> None:
    """With weight zero: no loss, no gradient, whatever stands there."""
    case = Case(multiplier=0.37, z_loss=0.1)
    hidden, weight, targets, weights = inputs(case)
    results = []
    for written in (-1, 5):
        leaf, labels = hidden.clone().requires_grad_(), (targets.masked_fill(weights == 0, written), weights)
        total = CrossEntropy(backend, case.z_loss)(Unread(leaf, weight, case.multiplier, SINGLE), labels)
        total.backward()
        assert leaf.grad is not None
        assert (leaf.grad[:, ::5] == 0).all()
        results.append((total, leaf.grad))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


def test_the_cap_bounds_the_logits_that_are_watched() -> None:
    hidden, weight, *_ = inputs(Case())
    unread = Unread(100 * hidden, weight, 1.0, SINGLE, soft_cap=3.0, bias=bias())
    assert unread.logits().abs().max() <= 3.0
    whole = torch.cat(list(unread.pieces(7 * VOCAB)))
    torch.testing.assert_close(whole.view(BATCH, SEQ, VOCAB), unread.logits())
    assert replace(unread, soft_cap=None).logits().abs().max() > 100


@pytest.mark.parametrize("gradients", [False, True])
def test_compiled_is_one_graph_and_an_evaluation_computes_no_gradient(gradients: bool) -> None:
    torch.compiler.reset()
    case = Case(soft_cap=2.0, z_loss=0.1, bias=True, multiplier=1.7)
    graphs = []

    def keep(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    hidden, weight, targets, weights = inputs(case)
    rows = torch.compile(losses_and_gradients, fullgraph=True, dynamic=False, backend=keep)
    head = Head(case.multiplier, case.soft_cap, case.z_loss)
    arguments = (targets.flatten(), weights.flatten(), head, SINGLE.tensor, bias())
    with torch.set_grad_enabled(gradients):
        leaf = weight.clone().requires_grad_()
        found = fused(hidden.flatten(0, 1), leaf, *arguments, rows_of_logits=rows)
        assert found == fused(hidden.flatten(0, 1), leaf, *arguments)
    (graph,) = graphs
    assert ("scatter_add" in graph.code) == gradients


# --------------------------------------------------------------------------- what never exists


def storages(tree: Any) -> dict[int, int]:
    """{address of a tensor's memory: bytes}"""
    found = [leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
    return {storage.data_ptr(): storage.nbytes() for storage in found}


class Largest(TorchDispatchMode):
    """Bytes of the largest tensor that any operator makes (views and results in place aren't made)."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.nbytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given, made = storages((args, kwargs)), storages(result)
        self.nbytes = max([self.nbytes, *(nbytes for at, nbytes in made.items() if at not in given)])
        return result


TOKENS, MANY, NARROW = 512, 1024, 16
AT_A_TIME = 16 * MANY


def largest(size: int, backend: str) -> tuple[int, int]:
    """Bytes of the largest tensor, and of this rank's logits in fp32; forward and backward."""
    distributed.join()
    axis = build_mesh(Parallel(tensor=size)).tensor
    hidden = draw(1, 1, TOKENS, NARROW).requires_grad_()
    weight = draw(2, MANY // size, NARROW).requires_grad_()
    labels = torch.arange(TOKENS)[None] % MANY, torch.ones(1, TOKENS)
    with Largest() as seen:
        total = CrossEntropy(backend)(Unread(hidden, weight, 1.0, replace(SINGLE, tensor=axis)), labels)
        total.backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    return seen.nbytes, 4 * TOKENS * MANY // size


@pytest.mark.parametrize("size", [1, 2])
def test_the_logits_never_exist(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    """Nothing is larger than the logits at a time, or than the weight; the plain loss makes them whole."""
    monkeypatch.setattr(loss, "LOGITS_AT_A_TIME", {"cpu": AT_A_TIME})
    for nbytes, logits in run_ranks(largest, size, size, "fused"):
        assert nbytes <= 4 * max(AT_A_TIME, MANY // size * NARROW) < logits / 10
    for nbytes, logits in run_ranks(largest, size, size, "reference"):
        assert nbytes >= logits


@pytest.mark.parametrize("gradients", [False, True])
def test_an_evaluation_computes_no_gradient(monkeypatch: pytest.MonkeyPatch, gradients: bool) -> None:
    """Without gradients nothing of the size of the weight is made, and the loss is the same."""
    monkeypatch.setattr(loss, "LOGITS_AT_A_TIME", {"cpu": 64})
    hidden, weight = draw(1, 1, 8, 64).requires_grad_(), draw(2, 512, 64).requires_grad_()
    unread, labels = Unread(hidden, weight, 1.0, SINGLE), (torch.arange(8)[None], torch.tensor(1.0))
    with torch.set_grad_enabled(gradients), Largest() as seen:
        total = CrossEntropy("fused")(unread, labels)
    assert total.requires_grad == gradients
    assert total == CrossEntropy("fused")(unread, labels)
    assert (seen.nbytes >= weight.nbytes) == gradients
