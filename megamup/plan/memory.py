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
from functools import cached_property
from typing import NamedTuple

from megamup.config import Config, micro_batches
from megamup.plan.activations import Device, Setting, block_footprint
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


class Moment(NamedTuple):
    total: int
    where: str
    place: int = 0
    """Of a block in its stage."""


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
    output: int
    """Bytes that go to the next stage, and wait there for their gradient; 0: there is none."""
    exchanged: int
    """Bytes of DeepSpeed's buffers for what comes from other stages, and of inputs and gradients that it lets lie."""
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

    @cached_property
    def peak(self) -> Moment:
        return max(self.moments())

    def moments(self) -> Iterator[Moment]:
        of_state = self.state
        lasting = of_state.weights + of_state.optimizer + of_state.lasting + of_state.buffers + self.exchanged
        yield from self.passes(lasting, self.in_flight, first=True)
        if later := self.in_flight if self.micro_batches > self.in_flight else self.in_flight - 1:
            yield from self.passes(lasting, later, first=False)
        first, full = self.micro_batches == 1, self.held.total > of_state.reduced_from > 0
        after = lasting + of_state.loose + (0 if first else of_state.part) + of_state.backward
        yield Moment(after + self.reducing(first, begun=full), "reduction")
        yield Moment(lasting - of_state.lasting + of_state.gradients + of_state.step, "optimizer step")

    def passes(self, lasting: int, in_flight: int, first: bool) -> Iterator[Moment]:
        """A forward and a backward pass, ``in_flight`` micro batches with its own; or the step's ``first`` of both."""
        of_state = self.state
        stay = 0 if of_state.renewed else of_state.loose
        earlier = 0 if first else stay + of_state.part + (of_state.backward if of_state.buckets_last else 0)
        level = lasting + of_state.gathered + earlier + (in_flight - 1) * (self.kept + self.output)
        yield from self.forward(level)
        new_buckets = of_state.backward if first or not of_state.buckets_last else 0
        yield from self.backward(level + self.kept + self.gathering_again + new_buckets, first)

    @property
    def gathering_again(self) -> int:
        return self.state.gathering if self.state.gathers_again else 0

    def forward(self, level: int) -> Iterator[Moment]:
        """A forward pass on top of ``level`` bytes."""
        gathering = self.state.gathering
        if self.embedding:
            yield Moment(level + gathering + self.embedding[0].forward, "forward, embedding")
            level += self.embedding[0].kept
        for place, (block, _) in enumerate(self.blocks):
            if self.tied and place == len(self.blocks) - 1:
                gathering = 0  # nothing is left to receive: the readout's weight is the embedding's
            yield Moment(level + gathering + block.forward, "forward, block", place)
            level += block.kept
        if self.heads:
            yield Moment(level + self.gathering_again + self.heads[0].forward, "forward, head")

    def backward(self, level: int, first: bool) -> Iterator[Moment]:
        """A backward pass from ``level`` bytes on, in which all that is kept for it is."""
        of_state = self.state
        version = 0 if of_state.renewed or (first and of_state.loose) else 1
        made, copied = 0, 0  # bytes of gradients so far, and of this rank's part of them
        if self.heads:
            level -= self.heads[0].kept
            yield Moment(level + self.heads[version].backward, "backward, head")
            level += self.heads[version].weights
            made += self.heads[0].weights
        for place in reversed(range(len(self.blocks))):
            block = self.blocks[place][version]
            level -= block.kept
            begun = made > self.weight_bytes * of_state.reduced_from > 0
            copied = self.copied(first) if begun else 0
            yield Moment(level + copied + block.backward, "backward, block", place)
            if reduced := self.reduced(block, made):
                yield Moment(level + reduced + self.reducing(first, begun), "reduction, block", place)
            level += block.weights
            made += self.blocks[place][0].weights
        if self.embedding:
            level -= self.embedding[0].kept
            yield Moment(level + copied + self.embedding[version].backward + self.tied, "backward, embedding")

    def copied(self, first: bool) -> int:
        """This rank's part of the gradients, once a reduction of this backward pass has brought some of it."""
        of_state = self.state
        if of_state.compact:
            return of_state.again + (of_state.part if first else 0)
        return of_state.part if first else of_state.again

    def reducing(self, first: bool, begun: bool) -> int:
        """Bytes that a reduction takes; the first one's copy comes when what it sent is gone."""
        of_state = self.state
        summed = of_state.part if first and of_state.compact else 0
        copy = self.copied(first) - summed
        return summed + (of_state.reduction + copy if begun else max(of_state.reduction, copy))

    def reduced(self, block: Footprint, made: int) -> int:
        """Most bytes of a block's backward pass at a product whose gradient fills a bucket; 0: there is none."""
        bucket = self.weight_bytes * self.state.reduced_from
        return max((live for so_far, live in block.products if made + so_far > bucket > 0), default=0)


def stages(config: Config, world_size: int, device: Device) -> list[Stage]:
    deepspeed, parallel, model = settings(config), config.parallel, config.model
    at = Setting.of(config, world_size, deepspeed.stage, device)
    kinds = {kind: (block_footprint(at, kind, False), block_footprint(at, kind, True)) for kind in kinds_of(config)}
    edges, count = first_layers(model.n_layers, parallel.pipeline), micro_batches(config, world_size)[1]
    replicas, found = parallel.data(world_size) * parallel.context, []
    for index, held in enumerate(inventory(model, parallel.tensor, parallel.pipeline)):
        first, last = index == 0, index == parallel.pipeline - 1
        tied = model.vocab_size // parallel.tensor * model.d_model if model.tie_embeddings and first and last else 0
        found.append(
            Stage(
                held=held,
                state=state(config, held, replicas, deepspeed, on_cpu=device == "cpu"),
                blocks=tuple(kinds[recompute_of(config, layer)] for layer in range(edges[index], edges[index + 1])),
                embedding=(embedding(at, False), embedding(at, True)) if first else None,
                heads=(head(at, False), head(at, True)) if last else None,
                output=0 if last else at.stream,
                exchanged=0 if first and last else at.stream * (1 if first else 5 if last else 4),
                in_flight=min(parallel.pipeline - index, count),
                micro_batches=count,
                weight_bytes=at.weight_bytes,
                tied=tied * at.weight_bytes,
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
