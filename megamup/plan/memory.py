"""Peak bytes of a training step, on the rank that holds most, before anything is built.

Weights, gradients and optimizer state follow from ZeRO (`megamup.plan.zero`), activations from the blocks' operations
(`megamup.plan.activations`, replayed by `megamup.plan.tape`). They don't peak together: gradients come while
activations go, buckets live through backward passes, and the optimizer steps when activations are gone. So a step is
followed through its moments, and the largest counts.

Not in it: what isn't a tensor of the run (the CUDA context, NCCL's and cuBLAS' workspaces, fragmentation), compiled
blocks (which keep less), evaluation, and a monitored step's copies.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from megamup.config import Config, micro_batches
from megamup.plan.activations import BlockTape, Device, Setting, backends
from megamup.plan.ends import End, embedding, head
from megamup.plan.state import Held, first_layers, inventory
from megamup.plan.tape import Footprint, Recompute
from megamup.plan.zero import StateBytes, settings, state


@dataclass(frozen=True)
class Memory:
    """Bytes on the rank that holds most. The parts at their own largest, so they add up to more than ``total``."""

    weights: int
    """Between steps."""
    gradients: int
    optimizer: int
    activations: int
    """Kept for backward passes, of all micro batches in flight."""
    logits: int
    """Logits, softmax and their gradient, as far as they exist at a time."""
    buffers: int
    """DeepSpeed's: buckets, gathered weights, what a reduction copies."""
    total: int
    """The peak."""


@dataclass(frozen=True)
class Moment:
    name: str
    total: int


def memory(config: Config, world_size: int, device: Device = "cuda") -> Memory:
    """Bytes by part, and their peak.

    Args:
        device: decides which backends ``kernels`` has where it says auto, and what they keep.

    Raises:
        MegamupError: the batch can't be split over so many ranks.
    """
    ranks = stages(config, world_size, device)
    most = max(ranks, key=lambda stage: stage.peak.total)
    of_state = most.state
    return Memory(
        weights=of_state.weights,
        gradients=of_state.gradients,
        optimizer=of_state.optimizer,
        activations=most.in_flight * most.kept,
        logits=most.head.logits if most.head else 0,
        buffers=of_state.buffers + of_state.backward + of_state.gathered + of_state.reduction,
        total=most.peak.total,
    )


def state_bytes(config: Config, world_size: int) -> dict[str, int]:
    """Bytes of weights, gradients and optimizer state on the rank that holds most of them, without activations."""
    of_stage = max(stages(config, world_size, "cuda"), key=lambda stage: stage.held.total).state
    return {"weights": of_stage.weights, "gradients": of_stage.gradients, "optimizer": of_stage.optimizer}


