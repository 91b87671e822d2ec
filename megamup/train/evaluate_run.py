"""A trained run on held-out text: the checkpoint, the data, and what is told of both."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megamup.config import Config, config_from, merge, micro_batches, parse_override, read_yaml
from megamup.data import consumed
from megamup.data.mixture import ValidData, open_valid_data
from megamup.data.objectives import open_objective
from megamup.errors import MegamupError, OneRankError
from megamup.kernels.choice import choose
from megamup.parallel.mesh import build_mesh
from megamup.train import checkpoint, distributed
from megamup.train.batches import held_out_batches
from megamup.train.engine import build_engine
from megamup.train.evaluate import SetLoss, evaluate, together

FREE = ("data.valid", "data.seq_len", "data.cache", "data.prefetch", "batch.", "kernels.", "train.eval_sequences")
"""Keys, or how they begin, that may differ from the run's."""
COLUMNS = {
    "loss": ("loss", ".4f"),
    "perplexity": ("per token", ",.5g"),
    "byte_perplexity": ("per byte", ".4f"),
    "word_perplexity": ("per word", ",.5g"),
    "bits_per_byte": ("bits per byte", ".4f"),
}
"""Figure -> its heading and its format."""


@dataclass(frozen=True)
class Evaluation:
    """What a checkpoint makes of each set."""

    run: Path
    step: int
    seq_len: int
    data: ValidData
    losses: tuple[SetLoss, ...]

    @property
    def shown(self) -> tuple[SetLoss, ...]:
        """The sets, and all together where they are several."""
        return (*self.losses, together(self.losses)) if len(self.losses) > 1 else self.losses

    def lines(self) -> list[str]:
        """A table of perplexities; a figure that can't be told is left blank."""
        rows = [["", "targets", *(heading for heading, _ in COLUMNS.values())]]
        for each in self.shown:
            figures = each.figures
            cells = [format(figures[key], form) if key in figures else "" for key, (_, form) in COLUMNS.items()]
            rows.append([each.name or "all together", f"{each.targets:,}", *cells])
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        title = f"{self.run} after step {self.step:,}: loss in nats, perplexity per token, byte and word"
        return [title, *("  ".join(map(aligned, row, widths, range(len(row)))).rstrip() for row in rows)]

    def records(self) -> list[dict[str, Any]]:
        """A flat object for each of `shown`, for evaluation.jsonl; ``set`` is null of all together."""
        read = {each.name: [corpus.prefix for corpus in each.corpora] for each in self.data.sets}
        common = {"step": self.step, "time_unix_s": time.time(), "seq_len": self.seq_len}
        return [
            common | {"set": each.name, "data": read.get(str(each.name)), "targets": each.targets} | each.figures
            for each in self.shown
        ]

    def as_json(self) -> dict[str, Any]:
        return {"run": str(self.run), "sets": self.records()}

    def append(self) -> None:
        """Add a line a set to ``evaluation.jsonl``. Raises OSError where the run's folder can't be written."""
        with open(self.run / "evaluation.jsonl", "a", encoding="utf-8") as file:
            file.writelines(json.dumps(record) + "\n" for record in self.records())


def aligned(cell: str, width: int, column: int) -> str:
    return cell.rjust(width) if column else cell.ljust(width)


def evaluate_run(run: str, changes: Sequence[str] = ()) -> Evaluation | None:
    """Evaluate ``RUN`` or ``RUN@STEP`` and add what was found to its folder. Every rank calls it.

    Args:
        run: see `checkpoint.named`.
        changes: ``a.b=c`` of keys in `FREE`.

    Returns:
        What was found, on the first rank; None on the others.

    Raises:
        MegamupError: before the process group exists, where run, changes or data are wrong, or the ranks aren't as
            many as the checkpoint's.
        OneRankError: ranks read different data.
    """
    folder, step, path = checkpoint.named(run)
    config = changed(folder, changes)
    world_size = distributed.world_size()
    micro_batches(config, world_size)
    choose(config, "cuda" if distributed.has_cuda() else "cpu")
    checkpoint.check(path, config, world_size)
    data = open_valid_data(config)
    check_tokenizer(folder, data)
    found = Evaluation(folder, step, config.seq_len, data, tuple(measure(config, data, path, world_size)))
    if distributed.rank():
        return None
    found.append()
    return found


def changed(folder: Path, changes: Sequence[str]) -> Config:
    """The run's config with some keys changed; held-out sets that are given replace the run's."""
    values = read_yaml(folder / "config.yaml")
    for change in changes:
        if not change.startswith(FREE):
            raise MegamupError(f"{change}: expected a key that an evaluation may change: {', '.join(FREE)}")
        if change.startswith("data.valid="):
            values["data"]["valid"] = None
        merge(values, parse_override(change))
    config = config_from(values)
    if config.data.valid is None:
        raise MegamupError(f"{folder}: the run has no data.valid; give data.valid=PREFIX, or {{NAME: PREFIX, ...}}")
    return config


def check_tokenizer(folder: Path, data: ValidData) -> None:
    """The text is in the tokens that the run learnt, as far as its record and the corpora tell."""
    record = consumed.read_record(folder)
    learnt = {source["tokenizer_sha256"] for source in record["train"]} - {None, ""} if record else set()
    for corpus in data.corpora:
        tokenizer = corpus.manifest.tokenizer if corpus.manifest else None
        if tokenizer and tokenizer.sha256 and learnt and tokenizer.sha256 not in learnt:
            raise MegamupError(
                f"data.valid: {corpus.prefix!r} was made with tokenizer {tokenizer.name!r} ({tokenizer.sha256[:12]}), "
                f"the run learnt tokens of another ({min(learnt)[:12]}); preprocess it with the run's"
            )


def measure(config: Config, data: ValidData, path: Path, world_size: int) -> list[SetLoss]:
    """Join the process group, load a checkpoint and evaluate it. Collective."""
    objective = open_objective(config, data.corpora, held_out=True)
    device = distributed.join()
    if not distributed.all_equal(data.content_hash, device):
        raise OneRankError("ranks read different data: copy the corpora of data.valid to every machine")
    mesh = build_mesh(config.parallel)
    engine = build_engine(config, mesh, world_size)
    checkpoint.load(engine, path)
    held_out = held_out_batches(data, objective, config, mesh.data.rank, world_size)
    return evaluate(held_out, engine, config, mesh, device)
