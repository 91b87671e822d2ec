"""Bytes that DeepSpeed keeps of weights, gradients and optimizer state, and its buffers (0.19.8, by its source).

What each optimizer wrapper holds besides Rajbhandari et al. (2020, section 5): buckets have their full configured size
however small the model, fp32 training under ZeRO 1-3 keeps a second copy of the weights that a rank updates, and a
reduction flattens what it sends.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from megamup.config import Config
from megamup.deepspeed_file import load_deepspeed, zero_stage
from megamup.plan.state import Held

ALLREDUCE_ELEMENTS = 500_000_000
"""Of gradients that are reduced at a time where no bucket is configured (``MEMORY_OPT_ALLREDUCE_SIZE``)."""
OVERLAPPED_ELEMENTS, IN_FLIGHT = 25_000_000, 3
"""Of a bucket, and how many buckets are there at a time, where ZeRO 0 reduces behind the backward pass."""
MOMENTS = 8
"""Bytes of AdamW's two averages of a weight."""


@dataclass(frozen=True)
class StateBytes:
    weights: int
    """Between steps."""
    gradients: int
    """As they are accumulated."""
    optimizer: int
    """Moments and, under ZeRO, the weights that this rank updates."""
    buffers: int = 0
    """Between steps."""
    lasting: int = 0
    """Of `gradients`, those that are there between steps too."""
    loose: int = 0
    """Gradients that come one by one in the first backward pass and stay until the step."""
    part: int = 0
    """This rank's part of the gradients, from the first reduction to the step."""
    backward: int = 0
    """Buckets, from a step's first backward pass on."""
    buckets_last: bool = False
    """They stay until the step, else until each backward pass is over."""
    gathered: int = 0
    """ZeRO 3: weights of other ranks, at the most."""
    gathering: int = 0
    """ZeRO 3: what they are received in."""
    gathers_again: bool = False
    """ZeRO 3: not all weights stay from the forward to the backward pass."""
    reduction: int = 0
    """Besides all of these, while gradients are reduced."""
    again: int = 0
    """A later micro batch's part of the gradients, before it is added to that of the earlier ones."""
    compact: bool = False
    """The part is summed in fp32 as reductions arrive, beside what is copied out of the bucket."""
    renewed: bool = False
    """`loose` gradients go after each backward pass."""
    reduced_from: int = 0
    """Elements of gradients after which that begins to happen, during backward passes; 0: not before their end."""
    step: int = 0
    """Besides weights, optimizer, gradients and `buffers`, while the optimizer steps."""


@dataclass(frozen=True)
class Settings:
    """The keys of a DeepSpeed config that bytes depend on, with DeepSpeed's defaults."""

    stage: int
    reduce_bucket: int
    overlap: bool
    contiguous: bool
    prefetch_bucket: int
    persistent: int
    """Parameters of fewer elements are never cut."""
    most_persistent: int
    reuse_distance: int
    most_live: int
    offloads_optimizer: bool
    offloads_weights: bool


def settings(config: Config) -> Settings:
    keys = load_deepspeed(config.deepspeed)
    stage = zero_stage(keys)
    section = keys.get("zero_optimization", {})
    section = section if isinstance(section, dict) else {}

    def number(name: str, default: float) -> int:
        value: Any = section.get(f"stage3_{name}", section.get(name, default))
        return int(default if value == "auto" else value)

    def offloads(name: str) -> bool:
        given = section.get(name)
        return isinstance(given, Mapping) and given.get("device", "none") != "none"

    overlap = section.get("overlap_comm")
    return Settings(
        stage=stage,
        reduce_bucket=number("reduce_bucket_size", 5e8),
        overlap=stage == 3 if overlap is None else bool(overlap),
        contiguous=bool(section.get("contiguous_gradients", True)),
        prefetch_bucket=number("prefetch_bucket_size", 5e7),
        persistent=number("param_persistence_threshold", 1e5),
        most_persistent=number("model_persistence_threshold", 2**63),
        reuse_distance=number("max_reuse_distance", 1e9),
        most_live=number("max_live_parameters", 1e9),
        offloads_optimizer=offloads("offload_optimizer"),
        offloads_weights=offloads("offload_param"),
    )


def state(config: Config, held: Held, replicas: int, settings: Settings, on_cpu: bool) -> StateBytes:
    """What DeepSpeed holds of a rank's parameters.

    Args:
        replicas: ranks that ZeRO cuts over: data x context.
        on_cpu: gloo, which copies what it reduces, does the sending.
    """
    found = on_device(config, held, replicas, settings, on_cpu)
    if settings.offloads_optimizer and not on_cpu:  # masters, moments and accumulated gradients are the host's
        found = replace(found, optimizer=0, gradients=found.loose, lasting=0, part=0, again=0, step=0)
    if settings.offloads_weights and not on_cpu:
        found = replace(found, weights=0)
    return found


