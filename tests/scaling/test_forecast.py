"""The final loss and the band of a run that hasn't started, from the curves of smaller runs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml

from megamup.config import Config, config_from
from megamup.errors import MegamupError
from megamup.flops import flops_per_token
from megamup.parameters import count
from megamup.scaling.analysis import Result, analyse
from megamup.scaling.curve_table import SMOOTHING
from megamup.scaling.curves import smoothed
from megamup.scaling.fit_file import load_result, save_result
from megamup.scaling.forecast import band, forecast, read_forecast
from megamup.scaling.laws.loss import power
from megamup.scaling.runs import load_runs, read_curve

STEPS, BATCH, NOISE = 400, 16 * 128, 0.02


def config_of(width: int, folder: Path, **schedule: object) -> Config:
    values = {
        "model": {"arch": "llama", "d_model": width, "n_layers": 2, "n_heads": width // 16, "vocab_size": 512},
        "data": {"train": "nowhere", "seq_len": 128},
        "batch": {"global_sequences": 16},
        "optim": {"lr": 0.01},
        "schedule": {"kind": "wsd", "warmup_steps": 20, "decay_fraction": 0.2} | schedule,
        "train": {"steps": STEPS, "log_every": 4},
        "run": {"dir": str(folder), "name": f"w{width}"},
    }
    values["model"]["max_seq_len"] = 128  # type: ignore[index]
    return config_from(values)


def loss_of(parameters: float, share: np.ndarray) -> np.ndarray:
    """A curve that falls to 2 + 20·N^-0.2 at its end."""
    return np.asarray((2 + 20 * parameters**-0.2) * (1 + 0.25 * (share**-0.3 - 1)))


def write_run(config: Config, seed: int) -> Path:
    """A finished run's folder, as the trainer writes it."""
    folder = config.run.folder
    folder.mkdir(parents=True)
    folder.joinpath("config.yaml").write_text(yaml.safe_dump(json.loads(config.model_dump_json())))
    environment = {"flops_convention": config.train.flops_convention, "parameters": dict(count(config.model))}
    folder.joinpath("environment.json").write_text(json.dumps(environment))
    steps = np.arange(4, STEPS + 1, 4)
    random = np.random.default_rng(seed)
    losses = loss_of(count(config.model)["non_embedding"], steps / STEPS) + NOISE * random.standard_normal(len(steps))
    per_token = flops_per_token(config.model, config.seq_len, config.train.flops_convention)
    records = [
        {
            "step": int(step),
            "tokens": int(step) * BATCH,
            "flops": step * BATCH * per_token,
            "loss": float(loss),
            "lr": 0.01,
        }
        for step, loss in zip(steps, losses, strict=True)
    ]
    records[-1]["valid_loss"] = (
        float(loss_of(count(config.model)["non_embedding"], np.ones(1))[0]) + 0.005 * seed % 0.01
    )
    folder.joinpath("metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


@pytest.fixture
def result(tmp_path: Path) -> Result:
    folders = [write_run(config_of(width, tmp_path), seed) for seed, width in enumerate((32, 48, 64, 80, 96, 112))]
    return analyse(load_runs(folders), [power("N")], objective="log")


def test_the_final_loss_is_the_laws_at_the_configs_own_size(result: Result, tmp_path: Path) -> None:
    config = config_of(256, tmp_path)
    found = forecast(result, config)
    own = count(config.model)["non_embedding"]
    assert found.inputs == {"N": float(own)}
    assert found.loss == pytest.approx(result.fit.at([own])[0])
    assert found.low is not None
    assert found.high is not None
    assert found.low < loss_of(own, np.ones(1))[0] < found.high
    assert found.measured == "valid_loss"
    assert "times the largest fitted run" in str(found)


def test_the_band_holds_a_larger_run_all_along(result: Result, tmp_path: Path) -> None:
    config = config_of(192, tmp_path)
    found = band(forecast(result, config), config)
    write_run(config, seed=7)
    curve = smoothed(read_curve(config.run.folder), SMOOTHING)
    inside = []
    for step, loss in zip(curve.step, curve.loss, strict=True):
        expected = found.at(step / STEPS)
        if expected is not None:
            inside.append(expected[1] <= loss <= expected[2])
    assert len(inside) > 80
    assert np.mean(inside) > 0.9
    # And not by being wide: a run that is 5% off is outside.
    middle, low, high = found.at(0.9) or (0.0, 0.0, 0.0)
    assert low > 0.95 * middle
    assert high < 1.05 * middle
    assert found.at(0.01) is None


def test_runs_that_say_little_leave_the_band_open_rather_than_end_the_run(tmp_path: Path) -> None:
    """Four runs, 0.3 nats of noise, least squares on the loss: the interval of one degree of freedom reaches 0."""
    folders = [write_run(config_of(width, tmp_path), seed) for seed, width in enumerate((32, 48, 64, 80))]
    result = analyse(load_runs(folders), [power("N")], objective="loss")
    assert result.curves is not None
    random = np.random.default_rng(1)
    noisy = tuple(tuple(loss + 0.3 * random.standard_normal() for loss in row or ()) for row in result.curves.losses)
    config = config_of(192, tmp_path)
    found = band(forecast(replace(result, curves=replace(result.curves, losses=noisy)), config), config)
    assert np.all(np.isfinite([found.low, found.loss, found.high]))
    assert found.low.min() < 1e-6
    assert np.all((found.low < found.loss) & (found.loss < found.high))


def test_the_band_travels_in_the_fit_file(result: Result, tmp_path: Path) -> None:
    path = tmp_path / "elsewhere" / "fit.json"
    save_result(result, path)
    for folder in tmp_path.glob("w*"):
        folder.rename(folder.with_name(f"gone-{folder.name}"))
    config = config_of(192, tmp_path)
    before, after = (band(forecast(one, config), config) for one in (result, load_result(path)))
    np.testing.assert_allclose(after.low, before.low, rtol=1e-9)
    np.testing.assert_allclose(after.high, before.high, rtol=1e-9)


def test_another_schedule_has_no_band(result: Result, tmp_path: Path) -> None:
    for changed in ({"kind": "cosine"}, {"decay_fraction": 0.5}):
        config = config_of(192, tmp_path, **changed)
        with pytest.raises(MegamupError, match="curves of one shape compare"):
            band(forecast(result, config), config)


def test_a_run_unlike_the_ladder_is_warned_of_and_has_no_band(result: Result, tmp_path: Path) -> None:
    long = config_of(192, tmp_path)
    long = long.model_copy(update={"train": long.train.model_copy(update={"steps": 10 * STEPS})})
    found = forecast(result, long)
    assert "the fitted runs' D would be" in found.warnings[0]
    with pytest.raises(MegamupError, match="the run is unlike the fitted ones"):
        band(found, long)


def test_flops_are_counted_as_the_points_were(tmp_path: Path) -> None:
    folders = [write_run(config_of(width, tmp_path), seed) for seed, width in enumerate((32, 48, 64, 80, 96))]
    result = analyse(load_runs(folders), [power("C")], objective="log")
    config = config_of(112, tmp_path)
    expected = flops_per_token(config.model, 128, config.train.flops_convention) * config.tokens
    assert forecast(result, config).inputs == {"C": pytest.approx(expected)}


def test_a_fit_of_no_loss_is_refused_under_the_options_name(result: Result, tmp_path: Path) -> None:
    with pytest.raises(MegamupError, match=r"--fit: .*none\.json is no file"):
        read_forecast(tmp_path / "none.json", config_of(64, tmp_path), "--fit")
    ladder = result.ladder
    counted = type(ladder)(ladder.points, {**ladder.convention, "parameters": "as in column n"})
    other = analyse(counted, [power("N")])
    with pytest.raises(MegamupError, match="N: the fit's points have it counted 'as in column n'"):
        forecast(other, config_of(64, tmp_path))
