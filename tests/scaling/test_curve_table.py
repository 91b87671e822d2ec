"""The training losses that a fit file keeps, at the same shares of every run's training."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml

from megamup.scaling.curve_table import FRACTIONS, SMOOTHING, curve_table, effective_records, schedule_shape
from megamup.scaling.curves import Smoothing, at, parse_at, smoothed
from megamup.scaling.runs import Reading, load, load_runs, read_curve

MakeRun = Callable[..., Path]
NOISE = 0.05


def test_its_losses_are_the_smoothed_ones_of_each_curve(ladder: list[Path]) -> None:
    table = curve_table(load_runs(ladder))
    assert table is not None
    assert table.fractions == FRACTIONS
    assert table.warmup == pytest.approx(0.2)
    for folder, row in zip(ladder, table.losses, strict=True):
        curve = smoothed(read_curve(folder), SMOOTHING)
        assert row == pytest.approx([at(curve, fraction=f).loss for f in FRACTIONS])


def test_it_tells_the_luck_of_batches_from_the_trend(make_run: MakeRun) -> None:
    folder = make_run("w64", steps=2000)
    path, random = folder / "metrics.jsonl", np.random.default_rng(0)
    records = [json.loads(line) for line in path.read_text().splitlines()]
    for record in records:
        if "loss" in record:
            record["loss"] += NOISE * random.standard_normal()
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    table = curve_table(load_runs([folder]))
    assert table is not None
    batch = records[0]["tokens"]
    assert table.token_noise / np.sqrt(batch) == pytest.approx(NOISE, rel=0.1)
    # An average over 10% of what was read, so over more and more records.
    assert NOISE / np.sqrt(2000) < table.noise[-1] < table.noise[0] < NOISE


def test_points_without_a_curve_have_no_row(ladder: list[Path], make_run: MakeRun) -> None:
    found = load_runs([*ladder, make_run("short", parameters=2e6, steps=50)])
    points = [replace(p, source=None) if p.name == "w64" else p for p in found.points]
    ladder[1].joinpath("metrics.jsonl").unlink()
    table = curve_table(replace(found, points=tuple(points)))
    assert table is not None
    names = [point.name for point, row in zip(points, table.losses, strict=True) if row is None]
    assert names == ["w64", "w128"]
    assert curve_table(replace(found, points=tuple(replace(p, source=None) for p in points))) is None


def test_losses_before_the_end_make_no_table(ladder: list[Path]) -> None:
    assert curve_table(load(ladder, (), Reading(at=parse_at("step=50")))) is None


def test_differing_schedules_are_no_shape(make_run: MakeRun) -> None:
    runs = [make_run("a", parameters=1e6), make_run("b", parameters=2e6)]
    table = curve_table(load_runs(runs))
    assert table is not None
    assert table.schedule == {"kind": "constant"}
    config = yaml.safe_load(runs[1].joinpath("config.yaml").read_text())
    config["schedule"]["kind"] = "cosine"
    runs[1].joinpath("config.yaml").write_text(yaml.safe_dump(config))
    table = curve_table(load_runs(runs))
    assert table is not None
    assert table.schedule is None


def test_schedules_are_compared_by_their_shape_alone() -> None:
    shape = {"kind": "wsd", "decay_fraction": 0.2, "min_ratio": 0.0}
    wsd = {f"schedule.{key}": value for key, value in shape.items()}
    assert schedule_shape(wsd | {"schedule.warmup_steps": 50}) == shape
    assert schedule_shape(wsd | {"schedule.kind": "cosine"}) == {"kind": "cosine", "min_ratio": 0.0}
    assert schedule_shape({}) is None


def test_effective_records_of_a_plain_mean_and_of_none() -> None:
    tokens = np.arange(1.0, 11.0)
    assert effective_records(tokens, Smoothing("none")) == pytest.approx(np.ones(10))
    assert effective_records(tokens, Smoothing("weight", 1 - 1e-12))[-1] == pytest.approx(10)
