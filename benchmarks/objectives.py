#!/usr/bin/env python3
"""How fast each objective makes batches out of token shards, on one thread.

Random ids in documents of 500 tokens, in the page cache; batches of 64 sequences of 512. The objectives take turns;
figures are medians, in tokens of text a second (what a decoder reads; an encoder reads a little less of it).

    ./dev bench objectives [--tokens 4000000] [--runs 5]
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from machine import processor

from megamup.config import Config, config_from
from megamup.data.collate import collate
from megamup.data.mixture import RunData, open_run_data
from megamup.data.writer import write_corpus

SEQ_LEN, BATCH, DOCUMENT, VOCABULARY = 512, 64, 500, 32_000
BOUND = 1e6
"""Tokens a second: what one GPU of 2026 trains a base-sized encoder at, about."""
OBJECTIVES: dict[str, dict[str, Any]] = {
    "causal": {"model": {"arch": "gpt"}},
    "causal, documents": {"model": {"arch": "gpt"}, "data": {"documents": True}},
    "prefix": {"model": {"arch": "gpt"}, "objective": {"kind": "prefix"}},
    "mlm": {"model": {"arch": "bert"}},
    "mlm, 3-grams": {"model": {"arch": "bert"}, "objective": {"ngram": 3}},
    "mlm, next sentence": {"model": {"arch": "bert", "pair_head": True}, "objective": {"pairs": "next_sentence"}},
    "mlm, sentence order": {"model": {"arch": "bert", "pair_head": True}, "objective": {"pairs": "sentence_order"}},
    "span corruption": {"model": {"arch": "t5"}},
    "span corruption, documents": {"model": {"arch": "t5"}, "data": {"documents": True}},
    "ul2": {"model": {"arch": "t5"}, "objective": {"kind": "ul2"}},
}


def config_of(prefix: str, sections: dict[str, Any]) -> Config:
    shape = {"d_model": 64, "n_layers": 1, "n_heads": 1, "vocab_size": VOCABULARY + 512, "max_seq_len": SEQ_LEN}
    values = {"data": {"train": prefix} | sections.get("data", {}), "train": {"steps": 1}}
    return config_from(values | {"model": shape | sections["model"], "objective": sections.get("objective", {})})


def rate(data: RunData, n_tokens: int, first: int) -> tuple[float, int]:
    """Tokens of text a second, and the sample that comes next."""
    start, taken = time.perf_counter(), 0
    window = np.empty((BATCH, data.objective.width), np.int64)
    while taken < n_tokens:
        collate(data.train.stream, np.arange(first, first + BATCH), window, data.objective)
        first, taken = first + BATCH, taken + BATCH * data.objective.raw_len
    return taken / (time.perf_counter() - start), first


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4_000_000, help="of a run of one objective")
    parser.add_argument("--runs", type=int, default=5)
    options = parser.parse_args(arguments)
    print(f"{date.today()}, {os.cpu_count()} cores ({processor()}), numpy {importlib.metadata.version('numpy')}")
    print(f"{options.tokens:,} tokens, {BATCH} x {SEQ_LEN}, one thread, median of {options.runs} runs\n")
    with tempfile.TemporaryDirectory() as folder:
        prefix = str(Path(folder) / "random")
        ids = np.random.default_rng(0).integers(VOCABULARY - 1, size=(options.tokens // DOCUMENT, DOCUMENT))
        ids[:, -1] = VOCABULARY - 1
        write_corpus(prefix, list(ids), VOCABULARY, VOCABULARY - 1)
        opened = {name: open_run_data(config_of(prefix, sections)) for name, sections in OBJECTIVES.items()}
        found: dict[str, list[float]] = {name: [] for name in opened}
        first = dict.fromkeys(opened, 0)
        for number in range(options.runs + 1):  # the first warms up
            for name, data in opened.items():
                measured, first[name] = rate(data, options.tokens if number else BATCH * SEQ_LEN, first[name])
                found[name] += [measured] if number else []
    print("| objective | M tokens/s |\n|---|---|")
    rates = {name: median(values) for name, values in found.items()}
    print("\n".join(f"| {name} | {value / 1e6:.1f} |" for name, value in rates.items()))
    if min(rates.values()) < BOUND:
        print(f"missed: expected at least {BOUND / 1e6:.0f} M tokens/s of each")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
