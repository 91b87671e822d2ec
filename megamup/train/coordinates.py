"""What every module of a training model puts out, whatever the layout: the coordinates of a coordinate check.

(Yang et al. 2022, Tensor Programs V, appendix D.1: under μP they, and their changes since initialization, keep their
size as width grows.)
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import sqrt
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megamup.config import Config
from megamup.data.mixture import open_run_data
from megamup.models.attention import CoreAttention
from megamup.parallel.loss import CrossEntropy
from megamup.parallel.mesh import Mesh, build_mesh
from megamup.train import distributed
from megamup.train.batches import read, training_batches
from megamup.train.compile import eager
from megamup.train.engine import Engine, MicroBatch, build_engine, weigh

LOGITS = "readout"
"""Name of the model's output, which no module of a tied model puts out."""


@dataclass(frozen=True)
class Coordinate:
    """Size of one module's output on the probe's batch, over all its logical elements."""

    rms: float
    change: float
    """RMS of the difference to the output at initialization."""


@dataclass(frozen=True)
class Share:
    """One rank's part of a coordinate."""

    squares: float
    change_squares: float
    count: int
    sharded: bool
    """Tensor ranks hold different elements; otherwise each holds all of them."""


class Probe:
    """Looks at every module's output on one fixed batch. Collective, like the engine's own methods."""

    def __init__(self, engine: Engine, mesh: Mesh, batch: Sequence[MicroBatch]) -> None:
        self.engine, self.mesh, self.batch = engine, mesh, batch
        self.outputs: dict[str, list[Tensor]] = {}
        self.sharded: dict[str, bool] = {}
        self.initial: dict[str, Tensor] = {}
        self.hooks: list[Any] = []

    def measure(self) -> dict[str, Coordinate]:
        """Coordinates by module, the same on every rank; the first call's are the initial ones."""
        self.outputs.clear()
        self.hooks = [module.register_forward_hook(self.record) for module in named_modules(self.engine)]
        losses = [module for module in self.engine.deepspeed.module.modules() if isinstance(module, CrossEntropy)]
        self.hooks += [module.register_forward_hook(self.record_logits) for module in losses]
        try:
            with eager():
                self.engine.evaluate(self.batch)
        finally:
            for hook in self.hooks:
                hook.remove()
        found = {name: torch.cat([part.flatten() for part in parts]) for name, parts in self.outputs.items()}
        if not self.initial:
            self.initial = found
        shares = {}
        for name, output in found.items():
            squares, changes = (
                float(x.square().sum(dtype=torch.float64)) for x in (output, output - self.initial[name])
            )
            shares[name] = Share(squares, changes, output.numel(), self.sharded[name])
        return gather(shares, self.mesh)

    def record(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        sharded = bool(getattr(module, "output_is_sharded", False))
        self.keep(str(module.name), output, sharded)
        if isinstance(module, CoreAttention):
            self.keep(f"{module.name.removesuffix('core')}logits", attention_logits(module, *inputs[:2]), True)

    def record_logits(self, module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        self.keep(LOGITS, inputs[0].logits(), True)

    def keep(self, name: str, output: Tensor, sharded: bool) -> None:
        self.outputs.setdefault(name, []).append(output.detach().float())
        self.sharded[name] = sharded


def named_modules(engine: Engine) -> Iterator[nn.Module]:
    """The modules on this rank that have a name of their own in every layout, but for the readout (see `LOGITS`)."""
    for module in engine.deepspeed.module.modules():
        if isinstance(getattr(module, "name", None), str) and module.name != LOGITS:
            yield module


def attention_logits(core: CoreAttention, query: Tensor, key: Tensor) -> Tensor:
    """What queries and keys give the softmax, before caps and relative biases: of the pairs that a causal mask leaves,
    flat, the others left out.

    Args:
        query: (batch, heads / tensor, seq, d_head)
        key: (batch, kv_heads / tensor, seq, d_head)
    """
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1).float()
    logits = core.scale * (query.float() @ key.transpose(-2, -1))  # (batch, heads / tensor, seq, seq)
    if not core.causal:
        return logits
    past = torch.ones(logits.shape[-2:], dtype=torch.bool, device=logits.device).tril()
    return logits[..., past]


def gather(shares: dict[str, Share], mesh: Mesh) -> dict[str, Coordinate]:
    """Add up what tensor ranks and data ranks saw of each module, and collect the stages' modules. Collective."""
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, (mesh.tensor.rank, shares))
    parts: dict[str, list[Share]] = {}
    for tensor_rank, found in everyone:
        for name, share in found.items():
            if share.sharded or tensor_rank == 0:
                parts.setdefault(name, []).append(share)
    return {name: total(parts[name]) for name in sorted(parts, key=in_order)}


def total(parts: Iterable[Share]) -> Coordinate:
    parts = list(parts)
    count = sum(part.count for part in parts)
    return Coordinate(
        sqrt(sum(part.squares for part in parts) / count), sqrt(sum(part.change_squares for part in parts) / count)
    )


def in_order(name: str) -> tuple[int, int, str]:
    """Sort key: embeddings, a stack's blocks by number, its norm, the other stack's, readout."""
    embedding = name.startswith("embedding")
    stack, name = (name.startswith("decoder."), name.removeprefix("encoder.").removeprefix("decoder."))
    first, *rest = name.split(".")
    place = {"blocks": 1, "final_norm": 2}.get(first, 3)
    return 0 if embedding else place + 2 * stack, int(rest[0]) if first == "blocks" else 0, name


def coordinates(config: Config) -> list[dict[str, Coordinate]]:
    """Train ``train.steps`` steps at the peak rate; the coordinates at initialization and after each step.

    Every rank calls it, without a process group yet; nothing is written. All steps train on the first batch of the
    training data, which is also the probe's: what many different tokens would teach is, at small widths, lost among
    the random overlaps of their activations, which fall with width (the mup package repeats one batch too).
    """
    world_size = distributed.world_size()
    device = distributed.join()
    mesh = build_mesh(config.parallel)
    data = training_batches(open_run_data(config), config, mesh.data.rank, world_size)
    engine = build_engine(config, mesh, world_size)
    batch, _ = weigh(read(data, 0), mesh, device)
    probe = Probe(engine, mesh, batch)
    found = [probe.measure()]
    for _ in range(config.train.steps):
        engine.train_batch(batch, config.optim.lr)
        found.append(probe.measure())
    return found
