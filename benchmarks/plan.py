#!/usr/bin/env python3
"""The plan's step time against measured steps on this machine's CPU, whose rates are measured first.

    ./dev bench plan [--ranks 2] [--steps 5] [--turns 3] [--cluster cpu.yaml] [--output F.md]

A device is a rank with one thread. All ranks at once measure what they reach: products in fp32 and bf16, streaming
through memory, an all-reduce over the loopback interface, and what a small operation takes however small it is. That
is a cluster as configs/clusters/ has them, written to ``--cluster`` for `tools/plan.py CONFIG --cluster FILE`. Then a
Llama of 8 blocks and width 512 takes real steps in several layouts, in turns, and each median stands beside the plan.

The model's constants are those of GPUs (megamup/plan/rates.py); nothing is fitted to what is measured here but the
rates.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import yaml
from machine import cores, headline, processor

from megamup.cluster import Cluster, parse_cluster
from megamup.config import Config, config_from
from megamup.data.writer import write_corpus
from megamup.plan import predicted
from megamup.plan.rates import LINK_SHARE, MEMORY_SHARE
from megamup.train.distributed import join
from megamup.train.fork import run_ranks
from megamup.train.loop import start, train_step

SEQ, VOCAB = 128, 2048
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one rank": (1, {}),
    "one rank, full recomputation": (1, {"train": {"recompute": "full"}}),
    "data": (2, {}),
    "data, ZeRO 2": (2, {"deepspeed": "ds_configs/zero2.json"}),
    "tensor": (2, {"parallel": {"tensor": 2}}),
    "tensor with sequence": (2, {"parallel": {"tensor": 2, "sequence": True}}),
    "pipeline": (2, {"parallel": {"pipeline": 2}, "batch": {"micro_sequences": 2}}),
}


def seconds_of(work: Callable[[], object], at_least: float = 0.5) -> float:
    """Median seconds of a call, repeated for so long; the first isn't counted."""
    work()
    times: list[float] = []
    while sum(times) < at_least or len(times) < 5:
        begun = time.perf_counter()
        work()
        times.append(time.perf_counter() - begun)
    return median(times)


def measured_rates() -> dict[str, float]:
    """What this rank reaches while all others measure too."""
    join()
    found = {name: product_rate(dtype) for name, dtype in (("fp32_peak", torch.float32), ("peak", torch.bfloat16))}
    a, b, c = (torch.ones(2**24) for _ in range(3))
    found["memory_bandwidth"] = 3 * 2**26 / seconds_of(lambda: torch.add(a, b, out=c)) / MEMORY_SHARE
    found["op_seconds"] = small_operation()
    ranks, sent = dist.get_world_size(), torch.ones(2**22)
    if ranks > 1:
        traffic = 2 * (ranks - 1) / ranks * 2**24
        found["node_bandwidth"] = traffic / fixed_seconds(lambda: dist.all_reduce(sent)) / LINK_SHARE
    return found


def fixed_seconds(work: Callable[[], object], times: int = 20) -> float:
    """Seconds of a call that all ranks make as often."""
    dist.barrier()
    begun = time.perf_counter()
    for _ in range(times):
        work()
    return (time.perf_counter() - begun) / times


def product_rate(dtype: torch.dtype, size: int = 1024) -> float:
    a, b = (torch.ones(size, size, dtype=dtype) for _ in range(2))
    return 2 * size**3 / seconds_of(lambda: a @ b)


def small_operation(length: int = 50) -> float:
    """Seconds of one of the products in a chain of tiny layers, forward and backward."""
    layers = [torch.nn.Linear(8, 8, bias=False) for _ in range(length)]
    x = torch.ones(8, 8)

    def chain() -> None:
        y = x
        for layer in layers:
            y = layer(y)
        y.sum().backward()

    return seconds_of(chain) / (3 * length)


def cluster_values(ranks: int) -> dict[str, Any]:
    """Keys of a cluster file: the slowest rank's rates."""
    each = run_ranks(measured_rates, ranks)
    rates = {key: (max if key == "op_seconds" else min)(rank[key] for rank in each) for key in each[0]}
    shown = {key: float(f"{value:.4g}") for key, value in rates.items()}
    return {"device": f"{processor()}, a thread", "kind": "cpu", "devices_per_node": cores(), "matmul": 1.0, **shown}


def config_of(sections: dict[str, Any], folder: Path, steps: int) -> Config:
    model = {"arch": "llama", "d_model": 512, "n_layers": 8, "n_heads": 8, "vocab_size": VOCAB, "max_seq_len": SEQ}
    values: dict[str, Any] = {
        "model": model,
        "data": {"train": str(folder / "tokens")},
        "batch": {"global_sequences": 16},
        "train": {"steps": steps + 1, "log_every": 1000, "monitor_every": 0},
        "run": {"dir": str(folder)},
    }
    for section, keys in sections.items():
        values[section] = {**values.get(section, {}), **keys} if isinstance(keys, dict) else keys
    return config_from(values)


def step_seconds(config: Config) -> float:
    """Median seconds of the steps after the first, on this rank."""
    with open(os.devnull, "w") as sink, contextlib.redirect_stdout(sink):
        run = start(config, int(os.environ["WORLD_SIZE"]), None)
        times = []
        for step in range(config.train.steps):
            begun = time.perf_counter()
            train_step(run, step)
            times.append(time.perf_counter() - begun)
    return median(times[1:])


def measure(name: str, folder: Path, steps: int) -> float:
    ranks, sections = LAYOUTS[name]
    with tempfile.TemporaryDirectory(dir=folder) as runs:
        config = config_of(sections | {"run": {"dir": runs}}, folder, steps)
        return max(run_ranks(step_seconds, ranks, config))


def compare(cluster: Cluster, folder: Path, steps: int, turns: int) -> list[str]:
    found: dict[str, list[float]] = {name: [] for name, (ranks, _) in LAYOUTS.items() if ranks <= cluster.devices}
    for _ in range(turns):
        for name in found:
            found[name].append(measure(name, folder, steps))
    lines = ["| layout | measured, ms | predicted, ms | predicted / measured | bound by |", "|---|---|---|---|---|"]
    for name, times in found.items():
        ranks, sections = LAYOUTS[name]
        step = predicted(config_of(sections, folder, steps), ranks, cluster)
        real, low, high = (1e3 * value for value in (median(times), min(times), max(times)))
        told = 1e3 * step.seconds
        lines.append(
            f"| {name} | {real:.0f} ({low:.0f} to {high:.0f}) | {told:.0f} | {told / real:.2f} | {step.bound} |"
        )
    return lines


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=min(2, cores()))
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--cluster", type=Path, help="write the measured rates here, as a cluster file")
    parser.add_argument("--output", type=Path, help="write the table here")
    options = parser.parse_args(argv)
    about = headline(" ".join(["./dev bench plan", *(sys.argv[1:] if argv is None else argv)]), "torch", "deepspeed")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        values = cluster_values(options.ranks)
        file = options.cluster or folder / "cpu.yaml"
        file.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
        tokens = np.random.default_rng(0).integers(0, VOCAB, 200_000, dtype=np.int32)
        write_corpus(str(folder / "tokens"), [tokens], vocab_size=VOCAB, eod_id=0)
        lines = compare(parse_cluster(str(file), options.ranks), folder, options.steps, options.turns)
    rates = ", ".join(f"{key} {value:g}" for key, value in values.items() if isinstance(value, float))
    text = "\n".join(["# The plan against measured steps", "", about, "", f"Rates: {rates}.", "", *lines, ""])
    print(text)
    if options.output:
        options.output.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
