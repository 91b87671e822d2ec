"""Loss on held-out data, told per token, per byte and per word: of each set, and of all of them together."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megamup.config import Config
from megamup.data.corpus import TextCounts, total
from megamup.parallel.mesh import Mesh
from megamup.train.batches import HeldOut, read
from megamup.train.engine import Engine, weigh

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
    """What was evaluated, before it was tokenized; 0 where that can't be told: where the corpora don't tell, or
    `train.eval_sequences` or the objective leaves some of their tokens out."""

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


def valid_metrics(losses: Sequence[SetLoss]) -> dict[str, float]:
    """For metrics.jsonl: ``valid_loss`` and its like over all sets, and of several each one's, ``valid_loss_NAME``."""
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
