"""A study read as a transfer experiment: what its trials say, and what tools/sweep.py draws of it. Trials are fakes."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from megamup.cli import load_program
from megamup.config import Config, dump_config
from megamup.errors import MegamupError
from megamup.experiments.curves import number_of, transfer_of, value_of
from megamup.sweep import Study, Trial, load_study, trials
from megamup.sweep.study import Curves
from megamup.train.loop import DivergedError

ROOT = Path(__file__).resolve().parents[2]
MakeConfig = Callable[..., Config]
CURVES = Curves(size="model.d_model", group="mup.parametrization")
GRID = {
    "width": [{"model.d_model": 32, "model.n_heads": 2}, {"model.d_model": 64, "model.n_heads": 4}],
    "mup.parametrization": ["mup", "sp"],
    "optim.lr": [2.0**-8, 2.0**-7, 2.0**-6, 2.0**-5, 2.0**-4],
}


def loss_of(config: Config) -> float | None:
    """A parabola that turns at 2^-6 under mup; under sp a doubling lower at width 64, where the largest diverges."""
    wide_sp = config.mup.parametrization == "sp" and config.model.d_model == 64
    power = math.log2(config.optim.lr)
    return None if wide_sp and power > -5 else 3 + 0.1 * (power + (7 if wide_sp else 6)) ** 2


class FakeRun:
    """A run that is over at once: valid_loss as `loss_of` has it, or diverged."""

    def __init__(self, study: Study, trial: Trial) -> None:
        self.trial = trial

    def __enter__(self) -> FakeRun:
        self.trial.folder.mkdir(parents=True, exist_ok=True)
        (self.trial.folder / "config.yaml").write_text(dump_config(self.trial.config), encoding="utf-8")
        record = {"step": self.trial.config.train.steps, "loss": 8.0, "valid_loss": loss_of(self.trial.config)}
        (self.trial.folder / "metrics.jsonl").write_text(json.dumps(record) + "\n", encoding="utf-8")
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def poll(self, timeout_s: float | None = 0.0) -> bool:
        if loss_of(self.trial.config) is None:
            raise DivergedError("loss is nan")
        return True


@pytest.fixture
def write_study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """``write_study(grid, **keys)``: a study's file; its trials are `FakeRun`s."""
    monkeypatch.setattr("megamup.sweep.run.start_trial", FakeRun)
    model = {"arch": "llama", "d_model": 32, "n_layers": 2, "n_heads": 2, "vocab_size": 64, "max_seq_len": 16}
    run = {"model": model, "data": {"train": "a", "valid": "b"}, "train": {"steps": 10}}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run | {"run": {"dir": str(tmp_path)}}), encoding="utf-8")

    def write(grid: dict[str, Any], **keys: Any) -> Path:
        values = {"name": "study", "configs": [str(tmp_path / "run.yaml")], "grid": grid}
        (tmp_path / "study.yaml").write_text(yaml.safe_dump(values | keys, sort_keys=False), encoding="utf-8")
        return tmp_path / "study.yaml"

    return write


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    return load_program(ROOT / "tools" / "sweep.py")


def finished(path: Path, tool: ModuleType) -> list[Trial]:
    assert tool.main([str(path)]) == 0
    return trials(*load_study(path))


# --------------------------------------------------------------------------- reading


def test_trials_are_read_by_the_keys_that_the_study_names(write_study: Callable[..., Path], tool: ModuleType) -> None:
    found = transfer_of(CURVES, finished(write_study(GRID), tool), "valid_loss")
    assert found.axis == "d_model"
    mup, sp = found.groups
    assert (mup.name, [curve.size for curve in mup.curves]) == ("mup", [32, 64])
    assert (sp.name, [curve.size for curve in sp.curves]) == ("sp", [32, 64])
    assert (mup.shift, sp.shift) == pytest.approx((0, -1), abs=1e-9)
    assert [point.rate for point in sp.curves[1].points] == GRID["optim.lr"]
    assert [point.diverged for point in sp.curves[1].points] == [0, 0, 0, 0, 1]


def test_seeds_of_a_point_are_averaged_and_the_rate_may_be_any_key(
    write_study: Callable[..., Path], tool: ModuleType
) -> None:
    """Here the size is what a property computes, and the rate is that of the embedding alone."""
    grid = {"batch.global_sequences": [8, 16], "mup.eta.embedding": [0.5, 1, 2], "run.seed": [1, 2]}
    curves = Curves(size="batch_tokens", group="model.arch", rate="mup.eta.embedding", axis="batch")
    found = transfer_of(curves, finished(write_study(grid), tool), "valid_loss")
    assert found.axis == "batch"
    (group,) = found.groups
    assert (group.name, [curve.size for curve in group.curves]) == ("llama", [128, 256])
    assert [(point.rate, point.seeds) for point in group.curves[0].points] == [(0.5, 2), (1, 2), (2, 2)]


def test_a_key_that_no_run_has_is_named(make_config: MakeConfig) -> None:
    config = make_config()
    assert value_of(config, "model.arch") == "llama"
    assert number_of(config, "tokens") == config.tokens == 20 * 8 * 64
    for key in ("model.width", "modle.d_model", "optim.lr.peak"):
        with pytest.raises(MegamupError, match=rf"curves: {key}: no key of a run's config, such as model\.d_model"):
            value_of(config, key)


@pytest.mark.parametrize(("key", "value"), [("model.arch", "'llama'"), ("model.bias", "False"), ("model", "Model")])
def test_a_size_that_is_no_number_is_refused(make_config: MakeConfig, key: str, value: str) -> None:
    with pytest.raises(MegamupError, match=rf"curves: {key}={value}.*: expected a number"):
        number_of(make_config(), key)


# --------------------------------------------------------------------------- tools/sweep.py


def test_the_sweep_draws_the_curves_that_its_study_asks_for(
    write_study: Callable[..., Path], tool: ModuleType, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    finished(write_study(GRID, curves=CURVES.model_dump()), tool)
    folder = tmp_path / "study"
    values = json.loads((folder / "curves.json").read_text(encoding="utf-8"))
    assert (values["axis"], [group["name"] for group in values["groups"]]) == ("d_model", ["mup", "sp"])
    assert values["groups"][1]["curves"][1]["points"][-1]["loss"] == "diverged"
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG\r\n")
    page = (folder / "curves.html").read_text(encoding="utf-8")
    printed = capsys.readouterr().out
    for text in ("mup: the optimum moves by 0.00 doublings", "sp: the optimum moves by -1.00 doublings"):
        assert text in page
        assert text in printed
    assert printed.endswith(f"written: {folder}/curves.json, .png and .html\n")


def test_without_curves_none_are_drawn(write_study: Callable[..., Path], tool: ModuleType, tmp_path: Path) -> None:
    finished(write_study(GRID), tool)
    assert (tmp_path / "study" / "best.yaml").is_file()
    assert not list((tmp_path / "study").glob("curves.*"))


def test_a_wrong_key_of_curves_ends_the_sweep_with_its_message(
    write_study: Callable[..., Path], tool: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_study(GRID, curves={"size": "model.arch", "group": "mup.parametrization"})
    assert tool.main([str(path)]) == 2
    assert "error: curves: model.arch='llama': expected a number" in capsys.readouterr().err
