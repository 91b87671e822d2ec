#!/usr/bin/env python3
"""Weak and strong scaling over CPU ranks, axis by axis: data, tensor, tensor with sequence, pipeline, context.

    ./dev bench scaling [--axes data tensor ...] [--turns 3] [--steps 2] [--quick] [--output F.md]

A 4-layer Llama of width 1024 in fp32, every rank one thread, forked from this process, joined by gloo over the
loopback interface. Strong: the same 2,048 tokens a step on any number of ranks. Weak: 512 tokens a step for each rank.
Sequences have 128 tokens; on the context axis 128 for each rank (weak) or 512 (strong). Whole calls of `train_step` are
timed, after one that isn't; layouts take turns, figures are medians.

The ideal of n ranks is what as many runs of one rank reach side by side, one a core, with nothing to say to each
other: no exchange, no bubble, but the same competition for memory. Where ranks outnumber cores, the ideal is that of
all cores, and what they lose by taking turns on a core counts as their loss. A pipeline of p stages and m micro batches
stands still for (p-1)/(m+p-1) of a step, given as its bubble; `of the ideal` subtracts nothing, `without bubble` is the
share of ideal x (1 - bubble).

Exit code 1 where a bound doesn't hold (strong scaling, 2 ranks): tensor=2 at 0.75 of the tokens/s of data=2, pipeline=2
at 0.8 of the ideal without bubble.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch.distributed as dist
from machine import cores, headline

from megamup.config import Config, config_from, micro_batches
from megamup.data.writer import write_corpus
from megamup.flops import flops_per_token
from megamup.train.fork import Ranks
from megamup.train.loop import start, train_step

WIDTH, LAYERS, VOCAB, SEQ = 1024, 4, 2048, 128
STRONG, WEAK = 16, 4
"""Sequences of 128 tokens: of a step; of a rank."""
AXES: dict[str, dict[str, Any]] = {
    "data": {},
    "tensor": {"tensor": True},
    "tensor+sequence": {"tensor": True, "sequence": True},
    "pipeline": {"pipeline": True},
    "context": {"context": True},
}
ALONE = "side by side"
BOUND_TENSOR, BOUND_PIPELINE = 0.75, 0.80


@dataclass(frozen=True)
class Layout:
    """What one cell of the table runs."""

    axis: str
    """A key of AXES, or ``side by side``: that many runs of one rank."""
    ranks: int
    sequences: int
    """Of a step; side by side: of all runs together."""
    seq_len: int = SEQ

    @property
    def tokens(self) -> int:
        return self.sequences * self.seq_len

    def config(self, folder: Path, steps: int) -> Config:
        alone = self.axis == ALONE
        keys = {} if alone else AXES[self.axis]
        parallel = {key: self.ranks if key != "sequence" else True for key in keys if self.ranks > 1}
        sequences = self.sequences // self.ranks if alone else self.sequences
        batch = {"global_sequences": sequences} | ({"micro_sequences": 1} if "pipeline" in parallel else {})
        return config_from(
            {
                "model": {
                    "arch": "llama",
                    "d_model": WIDTH,
                    "n_layers": LAYERS,
                    "n_heads": WIDTH // 64,
                    "vocab_size": VOCAB,
                    "max_seq_len": 4 * SEQ,
                },
                "data": {"train": str(folder / "tokens"), "seq_len": self.seq_len},
                "batch": batch,
                "parallel": parallel,
                "train": {"steps": steps + 1, "log_every": 1000},
                "run": {"dir": str(folder)},
            }
        )


def step_seconds(config: Config) -> float:
    """Mean seconds of the steps after the first, on this rank, from a moment when all ranks stand ready."""
    with open(os.devnull, "w") as sink, contextlib.redirect_stdout(sink):
        run = start(config, dist_world_size(), None)
        train_step(run, 0)
        dist.barrier()
        begun = time.perf_counter()
        for step in range(1, config.train.steps):
            train_step(run, step)
        dist.barrier()
        return (time.perf_counter() - begun) / (config.train.steps - 1)


def dist_world_size() -> int:
    return int(os.environ["WORLD_SIZE"])


def measure(layout: Layout, folder: Path, steps: int) -> float:
    """Tokens per second of all ranks together."""
    config = layout.config(folder, steps)
    alone = layout.axis == ALONE
    with contextlib.ExitStack() as stack:
        count, size = (layout.ranks, 1) if alone else (1, layout.ranks)
        worlds = [stack.enter_context(Ranks(step_seconds, size, named(config, index))) for index in range(count)]
        done = [False]
        while not all(done):
            done = [world.poll(0.05) for world in worlds]  # every one is looked after
        seconds = [max(world.results.values()) for world in worlds]
    return sum(layout.tokens / count / each for each in seconds)


def named(config: Config, index: int) -> Config:
    """The same run in a folder of its own."""
    return config.model_copy(update={"run": config.run.model_copy(update={"name": f"run_{index}"})})


@dataclass(frozen=True)
class Row:
    """A line of the table."""

    axis: str
    scaling: str
    layout: Layout
    ideal: Layout
    """What runs side by side on as many cores as the layout uses."""


def rows(axes: list[str]) -> list[Row]:
    return [row for axis in axes for ranks in (1, 2, 4) for row in (strong(axis, ranks), weak(axis, ranks))]


def strong(axis: str, ranks: int) -> Row:
    seq_len = 4 * SEQ if axis == "context" else SEQ
    return row_of(axis, "strong", Layout(axis, ranks, STRONG * SEQ // seq_len, seq_len))


def weak(axis: str, ranks: int) -> Row:
    seq_len = ranks * SEQ if axis == "context" else SEQ
    return row_of(axis, "weak", Layout(axis, ranks, WEAK * ranks * SEQ // seq_len, seq_len))


def row_of(axis: str, scaling: str, layout: Layout) -> Row:
    """The layout beside its ideal; one rank is its own, the same for every axis."""
    used = min(layout.ranks, cores())
    ideal = replace(layout, axis=ALONE, ranks=used, sequences=max(1, layout.sequences // used) * used)
    return Row(axis, scaling, ideal if layout.ranks == 1 else layout, ideal)


def bubble(layout: Layout, config: Config) -> float:
    """Share of a step in which a stage of a pipeline waits for its first or next micro batch."""
    stages, (_, parts) = config.parallel.pipeline, micro_batches(config, layout.ranks)
    return (stages - 1) / (parts + stages - 1)


def table(lines: list[Row], rates: dict[Layout, list[float]], folder: Path) -> list[str]:
    text = [
        "| axis | ranks | scaling | sequences x tokens | tokens/s (range) | of the ideal | bubble | without bubble |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in lines:
        layout, found = row.layout, rates[row.layout]
        share, idle = median(found) / median(rates[row.ideal]), bubble(layout, layout.config(folder, 1))
        tail = f"{100 * idle:.0f}% | {share / (1 - idle):.2f}" if idle else " | "
        text.append(
            f"| {row.axis} | {layout.ranks} | {row.scaling} | {layout.sequences} x {layout.seq_len} "
            f"| {median(found):,.0f} ({min(found):,.0f} to {max(found):,.0f}) | {share:.2f} | {tail} |"
        )
    return text


def verdicts(rates: dict[Layout, list[float]], folder: Path) -> list[tuple[str, float, float]]:
    """(what, measured, bound) of what two ranks are held to."""

    def rate(layout: Layout) -> float | None:
        return median(rates[layout]) if rates.get(layout) else None

    data, tensor = rate(strong("data", 2).layout), rate(strong("tensor", 2).layout)
    staged = strong("pipeline", 2)
    pipeline, ideal = rate(staged.layout), rate(staged.ideal)
    found = []
    if data and tensor:
        found.append(("tensor=2 over data=2", tensor / data, BOUND_TENSOR))
    if pipeline and ideal:
        idle = bubble(staged.layout, staged.layout.config(folder, 1))
        found.append(("pipeline=2 over the ideal without bubble", pipeline / ideal / (1 - idle), BOUND_PIPELINE))
    return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--axes", nargs="+", choices=AXES, default=list(AXES))
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--steps", type=int, default=2, help="timed steps of a layout in a turn")
    parser.add_argument("--quick", action="store_true", help="strong scaling on 1 and 2 ranks only")
    parser.add_argument("--output", type=Path, help="write the table here as Markdown")
    options = parser.parse_args(argv)
    command = " ".join(["./dev bench scaling", *(sys.argv[1:] if argv is None else argv)])
    first = headline(command, "torch", "deepspeed")
    lines = [
        row for row in rows(options.axes) if not options.quick or (row.layout.ranks < 3 and row.scaling == "strong")
    ]
    layouts = list(dict.fromkeys(layout for row in lines for layout in (row.ideal, row.layout)))
    rates: dict[Layout, list[float]] = {layout: [] for layout in layouts}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tokens = np.random.default_rng(0).integers(VOCAB, size=200_000)
        write_corpus(str(folder / "tokens"), [tokens], VOCAB, eod_id=0)
        for turn in range(options.turns):
            for layout in layouts:
                rates[layout].append(measure(layout, folder, options.steps))
                print(f"turn {turn + 1}: {layout}: {rates[layout][-1]:,.0f} tokens/s", file=sys.stderr, flush=True)
        shape = Layout("data", 1, STRONG).config(folder, 1)
        gigaflops = flops_per_token(shape.model, SEQ, "palm") / 1e9
        parts = table(lines, rates, folder)
        held = verdicts(rates, folder)
    shared = f", 4 of them on {cores()} cores" if cores() < 4 and not options.quick else ""
    page = ["# Scaling over CPU ranks", "", first, ""]
    page += [f"Ranks of one thread{shared}; {gigaflops:.2f} GFLOP a token (PaLM's count); {options.turns} turns of "]
    page[-1] += f"{options.steps} steps."
    page += ["", *parts, ""]
    for what, value, bound in held:
        page.append(f"{'held' if value >= bound else 'missed'}: {what} {value:.3f}, at least {bound:g}.")
    text = "\n".join(page) + "\n"
    print(text)
    print(json.dumps({what: value for what, value, _ in held}))
    if options.output is not None:
        options.output.write_text(text, encoding="utf-8")
    return 0 if all(value >= bound for _, value, bound in held) else 1


if __name__ == "__main__":
    sys.exit(main())
