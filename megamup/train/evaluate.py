"""Loss on held-out data, told per token, per byte and per word: of each set, and of all of them together."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megamup.config import Config
from megamup.data.corpus import TextCounts, total
from megamup.data.mixture import open_valid_data
from megamup.data.objectives import open_objective
from megamup.errors import OneRankError
from megamup.parallel.mesh import Mesh, build_mesh
from megamup.train import checkpoint, distributed
from megamup.train.batches import HeldOut, held_out_batches, read
from megamup.train.engine import Engine, build_engine, weigh

UNKNOWN = TextCounts(0, 0)
LARGEST_EXPONENT = 700.0
"""Its exponential is near the largest float."""


@dataclass(frozen=True)
class SetLoss:
    """What a model makes of held-out text."""

    name: str | None
    """Of the set; None of all together."""
    nats: float
    """The loss, summed over all targets that count: end-of-document tokens too, as in training."""
    targets: int
    text: TextCounts
    """What was evaluated, before it was tokenized; 0 where that can't be told: its corpora don't, `train.eval_sequences`
    left some of it out, or the objective did, which makes only some of its tokens targets."""

    @property
    def loss(self) -> float:
        """Mean over the targets, nats."""
        return self.nats / self.targets

    @property
    def bits_per_byte(self) -> float | None:
        return self.nats / math.log(2) / self.text.n_bytes if self.text.n_bytes else None

    @property
    def figures(self) -> dict[str, float]:
        """By the names of metrics.jsonl. Perplexities of byte and word are exp(nats / bytes), exp(nats / words): unlike
        those of tokens they can be compared between tokenizers. One that no float can hold is left out."""
        found = {"loss": self.loss} | exponential("perplexity", self.loss)
        if self.bits_per_byte is not None:
            found["bits_per_byte"] = self.bits_per_byte
            found |= exponential("byte_perplexity", self.nats / self.text.n_bytes)
        if self.text.n_words:
            found |= exponential("word_perplexity", self.nats / self.text.n_words)
        return found


def exponential(name: str, value: float) -> dict[str, float]:
    return {name: math.exp(value)} if value < LARGEST_EXPONENT else {}


def together(losses: Sequence[SetLoss]) -> SetLoss:
    """Of all targets of several sets."""
    nats, targets = sum(each.nats for each in losses), sum(each.targets for each in losses)
    return SetLoss(None, nats, targets, total([each.text for each in losses]))


def metrics(losses: Sequence[SetLoss]) -> dict[str, float]:
    """For metrics.jsonl: ``valid_loss`` and its like over all sets, and, where they are several, ``valid_loss_NAME``."""
    found = {f"valid_{figure}": value for figure, value in together(losses).figures.items()}
    for each in losses if len(losses) > 1 else ():
        found |= {f"valid_{figure}_{each.name}": value for figure, value in each.figures.items()}
    return found


def evaluate(
    held_out: Sequence[HeldOut], engine: Engine, config: Config, mesh: Mesh, device: torch.device
) -> list[SetLoss]:
    """Loss on each set, or on its first ``train.eval_sequences``. Collective."""
    return [evaluate_set(each, engine, config, mesh, device) for each in held_out]


def evaluate_set(held_out: HeldOut, engine: Engine, config: Config, mesh: Mesh, device: torch.device) -> SetLoss:
    steps, wanted = len(held_out.batches), config.train.eval_sequences
    if wanted is not None:
        steps = min(steps, math.ceil(wanted / config.batch.global_sequences))
    nats, targets = 0.0, 0
    for step in range(steps):
        batch, on_device = weigh(read(held_out.batches, step), mesh, device)
        count = int(on_device)
        nats += count * engine.evaluate(batch)
        targets += count
    all_text = steps == len(held_out.batches) and config.objective.kind == "causal"
    return SetLoss(held_out.data.name, nats, targets, held_out.data.text if all_text else UNKNOWN)


def evaluate_checkpoint(config: Config, path: Path) -> list[SetLoss]:
    """Loss of a checkpoint, in its own layout, on each set of ``data.valid``. Every rank calls it.

    Raises:
        MegamupError: before the process group exists, where the data or the checkpoint is wrong.
        OneRankError: ranks read different data.
    """
    world_size = distributed.world_size()
    data = open_valid_data(config)
    checkpoint.check(path, config, world_size)
    objective = open_objective(config, data.corpora, held_out=True)
    device = distributed.join()
    if not distributed.all_equal(data.content_hash, device):
        raise OneRankError("ranks read different data: copy the corpora of data.valid to every machine")
    mesh = build_mesh(config.parallel)
    engine = build_engine(config, mesh, world_size)
    checkpoint.load(engine, path)
    held_out = held_out_batches(data, objective, config, mesh.data.rank, world_size)
    return evaluate(held_out, engine, config, mesh, device)


COLUMNS = {
    "loss": ("loss", ".4f"),
    "perplexity": ("per token", ",.5g"),
    "byte_perplexity": ("per byte", ".4f"),
    "bits_per_byte": ("bits per byte", ".4f"),
    "word_perplexity": ("per word", ",.5g"),
}
"""Figure -> its heading and its format."""


def table(losses: Sequence[SetLoss]) -> list[str]:
    """A heading, and a line for each set and for all together; a figure that can't be told is left blank."""
    shown = [*losses, together(losses)] if len(losses) > 1 else losses
    rows = [["", "targets", *(heading for heading, _ in COLUMNS.values())]]
    for each in shown:
        cells = [format(each.figures[key], form) if key in each.figures else "" for key, (_, form) in COLUMNS.items()]
        rows.append([each.name or "all together", f"{each.targets:,}", *cells])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]


def records(losses: Sequence[SetLoss]) -> list[dict[str, Any]]:
    """For evaluation.jsonl: a flat object for each set, and, of set null, for all together where they are several."""
    shown = [*losses, together(losses)] if len(losses) > 1 else losses
    return [{"set": each.name, "targets": each.targets, **each.figures} for each in shown]
