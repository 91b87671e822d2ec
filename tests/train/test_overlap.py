"""Gradients are reduced while the backward pass goes on: at every ZeRO stage, and with the same result."""

from __future__ import annotations

import gzip
import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from megamup.parallel.mesh import ALONE, Axis
from megamup.train.distributed import join
from megamup.train.fork import run_ranks
from megamup.train.loop import train
from megamup.train.overlap import OverlappedReduction, buckets


class Tied(nn.Module):
    """A weight that is used twice, one that is larger than a bucket, one that takes no part."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.large = nn.Linear(8, 8), nn.Linear(8, 64, bias=False)
        self.last, self.unused = nn.Linear(64, 8), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.large(self.first(self.first(x).tanh()))).square().mean()  # type: ignore[no-any-return]


def reduced(elements: int) -> tuple[list[Tensor | None], list[Tensor | None], list[int]]:
    """(gradients reduced in hooks, the same averaged afterwards, buckets that were sent when each hook had run)."""
    join()
    axis = Axis(dist.get_rank(), 2, dist.group.WORLD)
    torch.manual_seed(0)
    module = Tied()
    reduction = OverlappedReduction(module.parameters(), axis, elements=elements)
    sent: list[int] = []
    for shard in module.parameters():
        shard.register_post_accumulate_grad_hook(lambda _: sent.append(reduction.next or 0))
    data = [torch.randn(5, 8, generator=torch.Generator().manual_seed(10 * axis.rank + micro)) for micro in range(3)]
    for last, x in zip((False, False, True), data, strict=True):
        with reduction.during(last):
            module(x).backward()
    plain = Tied()
    plain.load_state_dict(module.state_dict())
    for x in data:
        plain(x).backward()
    for shard in plain.parameters():
        if shard.grad is not None:
            dist.all_reduce(shard.grad)
            shard.grad /= 2
    return [s.grad for s in module.parameters()], [s.grad for s in plain.parameters()], sent


@pytest.mark.parametrize("elements", [1, 100, 10_000])
def test_gradients_are_the_means(elements: int) -> None:
    for found, expected, _ in run_ranks(reduced, 2, elements):
        assert [grad is None for grad in found] == [False] * 5 + [True] * 2
        for ours, theirs in zip(found, expected, strict=True):
            if ours is not None and theirs is not None:
                torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


def test_buckets_are_sent_in_order_as_they_fill() -> None:
    """``unused`` comes last in the forward pass, so first in the buckets: it holds the others back until the end."""
    _, _, sent = run_ranks(reduced, 2, 1)[0]
    assert sent == [0] * 15
    in_order = [nn.Parameter(torch.zeros(size)) for size in (30, 80, 10, 10, 500, 20)]
    assert [[s.numel() for s in bucket.shards] for bucket in buckets(in_order, 100)] == [
        [30],
        [80, 10, 10],
        [500],
        [20],
    ]


def test_one_replica_sends_nothing() -> None:
    module = nn.Linear(2, 2)
    with OverlappedReduction(module.parameters(), ALONE).during(last=True):
        module(torch.ones(2)).sum().backward()
    assert torch.equal(module.weight.grad, torch.ones(2, 2))  # type: ignore[arg-type]


def test_gradients_of_one_holder_count_for_their_share() -> None:
    """An expert that one of four replicas holds has the gradients of all four's tokens: their mean is wanted."""
    module = nn.Linear(2, 2)
    reduction = OverlappedReduction(module.parameters(), ALONE, share=0.25)
    for last in (False, True):
        with reduction.during(last):
            module(torch.ones(2)).sum().backward()
    assert torch.equal(module.weight.grad, torch.full((2, 2), 0.5))  # type: ignore[arg-type]


def ds_config(folder: Path, stage: int, **keys: Any) -> str:
    path = folder / f"zero{stage}.json"
    shipped = json.loads((Path(__file__).parents[2] / "ds_configs" / f"zero{stage}.json").read_text())
    path.write_text(json.dumps({"zero_optimization": shipped["zero_optimization"] | keys}))
    return str(path)


def started_in_backward(folder: Path) -> tuple[int, int]:
    """(reductions that began inside the backward pass, and of them those before its last gradient), a step."""
    trace = json.loads(gzip.decompress((folder / "profile" / "rank-0.json.gz").read_bytes()))["traceEvents"]
    named = [event for event in trace if event.get("ph") == "X"]
    grads = [e for e in named if e["name"] == "autograd::engine::evaluate_function: torch::autograd::AccumulateGrad"]
    sent = [e for e in named if e["name"].startswith(("c10d::allreduce", "c10d::_reduce_scatter"))]
    inside = [e["ts"] for e in sent if any(g["ts"] <= e["ts"] <= g["ts"] + g["dur"] for g in grads)]
    return len(inside), sum(ts < max(g["ts"] for g in grads) for ts in inside)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_reduction_starts_before_the_backward_pass_ends(
    make_config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: int
) -> None:
    """The shipped files ask for it; their buckets are larger than this model, so they are made smaller here."""
    monkeypatch.setattr("megamup.train.engine.OverlappedReduction", partial(OverlappedReduction, elements=20_000))
    keys = {"reduce_bucket_size": 20_000} if stage else {}
    config = make_config("train.steps=2", "train.profile=[2,2]", f"deepspeed={ds_config(tmp_path, stage, **keys)}")
    run_ranks(train, 2, config)
    inside, early = started_in_backward(config.run.folder)
    assert inside >= early >= (1 if stage == 3 else 3)  # ZeRO 3 takes a block's gradients together


def test_without_overlap_reduction_follows_the_backward_pass(make_config: Any, tmp_path: Path) -> None:
    """What the test above would find if ds_configs/zero1.json didn't ask for overlap."""
    keys = {"reduce_bucket_size": 20_000, "overlap_comm": False}
    config = make_config("train.steps=2", "train.profile=[2,2]", f"deepspeed={ds_config(tmp_path, 1, **keys)}")
    run_ranks(train, 2, config)
    assert started_in_backward(config.run.folder) == (0, 0)
