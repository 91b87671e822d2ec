#!/usr/bin/env python3
"""How fast batches come from the page cache: this loader beside Megatron's dataset under torch's DataLoader.

Both read the same shards of random ids, in a shuffled order, as int64 batches of 8 sequences of 4,096 targets. Runs
of all of them alternate, each over other samples than the last, after one that warms the page cache; the figures are
medians. `per CPU second` counts the processor time of all threads and worker processes: what a core gives. The limit is
a plain conversion of windows at the same random places, without order, check or batches.

    ./dev bench loader [--tokens 100000000] [--runs 5]
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import torch
from machine import processor

from megamup.data.corpus import Corpus
from megamup.data.loader import BatchStream
from megamup.data.manifest import TokenizerEntry
from megamup.data.mixture import TrainData, Wanted
from megamup.data.shards import token_dtype
from megamup.data.writer import CorpusWriter

SEQ_LEN, MICRO, GLOBAL = 4096, 8, 64
DOCUMENT = 1000
VOCABULARIES = {"uint16": 32_000, "int32": 128_000}
BOUND = 200e6
BLENDED = 20
"""Sources of a blend, of weights 1 to 20."""
OURS = "megamup BatchStream"

Batches = Iterator[Any]
"""Endless; each is (8 or more sequences of) int64."""


class Rate(NamedTuple):
    wall: float
    """Tokens per second."""
    cpu: float
    """Tokens per second of processor time."""


def write_tokens(prefix: str, vocab_size: int, n_tokens: int, seed: int = 0) -> None:
    generator, left = np.random.default_rng(seed), n_tokens
    with CorpusWriter(prefix, token_dtype(vocab_size)) as writer:
        while left:
            documents = min(left // DOCUMENT, 10_000)
            ids = generator.integers(vocab_size, size=documents * DOCUMENT)
            writer.add(ids, np.full(documents, DOCUMENT))
            left -= len(ids)
        writer.finish(vocab_size=vocab_size, eod_id=0, tokenizer=TokenizerEntry("random", "0" * 64))


def ours(prefixes: list[str], vocab_size: int, sequences: int) -> Batches:
    wanted = [Wanted(prefix, weight) for weight, prefix in enumerate(prefixes, 1)]
    data = TrainData(wanted, seq_len=SEQ_LEN, vocab_size=vocab_size, seed=1)
    stream, step = BatchStream(data.stream, sequences, MICRO), 0
    while True:
        yield from (batch.tokens for batch in stream.micro_batches(step))
        step += 1


def conversion(prefix: str, vocab_size: int) -> Batches:
    corpus, generator = Corpus(prefix), np.random.default_rng(1)
    while True:
        window = np.empty((GLOBAL, SEQ_LEN + 1), np.int64)
        for row, start in zip(window, generator.integers(corpus.n_tokens - SEQ_LEN, size=GLOBAL).tolist(), strict=True):
            row[:] = corpus.tokens(start, start + SEQ_LEN + 1)
        yield window[:, 1:]


def megatron(prefix: str, vocab_size: int, workers: int) -> Batches:
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.utils import Split

    class Tokenizer:
        eod, pad, unique_identifiers = 0, -1, {"name": "random"}

        def __init__(self, vocab_size: int) -> None:
            self.vocab_size = vocab_size

    config = GPTDatasetConfig(
        random_seed=1,
        sequence_length=SEQ_LEN,
        split="1",
        path_to_cache=str(Path(prefix).parent / "megatron"),
        tokenizer=Tokenizer(vocab_size),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    indexed = GPTDataset.build_low_level_dataset(prefix, config)
    documents = np.arange(len(indexed.document_indices) - 1, dtype=np.int32)
    samples = indexed.sequence_lengths.sum() // SEQ_LEN * 100
    dataset = GPTDataset(indexed, prefix, documents, int(samples), Split.train, config)
    loader = torch.utils.data.DataLoader(dataset, batch_size=MICRO, num_workers=workers)
    return (batch["tokens"] for batch in loader)


def measure(batches: Batches, n_tokens: int) -> Rate:
    """Take at least `n_tokens`."""
    taken, wall, cpu = 0, time.perf_counter(), cpu_seconds()
    while taken < n_tokens:
        taken += next(batches).shape[0] * SEQ_LEN
    return Rate(taken / (time.perf_counter() - wall), taken / (cpu_seconds() - cpu))


def cpu_seconds() -> float:
    """Of this process and its children, living ones included (Linux's /proc)."""
    ticks = 0
    children = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()
    for child in children:
        fields = Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return time.process_time() + ticks / os.sysconf("SC_CLK_TCK")


def compare(prefix: str, blended: list[str], vocab_size: int, n_tokens: int, runs: int) -> dict[str, Rate]:
    """Median rates by name."""
    sources: dict[str, Callable[[], Batches]] = {
        f"{OURS}, {GLOBAL} sequences a step": lambda: ours([prefix], vocab_size, GLOBAL),
        f"{OURS}, {MICRO} sequences a step": lambda: ours([prefix], vocab_size, MICRO),
        f"{OURS}, {GLOBAL} a step, blend of {BLENDED}": lambda: ours(blended, vocab_size, GLOBAL),
        f"{OURS}, {MICRO} a step, blend of {BLENDED}": lambda: ours(blended, vocab_size, MICRO),
        "conversion alone (limit)": lambda: conversion(prefix, vocab_size),
        "Megatron GPTDataset + DataLoader, 0 workers": lambda: megatron(prefix, vocab_size, 0),
        "Megatron GPTDataset + DataLoader, 2 workers": lambda: megatron(prefix, vocab_size, 2),
    }
    opened = {name: source() for name, source in sources.items()}
    for batches in opened.values():
        measure(batches, n_tokens)
    found: dict[str, list[Rate]] = {name: [] for name in sources}
    for _ in range(runs):
        for name, batches in opened.items():
            found[name].append(measure(batches, n_tokens))
    return {
        name: Rate(median(rate.wall for rate in rates), median(rate.cpu for rate in rates))
        for name, rates in found.items()
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=100_000_000, help="of the corpus")
    parser.add_argument("--runs", type=int, default=5)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("numpy", "torch", "megatron-core"))
    print(f"{date.today()}, {os.cpu_count()} cores ({processor()}), {versions}")
    print(f"{options.tokens:,} tokens, batches of {MICRO} x {SEQ_LEN}, median of {options.runs} runs\n")
    print("| ids | loader | M tokens/s | M tokens/s per CPU second |\n|---|---|---|---|")
    worst = float("inf")
    with tempfile.TemporaryDirectory() as folder:
        for dtype, vocab_size in VOCABULARIES.items():
            prefix = str(Path(folder) / dtype)
            write_tokens(prefix, vocab_size, options.tokens)
            blended = [f"{prefix}-{number}" for number in range(BLENDED)]
            for number, each in enumerate(blended):
                write_tokens(each, vocab_size, options.tokens // BLENDED, seed=number + 1)
            rates = compare(prefix, blended, vocab_size, options.tokens // 4, options.runs)
            for name, rate in rates.items():
                print(f"| {dtype} | {name} | {rate.wall / 1e6:.1f} | {rate.cpu / 1e6:.1f} |", flush=True)
            worst = min(worst, *(rate.cpu for name, rate in rates.items() if name.startswith(OURS)))
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"\npeak memory {memory:.2f} GiB (mapped pages of the shards included)")
    if worst < BOUND:
        print(f"missed: {worst / 1e6:.0f} M tokens/s a core, expected at least {BOUND / 1e6:.0f}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
