"""Studies: the grid, what is run again, and which trial is best. Trials are fakes that write their files at once."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from megamup.config import dump_config, load_config
from megamup.errors import MegamupError
from megamup.sweep import Study, Trial, load_study, run_study, table_lines, trials, write_results
from megamup.train.loop import DivergedError

MODEL = {"arch": "llama", "d_model": 32, "n_layers": 2, "n_heads": 2, "vocab_size": 64, "max_seq_len": 16}
Losses = Callable[[Trial], float | None]


class FakeRun:
    """A run that ends at its second poll: valid_loss as given, or diverged where that is None."""

    def __init__(self, trial: Trial, loss: float | None) -> None:
        self.trial, self.loss, self.polls = trial, loss, 0

    def __enter__(self) -> FakeRun:
        self.trial.folder.mkdir(parents=True, exist_ok=True)
        (self.trial.folder / "diverged.json").unlink(missing_ok=True)
        (self.trial.folder / "config.yaml").write_text(dump_config(self.trial.config), encoding="utf-8")
        (self.trial.folder / "metrics.jsonl").write_text(json.dumps({"step": 1, "loss": 9.0}) + "\n", encoding="utf-8")
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def poll(self, timeout_s: float | None = 0.0) -> bool:
        self.polls += 1
        if self.polls == 1:
            return False
        if self.loss is None:
            raise DivergedError("loss is nan")
        record = {"step": self.trial.config.train.steps, "loss": 8.0, "valid_loss": self.loss}
        with open(self.trial.folder / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        return True


class Bench:
    """Writes studies below a folder and runs them with fakes; ``started`` names the trials that were run."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.started = folder, list[str]()
        self.losses: Losses = lambda trial: abs(trial.config.optim.lr - 0.02)
        monkeypatch.setattr("megamup.sweep.run.start_trial", self.start)
        monkeypatch.setattr("megamup.sweep.run.time.sleep", lambda _: None)
        self.config = folder / "config.yaml"
        values = {"model": MODEL, "data": {"train": "a", "valid": "b"}, "train": {"steps": 10}}
        self.config.write_text(yaml.safe_dump(values | {"run": {"dir": str(folder / "runs")}}), encoding="utf-8")

    def start(self, study: Study, trial: Trial) -> FakeRun:
        self.started.append(trial.name)
        return FakeRun(trial, self.losses(trial))

    def plan(self, grid: dict[str, Any], *overrides: str, **keys: Any) -> tuple[Study, list[Trial]]:
        path = self.folder / "study.yaml"
        values = {"name": "study", "configs": [str(self.config)], "grid": grid, "jobs": 2}
        path.write_text(yaml.safe_dump(values | keys, sort_keys=False), encoding="utf-8")
        study, base = load_study(path, overrides)
        return study, trials(study, base)

    def run(self, grid: dict[str, Any], *overrides: str, **keys: Any) -> tuple[Study, list[Trial]]:
        study, planned = self.plan(grid, *overrides, **keys)
        run_study(study, planned)
        return study, planned


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    return Bench(tmp_path, monkeypatch)


def test_the_grid_is_in_the_order_of_the_file(bench: Bench) -> None:
    study, planned = bench.plan({"optim.lr": [0.1, 0.01], "model.d_model": [64, 32]}, "train.steps=7")
    assert [trial.name for trial in planned] == [f"lr={lr},d_model={d}" for lr in (0.1, 0.01) for d in (64, 32)]
    last = planned[2].config
    assert (last.optim.lr, last.model.d_model, last.train.steps) == (0.01, 64, 7)
    assert {trial.folder.parent for trial in planned} == {bench.folder / "runs" / study.name}
    assert len({trial.folder for trial in planned}) == 4


def test_a_grouped_axis_sets_its_keys_together(bench: Bench) -> None:
    shapes = [{"model.d_model": 64, "model.n_heads": 4}, {"model.d_model": 32, "model.n_heads": 2}]
    _, planned = bench.plan({"shape": shapes, "run.seed": [1, 2]})
    found = [(t.config.model.d_model, t.config.model.n_heads, t.config.run.seed) for t in planned]
    assert found == [(64, 4, 1), (64, 4, 2), (32, 2, 1), (32, 2, 2)]
    assert planned[0].overrides == {"model.d_model": 64, "model.n_heads": 4, "run.seed": 1}
    assert planned[0].name.startswith("d_model=64,")


def test_points_with_the_same_first_key_have_folders_of_their_own(bench: Bench) -> None:
    shapes = [{"model.d_model": 32, "model.n_layers": 2}, {"model.d_model": 32, "model.n_layers": 4}]
    _, planned = bench.plan({"shape": shapes})
    assert len({trial.folder for trial in planned}) == 2


def test_a_value_with_a_slash_stays_one_folder(bench: Bench) -> None:
    study, planned = bench.run({"deepspeed": ["ds_configs/zero0.json", "ds_configs/zero1.json"]})
    assert write_results(study, planned) == bench.folder / "runs" / "study" / "best.yaml"


