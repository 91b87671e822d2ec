"""The mesh of ranks: axes pipeline x data x context x tensor (tensor neighbours are adjacent ranks).

DeepSpeed knows three axes. To it, context ranks are data ranks: they hold the same weights, and their gradients, each
of a stretch of the same sequences, are averaged with the others'. Only batches and attention tell them apart.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch.distributed as dist

from megamup.sections import Parallel

AXES = ("pipeline", "data", "context", "tensor")


@dataclass(frozen=True)
class Axis:
    """One rank's place along an axis of the mesh, and the group of ranks that differ only there."""

    rank: int
    size: int
    group: dist.ProcessGroup | None
    """None on an axis of one rank: nothing to say to anybody."""

    @property
    def name(self) -> str:
        """By which torch's functional collectives know the group."""
        return "" if self.group is None else self.group.group_name


ALONE = Axis(0, 1, None)


@dataclass(frozen=True)
class Mesh:
    pipeline: Axis
    data: Axis
    """Ranks that read different samples."""
    context: Axis
    """Ranks that hold stretches of the same samples (DeepSpeed-Ulysses)."""
    tensor: Axis
    replicas: Axis
    """The ranks with the same weights: data x context. Gradients are averaged and ZeRO partitions over them."""
    model: Axis
    """The ranks that hold one replica: pipeline x tensor."""
    expert: Axis = ALONE
    """Replicas that share out the experts: the only weights in which they differ."""
    holders: Axis = ALONE
    """Replicas with the same experts."""
    sequence: bool = False
    """Outside the tensor-parallel regions each tensor rank holds its stretch of the sequence only."""

    @property
    def stretches(self) -> int:
        """Into how many stretches the residual stream's sequence is cut."""
        return self.context.size * (self.tensor.size if self.sequence else 1)

    @property
    def stretch(self) -> int:
        """Which of them this rank holds."""
        return self.context.rank * self.tensor.size + self.tensor.rank if self.sequence else self.context.rank


SINGLE = Mesh(ALONE, ALONE, ALONE, ALONE, ALONE, ALONE)
"""One rank, no process group: for building a model on its own."""


def build_mesh(parallel: Parallel) -> Mesh:
    """Cut the world into axes. Collective: every rank calls it, after ``init_process_group``.

    Raises:
        MegamupError: the world is no multiple of a replica's ranks.
    """
    world = dist.get_world_size()
    sizes = {
        "pipeline": parallel.pipeline,
        "data": parallel.data(world),
        "context": parallel.context,
        "tensor": parallel.tensor,
    }
    coordinates = list(itertools.product(*(range(sizes[axis]) for axis in AXES)))  # index = global rank

    def along(*varying: str) -> Axis:
        """The axis (or product of axes) on which the ``varying`` coordinates run."""
        fixed = [AXES.index(axis) for axis in AXES if axis not in varying]
        return together([tuple(at[dim] for dim in fixed) for at in coordinates])

    replicas = along("data", "context")
    expert, holders = ALONE, replicas
    if parallel.expert > 1:
        # Neighbours share out the experts, as they say the most to each other.
        places = [(at[0], at[3], *divmod(at[1] * parallel.context + at[2], parallel.expert)) for at in coordinates]
        expert = together([(stage, tensor, holder) for stage, tensor, holder, _ in places])
        holders = together([(stage, tensor, number) for stage, tensor, _, number in places])
    return Mesh(
        pipeline=along("pipeline"),
        data=along("data"),
        context=along("context"),
        tensor=along("tensor"),
        replicas=replicas,
        model=along("pipeline", "tensor"),
        expert=expert,
        holders=holders,
        sequence=parallel.sequence,
    )


def together(keys: Sequence[tuple[int, ...]]) -> Axis:
    """This rank's axis, where the ranks of an axis are those with the same key. Collective.

    Args:
        keys: of each rank of the world.
    """
    rank, mine = dist.get_rank(), ALONE
    for key in dict.fromkeys(keys):
        ranks = [r for r, other in enumerate(keys) if other == key]
        group = dist.new_group(ranks) if len(ranks) > 1 else None  # every rank creates every group
        if rank in ranks:
            mine = Axis(ranks.index(rank), len(ranks), group)
    return mine


class Mpu:
    """The mesh under the method names that DeepSpeed asks of Megatron's ``mpu`` (used without pipeline only)."""

    def __init__(self, mesh: Mesh) -> None:
        self.mesh = mesh
        # DeepSpeed needs a group object on every axis, also on those of one rank.
        alone = [dist.new_group([rank]) for rank in range(dist.get_world_size())]
        self.alone = alone[dist.get_rank()]

    def get_model_parallel_rank(self) -> int:
        return self.mesh.tensor.rank

    def get_model_parallel_world_size(self) -> int:
        return self.mesh.tensor.size

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        return self.mesh.tensor.group or self.alone

    def get_data_parallel_rank(self) -> int:
        return self.mesh.replicas.rank

    def get_data_parallel_world_size(self) -> int:
        return self.mesh.replicas.size

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        return self.mesh.replicas.group or self.alone

    get_tensor_model_parallel_rank = get_model_parallel_rank
    get_tensor_model_parallel_world_size = get_model_parallel_world_size
    get_tensor_model_parallel_group = get_model_parallel_group
