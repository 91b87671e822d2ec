"""Studies with a ladder: what their files say, what is run in which order, and what is shown beforehand."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import yaml

from megamup.cli import load_program, programs
from megamup.config import dump_config
from megamup.data.writer import write_corpus
from megamup.errors import MegamupError
from megamup.flops import flops_per_token
from megamup.sweep import Study, Trial, complete, load_study, trials, write_results

ROOT = Path(__file__).resolve().parents[2]
MODEL = {"arch": "llama", "d_model": 32, "n_layers": 1, "n_heads": 2, "vocab_size": 64, "max_seq_len": 16}
LADDER = {"kind": "scale_N", "budget": 1e13, "sizes": 3, "span": 3}
RATES = {"optim.lr": [0.01, 0.02, 0.04]}


class FakeRun:
    """A run that is over at once, at 5e11 FLOP/s, and the better the nearer its rate is to 0.02; or one that fails."""

    def __init__(self, trial: Trial, fails: bool) -> None:
        self.config, self.folder, self.fails = trial.config, trial.folder, fails

    def __enter__(self) -> FakeRun:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def poll(self, timeout_s: float | None = 0.0) -> bool:
        if self.fails:
            raise MegamupError("no memory")
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "config.yaml").write_text(dump_config(self.config), encoding="utf-8")
        each = flops_per_token(self.config.model, self.config.seq_len, self.config.train.flops_convention)
        record = {"step": self.config.train.steps, "tokens": self.config.tokens, "loss": 3.0}
        record |= {"valid_loss": 3 + abs(self.config.optim.lr - 0.02), "tokens_per_s": 5e11 / each}
        (self.folder / "metrics.jsonl").write_text(json.dumps(record) + "\n", encoding="utf-8")
        return True


class Bench:
    """Writes a study below a folder and runs it with fakes; ``started`` are the runs' folders."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.path, self.started = folder, folder / "study.yaml", list[Path]()
        self.failing = ""
        config = {"model": MODEL, "data": {"train": "a", "valid": "b"}, "train": {"steps": 10}}
        self.config = folder / "config.yaml"
        self.config.write_text(yaml.safe_dump(config | {"run": {"dir": str(folder / "runs")}}), encoding="utf-8")

    def start(self, study: Study, trial: Trial) -> FakeRun:
        self.started.append(trial.folder.relative_to(self.folder / "runs" / "study"))
        return FakeRun(trial, trial.name == self.failing)

    def load(self, *overrides: str, budget: float | None = None, **keys: Any) -> tuple[Study, dict[str, Any]]:
        values = {"name": "study", "configs": [str(self.config)], "jobs": 1, "ladder": LADDER} | keys
        self.path.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
        return load_study(self.path, overrides, budget)

    def run(self, **keys: Any) -> list[Trial]:
        self.started.clear()
        planned, promoted = complete(*self.load(**keys))
        assert promoted == []
        return planned


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    bench = Bench(tmp_path)
    monkeypatch.setattr("megamup.sweep.run.start_trial", bench.start)
    monkeypatch.setattr("megamup.sweep.run.time.sleep", lambda _: None)
    return bench


def sweep(*arguments: str | Path) -> int:
    return cast(int, load_program(programs()["sweep"]).main([str(argument) for argument in arguments]))


def total_flops(planned: list[Trial]) -> float:
    configs = [trial.config for trial in planned]
    return sum(flops_per_token(c.model, c.seq_len, c.train.flops_convention) * c.tokens for c in configs)


def test_every_rung_is_run_at_every_point_of_the_grid_for_one_budget(bench: Bench) -> None:
    planned = bench.run(grid={"run.seed": [1, 2]})
    widths = [trial.config.model.d_model for trial in planned]
    assert [widths[0], *widths[::2]] == [widths[1], *widths[1::2]]
    assert [trial.config.run.seed for trial in planned] == [1, 2] * 3
    assert planned[0].name == f"d_model={widths[0]},steps={planned[0].config.train.steps},seed=1"
    assert bench.started == [Path(trial.name) for trial in planned]
    assert 0.95e13 < total_flops(planned) <= 1e13


def test_finished_runs_are_not_run_again_and_missing_ones_are(bench: Bench) -> None:
    planned = bench.run(tune=RATES)
    assert bench.run(tune=RATES) == planned
    assert bench.started == []
    (planned[1].folder / "metrics.jsonl").write_text('{"step": 3, "loss": 5.0}\n', encoding="utf-8")
    bench.run(tune=RATES)
    assert bench.started == [Path(planned[1].name)]


def test_a_study_that_failed_goes_on_where_it_stopped(bench: Bench) -> None:
    bench.failing = trials(*bench.load())[1].name
    with pytest.raises(MegamupError, match=f"trial {bench.failing}: no memory"):
        bench.run()
    first, failed = bench.started
    bench.failing = ""
    largest, _, smallest = bench.run()
    assert first == Path(largest.name)
    assert sorted(bench.started) == sorted([failed, Path(smallest.name)])


