#!/usr/bin/env python3
"""The plan's bytes against measured ones in every layout, and what the fused cross-entropy saves at 128k words.

Trains two steps of a small model on forked CPU ranks and counts every allocation of the second
(`megamup.train.memory`); the rank that took most is compared with `megamup.plan.memory`. Exit code 1 where one is more
than 5% off, or the fused cross-entropy saves less than 60% of the logits' bytes. Writes benchmarks/results/memory.md.

    ./dev bench memory
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from machine import headline

from megamup.config import Config, config_from, merge, parse_override
from megamup.data.writer import write_corpus
from megamup.plan import memory
from megamup.train.fork import run_ranks
from megamup.train.loop import start, train_step
from megamup.train.memory import measure_peak

RESULTS = Path(__file__).parent / "results" / "memory.md"
BOUND_PERCENT, SAVED = 5.0, 0.6
BUCKET = 200_000
"""Elements of DeepSpeed's buckets, which at its default of 5e8 would be nearly all there is."""
WORDS, LONG = 131_072, 1024
LAYOUTS: dict[str, tuple[int, int, tuple[str, ...]]] = {
    "one rank": (1, 0, ()),
    "data 2": (2, 0, ()),
    "data 2, ZeRO 1": (2, 1, ()),
    "data 2, ZeRO 2": (2, 2, ()),
    "data 2, ZeRO 3": (2, 3, ()),
    "tensor 2": (2, 0, ("parallel.tensor=2",)),
    "tensor 2, sequence": (2, 0, ("parallel.tensor=2", "parallel.sequence=true")),
    "pipeline 2": (2, 0, ("parallel.pipeline=2",)),
    "pipeline 2, ZeRO 1": (2, 1, ("parallel.pipeline=2",)),
    "tensor 2, pipeline 2": (4, 0, ("parallel.tensor=2", "parallel.pipeline=2")),
    "context 2": (2, 0, ("parallel.context=2",)),
    "recompute selective": (1, 0, ("train.recompute=selective",)),
    "recompute full": (1, 0, ("train.recompute=full",)),
    "recompute every 2nd": (1, 0, ("train.recompute=2",)),
    "reference attention": (1, 0, ("kernels.attention=reference",)),
}
"""Name: ranks, ZeRO stage, overrides."""
SHAPES: dict[str, tuple[str, ...]] = {
    "llama": ("model.arch=llama",),
    "gpt": ("model.arch=gpt",),
    "bert": ("model.arch=bert",),
    "t5": ("model.arch=t5", "objective.decoder_len=32"),  # which context and tensor ranks can cut
}


@dataclass(frozen=True)
class Row:
    model: str
    layout: str
    measured: int
    planned: int
    parts: dict[str, int]
    """The plan's, each at its own largest."""

    @property
    def error_percent(self) -> float:
        return 100 * (self.planned / self.measured - 1)


def configured(folder: Path, zero: int, *overrides: str) -> Config:
    """A model of four blocks, whose activations are as large as its state."""
    buckets = {"reduce_bucket_size": BUCKET, "stage3_param_persistence_threshold": 1000} if zero else {}
    keys = folder / f"zero{zero}.json"
    keys.write_text(json.dumps({"zero_optimization": {"stage": zero, **buckets}}))
    values: dict[str, Any] = {
        "model": {
            "arch": "llama",
            "d_model": 128,
            "n_layers": 4,
            "n_heads": 4,
            "n_kv_heads": 2,
            "vocab_size": 512,
            "max_seq_len": 128,
        },
        "data": {"train": str(folder / "tokens")},
        "batch": {"global_sequences": 8, "micro_sequences": 2},
        "train": {"steps": 9, "monitor_every": 0},
        "deepspeed": str(keys),
        "run": {"dir": str(folder)},
    }
    for override in overrides:
        merge(values, parse_override(override))
    return config_from(values)


def peak(config: Config, world_size: int) -> int:
    """Of this rank, over the second step."""
    with open(os.devnull, "w") as sink, contextlib.redirect_stdout(sink):
        run = start(config, world_size, None)
        steps = iter(range(2))
        return measure_peak(lambda: train_step(run, next(steps)), run.device)


