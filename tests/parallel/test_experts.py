"""Sorting tokens by expert, and products of each expert's tokens."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megamup.parallel import experts
from megamup.parallel.experts import combine, product, routes, spread, trip
from megamup.parallel.mesh import Axis
from megamup.train import distributed
from megamup.train.fork import run_ranks

COUNTS = [3, 0, 5, 1, 0]
"""Of tokens by expert, some without any."""


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64).requires_grad_()


def ends(counts: list[int]) -> Tensor:
    return torch.tensor(counts).cumsum(0).to(torch.int32)


@pytest.mark.parametrize("counts", [COUNTS, [0, 0, 0, 0, 0], [0, 0, 9, 0, 0]])
def test_product_and_its_gradients(counts: list[int]) -> None:
    """Those of plain products, expert by expert; zero of an expert that no token came to."""
    rows, weight = draw(sum(counts), 4), draw(len(counts), 6, 4)
    assert torch.autograd.gradcheck(lambda x, w: product(x, w, ends(counts)), (rows, weight))
    parts = rows.split(counts)
    expected = torch.cat([part @ matrix.t() for part, matrix in zip(parts, weight, strict=True)])
    torch.testing.assert_close(product(rows, weight, ends(counts)), expected)


def test_product_is_a_sound_operator() -> None:
    """Its fake, its autograd and its compiled form agree (torch.library.opcheck)."""
    rows, weight = draw(9, 4), draw(5, 6, 4)
    torch.library.opcheck(experts.expert_product, (rows, weight, ends(COUNTS)))


@pytest.mark.parametrize("top_k", [1, 2, 5])
def test_tokens_come_back_from_their_experts(top_k: int) -> None:
    """Sorted by expert, an expert's by token; weighted by one over top_k, each token is itself again."""
    number, x = 5, draw(11, 3)
    chosen = torch.rand(11, number, generator=torch.Generator().manual_seed(1)).topk(top_k).indices
    at = routes(chosen, number)
    sorted_by_expert = spread(x, at)
    expected = torch.cat([x[(chosen == expert).any(-1)] for expert in range(number)])
    assert torch.equal(sorted_by_expert, expected)
    counts = [int((chosen == expert).sum()) for expert in range(number)]
    assert torch.equal(at.ends, ends(counts))
    weights = torch.full((11, top_k), 1 / top_k, dtype=torch.float64)
    torch.testing.assert_close(combine(sorted_by_expert, weights, at), x)


def test_gradients_of_spreading_and_combining() -> None:
    chosen = torch.tensor([[2, 0], [1, 2], [2, 1], [0, 1]])
    at = routes(chosen, 4)
    weights = torch.rand(4, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, w: combine(spread(x, at).sin(), w, at), (draw(4, 3), weights))


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != experts.GROUPED, reason="needs a Hopper GPU"
)
@pytest.mark.parametrize("counts", [[100, 0, 17, 3], [0, 0, 0, 64]])
def test_grouped_products_are_the_loops(counts: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """On Hopper one kernel computes all experts, in bf16: the same to rounding, and zero without tokens."""
    rows, weight = draw(sum(counts), 64), draw(len(counts), 128, 64)
    found = []
    for grouped in (True, False):
        if not grouped:
            monkeypatch.setattr(experts, "grouped", lambda rows, weight: False)
        x, w = (t.detach().bfloat16().cuda().requires_grad_() for t in (rows, weight))
        assert experts.grouped(x, w) == grouped
        y = product(x, w, ends(counts).cuda())
        y.square().sum().backward()
        found.append((y.detach(), x.grad, w.grad))
    for ours, loop in zip(*found, strict=True):
        torch.testing.assert_close(ours, loop, rtol=2e-2, atol=2e-2 * float(loop.abs().max()))


def visited(chosen: Tensor) -> tuple[Tensor, Tensor, list[int]]:
    """Rows of this rank after a visit to experts that know their number, with its gradient; and where rows went."""
    distributed.join()
    axis = Axis(dist.get_rank(), dist.get_world_size(), dist.group.WORLD)
    number, mine = 2 * axis.size, chosen[axis.rank]
    x = draw(len(mine), 3)
    at = routes(mine, number)
    journey = trip(at.counts, axis)
    rows = journey.go(spread(x, at))
    own = torch.arange(2 * axis.rank, 2 * axis.rank + 2).repeat_interleave(journey.at.counts)
    y = combine(journey.back(rows * (own[:, None] + 1)), torch.ones(mine.shape, dtype=torch.float64), at)
    (y * y).sum().backward()
    assert x.grad is not None
    return y.detach(), x.grad, journey.sent


CHOSEN = {
    "even": [[[0, 2], [1, 3]], [[0, 2], [1, 3]]],
    "uneven": [[[0, 1], [1, 3]], [[1, 0], [0, 1]]],
    "one rank's experts only": [[[2, 3], [3, 2]], [[2, 3], [2, 3]]],
}


@pytest.mark.parametrize("case", CHOSEN)
def test_rows_visit_the_ranks_of_their_experts(case: str) -> None:
    """And come back in order, whatever the numbers; so do gradients. Expert e multiplies by e + 1 here."""
    chosen = torch.tensor(CHOSEN[case])
    for rank, (y, grad, sent) in enumerate(run_ranks(visited, 2, chosen)):
        x, factor = draw(2, 3).detach(), (chosen[rank] + 1).sum(-1, keepdim=True)
        torch.testing.assert_close(y, x * factor)
        torch.testing.assert_close(grad, 2 * x * factor**2)
        assert sent == [int((chosen[rank] < 2).sum()), int((chosen[rank] >= 2).sum())]