def test_best_is_ready_to_be_merged(bench: Bench) -> None:
    study, planned = bench.run({"optim.lr": [0.1, 2e-05, 0.02], "optim.betas": [[0.9, 0.99]]})
    assert bench.started == [trial.name for trial in planned]
    path = write_results(study, planned)
    assert path == bench.folder / "runs" / "study" / "best.yaml"
    best = load_config([bench.config, path])
    assert (best.optim.lr, best.optim.betas) == (0.02, (0.9, 0.99))
    results = json.loads(path.with_name("results.json").read_text(encoding="utf-8"))
    assert [result["optim.lr"] for result in results] == [0.02, 2e-05, 0.1]
    assert results[0]["valid_loss"] == 0
    lines = list(table_lines(study, planned))
    assert lines[1].startswith("lr=0.02,")
    assert lines[1].endswith("<- best")
    assert sum("<- best" in line for line in lines) == 1


def test_small_numbers_survive_best_yaml(bench: Bench) -> None:
    bench.losses = lambda trial: trial.config.optim.lr
    path = write_results(*bench.run({"optim.lr": [1e-05, 0.1]}))
    assert load_config([bench.config, path]).optim.lr == 1e-05


def test_finished_trials_are_not_run_again(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    bench.run({"optim.lr": [0.1, 0.2]})
    bench.run({"optim.lr": [0.1, 0.2, 0.3]})
    assert bench.started == ["lr=0.1", "lr=0.2", "lr=0.3"]
    assert "2 of 3 trials were finished before" in capsys.readouterr().out


def test_an_interrupted_or_changed_trial_is_run_again(bench: Bench) -> None:
    _, planned = bench.run({"optim.lr": [0.1, 0.2]})
    (planned[1].folder / "metrics.jsonl").write_text('{"step": 3, "loss": 5.0}\n{"step": 4, "lo', encoding="utf-8")
    bench.run({"optim.lr": [0.1, 0.2]})
    assert bench.started[2:] == ["lr=0.2"]
    bench.run({"optim.lr": [0.1, 0.2]}, "optim.eps=1e-6")
    assert bench.started[3:] == ["lr=0.1", "lr=0.2"]


def test_a_diverged_trial_is_last_and_a_result(bench: Bench) -> None:
    bench.losses = lambda trial: None if trial.config.optim.lr > 0.5 else 1.0
    study, planned = bench.run({"optim.lr": [0.9, 0.1]})
    path = write_results(study, planned)
    results = json.loads(path.with_name("results.json").read_text(encoding="utf-8"))
    assert [(result["trial"], result["valid_loss"]) for result in results] == [("lr=0.1", 1.0), ("lr=0.9", None)]
    assert "nan" in (planned[0].folder / "diverged.json").read_text(encoding="utf-8")
    bench.run({"optim.lr": [0.9, 0.1]})
    assert len(bench.started) == 2


def test_all_diverged_is_an_error(bench: Bench) -> None:
    bench.losses = lambda trial: None
    study, planned = bench.run({"optim.lr": [0.9, 0.8]})
    with pytest.raises(MegamupError, match=r"study: every trial diverged; lower optim\.lr"):
        write_results(study, planned)


def test_a_nan_is_never_the_best(bench: Bench) -> None:
    bench.losses = lambda trial: float("nan") if trial.config.optim.lr > 0.5 else trial.config.optim.lr
    path = write_results(*bench.run({"optim.lr": [0.3, 0.9, 0.1]}))
    assert load_config([bench.config, path]).optim.lr == 0.1


def test_an_unknown_metric_names_those_known(bench: Bench) -> None:
    """After the first trial, not after all."""
    with pytest.raises(MegamupError, match=r"metric=valid_los: .* has loss, step, valid_loss"):
        bench.run({"optim.lr": [0.1, 0.2]}, metric="valid_los", jobs=1)
    assert bench.started == ["lr=0.1"]


def test_an_invalid_point_is_refused_before_any_is_run(bench: Bench) -> None:
    with pytest.raises(MegamupError, match=r"trial lr=-1: optim\.lr=-1: .*greater than 0"):
        bench.run({"optim.lr": [0.1, -1]})
    with pytest.raises(MegamupError, match=r"trial rl=0\.1: optim\.rl: unknown key; did you mean optim\.lr\?"):
        bench.run({"optim.rl": [0.1]})
    assert bench.started == []


def test_a_wrong_study_key_is_named(bench: Bench) -> None:
    with pytest.raises(MegamupError, match=r"study\.yaml: girds: unknown key"):
        bench.plan({"optim.lr": [0.1]}, girds={})
    with pytest.raises(MegamupError, match=r"study\.yaml: ranks=0: .*greater than 0"):
        bench.plan({"optim.lr": [0.1]}, ranks=0)
    with pytest.raises(MegamupError, match=r"study\.yaml: grid"):
        bench.plan({})


def test_another_failure_ends_the_study(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: FakeRun, timeout_s: float | None = 0.0) -> bool:
        raise RuntimeError("no memory")

    monkeypatch.setattr(FakeRun, "poll", fail)
    with pytest.raises(MegamupError, match=r"(?s)trial lr=0\.1: no memory\nsee .*log\.txt"):
        bench.run({"optim.lr": [0.1, 0.2]}, jobs=1)
    assert bench.started == ["lr=0.1"]


def test_overrides_hold_in_every_trial_and_stay_out_of_the_finding(bench: Bench) -> None:
    """A search at the base width must not make the target as small as the base when its best.yaml is merged."""
    study, planned = bench.run({"optim.lr": [0.01, 0.02]}, overrides={"model.d_model": 16, "model.n_heads": 1})
    assert {trial.config.model.d_model for trial in planned} == {16}
    assert yaml.safe_load(write_results(study, planned).read_text(encoding="utf-8")) == {"optim": {"lr": 0.02}}
