"""A run beside its forecast: what it says, what it records, and that its losses don't change by a bit."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megamup.config import Config
from megamup.errors import MegamupError
from megamup.parameters import count
from megamup.scaling.analysis import Result, analyse
from megamup.scaling.curve_table import CurveTable, schedule_shape
from megamup.scaling.curves import Curve, Smoothing, smoothed
from megamup.scaling.fit_file import save_result
from megamup.scaling.forecast import Band, forecast
from megamup.scaling.laws import Law
from megamup.scaling.laws.batch import BATCH_LOSS
from megamup.scaling.laws.loss import power
from megamup.scaling.runs import Ladder, Point, Reading
from megamup.train.fork import run_ranks
from megamup.train.loop import train
from megamup.train.outlook import PATIENCE, Average, Outlook

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


def with_curves(result: Result, config: Config) -> Result:
    """As if each run's training loss had been half its final loss all along."""
    table = CurveTable(
        fractions=(0.05, 0.4, 1.0),
        smoothing="none",
        losses=tuple((point.loss / 2,) * 3 for point in result.ladder.points),
        noise=(0.0, 0.0, 0.0),
        token_noise=0.0,
        schedule=schedule_shape({f"schedule.{key}": value for key, value in config.schedule}),
        warmup=0.0,
    )
    return replace(result, curves=table)


def test_a_run_says_its_forecast_and_trains_as_without(
    make_config: MakeConfig, read_metrics: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "fit.json"
    short = ("train.steps=6", "train.log_every=1", "train.eval_sequences=8")
    config, with_forecast = make_config(*short), make_config(*short, "run.name=b", f"log.forecast={path}")
    save_result(with_curves(fit_around(config), config), path)
    run_ranks(train, 2, config)
    capfd.readouterr()
    run_ranks(train, 2, with_forecast)
    told = capfd.readouterr()
    assert told.out.count("\npredicted final valid_loss 5.0") == 1  # one rank says it
    assert "no band" not in told.out
    assert told.out.count("predicted final 5.0") == 6
    assert "\nmeasured final valid_loss" in told.out
    assert told.err.count(f"outside its band for {PATIENCE} logged steps") == 1
    found = read_metrics(with_forecast)
    assert [r["loss"] for r in found] == [r["loss"] for r in read_metrics(config)]
    later = [r for r in found if r["step"] > config.schedule.warmup_steps]
    assert [r["predicted_loss"] for r in later] == pytest.approx([2.5] * 4, rel=0.01)
    assert all(r["outside_band"] for r in later)


def test_a_fit_without_curves_has_no_band_and_says_so(make_config: MakeConfig) -> None:
    config = make_config()
    outlook = Outlook(config, forecast(fit_around(config), config))
    assert outlook.lines[0].startswith("predicted final valid_loss 5.0")
    assert "no band of the training loss: the fit file holds no training curves" in outlook.lines[1]
    assert outlook.watch({"step": 20, "tokens": 100.0, "loss": 9.0}) == {}


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
    for outlook in (first, second):
        outlook.average = Average(Smoothing("share", 0.3))
    past = records(config, [4.5, 4.4, 3.9, 3.5])
    for record in past:
        first.watch(record)
    path.write_text("".join(json.dumps(record) + "\n" for record in past))
    second.replay(path)
    assert vars(second.average) == vars(first.average)
    assert vars(second.final) == vars(first.final)
    assert first.average.value != past[-1]["loss"]


def test_the_verdict_is_of_the_loss_that_the_law_is_of(make_config: MakeConfig) -> None:
    config = make_config()
    outlook = outlook_of(config, 3.0, 4.0)
    assert outlook.verdict({"step": 1, "loss": 5.0}) is None
    inside, outside = (outlook.verdict({"valid_loss": loss}) for loss in (outlook.forecast.loss * 1.001, 9.0))
    assert inside is not None
    assert inside.endswith("-0.10%, inside")
    assert outside is not None
    assert outside.endswith("OUTSIDE")


def test_the_average_is_the_one_that_curves_are_smoothed_by() -> None:
    step, tokens, loss = np.arange(1.0, 41.0), np.cumsum(np.arange(1.0, 41.0)), np.cos(np.arange(40.0)) + 3
    smoothing = Smoothing("share", 0.1)
    average = Average(smoothing)
    found = [average.add(at, value) for at, value in zip(tokens, loss, strict=True)]
    np.testing.assert_allclose(found, smoothed(Curve(step, tokens, tokens, loss), smoothing).loss, rtol=1e-12)


def test_a_fit_to_training_losses_is_held_against_their_average(make_config: MakeConfig) -> None:
    config = make_config("train.steps=100")
    fit = fit_around(config)
    reading = Reading(loss="loss")
    convention = {**fit.ladder.convention, "loss": reading.loss_meaning("loss"), "reading": reading.as_text()}
    result = replace(fit, ladder=replace(fit.ladder, convention=convention))
    outlook = Outlook(config, forecast(result, config))
    mean = outlook.forecast.loss
    for record in records(config, [mean + 0.5 * (-1) ** step for step in range(1001)]):
        outlook.watch(record)
    told = outlook.verdict(record)
    assert told is not None
    assert "measured final loss" in told
    assert told.endswith("inside")  # the last batch alone lies half a nat off
