"""A profile on request: what it writes, that it adds up, and that a planted cause shows where it belongs."""

from __future__ import annotations

import gzip
import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from megamup.config import Config
from megamup.data.loader import BatchStream, TensorBatch
from megamup.errors import MegamupError
from megamup.train.fork import run_ranks
from megamup.train.loop import train
from megamup.train.trace import STEP


def profiled(config: Config, world_size: int) -> dict[str, Any]:
    run_ranks(train, world_size, config)
    return dict(json.loads((config.run.folder / "profile" / "summary.json").read_text()))


def adds_up(found: dict[str, Any]) -> None:
    assert sum(found["percent"].values()) == pytest.approx(100)
    for rank in found["by_rank"]:
        assert sum(rank["time_ms"].values()) == pytest.approx(rank["wall_ms"])
        assert all(ms >= 0 for ms in rank["time_ms"].values())


def test_one_rank(make_config: Any, read_metrics: Any) -> None:
    config = make_config("train.profile=[3,5]", "train.steps=8")
    found = profiled(config, 1)
    adds_up(found)
    assert (found["steps"], found["ranks"], found["device"]) == ([3, 5], 1, "cpu")
    assert found["percent"]["collectives"] < 20  # DeepSpeed reduces, even over one rank
    assert set(found["collectives"]) <= {"all_reduce"}
    for part in ("matmul", "attention", "other", "optimizer", "data", "host"):
        assert found["time_ms"][part] > 0, part
    for part in ("matmul", "attention"):  # backward is about two thirds of them
        assert 0.4 < found["backward_ms"][part] / found["time_ms"][part] < 0.9, part
    records = read_metrics(config)
    assert [record["step"] for record in records if "profile_s" in record] == [3, 5]
    assert records[-1]["loss"] < records[0]["loss"]


def test_files_and_trace(make_config: Any) -> None:
    config = make_config("train.profile=[3,5]", "train.steps=5")
    found, folder = profiled(config, 1), config.run.folder / "profile"
    files = {path.name for path in folder.iterdir()}
    assert files == {"summary.md", "summary.json", "memory.svg", "rank-0.json.gz"}
    assert (folder / "memory.svg").read_text().startswith("<?xml")
    trace = json.loads(gzip.decompress((folder / "rank-0.json.gz").read_bytes()))
    steps = [event for event in trace["traceEvents"] if event["name"].startswith(STEP)]
    assert [event["name"] for event in steps] == [f"{STEP} {step}" for step in (3, 4, 5)]
    assert found["wall_ms"] == pytest.approx(sum(event["dur"] for event in steps) / 3000)
    lines = (folder / "summary.md").read_text().splitlines()
    assert lines[0] == "# Where the time went: steps 3 to 5"
    assert any(line.startswith("| all |") and "| 100.0 |" in line for line in lines)


def test_memory_is_what_the_step_held(make_config: Any) -> None:
    """Weights and moments stay; the peak is above them by at least one copy of the gradients."""
    memory = profiled(make_config("train.profile=[3,4]", "train.steps=4"), 1)["memory"]
    weights, optimizer = memory["held_bytes"]["weights"], memory["held_bytes"]["optimizer"]
    assert optimizer == pytest.approx(2 * weights, rel=0.01)  # fp32: two moments, and AdamW's step counts
    assert memory["peak_bytes"] > 4 * weights
    assert max(memory["timeline"]["bytes"]) == memory["peak_bytes"]
    assert sum(memory["at_peak_bytes"].values()) == memory["peak_bytes"]
    assert min(memory["timeline"]["bytes"]) >= weights + optimizer


@pytest.mark.parametrize(
    ("layout", "expected"), [("parallel.tensor=2", "all_reduce"), ("parallel.pipeline=2", "send_recv")]
)
def test_two_ranks_of_a_replica(make_config: Any, layout: str, expected: str) -> None:
    config = make_config("train.profile=[3,4]", "train.steps=4", layout)
    found = profiled(config, 2)
    adds_up(found)
    assert len(found["by_rank"]) == found["ranks"] == 2
    assert found["time_ms"]["collectives"] > 0
    assert found["collectives"][expected]["calls"] >= 4
    assert found["collectives"][expected]["exposed_ms"] > 0
    assert {path.name for path in (config.run.folder / "profile").glob("rank-*")} == {
        "rank-0.json.gz",
        "rank-1.json.gz",
    }