def test_the_ladder_takes_what_was_tuned_at_its_smallest_model(bench: Bench) -> None:
    planned = bench.run(tune=RATES, grid={"run.seed": [1, 2]})
    assert bench.started[:3] == [Path(f"tune/lr={lr}") for lr in RATES["optim.lr"]]
    assert {trial.config.optim.lr for trial in planned} == {0.02}
    tune = bench.folder / "runs" / "study" / "tune"
    assert yaml.safe_load((tune / "best.yaml").read_text("utf-8")) == {"optim": {"lr": 0.02}}
    tuned = yaml.safe_load((tune / "lr=0.02" / "config.yaml").read_text("utf-8"))
    smallest = planned[-2].config
    assert (tuned["model"]["d_model"], tuned["train"]["steps"]) == (smallest.model.d_model, smallest.train.steps)
    assert tuned["run"]["seed"] == 1


def test_tuning_is_paid_from_the_budget(bench: Bench) -> None:
    study, base = bench.load(tune={"optim.lr": [0.01 * i for i in range(1, 30)]})
    planned = trials(study, base)
    assert 0.95e13 < total_flops([*planned, *[planned[-1]] * 29]) <= 1e13


def test_a_ladder_has_results_and_no_best(bench: Bench) -> None:
    planned = bench.run()
    path = write_results(bench.load()[0], planned)
    assert path == bench.folder / "runs" / "study" / "results.json"
    assert len(json.loads(path.read_text("utf-8"))) == 3
    assert not path.with_name("best.yaml").exists()


def test_shares_are_of_the_corpus_that_the_config_names(bench: Bench) -> None:
    corpus = bench.folder / "corpus"
    write_corpus(str(corpus), [[1] * 3_000_000, [2] * 1_000_000], 64, eod_id=0)
    scale_d = {"kind": "scale_D", "budget": 2e12, "epochs": [1, 4], "tokens_per_parameter": 5}
    planned = trials(*bench.load(f"data.train={corpus}", ladder=scale_d))
    unique = [trial.config.data.fraction * 4_000_000 for trial in planned]
    epochs = [trial.config.tokens / share for trial, share in zip(planned, unique, strict=True)]
    assert epochs == pytest.approx([4, 1, 4, 1], rel=0.01)
    with pytest.raises(MegamupError, match=r"own fraction overrules data\.fraction, which scale_D sets"):
        trials(*bench.load(f"data.train=[{{prefix: {corpus}, fraction: 0.5}}]", ladder=scale_d))
    with pytest.raises(MegamupError, match="nowhere"):
        trials(*bench.load("data.train=nowhere", ladder=scale_d))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"ladder": LADDER | {"kind": "isofop"}}, r"study\.yaml: ladder=.*'isofop'.*'isoflop'"),
        ({"ladder": LADDER | {"budgte": 1}}, r"study\.yaml: ladder\.budgte: unknown key"),
        ({"ladder": LADDER | {"budget": -1}}, r"study\.yaml: ladder\.budget=-1: .*greater than 0"),
        ({"ladder": LADDER | {"sizes": 1}}, r"study\.yaml: ladder\.sizes=1: .*greater than or equal to 2"),
        ({"ladder": {"kind": "scale_N"}}, r"study\.yaml: ladder\.budget: missing"),
        ({"promote": {"top": 1}}, "ladder: goes with grid and tune alone"),
        ({"ladder": None, "grid": RATES, "tune": RATES}, "tune: is a ladder's first step"),
        ({"grid": {"train.steps": [1, 2]}}, r"train\.steps: the grid sets what the ladder does"),
        ({"tune": {"model.vocab_size": [64, 128]}}, r"model\.vocab_size: the grid sets what the ladder does"),
        ({"grid": {"batch.global_sequences": [1]}}, r"batch\.global_sequences: the grid sets what the ladder does"),
    ],
)
def test_a_wrong_ladder_is_one_message(bench: Bench, keys: dict[str, Any], message: str) -> None:
    with pytest.raises(MegamupError, match=message):
        complete(*bench.load(**keys))
    assert bench.started == []


