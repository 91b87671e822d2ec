"""Initial weights: pure in (seed, name), the same for every cut, of the deviation that the table says."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from megamup.parallel.init import initial_shard, shard_bounds
from megamup.parallel.mesh import Axis
from megamup.parameters import Parameter
from megamup.scales import Scales

SCALES = Scales(init_std=0.5, multiplier=1, lr_scale=1, betas=(0.9, 0.95), eps=1e-8, weight_decay=0)
ALONE = Axis(0, 1, None)
PINNED = [-0.380228, -1.525465, -1.268792]


@pytest.mark.parametrize("shape", [(640, 96), (64, 32), (30, 11), (11, 7)])
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("ranks", [2, 3, 5, 7])
def test_shards_are_cut_from_one_tensor(shape: tuple[int, int], dim: int, ranks: int) -> None:
    """Also where neither the slices nor the ranks divide the dim."""
    spec = Parameter("blocks.0.x", shape, "hidden", "d_model", partition_dim=dim)
    whole = initial_shard(spec, SCALES, 3, ALONE)
    assert whole.shape == shape
    pieces = [initial_shard(spec, SCALES, 3, Axis(rank, ranks, None)) for rank in range(ranks)]
    assert torch.equal(torch.cat(pieces, dim), whole)
    assert [piece.shape[dim] for piece in pieces] == [
        stop - start for start, stop in (shard_bounds(spec, Axis(rank, ranks, None)) for rank in range(ranks))
    ]


def test_weights_are_normal_of_the_tables_deviation() -> None:
    spec = Parameter("w", (512, 512), "hidden", "d_model", partition_dim=0)
    values = initial_shard(spec, SCALES, 0, ALONE).numpy()
    assert abs(values.mean()) < 4 * 0.5 / 512
    assert abs(values.std() / 0.5 - 1) < 0.005
    assert abs(np.mean(np.abs(values) > 0.98) - 0.05) < 0.005  # 5% beyond 1.96 deviations


def test_names_and_seeds_give_unrelated_weights() -> None:
    draws = {
        (name, seed): initial_shard(Parameter(name, (64, 64), "hidden", partition_dim=0), SCALES, seed, ALONE)
        for name in ("blocks.0.a", "blocks.1.a")
        for seed in (0, 1)
    }
    values = list(draws.values())
    for i, first in enumerate(values):
        for second in values[i + 1 :]:
            correlation = float((first * second).mean() / 0.25)
            assert abs(correlation) < 5 / 64


def test_weights_are_these_very_bits() -> None:
    """A release that changes them breaks the reproduction of every run: only on purpose."""
    spec = Parameter("blocks.0.attention.query.weight", (4, 3), "query", "d_model", partition_dim=0)
    values = initial_shard(spec, SCALES, 1234, ALONE)
    again = initial_shard(spec, SCALES, 1234, ALONE)
    assert torch.equal(values, again)
    assert [round(v, 6) for v in values[0].tolist()] == PINNED


def test_gains_are_one_and_biases_zero(make_config: Any) -> None:
    from megamup.mup import table
    from megamup.parameters import parameters

    config = make_config("model.arch=gpt", "model.n_kv_heads=4")
    scales = table(config)
    for spec in parameters(config.model).values():
        if spec.role in ("gain", "bias"):
            values = initial_shard(spec, scales[spec.name], 0, ALONE)
            assert torch.equal(values, torch.full(spec.shape, 1.0 if spec.role == "gain" else 0.0))


@pytest.mark.parametrize("name", ["up", "down"])
def test_experts_are_cut_from_one_tensor(name: str) -> None:
    """Over ranks that share them out and over tensor ranks, in any number."""
    shape, dim = ((4, 70, 6), 1) if name == "up" else ((4, 6, 70), 2)
    spec = Parameter(f"blocks.0.moe.experts.{name}", shape, "hidden", partition_dim=dim)
    whole = initial_shard(spec, SCALES, 3, ALONE)
    assert whole.shape == shape
    for experts, ranks in ((2, 1), (4, 2), (1, 2)):
        columns = []
        for rank in (Axis(rank, ranks, None) for rank in range(ranks)):
            pieces = [initial_shard(spec, SCALES, 3, rank, Axis(place, experts, None)) for place in range(experts)]
            columns.append(torch.cat(pieces))
        assert torch.equal(torch.cat(columns, dim), whole)
    router = Parameter("blocks.0.moe.router.weight", (4, 6), "router")
    of_second = initial_shard(router, SCALES, 3, ALONE, Axis(1, 2, None))
    assert torch.equal(of_second, initial_shard(router, SCALES, 3, ALONE))
