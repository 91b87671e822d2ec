"""Bytes that a stretch of a model's graph takes, forward and backward, from a list of its operations.

What autograd keeps of a block, and what its backward pass needs at most besides, follow from a few rules: an operation
keeps what it ``saves`` until its own backward is over; a tensor goes when nobody reads it any more; gradients of a
tensor that several operations read are summed in place. Replayed here on numbers, so that one description of a block
answers for every ``train.recompute``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Literal

Recompute = Literal["none", "selective", "full"]


@dataclass(frozen=True)
class Op:
    """One operation of a graph. Tensors have names; views none of their own. All sizes in bytes."""

    inputs: tuple[str, ...]
    output: str
    size: int
    """Of the output."""
    saves: tuple[str, ...] = ()
    """Inputs and output that its backward reads."""
    hidden: int = 0
    """What it keeps for its backward besides."""
    copies: int = 0
    """Copies of weights in the activations' type, kept likewise, and made again where anything is recomputed."""
    passes: bool = False
    """The inputs' gradients are the output's, as a sum's are: no new bytes."""
    holds: tuple[str, ...] = ()
    """Tensors that the calling function still refers to."""
    scratch: int = 0
    """Temporaries, forward."""
    backward_scratch: int = 0
    weight: int = 0
    """Gradients that it makes of weights."""
    dear: bool = False
    """``selective`` keeps its output (and ``hidden``) instead of computing it again."""


@dataclass(frozen=True)
class Footprint:
    """Bytes of a stretch of a graph; its output isn't in ``kept``, and its input only where something saves it."""

    kept: int
    """From the forward to the backward pass."""
    forward: int
    """Most during the forward pass, input and output included."""
    backward: int
    """Most during the backward pass, the output's gradient and all new ones of weights included."""
    weights: int
    """Gradients of weights at its end; none where they are added to those that are there already."""
    products: tuple[tuple[int, int], ...]
    """At every operation that has weights, in the order of the backward pass: bytes of weights' gradients made so far,
    and most bytes then."""


@dataclass
class Meter:
    live: int = 0
    peak: int = 0

    def add(self, size: int) -> None:
        self.live += size
        self.peak = max(self.peak, self.live)


@dataclass
class Tape:
    """Operations in the order of the forward pass."""

    start: str
    """The tensor that comes in."""
    size: int
    ops: list[Op] = field(default_factory=list)
    summed: bool = False
    """Weights have gradients already, to which theirs are added one operation at a time."""
    outside: dict[str, int] = field(default_factory=dict)
    """Tensors that come in besides ``start`` and that others hold: by name, the bytes of their gradients, each added at
    once to one that is there."""

    def add(self, op: Op) -> str:
        self.ops.append(op)
        return op.output

    def footprint(self, recompute: Recompute = "none") -> Footprint:
        if not self.ops:
            return Footprint(0, self.size, self.size, 0, ())
        sizes = {self.start: self.size} | dict.fromkeys(self.outside, 0) | {op.output: op.size for op in self.ops}
        saved = {name for op in self.ops for name in op.saves}
        own = sum(sizes[name] for name in saved) + sum(op.hidden + op.copies for op in self.ops)
        weights = 0 if self.summed else sum(op.weight for op in self.ops)
        if recompute == "none":
            forward = self.forward(sizes, saved, self.ops)
            backward, products = self.backward(sizes, own)
            return Footprint(own, forward, backward, weights, products)
        dear = [op for op in self.ops if op.dear] if recompute == "selective" else []
        kept = self.size + sum(op.size + op.hidden for op in dear)
        # Recomputation ends at the last operation that saves; results kept of later ones lie idle.
        last = max(place for place, op in enumerate(self.ops) if op.saves)
        idle = sum(op.size for op in self.ops[last:] if op in dear)
        again = self.forward(sizes, saved, self.ops[:last]) + self.ops[-1].size
        forward = self.forward(sizes, {op.output for op in dear} | {self.start}, self.ops, dear)
        backward, products = self.backward(sizes, own)
        moved = tuple((made, idle + live) for made, live in products)
        return Footprint(kept, forward, idle + max(again, backward), weights, moved)

    def forward(
        self, sizes: Mapping[str, int], stay: Collection[str], ops: list[Op], hide: list[Op] | None = None
    ) -> int:
        """Most bytes where the tensors ``stay`` do, and the hidden ones of ``hide`` (default all)."""
        readers = Counter(name for op in ops for name in (*op.inputs, *op.holds))
        meter = Meter()
        meter.add(self.size)
        for op in ops:
            meter.add(op.size + op.scratch + op.hidden + op.copies)
            meter.live -= op.scratch + (0 if hide is None else op.copies + (0 if op in hide else op.hidden))
            for name in (*op.inputs, *op.holds):
                readers[name] -= 1
                if not readers[name] and name not in stay and name != self.start:
                    meter.live -= sizes[name]
        return meter.peak

    def backward(self, sizes: Mapping[str, int], kept: int) -> tuple[int, tuple[tuple[int, int], ...]]:
        """Most bytes from the gradient of the output on, where all that is saved is there; `Footprint.products`."""
        holders = Counter(name for op in self.ops for name in op.saves)
        last = self.ops[-1]
        gradient = {last.output: last.output}  # tensor: whose bytes its gradient has
        sharers, bytes_of = Counter(gradient.values()), {last.output: last.size}
        meter, made_weights, products = Meter(), 0, []
        meter.add(kept + last.size)
        for op in reversed(self.ops):
            mine = gradient.pop(op.output)
            made = [(name, mine if op.passes else f"{name} of {op.output}") for name in op.inputs]
            new = {key: sizes[name] for name, key in made if key != mine}
            bytes_of |= new
            passing = op.backward_scratch + sum(self.outside.get(name, 0) for name in op.inputs)
            meter.add(op.weight + sum(new.values()) + passing)
            if op.weight:
                made_weights += op.weight
                products.append((made_weights, meter.live - op.backward_scratch))
            meter.live -= passing + (op.weight if self.summed else 0)
            for name, key in made:
                if name not in gradient:
                    gradient[name] = key
                    sharers[key] += 1
                elif key in new:  # added in place to what is there
                    meter.live -= new[key]
            sharers[mine] -= 1
            if not sharers[mine]:
                meter.live -= bytes_of[mine]
            meter.live -= op.hidden + op.copies
            for name in op.saves:
                holders[name] -= 1
                if not holders[name]:
                    meter.live -= sizes[name]
        return meter.peak, tuple(products)