def test_traces_are_of_one_replica_and_the_summary_of_all(make_config: Any) -> None:
    config = make_config("train.profile=[3,4]", "train.steps=4")
    found = profiled(config, 2)
    adds_up(found)
    assert len(found["by_rank"]) == 2
    assert [path.name for path in (config.run.folder / "profile").glob("rank-*")] == ["rank-0.json.gz"]


def test_a_slow_reader_shows_as_data_on_its_rank(make_config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """... and on the other rank as a collective, where it waits for the slow one."""
    fast = BatchStream.micro_batches

    def slow(self: BatchStream, step: int) -> list[TensorBatch]:
        time.sleep(0.1 if os.environ["RANK"] == "1" else 0)
        return fast(self, step)

    monkeypatch.setattr(BatchStream, "micro_batches", slow)
    found = profiled(make_config("train.profile=[3,4]", "train.steps=4"), 2)
    adds_up(found)
    reader, other = (found["by_rank"][rank]["time_ms"] for rank in (1, 0))
    assert 100 <= reader["data"] < 150
    assert other["data"] < 50
    assert other["collectives"] > reader["collectives"] + 50
    assert found["most_on_rank"]["data"]["rank"] == 1


def test_a_resumed_run_profiles_what_is_left(make_config: Any) -> None:
    same = ("schedule.kind=constant", "train.save_every=4", "data.valid=null")
    run_ranks(train, 1, make_config("train.steps=4", *same))
    config = make_config("train.steps=6", "train.profile=[3,5]", *same)
    assert profiled(config, 1)["steps"] == [5, 5]
    before = (config.run.folder / "profile" / "summary.json").read_bytes()
    run_ranks(train, 1, make_config("train.steps=7", "train.profile=[3,5]", *same))
    assert (config.run.folder / "profile" / "summary.json").read_bytes() == before, "nothing of it was left"


def test_training_is_the_same_under_a_profile(make_config: Any, read_metrics: Any) -> None:
    plain, watched = make_config("run.name=plain"), make_config("run.name=watched", "train.profile=[2,4]")
    for config in (plain, watched):
        run_ranks(train, 1, config)
    losses = [[record["loss"] for record in read_metrics(config)] for config in (plain, watched)]
    assert losses[0] == losses[1]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_the_time_is_the_devices(make_config: Any, read_metrics: Any) -> None:
    config = make_config("train.profile=[5,8]", "train.steps=8", "precision=bf16", "data.valid=null")
    found = profiled(config, 1)
    adds_up(found)
    assert found["device"] == "cuda"
    for part in ("matmul", "attention", "other", "optimizer"):
        assert found["time_ms"][part] > 0, part
    for part in ("matmul", "attention"):
        assert 0.3 < found["backward_ms"][part] / found["time_ms"][part] < 0.95, part
    kernels = [one["name"] for one in found["operations_of_rank_0"]]
    assert not any(name.startswith("aten::") for name in kernels)
    peak = read_metrics(config)[-1]["memory_peak_gib"] * 2**30
    assert 0.5 * peak < found["memory"]["peak_bytes"] <= 1.01 * peak


@pytest.mark.parametrize("steps", ["[5,3]", "[10,21]", "[0,2]", "[3]", "4"])
def test_a_wrong_range_is_refused(make_config: Any, steps: str) -> None:
    with pytest.raises(MegamupError, match=r"train\.profile"):
        make_config(f"train.profile={steps}")


def test_a_folder_that_cannot_be_written_is_named(make_config: Any) -> None:
    config = make_config("train.profile=[2,2]", "train.steps=3")
    Path(config.run.folder).mkdir(parents=True)
    (config.run.folder / "profile").write_text("in the way")
    with pytest.raises(MegamupError, match=r"profile: the profile cannot be written"):
        run_ranks(train, 1, config)
