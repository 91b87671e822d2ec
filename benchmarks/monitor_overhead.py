#!/usr/bin/env python3
"""What ``train.monitor_every`` costs at its default: at most 2% of the training time, or exit 1.

Trains a 4-layer Llama of width 256 on sequences of 256 tokens, one rank, every second step monitored: plain and
monitored steps alternate in one run, so that whatever else the machine does meets both. The figures are the medians of
all plain and of all monitored steps, as whole calls of `train_step`, the line in metrics.jsonl included. The whole
batch is one micro batch, the dearest case: with more, the forward's part is still paid on the first alone.

    ./dev bench monitor_overhead [--steps 60]
"""

from __future__ import annotations

import argparse
import contextlib
import os
import platform
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from statistics import median

import numpy as np
import torch

from megamup.config import Config, config_from
from megamup.data.writer import write_corpus
from megamup.sections import Train
from megamup.train.fork import run_ranks
from megamup.train.loop import start, train_step

VOCAB, SEQ, SEQUENCES, WARM_UP = 1024, 256, 4, 4
BOUND_PERCENT = 2.0


def write_tokens(prefix: Path, n_tokens: int) -> None:
    write_corpus(str(prefix), [np.random.default_rng(0).integers(VOCAB, size=n_tokens)], VOCAB, eod_id=0)


def configured(folder: Path, steps: int) -> Config:
    return config_from(
        {
            "model": {
                "arch": "llama",
                "d_model": 256,
                "n_layers": 4,
                "n_heads": 4,
                "vocab_size": VOCAB,
                "max_seq_len": SEQ,
            },
            "data": {"train": str(folder / "tokens")},
            "batch": {"global_sequences": SEQUENCES, "micro_sequences": SEQUENCES},
            "train": {"steps": steps, "log_every": 1, "monitor_every": 2},  # plain steps are written too
            "run": {"dir": str(folder)},
        }
    )


def step_times(config: Config) -> list[float]:
    """Seconds of each step after the first few."""
    found = []
    with open(os.devnull, "w") as sink, contextlib.redirect_stdout(sink):
        run = start(config, 1, None)
        for step in range(config.train.steps):
            begun = time.perf_counter()
            train_step(run, step)
            found.append(time.perf_counter() - begun)
    return found[WARM_UP:]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60, help="plain and monitored together, at least 10")
    steps = max(10, parser.parse_args(argv).steps)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_tokens(folder / "tokens", 200_000)
        times = run_ranks(step_times, 1, configured(folder, steps))[0]
    plain, monitored = median(times[::2]), median(times[1::2])  # the second step is the first monitored one
    every = Train.model_fields["monitor_every"].default
    once = 100 * (monitored / plain - 1)
    print(f"{date.today()}, {platform.machine()} CPU, one thread, torch {torch.__version__}; {len(times)} steps")
    print(f"plain step          {1e3 * plain:8.1f} ms")
    print(f"monitored step      {1e3 * monitored:8.1f} ms   {once:+.1f}%")
    print(f"every {every:>4} steps    {once / every:+8.3f} %    of the training time; bound {BOUND_PERCENT:g}%")
    return 0 if once / every <= BOUND_PERCENT else 1


if __name__ == "__main__":
    sys.exit(main())
