"""The layouts that benchmarks/scaling.py compares, and what it makes of their speeds."""

from __future__ import annotations

from pathlib import Path

import pytest
import scaling
from scaling import ALONE, AXES, STRONG, Layout, bubble, rows, verdicts

from megamup.config import micro_batches


def test_strong_keeps_the_step_and_weak_keeps_the_rank(tmp_path: Path) -> None:
    for row in rows(list(AXES)):
        whole = row.layout.tokens
        assert whole == (2048 if row.scaling == "strong" else 512 * row.layout.ranks)
        config = row.layout.config(tmp_path, 1)
        if row.layout.axis != ALONE:
            assert config.batch_tokens == whole
            assert config.parallel.data(row.layout.ranks) == (row.layout.ranks if row.axis == "data" else 1)


def test_an_ideal_does_the_same_work_on_as_many_cores(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(scaling, "cores", lambda: 2)
    for row in rows(list(AXES)):
        assert row.ideal.axis == ALONE
        assert row.ideal.ranks == min(2, row.layout.ranks)
        assert row.ideal.tokens == row.layout.tokens
        assert row.ideal.config(tmp_path, 1).batch_tokens == row.layout.tokens // row.ideal.ranks


def test_the_bubble_of_a_pipeline(tmp_path: Path) -> None:
    layout = Layout("pipeline", 2, STRONG)
    config = layout.config(tmp_path, 1)
    assert micro_batches(config, 2) == (1, 16)
    assert bubble(layout, config) == pytest.approx(1 / 17)
    data = Layout("data", 2, STRONG)
    assert bubble(data, data.config(tmp_path, 1)) == 0


def test_verdicts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(scaling, "cores", lambda: 2)
    speeds = {"data": 100.0, "tensor": 80.0, "pipeline": 96.0, ALONE: 120.0}
    rates = {Layout(axis, 2, STRONG): [speed, speed * 0.9, speed * 1.1] for axis, speed in speeds.items()}
    (_, tensor, _), (_, pipeline, _) = verdicts(rates, tmp_path)
    assert tensor == pytest.approx(0.8)
    assert pipeline == pytest.approx(0.8 / (16 / 17))
