"""Peak bytes of a training step, on the rank that holds most, before anything is built.

Weights, gradients and optimizer state follow from ZeRO (`megamup.plan.zero`), activations from the blocks' operations
(`megamup.plan.activations`, replayed by `megamup.plan.tape`). They don't peak together: gradients come while
activations go, buckets live through backward passes, and the optimizer steps when activations are gone. So a step is
followed through its moments, and the largest counts.

Not in it: what isn't a tensor of the run (the CUDA context, NCCL's and cuBLAS' workspaces, fragmentation), compiled
blocks (which keep less), evaluation, and a monitored step's copies.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import zip_longest
from typing import NamedTuple

from megamup.config import Config, micro_batches
from megamup.parameters import Stack, stacks
from megamup.plan.activations import block_footprint
from megamup.plan.ends import End, embedding, head, memory_norm
from megamup.plan.setting import Device, Setting
from megamup.plan.state import Held, Layer, held_of, stage_layers
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
    parallel, most = config.parallel, max(held_of(config), key=lambda held: held.total)
    of_stage = state(config, most, parallel.data(world_size) * parallel.context, settings(config), on_cpu=False)
    return {"weights": of_stage.weights, "gradients": of_stage.gradients, "optimizer": of_stage.optimizer}


@dataclass(frozen=True)
class Piece:
    """A layer's bytes."""

    layer: Layer
    new: Footprint | End
    """With new gradients of weights."""
    added: Footprint | End
    """With gradients that are added to what is there."""


@dataclass(frozen=True)
class Stage:
    """One pipeline stage's rank."""

    held: Held
    state: StateBytes
    pieces: tuple[Piece, ...]
    """First to last."""
    output: int
    """Bytes that go to the next stage, and wait there for their gradient; 0: there is none."""
    exchanged: int
    """Bytes of DeepSpeed's buffers for what comes from other stages, and of inputs and gradients that it lets lie."""
    in_flight: int
    """Micro batches whose activations it keeps at a time: of 1F1B, one for itself and each later stage."""
    micro_batches: int
    weight_bytes: int
    token: int
    """Bytes of the token embedding's gradient."""
    tied: bool
    """The readout's weight is that of an embedding on the same stage."""
    memory: int
    """Bytes of the encoder's output, and of its gradient, which blocks here read; 0: none does."""

    @property
    def head(self) -> End | None:
        last = self.pieces[-1].new
        return last if isinstance(last, End) and last.logits else None

    @property
    def kept(self) -> int:
        """Of one micro batch."""
        return sum(piece.new.kept for piece in self.pieces) + self.received

    @property
    def received(self) -> int:
        """Of an encoder's output, where the encoder ends on an earlier stage."""
        return 0 if any(piece.layer.kind == "memory" for piece in self.pieces) else self.memory

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
        level += self.received
        for piece, following in zip_longest(self.pieces, self.pieces[1:]):
            gathering = self.gathering_again if piece.layer.kind == "head" else self.state.gathering
            if self.tied and following and following.layer.kind == "head":
                gathering = 0  # nothing is left to receive: the readout's weight is the embedding's
            yield Moment(level + gathering + piece.new.forward, f"forward, {piece.layer.kind}", piece.layer.number)
            level += piece.new.kept

    def backward(self, level: int, first: bool) -> Iterator[Moment]:
        """A backward pass from ``level`` bytes on, in which all that is kept for it is."""
        of_state = self.state
        sums = not (of_state.renewed or (first and of_state.loose))
        made, memory = 0, 0  # bytes of gradients so far, and of that of the encoder's output
        held, left = 0, sum(map(self.reads_token, self.pieces))  # of the token embedding's, until all its readers gave
        for piece in reversed(self.pieces):
            part, kind, number = piece.added if sums else piece.new, piece.layer.kind, piece.layer.number
            if piece.layer.stack.cross and kind == "block" and not memory:
                memory = self.memory
                level += memory
            if kind == "memory":
                level -= memory
            level -= part.kept
            begun = made > self.weight_bytes * of_state.reduced_from > 0
            copied = self.copied(first) if begun else 0
            both = held if kind == "start" else 0  # two readers' gradients, before they are one
            yield Moment(level + copied + both + part.backward, f"backward, {kind}", number)
            if reduced := self.reduced(part, made):
                yield Moment(level + reduced + self.reducing(first, begun), f"reduction, {kind}", number)
            level += part.weights
            made += piece.new.weights
            if self.reads_token(piece):
                left -= 1
                made -= self.token if left else 0
                level += (self.token if left and sums and not held else 0) - (held if part.weights else 0)
                held = self.token

    def reads_token(self, piece: Piece) -> bool:
        return piece.layer.kind == "start" or (piece.layer.kind == "head" and self.tied)

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

    def reduced(self, part: Footprint | End, made: int) -> int:
        """Most bytes of a layer's backward pass at a product whose gradient fills a bucket; 0: there is none."""
        bucket = self.weight_bytes * self.state.reduced_from
        return max((live for so_far, live in part.products if made + so_far > bucket > 0), default=0)