@dataclass(frozen=True)
class Stage:
    """One pipeline stage's rank."""

    held: Held
    state: StateBytes
    blocks: tuple[tuple[Footprint, Footprint], ...]
    """Of every block: with new gradients of weights, and with gradients that are added to what is there."""
    embedding: tuple[End, End] | None
    heads: tuple[End, End] | None
    boundary: int
    """Bytes of what is sent to and received from other stages."""
    in_flight: int
    """Micro batches whose activations it keeps at a time: of 1F1B, one for itself and each later stage."""
    micro_batches: int
    weight_bytes: int
    tied: int
    """Bytes of a weight whose gradient comes from both ends."""

    @property
    def head(self) -> End | None:
        return self.heads[0] if self.heads else None

    @property
    def kept(self) -> int:
        """Of one micro batch."""
        ends = sum(end[0].kept for end in (self.embedding, self.heads) if end)
        return sum(block.kept for block, _ in self.blocks) + ends

    @property
    def peak(self) -> Moment:
        return max(self.moments(), key=lambda moment: moment.total)

    def moments(self) -> Iterator[Moment]:
        of_state = self.state
        lasting = of_state.weights + of_state.optimizer + of_state.lasting + of_state.buffers + self.boundary
        yield from self.passes("first", lasting, self.in_flight, first=True)
        if later := self.in_flight if self.micro_batches > self.in_flight else self.in_flight - 1:
            yield from self.passes("later", lasting, later, first=False)
        after = lasting + of_state.loose + of_state.part
        again = of_state.again if self.micro_batches > 1 else 0
        yield Moment("reduction", after + of_state.backward + again + of_state.reduction)
        yield Moment("optimizer step", lasting - of_state.lasting + of_state.gradients + of_state.step)

    def passes(self, which: str, lasting: int, in_flight: int, first: bool) -> Iterator[Moment]:
        """A forward and a backward pass, ``in_flight`` micro batches with its own; or the step's ``first`` of both."""
        of_state = self.state
        summed = not of_state.renewed and (not first or not of_state.loose)
        version = 1 if summed else 0
        stay = 0 if of_state.renewed else of_state.loose
        before = 0 if first else stay + of_state.part + of_state.backward
        level = lasting + of_state.gathered + before + (in_flight - 1) * (self.kept + self.sent)
        gathering = of_state.gathering
        if self.embedding:
            yield Moment(f"{which} forward, embedding", level + gathering + self.embedding[0].forward)
            level += self.embedding[0].kept
        for place, (block, _) in enumerate(self.blocks):
            yield Moment(f"{which} forward, block {place}", level + gathering + block.forward)
            level += block.kept
        gathering = of_state.gathering if of_state.gathers_again else 0
        if self.heads:
            yield Moment(f"{which} forward, head", level + gathering + self.heads[0].forward)
        level += gathering + (of_state.backward + of_state.part if first else 0)
        made = 0  # bytes of gradients so far
        if self.heads:
            yield Moment(f"{which} backward, head", level + self.heads[version].backward)
            level += self.heads[version].weights
            made += self.heads[0].weights
        for place in reversed(range(len(self.blocks))):
            block = self.blocks[place][version]
            level -= block.kept
            begun = bool(of_state.reduced_from) and made > self.weight_bytes * of_state.reduced_from
            again = 0 if first else of_state.again
            yield Moment(f"{which} backward, block {place}", level + (again if begun else 0) + block.backward)
            if reduced := self.reduced(block, made):
                yield Moment(f"{which} reduction, block {place}", level + reduced + again + of_state.reduction)
            level += block.weights
            made += self.blocks[place][0].weights
        if self.embedding:
            level -= self.embedding[0].kept
            yield Moment(f"{which} backward, embedding", level + self.embedding[version].backward + self.tied)

    def reduced(self, block: Footprint, made: int) -> int:
        """Most bytes of a block's backward pass at a product whose gradient fills a bucket; 0: there is none."""
        bucket = self.weight_bytes * self.state.reduced_from
        return max((live for so_far, live in block.products if made + so_far > bucket > 0), default=0)

    @property
    def sent(self) -> int:
        """Of a micro batch in flight, its output, which waits for its gradient."""
        return 0 if self.heads else self.boundary // 3


def stages(config: Config, world_size: int, device: Device) -> list[Stage]:
    micro, count = micro_batches(config, world_size)
    deepspeed = settings(config)
    weight_bytes = 2 if config.precision == "bf16" and deepspeed.stage > 0 else 4
    at = Setting(config, micro, backends(config, device), device, weight_bytes)
    replicas = config.parallel.data(world_size) * config.parallel.context
    kinds = {kind: footprints(at, kind) for kind in kinds_of(config)}
    edges = first_layers(config.model.n_layers, config.parallel.pipeline)
    pipeline, model = config.parallel.pipeline, config.model
    found = []
    for index, held in enumerate(inventory(model, config.parallel.tensor, pipeline)):
        first, last = index == 0, index == pipeline - 1
        layers = range(edges[index], edges[index + 1])
        tied = model.tie_embeddings and pipeline == 1
        found.append(
            Stage(
                held=held,
                state=state(config, held, replicas, deepspeed, on_cpu=device == "cpu"),
                blocks=tuple(kinds[recompute_of(config, layer)] for layer in layers),
                embedding=(embedding(at, False), embedding(at, True)) if first else None,
                heads=(head(at, False), head(at, True)) if last else None,
                boundary=0 if pipeline == 1 else 3 * at.stream,
                in_flight=min(pipeline - index, count),
                micro_batches=count,
                weight_bytes=weight_bytes,
                tied=model.vocab_size // at.tensor * model.d_model * weight_bytes if tied else 0,
            )
        )
    return found


def kinds_of(config: Config) -> set[Recompute]:
    return {recompute_of(config, layer) for layer in range(config.model.n_layers)}


def recompute_of(config: Config, layer: int) -> Recompute:
    """As `megamup.models.recompute.recompute`."""
    setting = config.train.recompute
    if isinstance(setting, int):
        return "full" if layer % setting == 0 else "none"
    return setting


def footprints(at: Setting, recompute: Recompute) -> tuple[Footprint, Footprint]:
    new, summed = (BlockTape(at, summed).tape.footprint(recompute) for summed in (False, True))
    return new, summed
