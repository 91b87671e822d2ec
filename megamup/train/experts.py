"""Experts that replicas share out: what DeepSpeed has to know of them, and their state, of which a rank has its own.

DeepSpeed's own MoE layer isn't used (NOTES.md says why), but its groups are: to its engines these are parameters that
are alike on some data ranks only, which at ZeRO 0 it leaves to us, and at ZeRO 1-2 partitions among those.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.moe.layer import MoE
from deepspeed.utils import groups
from torch import nn

from megamup.parallel.layers import EXPERTS, shared_out, spec_of
from megamup.parallel.mesh import Mesh


@contextlib.contextmanager
def announced(module: nn.Module, mesh: Mesh, partitioned: bool) -> Iterator[None]:
    """Have ``deepspeed.initialize`` find which ranks hold the same experts: it copies a rank's weights to those, and
    under ZeRO has them partition the optimizer's state (``partitioned``). Collective."""
    if mesh.expert.size == 1:
        yield
        return
    alone = [dist.new_group([rank]) for rank in range(dist.get_world_size())]
    mine = mesh.holders.group or alone[dist.get_rank()]
    groups._EXPERT_DATA_PARALLEL_GROUP[EXPERTS] = mine
    groups._EXPERT_DATA_PARALLEL_GROUP_RANKS[EXPERTS] = dist.get_process_group_ranks(mine)
    groups._EXPERT_PARALLEL_GROUP[EXPERTS] = mesh.expert.group
    groups._EXPERT_PARALLEL_GROUP_RANKS[EXPERTS] = dist.get_process_group_ranks(mesh.expert.group)
    if partitioned:
        module.add_module(EXPERTS, SharedOut())
    yield
    if partitioned:
        delattr(module, EXPERTS)


class SharedOut(MoE):  # type: ignore[misc]
    """By which DeepSpeed's engine finds that a model has experts, so that ZeRO 1-2 partitions them among their
    holders; it has no parameters, and nothing calls it."""

    num_experts = 0

    def __init__(self) -> None:
        nn.Module.__init__(self)

    def set_deepspeed_parallelism(self, use_data_before_expert_parallel_: bool = False) -> None:
        """Its groups are those of `announced`."""


def file_of(folder: Path, mesh: Mesh) -> Path:
    places = (mesh.pipeline.rank, mesh.tensor.rank, mesh.expert.rank)
    return folder / "experts_pipeline{}_tensor{}_expert{}.pt".format(*places)


def save(engine: Any, mesh: Mesh, folder: Path) -> None:
    """Write what DeepSpeed, which writes the first replica's weights, leaves out. Collective.

    At ZeRO 1-2 it writes every rank's part of the optimizer's state; at ZeRO 0 the first replica's.
    """
    if mesh.expert.size == 1:
        return
    if mesh.holders.rank == 0:
        states = {} if engine.zero_optimization() else engine.basic_optimizer.state
        state = {name: {"weight": shard.detach(), **states.get(shard, {})} for name, shard in own(engine.module)}
        torch.save(state, file_of(folder, mesh))
    dist.barrier()


def load(engine: Any, mesh: Mesh, folder: Path) -> None:
    """Put this rank's experts where DeepSpeed has put the first replica's."""
    if mesh.expert.size == 1:
        return
    stored = torch.load(file_of(folder, mesh), map_location="cpu", weights_only=True)
    with torch.no_grad():
        for name, shard in own(engine.module):
            shard.copy_(stored[name].pop("weight"))
            for key, value in stored[name].items():
                engine.basic_optimizer.state[shard][key].copy_(value)


def own(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """This rank's experts by global name."""
    return ((spec_of(shard).name, shard) for shard in module.parameters() if shared_out(shard))
