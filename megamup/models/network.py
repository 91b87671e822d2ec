"""A model as a flat list of layers that are wired by name, for one engine or cut into pipeline stages.

What a layer reads and writes are tensors of the *stream*, a dict by name. The batch's inputs start it (``tokens``, and
what else the objective gives); ``hidden`` is the residual stream. So a layer with other inputs than the one before it
(a decoder's block with the encoder's memory, say) is one more name, and what has to travel between two pipeline stages
follows: what was written before and is read later.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from megamup.parallel.loss import CrossEntropy, Labels, Unread

Carried = Tensor | tuple[Tensor, ...]
"""What travels between layers of a pipeline: DeepSpeed knows tensors and tuples of them."""


@dataclass(frozen=True)
class LayerSpec:
    """A layer that isn't built yet: a pipeline stage builds only its own."""

    module: Callable[..., nn.Module]
    arguments: tuple[Any, ...] = ()
    shared: str | None = None
    """Layers of the same key share one module, and its gradient where they sit on different stages."""
    borrow: Callable[..., Any] | None = None
    """What to compute with a shared module in place of its forward."""
    reads: tuple[str, ...] = ("hidden",)
    writes: str = "hidden"
    """The last layer's is the model's output."""

    def build(self) -> nn.Module:
        return self.module(*self.arguments)


class Network(nn.Module):
    """The list run from first to last, where there is no pipeline."""

    def __init__(self, specs: Sequence[LayerSpec], loss: CrossEntropy) -> None:
        super().__init__()
        self.loss = loss
        self.layers = nn.ModuleList()
        self.calls: list[tuple[Callable[..., Any], LayerSpec]] = []
        shared: dict[str, nn.Module] = {}
        for spec in specs:
            module = shared[spec.shared] if spec.shared in shared else spec.build()
            if spec.shared is not None and spec.shared not in shared:
                shared[spec.shared] = module
            if module not in self.layers:
                self.layers.append(module)
            self.calls.append((module if spec.borrow is None else partial(spec.borrow, module), spec))

    def forward(self, inputs: Mapping[str, Tensor], labels: Labels | None = None) -> Tensor:
        """Inputs by name, such as ``tokens`` (batch, seq), to logits (batch, seq, vocab / tensor), or with labels to
        their loss.

        ZeRO 3 has the readout's weight only while the model is called, so the loss is computed in here.
        """
        *body, (read, last) = self.calls
        stream = dict(inputs)
        for call, spec in body:
            stream[spec.writes] = call(*(stream[name] for name in spec.reads))
        found = read(*(stream[name] for name in last.reads), labels=labels)
        return found.logits() if isinstance(found, Unread) else found


@dataclass(frozen=True)
class Wires:
    """What a layer of a pipeline takes in and hands on: its own, and what later layers read."""

    reads: tuple[str, ...]
    writes: str
    before: tuple[str, ...]
    """Names of what comes in."""
    after: tuple[str, ...]

    @property
    def plain(self) -> bool:
        """The layer takes all that comes in, and what goes on is its output alone: nothing to wire."""
        return self.before == self.reads and self.after == (self.writes,) and len(self.reads) == 1

    def run(self, call: Callable[..., Any], carried: Carried) -> Any:
        stream = dict(zip(self.before, (carried,) if isinstance(carried, Tensor) else carried, strict=True))
        output = call(*(stream[name] for name in self.reads))
        if self.after == (self.writes,):
            return output
        # Views of what passes by: DeepSpeed runs backward from a stage's outputs, which are not to be its inputs.
        # What has no gradient stays the object it is, by which attention finds the masks that it has made of documents.
        passed = {name: value.view_as(value) if value.is_floating_point() else value for name, value in stream.items()}
        passed[self.writes] = output
        return tuple(passed[name] for name in self.after)


def wires(specs: Sequence[LayerSpec]) -> list[Wires]:
    """What travels between the layers of a list: names that were given or written before, and are read later."""
    found: list[Wires] = []
    after: tuple[str, ...] = (specs[-1].writes,)
    for spec in reversed(specs):
        needed = (set(after) - {spec.writes}) | set(spec.reads)
        before = tuple(sorted(needed, key=order))
        found.append(Wires(spec.reads, spec.writes, before, after))
        after = before
    return found[::-1]


def order(name: str) -> tuple[bool, str]:
    """The residual stream first, the others by name."""
    return name != "hidden", name


def inputs(specs: Sequence[LayerSpec]) -> tuple[str, ...]:
    """The names that a list of layers reads and none writes, in the order in which a pipeline takes them."""
    return wires(specs)[0].before


class Wired(nn.Module):
    """A layer of a pipeline with its wires."""

    def __init__(self, spec: LayerSpec, at: Wires) -> None:
        super().__init__()
        self.layer, self.at = spec.build(), at

    def forward(self, carried: Carried) -> Any:
        return self.at.run(self.layer, carried)


class WiredBlock(Wired):
    """By whose name DeepSpeed finds the blocks, which it shares out evenly among the stages."""
