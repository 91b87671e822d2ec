"""What tests of the trainer share: a small shard of learnable text, and configs over it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megamup.config import Config, config_from, merge, parse_override
from megamup.data.writer import write_corpus

ROOT = Path(__file__).resolve().parents[1]
VOCAB, SEQ = 256, 64

MakeConfig = Callable[..., Config]
ReadMetrics = Callable[[Config], list[dict[str, Any]]]


def pytest_configure() -> None:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # ranks share 2 cores


def write_shard(prefix: Path, n_tokens: int, seed: int) -> None:
    """Tokens that a model can learn something of: a noisy walk over the vocabulary."""
    rng = np.random.default_rng(seed)
    steps = rng.choice([1, 2, 3, 50], size=n_tokens, p=[0.5, 0.3, 0.15, 0.05])
    ids = np.cumsum(steps) % VOCAB
    write_corpus(str(prefix), np.split(ids, [n_tokens // 2]), VOCAB, eod_id=0)


@pytest.fixture(scope="session", autouse=True)
def cache_folder(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What is remembered between runs is remembered for one run of the tests."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``train`` and ``valid`` shards."""
    folder = tmp_path_factory.mktemp("shards")
    write_shard(folder / "train", 40_000, seed=1)
    write_shard(folder / "valid", 1_500, seed=2)  # no multiple of a batch: the last one is padded
    return folder


@pytest.fixture
def make_config(shards: Path, tmp_path: Path) -> MakeConfig:
    """``make_config("a.b=c", ...)``: a small llama under μP, with GQA and a d_ff that no power of two divides."""

    def make(*overrides: str) -> Config:
        values: dict[str, Any] = {
            "model": {
                "arch": "llama",
                "d_model": 64,
                "n_layers": 2,
                "n_heads": 4,
                "n_kv_heads": 2,
                "d_ff": 160,
                "vocab_size": VOCAB,
                "max_seq_len": SEQ,
            },
            "mup": {"base": {"d_model": 32, "n_heads": 2}, "sigma": {"embedding": 0.5, "hidden": 0.1}},
            "data": {"train": str(shards / "train"), "valid": str(shards / "valid")},
            "batch": {"global_sequences": 8, "micro_sequences": 2},
            "optim": {"lr": 0.01},
            "schedule": {"kind": "cosine", "warmup_steps": 2},
            "train": {"steps": 20, "log_every": 1},
            "run": {"dir": str(tmp_path), "name": "run"},
        }
        for override in overrides:
            merge(values, parse_override(override))
        return config_from(values)

    return make


@pytest.fixture
def read_metrics() -> ReadMetrics:
    def read(config: Config) -> list[dict[str, Any]]:
        lines = (config.run.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines]

    return read
