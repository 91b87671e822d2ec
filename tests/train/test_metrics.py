"""The clock of a real run, interrupted once, and what `megamup.scaling.mfu` makes of it."""

from __future__ import annotations

import json
import shutil
import time
from typing import Any

import pytest

from megamup.config import Config
from megamup.scaling.mfu import utilisation
from megamup.train import checkpoint, loop
from megamup.train.engine import DataParallelEngine
from megamup.train.fork import run_ranks


def train_slowly(config: Config) -> None:
    """`loop.train` on one rank, where a step, an evaluation and a save take at least 0.05, 0.2 and 0.4 s."""
    for owner, name, seconds in (
        (DataParallelEngine, "train_batch", 0.05),
        (loop, "evaluate", 0.2),
        (checkpoint, "save", 0.4),
    ):
        setattr(owner, name, delayed(getattr(owner, name), seconds))
    loop.train(config)


def delayed(function: Any, seconds: float) -> Any:
    def later(*arguments: Any) -> Any:
        time.sleep(seconds)
        return function(*arguments)

    return later


def test_wall_time_of_an_interrupted_run_is_accounted_for(make_config: Any, read_metrics: Any) -> None:
    config = make_config("train.steps=12", "train.save_every=6", "train.eval_every=4", "train.eval_sequences=8")
    before = time.time()
    run_ranks(train_slowly, 1, config)
    shutil.rmtree(config.run.folder / "checkpoints" / "step-00000012")
    run_ranks(train_slowly, 1, config)  # again from step 6
    after = time.time()

    starts = [json.loads(line) for line in (config.run.folder / "starts.jsonl").read_text().splitlines()]
    assert [start["step"] for start in starts] == [0, 6]
    records = read_metrics(config)
    times = [record["time_unix_s"] for record in records]
    assert before < starts[0]["time_unix_s"] < times[0]
    assert times == sorted(times)
    assert times[5] < starts[1]["time_unix_s"] < times[6]
    assert times[-1] < after
    assert [record["step"] for record in records if "evaluation_s" in record] == [4, 8, 12]
    assert all(record["evaluation_s"] >= 0.2 for record in records if "evaluation_s" in record)
    assert [record["step"] for record in records if "saving_s" in record] == []  # step 7's was thrown away

    found = utilisation(config.run.folder)
    assert found.no_goodput is None
    assert found.lost_s is not None
    assert found.wall_s == pytest.approx(times[-1] - starts[0]["time_unix_s"])
    assert found.lost_s["evaluation"] >= 3 * 0.2
    assert found.lost_s["restarts"] >= 0.4 + 6 * 0.05 + 2 * 0.2 + 0.4  # two saves, and steps 7 to 12 with evaluations
    assert found.productive_s is not None
    assert found.wall_s is not None
    assert 12 * 0.05 * 0.99 <= found.productive_s <= found.wall_s
    assert all(seconds >= 0 for seconds in found.lost_s.values())


def test_time_of_a_save_stands_in_the_next_record(make_config: Any, read_metrics: Any) -> None:
    config = make_config("train.steps=6", "train.save_every=3")
    run_ranks(train_slowly, 1, config)
    saved = {record["step"]: record["saving_s"] for record in read_metrics(config) if "saving_s" in record}
    assert list(saved) == [4]
    assert saved[4] >= 0.4
    found = utilisation(config.run.folder)
    assert found.lost_s is not None
    assert found.lost_s["saving"] == saved[4]
