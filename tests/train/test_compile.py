"""Blocks compiled by region: one graph for all layers, the same training, kept on disk, and no part of the speed.

A compilation takes seconds, so the runs are shared between the tests.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._inductor.compile_fx  # seconds that every rank would pay
from torch._inductor.runtime.cache_dir_utils import cache_dir

from megamup.config import Config, config_from
from megamup.train.compile import Compiled, cache_folder, eager, keep_in
from megamup.train.fork import run_ranks
from megamup.train.loop import start, train_step

STEPS, BATCH, SEQ = 3, 4, 64


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
    found, before = Outcome([], [], []), Compiled.now()  # the process that was forked may have compiled, too
    for step in range(config.train.steps):
        began = time.perf_counter()
        found.records.append(train_step(training, step))
        found.seconds.append(time.perf_counter() - began)
        now = Compiled.now()
        since = Compiled(now.seconds - before.seconds, now.graphs - before.graphs, now.cached - before.cached)
        found.compiled.append(since)
    return found


@pytest.fixture(scope="module")
def runs(shards: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome]:
    """Rank 0's outcome of the runs. The compiled ones start with an empty cache, which they share in this order."""
    folder = tmp_path_factory.mktemp("compile")
    model = {"arch": "llama", "d_model": 32, "n_layers": 4, "n_heads": 4, "d_ff": 80, "vocab_size": 256}

    def config(name: str, parallel: dict[str, Any], **train: str) -> Config:
        values: dict[str, Any] = {
            "model": model | {"n_kv_heads": 2, "max_seq_len": SEQ},
            "mup": {"base": {"d_model": 16, "n_heads": 2}, "sigma": {"embedding": 0.5, "hidden": 0.1}},
            "data": {"train": str(shards / "train"), "cache": str(folder / "cache")},
            "batch": {"global_sequences": BATCH, "micro_sequences": 2},
            "optim": {"lr": 0.01},
            "train": {"steps": STEPS, "log_every": 1, "monitor_every": 2, **train},
            "kernels": {"compile": name != "eager"},
            "run": {"dir": str(folder), "name": name},
            "parallel": parallel,
        }
        if name in ("eager", "first"):  # evaluation, without gradients, is a graph of its own
            values["data"]["valid"] = str(shards / "valid")
        return config_from(values)

    wanted = {
        "eager": config("eager", {}),
        "first": config("first", {}),
        "second": config("second", {}),
        "sequence": config("sequence", {"tensor": 2, "sequence": True}, recompute="selective"),
        "pipeline": config("pipeline", {"pipeline": 2}),
    }
    assert not cache_folder(wanted["first"]).exists()
    with pytest.MonkeyPatch.context() as environment:
        environment.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
        return {name: run_ranks(run, ranks_of(one), one, ranks_of(one))[0] for name, one in wanted.items()}


def ranks_of(config: Config) -> int:
    return config.parallel.tensor * config.parallel.pipeline


def same(found: Outcome, expected: Outcome) -> None:
    for mine, right in zip(found.records, expected.records, strict=True):
        assert mine["loss"] == pytest.approx(right["loss"], rel=1e-5)
        assert mine["grad_norm"] == pytest.approx(right["grad_norm"], rel=1e-4)


@pytest.mark.parametrize("name", ["first", "second", "sequence", "pipeline"])
def test_compiled_blocks_train_the_same_model(runs: dict[str, Outcome], name: str) -> None:
    """Alone, with stretches over two tensor ranks and selective recomputation, and on two stages."""
    same(runs[name], runs["eager"])
    assert runs["eager"].compiled[-1] == Compiled(0.0, 0, 0)


def test_four_layers_are_one_graph(runs: dict[str, Outcome]) -> None:
    """Beside the loss's, on the last stage; the evaluation after the last step, without gradients and with padding, has
    others."""
    assert [compiled.graphs for compiled in runs["first"].compiled] == [2, 2, 4]
    for name, graphs in (("second", 2), ("sequence", 2), ("pipeline", 1)):
        assert [compiled.graphs for compiled in runs[name].compiled] == [graphs] * 3, name


