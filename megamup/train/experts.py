"""Experts that replicas share out: what DeepSpeed has to know of them, and their state, of which a rank has its own.

DeepSpeed's own MoE layer isn't used (NOTES.md says why); to its engines these are parameters that aren't alike on all
data ranks, which at ZeRO 0 it leaves alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.utils import groups
from torch import nn

from megamup.parallel.layers import EXPERTS, shared_out, spec_of
from megamup.parallel.mesh import Mesh


def announce(mesh: Mesh) -> None:
    """Tell DeepSpeed which ranks hold the same experts: a start copies a rank's weights to those. Collective."""
    if mesh.expert.size == 1:
        return
    alone = [dist.new_group([rank]) for rank in range(dist.get_world_size())]
    groups._EXPERT_DATA_PARALLEL_GROUP[EXPERTS] = mesh.holders.group or alone[dist.get_rank()]


def file_of(folder: Path, mesh: Mesh) -> Path:
    places = (mesh.pipeline.rank, mesh.tensor.rank, mesh.expert.rank)
    return folder / "experts_pipeline{}_tensor{}_expert{}.pt".format(*places)


def save(engine: Any, mesh: Mesh, folder: Path) -> None:
    """Write what DeepSpeed, which writes the first replica's state, leaves out. Collective."""
    if mesh.expert.size == 1:
        return
    if mesh.holders.rank == 0:
        states = engine.basic_optimizer.state
        state = {name: {"weight": shard.detach(), **states[shard]} for name, shard in own(engine.module)}
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
