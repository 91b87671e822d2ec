"""Blocks compiled by region: one graph for all layers, the same training, kept on disk, and no part of the speed.

A compilation takes seconds, so the runs are shared between the tests.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import pytest

from megamup.config import Config, config_from
from megamup.train.compile import Compiled, cache_folder
from megamup.train.fork import run_ranks
from megamup.train.loop import start, train_step

STEPS = 3


@dataclass(frozen=True)
class Outcome:
    records: list[dict[str, float]]
    compiled: list[Compiled]
    """After each step."""
    seconds: list[float]
    """Wall time of each step, with what is due after it."""


def run(config: Config, world_size: int) -> Outcome:
    """Train to the end, looking at the compiler after every step."""
    training = start(config, world_size, None)
    found = Outcome([], [], [])
    for step in range(config.train.steps):
        began = time.perf_counter()
        found.records.append(train_step(training, step))
        found.seconds.append(time.perf_counter() - began)
        found.compiled.append(Compiled.now())
    return found


@pytest.fixture(scope="module")
def runs(shards: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome]:
    """Rank 0's outcome of the runs. The compiled ones start with an empty cache, which they share in this order."""
    folder = tmp_path_factory.mktemp("compile")
    model = {"arch": "llama", "d_model": 32, "n_layers": 4, "n_heads": 4, "d_ff": 80, "vocab_size": 256}

    def config(name: str, compiled: bool, parallel: dict[str, Any]) -> Config:
        values: dict[str, Any] = {
            "model": model | {"n_kv_heads": 2, "max_seq_len": 64},
            "mup": {"base": {"d_model": 16, "n_heads": 2}, "sigma": {"embedding": 0.5, "hidden": 0.1}},
            "data": {"train": str(shards / "train"), "cache": str(folder / "cache")},
            "batch": {"global_sequences": 4, "micro_sequences": 2},
            "optim": {"lr": 0.01},
            "train": {"steps": STEPS, "log_every": 1, "monitor_every": 2},
            "kernels": {"compile": compiled},
            "run": {"dir": str(folder), "name": name},
            "parallel": parallel,
        }
        if name in ("eager", "first"):  # evaluation, without gradients, is a graph of its own
            values["data"]["valid"] = str(shards / "valid")
        return config_from(values)

    sequence = {"tensor": 2, "sequence": True}
    wanted = {
        "eager": config("eager", compiled=False, parallel={}),
        "first": config("first", compiled=True, parallel={}),
        "second": config("second", compiled=True, parallel={}),
        "sequence": config("sequence", compiled=True, parallel=sequence),
        "pipeline": config("pipeline", compiled=True, parallel={"pipeline": 2}),
    }
    assert not cache_folder(wanted["first"]).exists()
    return {name: run_ranks(run, ranks_of(one), one, ranks_of(one))[0] for name, one in wanted.items()}


def ranks_of(config: Config) -> int:
    return config.parallel.tensor * config.parallel.pipeline
