"""Layouts of a config on a cluster that are valid and fit, the fastest first."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

from megamup import kernel_rules
from megamup.cluster import Cluster
from megamup.config import Config, config_from, merge
from megamup.errors import MegamupError
from megamup.plan.layout import layout_of
from megamup.plan.memory import memory
from megamup.plan.rates import known
from megamup.plan.scope import unplanned
from megamup.plan.state import stage_parameters
from megamup.plan.time import StepTime, step_time

HEADROOM = 0.9
"""Of a device's memory that a layout may take: the rest is the CUDA context, NCCL's buffers, and what the allocator
leaves between tensors."""
RECOMPUTE: tuple[Literal["none", "selective", "full"], ...] = ("none", "selective", "full")


@dataclass(frozen=True)
class Candidate:
    overrides: tuple[str, ...]
    """What makes the config this one, as on a command line."""
    step: StepTime
    peak_bytes: int
    """Of the rank that holds most."""


@dataclass(frozen=True)
class Found:
    candidates: tuple[Candidate, ...]
    """The fastest that fit."""
    tried: int
    """Valid layouts whose time was predicted."""
    too_large: int
    """Of these, how many were faster than the last candidate and didn't fit."""


class Timed(NamedTuple):
    """A layout with its time, whose memory isn't known yet."""

    step: StepTime
    base: Config
    """Its axes and ZeRO stage; micro batches and recomputation are still those of the user."""
    overrides: dict[str, Any]
    """What made the base."""
    micro_sequences: int
    recompute: Literal["none", "selective", "full"]

    def settings(self) -> dict[str, Any]:
        return {
            **self.overrides,
            "batch.micro_sequences": self.micro_sequences,
            "train.recompute": self.recompute,
        }

    def config(self) -> Config | None:
        found = valid(self.base.model_dump(mode="json"), self.settings())
        return None if found is None or kernel_rules.refused(found) else found