def measure(config: Config, world_size: int, model: str, layout: str) -> Row:
    measured = max(run_ranks(peak, world_size, config, world_size))
    planned = memory(config, world_size, "cpu")
    parts = {name: getattr(planned, name) for name in ("weights", "gradients", "optimizer", "activations", "buffers")}
    row = Row(model, layout, measured, planned.total, parts)
    print(f"{model:<12}{layout:<24}{measured / 2**20:9.2f} MiB, plan {row.error_percent:+.1f}%", flush=True)
    return row


def layouts(folder: Path) -> Iterator[Row]:
    for arch in ("llama", "gpt", "bert", "t5"):
        for precision in ("fp32", "bf16"):
            for name, (ranks, zero, overrides) in LAYOUTS.items():
                if precision == "bf16" and "reference" in name:
                    continue  # an fp32 computation
                config = configured(folder, zero, *SHAPES[arch], f"precision={precision}", *overrides)
                yield measure(config, ranks, f"{arch}, {precision}", name)


def table(rows: list[Row]) -> list[str]:
    parts = list(rows[0].parts)
    lines = [
        "| model | layout | measured, MiB | plan | " + " | ".join(parts) + " |",
        "|---|---|---|---|" + "---|" * len(parts),
    ]
    for row in rows:
        sizes = " | ".join(f"{row.parts[part] / 2**20:.2f}" for part in parts)
        lines.append(
            f"| {row.model} | {row.layout} | {row.measured / 2**20:.2f} | {row.error_percent:+.1f}% | {sizes} |"
        )
    return lines


def words(folder: Path) -> tuple[list[Row], float]:
    """Peaks with a vocabulary of 128k, and what fused cross-entropy saves as a share of the logits' bytes."""
    size = (
        f"model.vocab_size={WORDS}", "model.d_model=64", "model.n_layers=1", f"model.max_seq_len={LONG}",
        "batch.global_sequences=1", "batch.micro_sequences=1",
    )  # fmt: skip
    rows = [
        measure(configured(folder, 0, *size, f"kernels.cross_entropy={backend}"), 1, "128k words", backend)
        for backend in ("reference", "fused")
    ]
    logits = 4 * LONG * WORDS
    return rows, (rows[0].measured - rows[1].measured) / logits


def main(argv: list[str] | None = None) -> int:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args(argv)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_corpus(str(folder / "tokens"), [np.random.default_rng(0).integers(256, size=100_000)], 256, eod_id=0)
        rows = list(layouts(folder))
        large, saved = words(folder)
    worst = max((row for row in [*rows, *large]), key=lambda row: abs(row.error_percent))
    text = [
        "# Memory: the plan against the allocator",
        "",
        headline("./dev bench memory", "torch", "deepspeed"),
        "",
        "Four blocks of d_model 128 (of t5 in either stack) with micro batches of 2 x 128 tokens, 8 sequences a step, "
        f"and DeepSpeed's buckets cut to {BUCKET:,} elements. Measured: every allocation of torch's CPU allocator over "
        "the second step, on the rank that takes most. Parts are the plan's, in MiB, each at its own largest, so they "
        "exceed the peak.",
        "",
        *table(rows),
        "",
        f"Largest error: {worst.error_percent:+.1f}% ({worst.model}, {worst.layout}); bound {BOUND_PERCENT:g}%.",
        "",
        f"## A vocabulary of {WORDS:,}, {LONG:,} tokens at a time, fp32: logits of {4 * LONG * WORDS / 2**20:.0f} MiB",
        "",
        *table(large),
        "",
        f"The fused cross-entropy's peak is lower by {saved:.0%} of the logits' bytes (bound {SAVED:.0%}); the "
        "reference has them more than once: logits, softmax, its gradient.",
    ]
    RESULTS.write_text("\n".join(text) + "\n", encoding="utf-8")
    print(f"largest error {worst.error_percent:+.1f}%, logits' bytes saved {saved:.0%}; {RESULTS}")
    return 0 if abs(worst.error_percent) <= BOUND_PERCENT and saved >= SAVED else 1


if __name__ == "__main__":
    sys.exit(main())
