"""The mesh of ranks: axes pipeline x data x tensor, in DeepSpeed's order (tensor neighbours are adjacent ranks)."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch.distributed as dist

AXES = ("pipeline", "data", "tensor")


@dataclass(frozen=True)
class Axis:
    """One rank's place along an axis of the mesh, and the group of ranks that differ only there."""

    rank: int
    size: int
    group: dist.ProcessGroup | None
    """None on an axis of one rank: nothing to say to anybody."""


@dataclass(frozen=True)
class Mesh:
    pipeline: Axis
    data: Axis
    tensor: Axis
    model: Axis
    """The ranks that hold one replica: pipeline x tensor."""


ALONE = Axis(0, 1, None)
SINGLE = Mesh(ALONE, ALONE, ALONE, ALONE)
"""One rank, no process group: for building a model on its own."""


def build_mesh(tensor: int, pipeline: int) -> Mesh:
    """Cut the world into axes. Collective: every rank calls it, after ``init_process_group``.

    Raises:
        ValueError: the world is no multiple of ``tensor * pipeline``.
    """
    world, rank = dist.get_world_size(), dist.get_rank()
    if world % (tensor * pipeline):
        raise ValueError(f"{world} ranks are no multiple of tensor={tensor} x pipeline={pipeline}")
    sizes = {"pipeline": pipeline, "data": world // (tensor * pipeline), "tensor": tensor}
    coordinates = list(itertools.product(*(range(sizes[axis]) for axis in AXES)))  # index = global rank

    def along(*varying: str) -> Axis:
        """The axis (or product of axes) on which the ``varying`` coordinates run."""
        fixed = [AXES.index(axis) for axis in AXES if axis not in varying]
        mine: Axis = ALONE
        for key in itertools.product(*(range(sizes[AXES[dim]]) for dim in fixed)):
            ranks = [r for r, at in enumerate(coordinates) if tuple(at[dim] for dim in fixed) == key]
            group = dist.new_group(ranks) if len(ranks) > 1 else None  # every rank creates every group
            if rank in ranks:
                mine = Axis(ranks.index(rank), len(ranks), group)
        return mine

    return Mesh(along("pipeline"), along("data"), along("tensor"), along("pipeline", "tensor"))


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
        return self.mesh.data.rank

    def get_data_parallel_world_size(self) -> int:
        return self.mesh.data.size

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        return self.mesh.data.group or self.alone

    get_tensor_model_parallel_rank = get_model_parallel_rank
    get_tensor_model_parallel_world_size = get_model_parallel_world_size
    get_tensor_model_parallel_group = get_model_parallel_group