def search(config: Config, cluster: Cluster, limit: int = 10) -> Found:
    """Try tensor, pipeline, context and data axes, sequence parallelism, ZeRO stages, micro batches and recomputation.

    The tensor axis stays within a node, where its traffic is fast. What the config's own checks refuse, or the backends
    that it names can't compute, is no candidate.

    Raises:
        MegamupError: the cluster's memory or rates aren't known, no layout is valid, or what the config asks for has no
            plan (`megamup.plan.scope`).
    """
    if missing := unplanned(config):
        raise MegamupError(f"--search: activations and step time aren't planned: {'; '.join(missing)}")
    capacity = HEADROOM * known(cluster, "memory")
    timed: list[Timed] = []
    held: dict[tuple[int, int], tuple[int, ...]] = {}
    for base, overrides in layouts(config, cluster):
        axes = (base.parallel.tensor, base.parallel.pipeline)
        if axes not in held:
            held[axes] = tuple(stage_parameters(base))
        layout, share = (
            layout_of(base, cluster.devices, cluster.kind),
            base.batch.global_sequences // base.parallel.data(cluster.devices),
        )
        for size, recompute in itertools.product(divisors(share), RECOMPUTE):
            changed = replace(layout, micro_sequences=size, micro_batches=share // size, recompute=recompute)
            step = step_time(base.model, base.lengths, changed, cluster, held[axes])
            timed.append(Timed(step, base, overrides, size, recompute))
    if not timed:
        raise MegamupError(
            f"--search: no layout of {cluster.devices} devices is valid for this config; its batch of "
            f"{config.batch.global_sequences} sequences and its sizes have to be divisible by the axes, and the "
            "backends of `kernels` that it names have to take the parts"
        )
    timed.sort(key=lambda one: one.step.seconds)
    return fitting(config, timed, cluster, capacity, limit)


def fitting(config: Config, timed: Sequence[Timed], cluster: Cluster, capacity: float, limit: int) -> Found:
    """The first that fit. Where a micro batch doesn't, no larger one of the same layout is asked for."""
    smallest_too_large: dict[tuple[Any, ...], int] = {}
    candidates: list[Candidate] = []
    too_large = 0
    for one in timed:
        kind = (*one.overrides.values(), one.recompute)
        if one.micro_sequences >= smallest_too_large.get(kind, one.micro_sequences + 1):
            too_large += 1
            continue
        changed = one.config()
        if changed is None:
            continue
        peak = memory(changed, cluster.devices, cluster.kind).total
        if peak > capacity:
            smallest_too_large[kind] = one.micro_sequences
            too_large += 1
            continue
        candidates.append(Candidate(different(config, changed, one.settings()), one.step, peak))
        if len(candidates) == limit:
            break
    return Found(tuple(candidates), len(timed), too_large)


def layouts(config: Config, cluster: Cluster) -> Iterator[tuple[Config, dict[str, Any]]]:
    """Valid configs, and what was overridden, for every axis and ZeRO stage; micro batches are not yet set."""
    values = config.model_dump(mode="json")
    values["batch"]["micro_sequences"] = None
    world, per_node = cluster.devices, cluster.devices_per_node or cluster.devices
    blocks = config.model.n_layers + (config.model.n_decoder_layers or 0)
    for tensor in divisors(min(world, per_node)):
        for pipeline in divisors(world // tensor) if world % tensor == 0 else []:
            for context in divisors(world // tensor // pipeline):
                if pipeline > blocks or config.batch.global_sequences % (world // tensor // pipeline // context):
                    continue
                for sequence in (False, True) if tensor > 1 else (False,):
                    for stage in (0, 1) if pipeline > 1 else (0, 1, 2, 3):
                        overrides = {
                            "parallel.tensor": tensor,
                            "parallel.pipeline": pipeline,
                            "parallel.context": context,
                            "parallel.sequence": sequence,
                            "deepspeed": f"ds_configs/zero{stage}.json",
                        }
                        found = valid(values, overrides)
                        if found is not None and computable(found, world):
                            yield found, overrides


def computable(base: Config, world: int) -> bool:
    """Whether the backends that the config names can compute the layout with some micro batch: rules ask for multiples,
    and a rank's whole share is a multiple of every micro batch."""
    share = base.batch.global_sequences // base.parallel.data(world)
    whole = base.batch.model_copy(update={"micro_sequences": share})
    return kernel_rules.refused(base.model_copy(update={"batch": whole})) is None


def valid(values: dict[str, Any], overrides: dict[str, Any]) -> Config | None:
    """The config with ``overrides``, None where its checks refuse them."""
    changed = deepcopy(values)
    for key, value in overrides.items():
        nested: Any = value
        for part in reversed(key.split(".")):
            nested = {part: nested}
        merge(changed, nested)
    try:
        return config_from(changed)
    except MegamupError:
        return None


def different(config: Config, changed: Config, settings: dict[str, Any]) -> tuple[str, ...]:
    """The settings that the config doesn't have already, as overrides."""
    old, new = config.model_dump(mode="json"), changed.model_dump(mode="json")
    return tuple(f"{key}={shown(value)}" for key, value in settings.items() if at(old, key) != at(new, key))


def at(values: Any, key: str) -> Any:
    for part in key.split("."):
        values = values[part]
    return values


def divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]


def shown(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def search_lines(found: Found, cluster: Cluster) -> Iterator[str]:
    """A row a layout, and the overrides to paste."""
    if not found.candidates:
        yield (
            f"none of {found.tried:,} valid layouts fits in {HEADROOM:.0%} of {known(cluster, 'memory') / 1e9:g} GB; "
            "take more devices, a shorter sequence or a smaller batch"
        )
        return
    yield f"{found.tried:,} valid layouts; {found.too_large:,} that would have been faster than the last here don't fit"
    yield f"{'tokens/s':>12}{'step':>9}{'MFU':>7}{'bubble':>8}{'GB':>7}  {'bound by':<16}  overrides"
    for one in found.candidates:
        step = one.step
        bubble = step.terms.get("pipeline bubble", 0.0) / step.seconds
        yield (
            f"{step.tokens_per_s:>12,.0f}{step.seconds:>8.3g}s{step.mfu:>6.1f}%{bubble:>8.1%}"
            f"{one.peak_bytes / 1e9:>7.1f}  {step.bound:<16}  {' '.join(one.overrides)}"
        )


def search_json(found: Found) -> dict[str, Any]:
    return {
        "valid_layouts": found.tried,
        "faster_but_too_large": found.too_large,
        "candidates": [
            {"overrides": list(one.overrides), "peak_bytes": one.peak_bytes, **one.step.as_json()}
            for one in found.candidates
        ],
    }