def on_device(config: Config, held: Held, replicas: int, settings: Settings, on_cpu: bool) -> StateBytes:
    """`state` where nothing is offloaded."""
    mixed, pipelined = config.precision == "bf16" and settings.stage > 0, config.parallel.pipeline > 1
    if settings.stage == 0:
        return plain(held, replicas, pipelined)
    if settings.stage == 3:
        return zero_3(held, replicas, settings, each=2 if mixed else 4, copies=2 if on_cpu else 1)
    if settings.stage == 1 and mixed:
        return bf16_optimizer(held, replicas, pipelined)
    return zero_1_2(held, replicas, settings, each=2 if mixed else 4, pipelined=pipelined)


def plain(held: Held, replicas: int, pipelined: bool) -> StateBytes:
    """ZeRO 0: the bare optimizer. Some buckets of gradients are flattened at a time (`megamup.train.overlap`), in a
    pipeline, where DeepSpeed reduces, all of them."""
    sent = ALLREDUCE_ELEMENTS + held.largest if pipelined else IN_FLIGHT * OVERLAPPED_ELEMENTS
    reduced = pipelined or replicas > 1
    return StateBytes(
        weights=4 * held.total,
        gradients=4 * held.total,
        optimizer=MOMENTS * held.total,
        loose=4 * held.total,
        reduction=4 * min(held.total, sent) if reduced else 0,
        reduced_from=OVERLAPPED_ELEMENTS if reduced and not pipelined else 0,
    )


def bf16_optimizer(held: Held, replicas: int, pipelined: bool) -> StateBytes:
    """ZeRO 1 in bf16 (BF16_Optimizer): fp32 gradients lie flat beside bf16 ones, and are sent in bf16. The
    pipeline's engine drops the bf16 ones after each backward pass."""
    return StateBytes(
        weights=2 * held.total,
        gradients=4 * held.total,
        optimizer=(4 + MOMENTS) * held.total // replicas,
        lasting=4 * held.total,
        loose=2 * held.total,
        reduction=(4 + 2) * min(held.total, ALLREDUCE_ELEMENTS + held.largest_group),
        step=2 * held.total,
        renewed=pipelined,
    )


def zero_1_2(held: Held, replicas: int, settings: Settings, each: int, pipelined: bool) -> StateBytes:
    """ZeRO 1 in fp32 and ZeRO 2 (DeepSpeedZeroOptimizer). Gradients move into a bucket, at ZeRO 1 after the last
    backward pass, at ZeRO 2 as they come; a reduction flattens the bucket, and this rank's part is kept."""
    whole, part = settings.stage == 1, held.total // replicas
    overlaps = settings.overlap and not pipelined
    early = 4 * part if whole and overlaps and held.total > settings.reduce_bucket else 0  # during the backward pass
    buckets = (1 if settings.contiguous else 0) + (1 if overlaps else 0)
    return StateBytes(
        weights=each * held.total,
        gradients=4 * (held.total if whole else part),
        optimizer=(4 + MOMENTS) * part,
        loose=4 * held.total if whole else 0,
        part=0 if whole else 4 * part,
        backward=buckets * each * settings.reduce_bucket + early,
        reduction=4 * part - early if whole else each * min(held.total, settings.reduce_bucket),
        again=0 if whole else each * part,
        compact=each < 4,
        buckets_last=whole,
        reduced_from=0 if whole else settings.reduce_bucket,
        step=4 * -(-held.largest_group // replicas) + (4 * part if whole else 0),
    )


def zero_3(held: Held, replicas: int, settings: Settings, each: int, copies: int) -> StateBytes:
    """ZeRO 3. The bucket lasts; small parameters are never cut; others are gathered some time before their use, and
    dropped where their next use is far."""
    part = held.total // replicas
    small = min(sum(size for size in held.sizes if size <= settings.persistent), settings.most_persistent)
    kept_near = settings.reuse_distance // 2 + settings.prefetch_bucket
    return StateBytes(
        weights=each * (part + small),
        gradients=4 * part,
        optimizer=(4 + MOMENTS) * part,
        buffers=each * settings.reduce_bucket if settings.contiguous else 0,
        lasting=4 * part,
        gathered=each * min(held.total - small, settings.most_live, kept_near),
        gathering=each * min(held.total - small, settings.prefetch_bucket),
        gathers_again=held.total - small > settings.reuse_distance // 2,
        reduction=copies * each * min(held.total, max(settings.reduce_bucket, held.largest)),
        reduced_from=settings.reduce_bucket,
        step=4 * -(-held.largest_group // replicas),
    )