def test_the_plan_shows_every_run_and_starts_none(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    study, base = bench.load(tune=RATES)
    planned = trials(study, base)
    assert sweep(bench.path, "--plan") == 0
    said = capsys.readouterr().out
    assert not (bench.folder / "runs").exists()
    lines = said.splitlines()
    assert [line.split()[0] for line in lines[1:7]] == [
        *(f"tune/lr={lr}" for lr in RATES["optim.lr"]),
        *(t.name for t in planned),
    ]
    shares = [float(line.split()[6].rstrip("%")) for line in lines[1:7]]
    assert sum(shares) == pytest.approx(100, abs=0.3)
    assert [float(line.split()[4]) for line in lines[4:7]] == pytest.approx(
        [total_flops([t]) for t in planned], rel=0.01
    )
    assert {line.split()[-1] for line in lines[1:7]} == {"-"}
    assert "no time: no trial is finished" in said


def test_the_plan_tells_time_from_finished_trials_or_from_what_is_given(
    bench: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    bench.run()
    assert sweep(bench.path, "--plan") == 0
    assert "0.333 minutes one after another at 5e+11 FLOP/s a trial (measured in 3 finished" in capsys.readouterr().out
    assert sweep(bench.path, "--plan", "--flops-per-s", "1e11") == 0
    assert "1.67 minutes one after another at 1e+11 FLOP/s a trial (as given)" in capsys.readouterr().out


def test_a_budget_on_the_command_line_replaces_the_files(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    bench.load()
    assert sweep(bench.path, "train.flops_convention=6N", "--budget", "1e15", "--plan") == 0
    assert "FLOPs (6N, without evaluations) of the budget of 1e+15" in capsys.readouterr().out
    assert sweep(bench.path, "--budget", "1e3") == 2
    assert "ladder.budget: 1e+03 FLOPs are too few; expected at least" in capsys.readouterr().err
    bench.load(ladder=None, grid=RATES)
    assert sweep(bench.path, "--budget", "1e15") == 2
    assert "has no ladder" in capsys.readouterr().err
    assert bench.started == []


def test_a_search_has_no_plan(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    bench.load(ladder=None, search={"trials": 2, "space": RATES})
    assert sweep(bench.path, "--plan") == 2
    assert "--plan: a search draws its trials as it goes" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "factor"),
    [
        *((name, 1) for name in ("width_ladder", "scale_N", "scale_D", "isoflop", "critical_batch")),
        *((name, 1e6) for name in ("width_ladder", "scale_N", "isoflop", "critical_batch")),
    ],
)
def test_the_shipped_ladders_use_their_budgets(name: str, factor: float, tmp_path: Path) -> None:
    corpus = tmp_path / "corpus"
    write_corpus(str(corpus), [[1] * 1_000_000], 1024, eod_id=0)
    path = ROOT / "configs" / "studies" / f"{name}.yaml"
    budget = factor * float(yaml.safe_load(path.read_text("utf-8"))["ladder"]["budget"])
    study, base = load_study(path, [f"data.train={corpus}"], budget)
    planned = trials(study, base)
    used = total_flops([*planned, *[planned[-1]] * len(study.tune.get("optim.lr", []))])
    assert 0.97 * budget < used <= budget
    assert study.ladder is not None
    if study.ladder.evaluations:  # a point of a curve stands for a run that ended there
        assert {trial.config.schedule.kind for trial in planned} == {"constant"}


def test_real_runs_count_the_flops_that_were_planned(
    bench: Bench, shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()  # no fakes
    model = MODEL | {"d_model": 8, "d_ff": 16, "vocab_size": 256, "max_seq_len": 64}
    config = {"model": model, "data": {"train": str(shards / "train"), "valid": str(shards / "valid")}}
    config |= {"batch": {"global_sequences": 2}, "train": {"steps": 1}, "run": {"dir": str(bench.folder / "runs")}}
    bench.config.write_text(yaml.safe_dump(config), encoding="utf-8")
    ladder = {"kind": "scale_N", "budget": 7e8, "sizes": 2, "span": 2, "tokens_per_parameter": 3, "evaluations": 4}
    planned = trials(*bench.load(ladder=ladder))
    assert sweep(bench.path) == 0
    last = [trial.records()[-1] for trial in planned]
    assert sum(record["flops"] for record in last) == pytest.approx(total_flops(planned))
    assert 0.95 * 7e8 < total_flops(planned) <= 7e8
    for trial in planned:
        assert 4 <= sum("valid_loss" in record for record in trial.records()) <= 5


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """``slurm(ARGUMENTS)``: launch/sweep.sbatch beside an sbatch that only writes down what it was given."""
    log = tmp_path / "sbatch.txt"
    fake = tmp_path / "sbatch"
    fake.write_text(f'#!/usr/bin/env bash\nprintf "%s\\n" "$@" > {log}\necho 17\n', encoding="utf-8")
    fake.chmod(0o755)

    def submit(*arguments: str, **environment: str) -> list[str]:
        command = [str(ROOT / "launch" / "sweep.sbatch"), *arguments]
        env = {"PATH": f"{tmp_path}:/usr/bin:/bin", **environment}
        done = subprocess.run(command, capture_output=True, text=True, env=env, check=True)
        assert "as job 17" in done.stdout
        return log.read_text("utf-8").splitlines()

    return submit


def test_slurm_starts_workers_that_share_the_study(slurm: Callable[..., list[str]]) -> None:
    given = slurm("study.yaml", "--budget", "1e21", WORKERS="3", SBATCH_OPTIONS="--gpus=8 --partition=a")
    assert "--array=0-2" in given
    assert {"--gpus=8", "--partition=a", "--requeue"} <= set(given)
    assert given[-4:] == [str(ROOT / "launch" / "sweep.sbatch"), "study.yaml", "--budget", "1e21"]