def stages(config: Config, world_size: int, device: Device) -> list[Stage]:
    deepspeed, parallel, model = settings(config), config.parallel, config.model
    at = {stack: Setting.of(config, stack, world_size, deepspeed.stage, device) for stack in stacks(model)}
    token = model.vocab_size // parallel.tensor * model.d_model * next(iter(at.values())).weight_bytes
    count, replicas = micro_batches(config, world_size)[1], parallel.data(world_size) * parallel.context
    cut = stage_layers(model, parallel.pipeline)
    sent = [0, *(crossing(of_stage[0], at) for of_stage in cut[1:]), 0]  # into each stage, and out of the last
    found = []
    for index, held in enumerate(held_of(config)):
        pieces = tuple(piece(layer, at[layer.stack], config) for layer in cut[index])
        kinds = {layer.kind for layer in cut[index]}
        reading = [at[layer.stack].memory for layer in cut[index] if layer.kind == "block"]
        found.append(
            Stage(
                held=held,
                state=state(config, held, replicas, deepspeed, on_cpu=device == "cpu"),
                pieces=pieces,
                output=sent[index + 1],
                exchanged=exchanged(sent[index], sent[index + 1]),
                in_flight=min(parallel.pipeline - index, count),
                micro_batches=count,
                weight_bytes=next(iter(at.values())).weight_bytes,
                token=token,
                tied=model.tie_embeddings and {"start", "head"} <= kinds,
                memory=max(reading),
            )
        )
    return found


def crossing(layer: Layer, at: Mapping[Stack, Setting]) -> int:
    """Bytes that come to a stage which begins with ``layer``: the stream, with it the other stack's input or output."""
    here = at[layer.stack]
    ids = sum(8 * setting.tokens for stack, setting in at.items() if stack.cross and stack != layer.stack)
    return here.stream + here.memory + ids


def exchanged(before: int, after: int) -> int:
    """Of buffers for the output's gradient; for the input, its gradient and those of the micro batch before."""
    if not before:
        return after
    return (5 if not after else 4) * before


def piece(layer: Layer, at: Setting, config: Config) -> Piece:
    match layer.kind:
        case "start":
            return Piece(layer, embedding(at, False), embedding(at, True))
        case "memory":
            return Piece(layer, memory_norm(at), memory_norm(at))
        case "head":
            return Piece(layer, head(at, False), head(at, True))
    kind = recompute_of(config, layer.number)
    return Piece(layer, block_footprint(at, kind, False), block_footprint(at, kind, True))


def recompute_of(config: Config, layer: int) -> Recompute:
    """As `megamup.models.recompute.recompute`."""
    setting = config.train.recompute
    if isinstance(setting, int):
        return "full" if layer % setting == 0 else "none"
    return setting
