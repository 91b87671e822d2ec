"""The mesh: every axis cuts the world into groups, neighbours along tensor first, whatever the degrees."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from megamup.errors import MegamupError
from megamup.parallel.collectives import all_reduce
from megamup.parallel.mesh import AXES, SINGLE, Axis, Mesh, Mpu, build_mesh
from megamup.sections import Parallel
from megamup.train import distributed
from megamup.train.fork import run_ranks

Degrees = tuple[int, int, int, int]
"""Of pipeline, data, context and tensor."""
DEGREES: list[Degrees] = [
    (p, d, c, t) for p, d, c, t in itertools.product((1, 2, 3), (1, 2), (1, 2), (1, 2, 4)) if p * d * c * t <= 12
]
ALL_AXES = (*AXES, "replicas", "model")


@contextmanager
def world_of(size: int, rank: int) -> Iterator[None]:
    """A process group of which only this rank exists: groups can be made, and nothing is sent."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)
    try:
        yield
    finally:
        dist.destroy_process_group()


def members(axis: Axis, rank: int) -> list[int]:
    return [rank] if axis.group is None else dist.get_process_group_ranks(axis.group)


def places(degrees: Degrees, sequence: bool) -> list[tuple[Mesh, dict[str, list[int]]]]:
    """Of every rank: its mesh, and the ranks of its group along each axis."""
    pipeline, data, context, tensor = degrees
    parallel = Parallel(pipeline=pipeline, context=context, tensor=tensor, sequence=sequence and tensor > 1)
    found, world = [], pipeline * data * context * tensor
    for rank in range(world):
        with world_of(world, rank):
            mesh = build_mesh(parallel)
            found.append((mesh, {name: members(getattr(mesh, name), rank) for name in ALL_AXES}))
    return found


@pytest.mark.parametrize("degrees", DEGREES, ids=str)
def test_the_groups_of_an_axis_partition_the_world(degrees: Degrees) -> None:
    pipeline, data, context, tensor = degrees
    sizes = dict(zip(ALL_AXES, (*degrees, data * context, pipeline * tensor), strict=True))
    ranks = places(degrees, sequence=False)
    for name, size in sizes.items():
        groups = [groups[name] for _, groups in ranks]
        for rank, ((mesh, _), group) in enumerate(zip(ranks, groups, strict=True)):
            axis: Axis = getattr(mesh, name)
            assert (axis.size, len(group)) == (size, size)
            assert group[axis.rank] == rank, "a rank's place in the group is its rank on the axis"
            assert (axis.group is None) == (size == 1)
            assert all(groups[other] == group for other in group), "members disagree on the group"
        distinct = {tuple(group) for group in groups}
        assert Counter(rank for group in distinct for rank in group) == dict.fromkeys(range(len(ranks)), 1)


@pytest.mark.parametrize("degrees", DEGREES, ids=str)
def test_ranks_are_coordinates_with_tensor_innermost(degrees: Degrees) -> None:
    _, data, context, tensor = degrees
    for rank, (mesh, _) in enumerate(places(degrees, sequence=False)):
        at = ((mesh.pipeline.rank * data + mesh.data.rank) * context + mesh.context.rank) * tensor + mesh.tensor.rank
        assert at == rank
        assert mesh.replicas.rank == mesh.data.rank * context + mesh.context.rank
        assert mesh.model.rank == mesh.pipeline.rank * tensor + mesh.tensor.rank


@pytest.mark.parametrize("sequence", [False, True])
@pytest.mark.parametrize("degrees", DEGREES, ids=str)
def test_stretches_cover_the_sequence(degrees: Degrees, sequence: bool) -> None:
    """Of the ranks that share a sample, in one stage: each stretch once, or once a tensor rank without `sequence`."""
    _, _, context, tensor = degrees
    ranks = [mesh for mesh, _ in places(degrees, sequence)]
    shared = sequence and tensor > 1
    samples: dict[tuple[int, int], Counter[int]] = {}
    for mesh in ranks:
        assert mesh.stretches == context * (tensor if shared else 1)
        samples.setdefault((mesh.pipeline.rank, mesh.data.rank), Counter())[mesh.stretch] += 1
    for found in samples.values():
        assert found == dict.fromkeys(range(context * (tensor if shared else 1)), 1 if shared else tensor)
    # Gathered over the tensor axis, a context rank's stretches are those that follow each other.
    if shared:
        assert all(mesh.stretch // tensor == mesh.context.rank for mesh in ranks)


@pytest.mark.parametrize("parallel", [{"expert": 2}, {"expert": 4}, {"expert": 2, "context": 2}])
@pytest.mark.parametrize("pipeline", [1, 2])
def test_experts_are_shared_out_among_neighbouring_replicas(parallel: dict[str, int], pipeline: int) -> None:
    """Replicas = experts x holders: of a stage's four replicas of a tensor shard those that follow each other."""
    world, tensor, replicas = 8 * pipeline, 2, 4
    expert, holders = parallel["expert"], replicas // parallel["expert"]
    for rank in range(world):
        with world_of(world, rank):
            mesh = build_mesh(Parallel(tensor=tensor, pipeline=pipeline, **parallel))
            assert (mesh.expert.size, mesh.holders.size) == (expert, holders)
            assert mesh.replicas.rank == mesh.holders.rank * expert + mesh.expert.rank
            first = mesh.pipeline.rank * 8 + mesh.tensor.rank  # of this stage's replicas of this shard
            mine = mesh.holders.rank * expert
            assert members(mesh.expert, rank) == [first + tensor * (mine + n) for n in range(expert)]
            alike = [first + tensor * (n * expert + mesh.expert.rank) for n in range(holders)]
            assert members(mesh.holders, rank) == alike


def test_one_rank_needs_no_process_group() -> None:
    assert not dist.is_initialized()
    assert (SINGLE.stretches, SINGLE.stretch, SINGLE.tensor.name) == (1, 0, "")


def test_a_world_that_is_no_multiple_is_refused() -> None:
    with world_of(6, 0), pytest.raises(MegamupError, match="tensor=2 x pipeline=1 x context=2 = 4 ranks a replica"):
        build_mesh(Parallel(tensor=2, context=2))


def sums(parallel: Parallel) -> tuple[dict[str, tuple[float, list[int]]], Any]:
    distributed.join()
    mesh, rank = build_mesh(parallel), dist.get_rank()
    mpu = Mpu(mesh)
    mine = torch.tensor(10.0**rank)
    reduced = {
        name: (float(all_reduce(mine, getattr(mesh, name))), members(getattr(mesh, name), rank)) for name in ALL_AXES
    }
    sizes = [dist.get_world_size(mpu.get_data_parallel_group()), dist.get_world_size(mpu.get_model_parallel_group())]
    return reduced, sizes


@pytest.mark.parametrize(
    "parallel", [Parallel(tensor=2, context=2), Parallel(pipeline=2, context=2), Parallel(tensor=2)], ids=str
)
def test_real_groups_reduce_over_their_ranks(parallel: Parallel) -> None:
    """And DeepSpeed is told of context ranks as of data ranks."""
    for reduced, (replicas, model) in run_ranks(sums, 4, parallel):
        for name, (total, group) in reduced.items():
            assert total == sum(10.0**rank for rank in group), name
        assert (replicas, model) == (4 // parallel.tensor // parallel.pipeline, parallel.tensor)
