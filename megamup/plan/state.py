"""Which layers and parameters each pipeline stage holds, and how many elements of them a tensor rank does."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Literal

from megamup.config import Config
from megamup.model import Model
from megamup.parameters import Stack, parameters, stacks


@dataclass(frozen=True)
class Layer:
    """A stretch of a model's list of layers (megamup.models): a block, or what stands between blocks.

    ``start``: from token ids to a stack's stream, with all that its blocks share. ``memory``: the encoder's last norm.
    ``head``: from the last block's output to the loss.
    """

    kind: Literal["start", "block", "memory", "head"]
    stack: Stack
    number: int = 0
    """Of a block in its stack."""


def layers(model: Model) -> list[Layer]:
    """The list, first to last."""
    first, *others = stacks(model)
    found = [Layer("start", first), *blocks_of(first)]
    for stack in others:
        found += [Layer("memory", first), Layer("start", stack), *blocks_of(stack)]
    return [*found, Layer("head", found[-1].stack)]


def blocks_of(stack: Stack) -> list[Layer]:
    return [Layer("block", stack, number) for number in range(stack.layers)]


@lru_cache(maxsize=256)
def stage_layers(model: Model, pipeline: int) -> tuple[tuple[Layer, ...], ...]:
    """The list cut into stages as DeepSpeed cuts it (``type:^(Wired)?Block$``): each begins with a block, the first
    with the list, and where blocks don't go evenly into stages the first ones have one more."""
    found = layers(model)
    places = [place for place, layer in enumerate(found) if layer.kind == "block"]
    each, rest = divmod(len(places), pipeline)
    begins = [stage * each + min(stage, rest) for stage in range(pipeline)]
    edges = [0, *(places[block] for block in begins[1:]), len(found)]
    return tuple(tuple(found[start:stop]) for start, stop in pairwise(edges))


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
    return [held.total for held in held_of(config)]


def held_of(config: Config) -> tuple[Held, ...]:
    """Of each pipeline stage, what a tensor rank of the config's layout holds."""
    parallel = config.parallel
    return inventory(config.model, parallel.tensor, parallel.pipeline, parallel.expert)


@lru_cache(maxsize=256)
def inventory(model: Model, tensor: int, pipeline: int, expert: int = 1) -> tuple[Held, ...]:
    """Of each pipeline stage, what a tensor rank holds, which of experts has one of ``expert`` shares; a parameter of
    layers on several stages is on each of them."""
    stage_of = {layer: stage for stage, of_stage in enumerate(stage_layers(model, pipeline)) for layer in of_stage}
    members: list[list[tuple[str, int]]] = [[] for _ in range(pipeline)]
    for parameter in parameters(model).values():
        size = parameter.size // (tensor if parameter.partition_dim is not None else 1)
        if ".moe.experts." in parameter.name:
            size //= expert
        for stage in {stage_of[layer] for layer in owners(model, parameter.name)}:
            members[stage].append((parameter.role, size))
    return tuple(held(of_stage) for of_stage in members)


def owners(model: Model, name: str) -> list[Layer]:
    """The layers that a parameter is of: more than one where it is shared."""
    first, last = stacks(model)[0], stacks(model)[-1]
    head = Layer("head", last)
    if name == "embedding.token":
        return [Layer("start", stack) for stack in stacks(model)] + ([head] if model.tie_embeddings else [])
    if name.startswith(("embedding.", "embedding_norm.")):
        return [Layer("start", first)]
    for stack in stacks(model):
        part, _, rest = name.removeprefix(stack.prefix).partition(".")
        if not name.startswith(stack.prefix):
            continue
        if part == "blocks":
            return [Layer("block", stack, int(rest.partition(".")[0]))]
        if part == "relative":
            return [Layer("start", stack)]
        if part == "final_norm" and stack != last:
            return [Layer("memory", stack)]
    return [head]


def held(members: list[tuple[str, int]]) -> Held:
    """From (role, elements) of every parameter."""
    groups: dict[str, int] = {}
    for role, size in members:
        groups[role] = groups.get(role, 0) + size
    sizes = tuple(size for _, size in members)
    return Held(sum(sizes), max(sizes), max(groups.values()), sizes)