def test_the_next_process_reads_it_from_disk(runs: dict[str, Outcome]) -> None:
    """Forward, backward and loss; and a pipeline's stages, whose blocks are the same. Nothing is compiled twice."""
    cached = {name: [compiled.cached for compiled in found.compiled] for name, found in runs.items()}
    assert cached["first"] == [0, 0, 0]
    assert (cached["second"], cached["pipeline"]) == ([3, 3, 3], [2, 2, 2])
    assert runs["second"].compiled[0].seconds < runs["first"].compiled[0].seconds


@pytest.mark.parametrize("name", ["first", "second", "sequence"])
def test_throughput_leaves_compiling_out(runs: dict[str, Outcome], name: str) -> None:
    """Compiling is most of a first step, unless it is read from disk: what is left is the step's own time."""
    found = runs[name]
    record, seconds, compiled = found.records[0], found.seconds[0], found.compiled[0].seconds
    assert record["compile_s"] == pytest.approx(compiled)
    assert record["compile_s"] > (0 if name == "second" else 0.5 * seconds)
    rest = BATCH * SEQ / record["tokens_per_s"]
    assert rest + record["compile_s"] == pytest.approx(seconds, rel=0.2)
    assert "compile_s" not in found.records[1]
    assert all("compile_s" not in record for record in runs["eager"].records)


def test_an_evaluations_graph_is_left_out_once(runs: dict[str, Outcome]) -> None:
    """Its seconds are ``compile_s``, not the evaluation's too: else the step's own time would be below zero."""
    found = runs["first"]
    record = found.records[-1]
    assert record["valid_loss"] == pytest.approx(runs["eager"].records[-1]["valid_loss"], rel=1e-5)
    assert record["compile_s"] == pytest.approx(found.compiled[-1].seconds - found.compiled[-2].seconds)
    step = BATCH * SEQ / record["tokens_per_s"]
    assert step > 1e-3, "no step is that fast"
    whole = step + record["compile_s"] + record["evaluation_s"]
    assert whole == pytest.approx(found.seconds[-1], rel=0.2)


@pytest.mark.parametrize("name", ["first", "sequence", "pipeline"])
def test_a_monitored_step_reports_what_an_eager_run_does(runs: dict[str, Outcome], name: str) -> None:
    figures = [
        key for key in runs["eager"].records[1] if key.startswith(("update_", "attention_", "output_", "activa"))
    ]
    assert len(figures) == 7 + 2 + 6
    for key in figures:
        assert runs[name].records[1][key] == pytest.approx(runs["eager"].records[1][key], rel=1e-4), key


# --------------------------------------------------------------------------- where it is kept


@pytest.mark.parametrize(("before", "taken"), [(None, True), ("torch's default", True), ("/elsewhere", False)])
def test_the_folder_is_the_configs_unless_the_user_names_one(
    monkeypatch: pytest.MonkeyPatch, before: str | None, taken: bool
) -> None:
    """Torch sets the variable to its default as soon as it is asked for the folder, as any compilation before does."""
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    if before == "torch's default":
        cache_dir()
        assert "TORCHINDUCTOR_CACHE_DIR" in os.environ
    elif before is not None:
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", before)
    keep_in(Path("/ours"))
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == ("/ours" if taken else before)


def test_inside_eager_nothing_is_compiled() -> None:
    compiled = torch.compile(lambda x: torch.sin(x) + 1, backend=refuse)
    x = torch.zeros(2)
    with eager(), eager(active=False):
        assert compiled(x).tolist() == [1.0, 1.0]
    with eager(active=False), pytest.raises(Exception, match="refused"):
        compiled(x)


def refuse(*_: Any) -> Any:
    raise RuntimeError("refused")
