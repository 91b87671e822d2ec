"""lm-evaluation-harness on an exported model: its likelihoods are those that we evaluate the run with."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from megamup.cli import load_program
from megamup.config import Config
from megamup.convert.hf.exporting import export_run
from megamup.data.manifest import TokenizerEntry
from megamup.data.shards import token_dtype
from megamup.data.writer import CorpusWriter
from megamup.train.evaluate import together
from megamup.train.evaluate_run import Evaluation, evaluate_run
from megamup.train.fork import run_ranks
from megamup.train.loop import train

ROOT = Path(__file__).resolve().parents[2]
TASKS = Path(__file__).with_name("harness_tasks")
TEXTS = [json.loads(line)["text"] for line in (TASKS / "text.jsonl").read_text(encoding="utf-8").splitlines()]
LEARNT = "for index in range(10):\n    print(index)\n"

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None,
    reason="lm_eval isn't installed: pip install --no-deps -r tests/lm_eval.txt",
)


class Found(NamedTuple):
    ours: Evaluation
    results: dict[str, Any]
    """Of each task, by name."""
    samples: list[dict[str, Any]]
    """Of local_text, one a document."""


def write_text(prefix: Path, text: str) -> str:
    """A corpus of one document without its end, as the harness reads it."""
    ids = np.frombuffer(text.encode(), np.uint8).astype(np.uint16)
    with CorpusWriter(str(prefix), token_dtype(257)) as writer:
        writer.add(ids, [len(ids)])
        writer.finish(
            vocab_size=257,
            eod_id=256,
            tokenizer=TokenizerEntry.unknown(),
            text_bytes=len(ids),
            text_words=len(text.split()),
        )
    return str(prefix)


def trained(make_config: Any, folder: Path) -> Config:
    """A model under μP, with tokens of bytes, and each text of the task as a held-out set."""
    (folder / "learnt.txt").write_text(LEARNT * 400)
    preprocess = load_program(ROOT / "tools" / "preprocess_data.py").main
    call = ["--input", folder / "learnt.txt", "--tokenizer", "bytes", "--output-prefix", folder / "p", "--workers", 1]
    assert preprocess(list(map(str, call))) == 0
    sets = {f"text{number}": write_text(folder / f"text{number}", text) for number, text in enumerate(TEXTS)}
    config: Config = make_config(
        f"data.train={folder / 'p'}",
        f"data.valid={json.dumps(sets)}",
        "model.vocab_size=257",
        "model.max_seq_len=128",
        "mup.alpha={embedding: 1.5, hidden: 0.8, residual_out: 1.2, readout: 2.0, attention: 0.7}",
        "train.steps=30",
        "train.save_every=30",
    )
    run_ranks(train, 1, config)
    return config


def harness(model: Path, output: Path) -> None:
    """As the README tells it, without a network."""
    command = [sys.executable, "-m", "lm_eval", "--model", "hf", "--model_args", f"pretrained={model},dtype=float32"]
    command += ["--tasks", "local_text,local_choice", "--include_path", ".", "--device", "cpu", "--batch_size", "2"]
    command += ["--output_path", str(output), "--log_samples"]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(output / "home")}
    ended = subprocess.run(command, cwd=TASKS, env=os.environ | offline, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr[-2000:]


@pytest.fixture
def found(make_config: Any, tmp_path: Path) -> Found:
    config = trained(make_config, tmp_path)
    export_run(str(config.run.folder), tmp_path / "hf")
    harness(tmp_path / "hf", tmp_path / "harness")
    (ours,) = run_ranks(evaluate_run, 1, str(config.run.folder))
    assert ours is not None
    (results,) = (tmp_path / "harness").rglob("results_*.json")
    (samples,) = (tmp_path / "harness").rglob("samples_local_text_*.jsonl")
    lines = sorted(
        map(json.loads, samples.read_text(encoding="utf-8").splitlines()), key=lambda line: int(line["doc_id"])
    )
    return Found(ours, json.loads(results.read_text(encoding="utf-8"))["results"], lines)


def test_the_harness_reads_an_export_and_finds_our_losses(found: Found) -> None:
    """Of texts shorter than the model's longest sequence, and of one that takes two."""
    assert [sample["doc"]["text"] for sample in found.samples] == TEXTS
    for sample, ours in zip(found.samples, found.ours.losses, strict=True):
        assert ours.targets == len(sample["doc"]["text"].encode())
        assert -float(sample["resps"][0][0]) / ours.targets == pytest.approx(ours.loss, abs=1e-5)
    whole, theirs = together(found.ours.losses), found.results["local_text"]
    for figure in ("bits_per_byte", "byte_perplexity", "word_perplexity"):
        assert whole.figures[figure] == pytest.approx(theirs[f"{figure},none"], rel=1e-4)
    assert found.ours.losses[0].loss < 1 < found.ours.losses[1].loss, "one text is what was learnt"
    assert found.results["local_choice"]["acc,none"] == 1.0
