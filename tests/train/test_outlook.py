"""A run beside its forecast: what it says, what it records, and that its losses don't change by a bit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megamup.config import Config
from megamup.errors import MegamupError
from megamup.parameters import count
from megamup.scaling.analysis import Result, analyse
from megamup.scaling.curves import Smoothing
from megamup.scaling.fit_file import save_result
from megamup.scaling.forecast import Band, forecast
from megamup.scaling.laws import Law
from megamup.scaling.laws.batch import BATCH_LOSS
from megamup.scaling.laws.loss import power
from megamup.scaling.runs import Ladder, Point
from megamup.train.fork import run_ranks
from megamup.train.loop import train
from megamup.train.outlook import PATIENCE, Outlook

MakeConfig = Callable[..., Config]


def fit_around(config: Config, law: Law | None = None) -> Result:
    """A power law in N through six sizes, of which this run's is the fifth; losses near ln(vocab_size)."""
    own = count(config.model)["non_embedding"]
    random = np.random.default_rng(0)
    points = []
    for factor in (0.1, 0.2, 0.4, 0.7, 1.0, 1.5):
        loss = (4.0 + factor**-0.2) * np.exp(0.002 * random.standard_normal())
        points.append(
            Point(f"x{factor}", {"N": own * factor, "D": float(config.tokens), "B": 1e3 * factor}, float(loss))
        )
    convention = {"parameters": "non_embedding", "flops": "6N", "loss": "valid_loss at the final step"}
    return analyse(Ladder(tuple(points), convention), [law or power("N")], objective="log")


def outlook_of(config: Config, low: float, high: float) -> Outlook:
    """An outlook whose band is the same from the first step to the last."""
    found = Outlook(config, forecast(fit_around(config), config))
    share = np.array([0.01, 1.0])
    found.band = Band(share, np.full(2, (low + high) / 2), np.full(2, low), np.full(2, high), Smoothing("none"))
    return found


def records(config: Config, losses: list[float]) -> list[dict[str, float]]:
    return [{"step": step, "tokens": 100.0 * step, "loss": loss} for step, loss in enumerate(losses, start=1)]


def test_a_run_says_its_forecast_and_trains_as_without(
    make_config: MakeConfig, read_metrics: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = make_config("train.steps=6", "train.log_every=1", "train.eval_sequences=8")
    path = tmp_path / "fit.json"
    save_result(fit_around(config), path)
    with_forecast = make_config(
        "train.steps=6", "train.log_every=1", "train.eval_sequences=8", "run.name=b", f"log.forecast={path}"
    )
    run_ranks(train, 1, config)
    capfd.readouterr()
    run_ranks(train, 1, with_forecast)
    told = capfd.readouterr().out
    assert "predicted final valid_loss 5.0" in told
    assert "no band of the training loss: the fit file holds no training curves" in told
    assert "predicted final 5.0" in told
    assert "measured valid_loss" in told or "measured final valid_loss" in told
    assert [r["loss"] for r in read_metrics(with_forecast)] == [r["loss"] for r in read_metrics(config)]


def test_a_wrong_file_is_an_error_before_the_ranks_meet(make_config: MakeConfig, tmp_path: Path) -> None:
    with pytest.raises(MegamupError, match=r"log\.forecast: .*none\.json is no file"):
        train(make_config(f"log.forecast={tmp_path / 'none.json'}"))
    config = make_config()
    path = tmp_path / "batch.json"
    save_result(fit_around(config, BATCH_LOSS), path)
    with pytest.raises(MegamupError, match=r"log\.forecast: .*gives no loss of a run that hasn't started"):
        train(make_config(f"log.forecast={path}"))


def test_leaving_the_band_is_said_once_and_recorded(
    make_config: MakeConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make_config("train.steps=10")
    outlook = outlook_of(config, 3.0, 4.0)
    losses = [3.5, 5.0, 5.0, 5.0, 5.0, 3.5, 5.0]
    found = [outlook.watch(record) for record in records(config, losses)]
    assert all(one["predicted_loss"] == 3.5 for one in found)
    assert ["outside_band" in one for one in found] == [loss > 4 for loss in losses]
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2
    assert f"step 4: training loss 5.0000, predicted 3.0000 to 4.0000: outside its band for {PATIENCE}" in said[0]
    assert "step 6" in said[1]
    assert "back in its band" in said[1]


def test_a_resumed_run_goes_on_with_its_average(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config("train.steps=10")
    path = tmp_path / "metrics.jsonl"
    first, second = outlook_of(config, 3.0, 4.0), outlook_of(config, 3.0, 4.0)
    assert first.band is not None
    smooth = Band(first.band.fraction, first.band.loss, first.band.low, first.band.high, Smoothing("share", 0.3))
    first.band = second.band = smooth
    past = records(config, [4.5, 4.4, 3.9, 3.5])
    for record in past:
        first.watch(record)
    path.write_text("".join(json.dumps(record) + "\n" for record in past))
    second.replay(path)
    assert (second.total, second.weight, second.tokens) == (first.total, first.weight, first.tokens)


def test_the_verdict_is_of_the_loss_that_the_law_is_of(make_config: MakeConfig) -> None:
    config = make_config()
    outlook = outlook_of(config, 3.0, 4.0)
    assert outlook.verdict({"step": 1, "loss": 5.0}) is None
    inside, outside = (outlook.verdict({"valid_loss": loss}) for loss in (outlook.forecast.loss * 1.001, 9.0))
    assert inside is not None
    assert inside.endswith("-0.10%, inside")
    assert outside is not None
    assert outside.endswith("OUTSIDE")
