"""Which parameters each pipeline stage holds, and how many elements of them a tensor rank does."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from megamup.config import Config
from megamup.parameters import parameters
from megamup.sections import Model


@dataclass(frozen=True)
class Held:
    """Elements of the parameters of one rank, before ZeRO cuts them."""

    total: int
    largest: int
    """Of one parameter."""
    largest_group: int
    """Of the parameters of one role, which are in one group of the optimizer."""
    sizes: tuple[int, ...]


def stage_parameters(config: Config) -> list[int]:
    """Parameters that one tensor rank of each pipeline stage holds; blocks are spread as evenly as they go."""
    return [held.total for held in inventory(config.model, config.parallel.tensor, config.parallel.pipeline)]


def first_layers(n_layers: int, pipeline: int) -> list[int]:
    """Of each stage its first block, and the number of blocks."""
    return [-(-n_layers * stage // pipeline) for stage in range(pipeline + 1)]


@lru_cache(maxsize=256)
def inventory(model: Model, tensor: int, pipeline: int) -> tuple[Held, ...]:
    """Of each pipeline stage, what a tensor rank holds."""
    edges = first_layers(model.n_layers, pipeline)
    stage_of_layer = [stage for stage in range(pipeline) for _ in range(edges[stage], edges[stage + 1])]
    members: list[list[tuple[str, int]]] = [[] for _ in range(pipeline)]
    for parameter in parameters(model).values():
        size = parameter.size // (tensor if parameter.partition_dim is not None else 1)
        part, *rest = parameter.name.split(".")
        stage = stage_of_layer[int(rest[0])] if part == "blocks" else 0 if part == "embedding" else pipeline - 1
        members[stage].append((parameter.role, size))
        if model.tie_embeddings and parameter.name == "embedding.token" and pipeline > 1:
            members[-1].append((parameter.role, size))  # the tied readout's copy
    return tuple(held(of_stage) for of_stage in members)


def held(members: list[tuple[str, int]]) -> Held:
    """From (role, elements) of every parameter."""
    groups: dict[str, int] = {}
    for role, size in members:
        groups[role] = groups.get(role, 0) + size
    sizes = tuple(size for _, size in members)
    return Held(sum(sizes), max(sizes), max(groups.values()), sizes)
