"""Searches: what is drawn, what workers share, what is stopped, passed over and promoted. Trials are fakes, but one."""

from __future__ import annotations

import json
import os
import random
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml

from megamup.config import Config, dump_config, load_config
from megamup.errors import MegamupError
from megamup.sweep import Study, Trial, complete, load_study, table_lines, trials, write_results
from megamup.sweep.processes import Launched
from megamup.sweep.stability import diverging, spike_score
from megamup.sweep.study import Prune
from megamup.train.loop import DivergedError

MODEL = {"arch": "llama", "d_model": 32, "n_layers": 2, "n_heads": 2, "vocab_size": 64, "max_seq_len": 16}
MakeConfig = Callable[..., Config]
RATE: dict[str, Any] = {"optim.lr": {"low": 1e-3, "high": 1e-1, "log": True}}


def smooth(trial: Trial) -> list[float]:
    """40 losses that fall to 1 + (log10(lr) + 2)²: best at lr = 0.01."""
    from math import log10

    last = 1 + (log10(trial.config.optim.lr) + 2) ** 2
    return [last + 2 * (1 - step / 40) for step in range(1, 41)]


class FakeRun:
    """A run that writes ``per_poll`` of its losses at each poll; the last is its valid_loss too."""

    def __init__(self, trial: Trial, losses: list[float], per_poll: int) -> None:
        self.trial, self.losses, self.per_poll, self.step, self.closed = trial, losses, per_poll, 0, False
        trial.folder.mkdir(parents=True, exist_ok=True)
        (trial.folder / "diverged.json").unlink(missing_ok=True)
        (trial.folder / "config.yaml").write_text(dump_config(trial.config), encoding="utf-8")
        (trial.folder / "metrics.jsonl").write_text("", encoding="utf-8")
        with open(trial.folder / "started.txt", "a", encoding="utf-8") as file:
            file.write(f"{os.getpid()}\n")

    def __enter__(self) -> FakeRun:
        return self

    def __exit__(self, *_: object) -> None:
        self.closed = True

    def poll(self, timeout_s: float | None = 0.0) -> bool:
        with open(self.trial.folder / "metrics.jsonl", "a", encoding="utf-8") as file:
            for loss in self.losses[self.step : self.step + self.per_poll]:
                self.step += 1
                record = {"step": self.step, "loss": loss, "grad_norm": 1.0}
                file.write(json.dumps(record | ({"valid_loss": loss} if self.step == len(self.losses) else {})) + "\n")
        return self.step == len(self.losses)


class Bench:
    """Writes studies below a folder and runs them with fakes; ``runs`` are those that were started."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.runs = folder, list[FakeRun]()
        self.losses: Callable[[Trial], list[float]] = smooth
        self.per_poll = 40
        self.config, self.path = folder / "config.yaml", folder / "study.yaml"
        values = {"model": MODEL, "data": {"train": "a", "valid": "b"}, "train": {"steps": 40, "log_every": 1}}
        self.config.write_text(yaml.safe_dump(values | {"run": {"dir": str(folder / "runs")}}), encoding="utf-8")

    @property
    def out(self) -> Path:
        return self.folder / "runs" / "study"

    @property
    def started(self) -> list[str]:
        return [run.trial.name for run in self.runs]

    def start(self, study: Study, trial: Trial) -> FakeRun:
        self.runs.append(FakeRun(trial, self.losses(trial), self.per_poll))
        return self.runs[-1]

    def write(self, **keys: Any) -> Path:
        values = {"name": "study", "configs": [str(self.config)], "jobs": 1, **keys}
        self.path.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
        return self.path

    def run(self, *overrides: str, **keys: Any) -> tuple[Study, list[Trial], list[Trial]]:
        study, base = load_study(self.write(**keys), overrides)
        return study, *complete(study, base)

    def search(self, trials: int, sampler: str = "random", space: Any = RATE, **keys: Any) -> list[Trial]:
        search = {"sampler": sampler, "trials": trials, "space": space, "seed": keys.pop("seed", 0)}
        return self.run(search=search, **keys)[1]


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    bench = Bench(tmp_path)
    monkeypatch.setattr("megamup.sweep.run.start_trial", bench.start)
    monkeypatch.setattr("megamup.sweep.run.time.sleep", lambda _: None)
    return bench


# --------------------------------------------------------------------------- what is drawn


@pytest.mark.parametrize("sampler", ["random", "qmc", "tpe", "gp"])
def test_draws_lie_in_the_space_and_runs_have_what_their_names_say(bench: Bench, sampler: str) -> None:
    space = RATE | {
        "mup.alpha.embedding": {"low": 1, "high": 20},
        "schedule.warmup_steps": {"low": 1, "high": 9},
        "batch.global_sequences": [8, 16, 32],
        "shape": [{"model.d_model": 64, "model.n_heads": 4}, {"model.d_model": 32, "model.n_heads": 2}],
    }
    found = bench.search(13, sampler, space)
    assert len({trial.name for trial in found}) == len(bench.runs) == 13
    assert {trial.config.model.d_model // trial.config.model.n_heads for trial in found} == {16}
    assert {trial.config.batch.global_sequences for trial in found} <= {8, 16, 32}
    assert len({trial.config.schedule.warmup_steps for trial in found} - set(range(1, 10))) == 0
    for trial in found:
        lr, alpha = trial.config.optim.lr, trial.config.mup.alpha.embedding
        assert 1e-3 <= lr <= 1e-1
        assert 1 <= alpha <= 20
        assert trial.name.startswith(f"lr={lr},embedding={alpha},")
        assert len(trial.name) < 90


def test_a_random_search_is_the_same_set_on_any_number_of_workers(bench: Bench) -> None:
    first = {trial.name for trial in bench.search(6)}
    assert {trial.name for trial in bench.search(6, jobs=3, name="again")} == first
    assert {trial.name for trial in bench.search(6, seed=1, name="other")}.isdisjoint(first)
    assert {trial.name for trial in bench.search(8)} > first  # two more
    assert len(bench.runs) == 6 + 6 + 6 + 2


def test_a_narrow_range_keeps_its_resolution(bench: Bench) -> None:
    found = bench.search(8, "qmc", {"model.rope_theta": {"low": 9999, "high": 10001}})
    assert len({trial.name for trial in found}) == 8


def test_tpe_finds_a_minimum_better_than_random(bench: Bench) -> None:
    """Two dimensions, 24 trials, three seeds: the median distance from the optimum is less than half."""
    from math import log10

    def distance(trial: Trial) -> float:
        return (log10(trial.config.optim.lr) + 1.7) ** 2 + ((trial.config.mup.alpha.embedding - 14) / 10) ** 2

    bench.losses = lambda trial: [2.0 + distance(trial)]
    space = RATE | {"mup.alpha.embedding": {"low": 1, "high": 20}}
    best: dict[str, list[float]] = {}
    for sampler in ("tpe", "random"):
        for seed in range(3):
            found = bench.search(24, sampler, space, seed=seed, name=f"{sampler}{seed}", configs=[str(one_step(bench))])
            best.setdefault(sampler, []).append(min(distance(trial) for trial in found))
    assert statistics.median(best["tpe"]) < statistics.median(best["random"]) / 2


def one_step(bench: Bench) -> Path:
    """The bench's config with runs of one step."""
    path = bench.folder / "one.yaml"
    values = yaml.safe_load(bench.config.read_text(encoding="utf-8")) | {"train": {"steps": 1}}
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path


def test_a_value_drawn_twice_is_run_once(bench: Bench) -> None:
    found = bench.search(12, "random", {"batch.global_sequences": [8, 16]}, jobs=4)
    assert sorted(bench.started) == ["global_sequences=16", "global_sequences=8"]
    assert sorted(trial.name for trial in found) == sorted(bench.started)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"sampler": "tbe"}, r"study\.yaml: search\.sampler: 'tbe' is no sampler \(.*\); did you mean tpe\?"),
        ({"space": {"optim.lr": {"low": 2, "high": 1}}}, r"study\.yaml: search\.space\.optim\.lr: low=2 is not below"),
        (
            {"space": {"optim.lr": {"low": 0, "high": 1, "log": True}}},
            r"search\.space\.optim\.lr: low=0 has no logarithm",
        ),
        ({"space": {"optim.lrr": {"low": 1, "high": 2}}}, r"optim\.lrr: unknown key; did you mean optim\.lr\?"),
        ({"space": {"optim.lr": []}}, r"search\.space\.optim\.lr"),
        ({"space": {"optim.lr": {"low": -1, "high": 2}}}, r"optim\.lr=-1\.0: .*greater than 0"),
        ({"space": {"model.n_layers": {"low": 1.5, "high": 2}}}, r"model\.n_layers=1\.5"),
        ({"trials": 0}, r"search\.trials=0"),
    ],
)
def test_a_wrong_search_is_refused_before_any_trial(bench: Bench, keys: dict[str, Any], message: str) -> None:
    with pytest.raises(MegamupError, match=message):
        bench.run(search={"sampler": "random", "trials": 2, "space": RATE} | keys)
    assert bench.runs == []


def test_grid_or_search_and_only_one(bench: Bench) -> None:
    with pytest.raises(MegamupError, match=r"grid, search: found both; give `grid`"):
        bench.run(grid={"optim.lr": [1]}, search={"trials": 2, "space": RATE})
    with pytest.raises(MegamupError, match="grid, search: found neither"):
        bench.run()


# --------------------------------------------------------------------------- what workers share

WORKER = """
import sys, time
from pathlib import Path
import test_search as t
from megamup.sweep import run, load_study, complete, write_results
bench = t.Bench(Path(sys.argv[1]))
bench.per_poll = int(sys.argv[2])
run.start_trial = bench.start
study, base = load_study(bench.path)
print("ready", flush=True)
sys.stdin.readline()
planned, promoted = complete(study, base)
write_results(study, planned, promoted)
print(len(bench.runs))
"""


def worker(bench: Bench, per_poll: int) -> subprocess.Popen[str]:
    """A process that runs the bench's study with fakes once it is told to; one poll is at least 0.1 s."""
    root = str(Path(__file__).parents[1])
    command = [sys.executable, "-c", WORKER, str(bench.folder), str(per_poll)]
    environment = os.environ | {"PYTHONPATH": f"{root}:{root}/tests"}
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, cwd=root, env=environment)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def go(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("go\n")
    process.stdin.flush()


def starts(bench: Bench) -> dict[str, int]:
    """{trial: how often it was started}."""
    return {path.parent.name: len(path.read_text().splitlines()) for path in bench.out.glob("*/started.txt")}


@pytest.mark.parametrize("kind", ["grid", "search"])
def test_two_processes_share_the_trials_and_none_runs_twice(bench: Bench, kind: str) -> None:
    grid = {"optim.lr": [round(0.01 + step / 1000, 3) for step in range(8)]}
    bench.write(**({"grid": grid} if kind == "grid" else {"search": {"trials": 8, "space": RATE}}))
    both = [worker(bench, per_poll=14) for _ in range(2)]
    for process in both:
        go(process)
    said = [process.communicate(timeout=60) for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    counts = [int(out.splitlines()[-1]) for out, _ in said]
    assert sum(counts) == 8
    assert min(counts) > 0
    assert starts(bench) == dict.fromkeys(starts(bench), 1)
    assert len(json.loads((bench.out / "results.json").read_text(encoding="utf-8"))) == 8


def kill_when_started(bench: Bench, process: subprocess.Popen[str], trials: int) -> None:
    go(process)
    until = time.monotonic() + 30
    while sum(starts(bench).values()) < trials and time.monotonic() < until:
        os.sched_yield()
    assert process.poll() is None, process.communicate()
    process.send_signal(signal.SIGKILL)
    process.communicate()


def test_a_killed_worker_s_trial_is_taken_over_with_its_values(bench: Bench) -> None:
    bench.write(search={"trials": 3, "space": RATE})
    kill_when_started(bench, worker(bench, per_poll=1), 1)
    (before,) = starts(bench)
    found = bench.search(3, "tpe")
    assert before in [trial.name for trial in found]
    assert starts(bench) == {trial.name: 1 + (trial.name == before) for trial in found}


def test_a_silent_worker_s_trial_is_taken_over_when_its_lease_has_run_out(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.write(grid={"optim.lr": [0.01]})
    kill_when_started(bench, worker(bench, per_poll=1), 1)
    monkeypatch.setattr("megamup.sweep.journal.host", lambda: "another host, where that pid says nothing")
    begun = time.monotonic()
    bench.run(grid={"optim.lr": [0.01]}, lease_s=1.5)
    assert 1.5 < time.monotonic() - begun < 60  # of 120 by default
    assert starts(bench) == {"lr=0.01": 2}


def test_finished_trials_are_read_without_the_journal(bench: Bench) -> None:
    first = bench.search(4, "tpe")
    (bench.out / "study.journal").unlink()
    again = bench.search(5, "tpe")
    assert [trial.name for trial in again[:4]] == [trial.name for trial in first]
    assert len(bench.runs) == 5


def test_another_config_is_another_search(bench: Bench) -> None:
    bench.search(3, "random")
    bench.run("optim.eps=1e-6", search={"sampler": "random", "trials": 3, "space": RATE})
    assert bench.started[3:] == bench.started[:3]  # the same draws, and no result of the first config was taken


def test_a_torn_line_doesn_t_lose_the_study(bench: Bench) -> None:
    bench.search(3)
    journal = bench.out / "study.journal"
    with open(journal, "ab") as file:
        file.write(journal.read_bytes().splitlines()[-1][:25])
    assert len(bench.search(4)) == 4
    assert len(bench.runs) == 4
    assert all(isinstance(json.loads(line), dict) for line in journal.read_text(encoding="utf-8").splitlines())


def test_a_journal_damaged_in_the_middle_says_what_to_do(bench: Bench) -> None:
    bench.search(2)
    journal = bench.out / "study.journal"
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join([*lines[:2], b'{"op_co\n', *lines[2:]]))
    with pytest.raises(MegamupError, match=r"study\.journal: damaged .*remove this file and start the study again"):
        bench.search(3)
    journal.unlink()
    assert len(bench.search(3)) == 3
    assert len(bench.runs) == 3


def test_a_launched_trial_tells_how_it_ended(bench: Bench) -> None:
    (trial,) = trials(*load_study(bench.write(grid={"optim.lr": [0.1]})))
    trial.folder.mkdir(parents=True)

    def launched(script: str) -> bool:
        with Launched(f"sh -c '{script}'", trial, trial.folder / "log.txt") as run:
            return run.poll(20)

    with pytest.raises(DivergedError, match=r"see log\.txt"):
        launched("echo error: the loss diverged at step 3; exit 2")
    with pytest.raises(MegamupError, match="exited with 3"):  # though the log still has the words of the run before
        launched("exit 3")
    assert launched("exit 0")


def test_a_launched_command_ends_with_its_worker(tmp_path: Path) -> None:
    """The guard's parent is killed; the command, in a session of its own, ends too."""
    from megamup.sweep import guard

    pid = tmp_path / "pid"
    code = (
        "import os, subprocess, sys, time\n"
        "shell = 'echo $$ > {0}.new; mv {0}.new {0}; sleep 60 & wait'.format(sys.argv[1])\n"
        "subprocess.Popen([sys.executable, '-I', sys.argv[2], str(os.getpid()), 'sh', '-c', shell])\n"
        "time.sleep(60)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code, str(pid), guard.__file__])
    until = time.monotonic() + 20
    while not pid.is_file() and time.monotonic() < until:
        time.sleep(0.01)
    group = int(pid.read_text())
    os.killpg(group, 0)  # it runs
    parent.kill()
    parent.wait()
    while time.monotonic() < until:
        with suppress(ProcessLookupError):
            os.killpg(group, 0)
            time.sleep(0.05)
            continue
        return
    pytest.fail("the command outlived its worker")


# --------------------------------------------------------------------------- what is stopped


def test_a_diverging_run_is_stopped_early_and_is_never_the_best(bench: Bench) -> None:
    bench.per_poll = 1
    bench.losses = lambda trial: [3.0] * 10 + [6.0] * 30 if trial.config.optim.lr > 0.5 else smooth(trial)
    study, planned, _ = bench.run(grid={"optim.lr": [0.9, 0.02]})
    stopped, fine = bench.runs
    assert stopped.closed
    assert stopped.step == 15  # five logged steps in a row
    assert fine.step == 40
    reason = json.loads((planned[0].folder / "diverged.json").read_text(encoding="utf-8"))["error"]
    assert reason.startswith("stopped at step 15: the loss was above 4.575, 1.1 ln(vocab_size)")
    best = load_config([bench.config, write_results(study, planned)])
    assert best.optim.lr == 0.02
    assert any("diverged" in line for line in table_lines(study, planned))
    bench.run(grid={"optim.lr": [0.9, 0.02]})
    assert len(bench.runs) == 2


def test_stopping_can_be_switched_off(bench: Bench) -> None:
    bench.per_poll = 1
    bench.losses = lambda trial: [9.0] * 40
    bench.run(grid={"optim.lr": [0.9]}, prune=None)
    assert bench.runs[0].step == 40


def test_what_counts_as_diverging(make_config: MakeConfig) -> None:
    config, rule = make_config("schedule.warmup_steps=5"), Prune()  # ln(256) = 5.545

    def reason(*losses: float) -> str | None:
        records = [{"step": step, "loss": loss} for step, loss in enumerate(losses, start=1)]
        return diverging(records, config, rule)

    assert reason(*[9.0] * 9) is None  # five of them in warm-up
    assert "1.1 ln(vocab_size)" in str(reason(*[9.0] * 10))
    falling = [5.0 - step / 10 for step in range(20)]
    assert reason(*falling) is None
    assert reason(*falling, *[4.2] * 4) is None
    assert "lowest + 1 nats" in str(reason(*falling, *[4.2] * 5))
    assert reason(*falling, *[4.2] * 4, 3.5, *[4.2] * 4) is None  # it came back in between


def test_a_real_run_that_diverges_is_stopped(make_config: MakeConfig, tmp_path: Path) -> None:
    rates = {"optim.lr": [30.0, 0.01]}
    config = make_config("train.steps=60", "optim.grad_clip=0", "run.dir=" + str(tmp_path / "runs"))
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(config), encoding="utf-8")
    study_file = tmp_path / "study.yaml"
    values = {"name": "study", "configs": [str(path)], "grid": rates, "jobs": 2}
    study_file.write_text(yaml.safe_dump(values), encoding="utf-8")
    study, base = load_study(study_file)
    planned, _ = complete(study, base)
    wild, fine = planned
    assert "stopped at step" in (wild.folder / "diverged.json").read_text(encoding="utf-8")
    assert wild.records()[-1]["step"] < 60
    assert fine.records()[-1]["step"] == 60
    assert load_config([path, write_results(study, planned)]).optim.lr == 0.01


# --------------------------------------------------------------------------- what is passed over


def test_the_spike_score_counts_spikes_and_nothing_else() -> None:
    noise = random.Random(0)
    curve = [2 + 4 * 0.98**step + noise.gauss(0, 0.05) for step in range(400)]
    assert spike_score(curve, 0.01) == 0
    for step in (100, 101, 300):
        curve[step] += 1.5
    assert spike_score(curve, 0.01) == pytest.approx(3 / (400 - 16))
    assert spike_score([1.0] * 40, 0.01) == 0
    assert spike_score([1.0] * 30 + [float("nan")] + [1.0] * 9, 0.01) == pytest.approx(1 / 24)
    assert spike_score([1.0] * 16, 0.01) is None


def spiky(rate: float, depth: float) -> Callable[[Trial], list[float]]:
    """One rate reaches ``depth`` times the smooth curve's end, with one spike on its way."""

    def losses(trial: Trial) -> list[float]:
        values = smooth(trial)
        if trial.config.optim.lr == rate:
            values[30] = 4.4
            values[-1] = depth
        return values

    return losses


def test_an_unstable_lowest_loss_is_passed_over_unless_it_is_clearly_better(bench: Bench) -> None:
    grid = {"optim.lr": [0.01, 0.02, 0.03]}
    bench.losses = spiky(0.02, depth=0.995)
    study, planned, _ = bench.run(grid=grid)
    path = write_results(study, planned)
    assert load_config([bench.config, path]).optim.lr == 0.01
    assert path.read_text(encoding="utf-8").splitlines()[1].startswith("# lr=0.02 has valid_loss 0.99500, but spikes")
    lines = list(table_lines(study, planned))
    assert lines[1].endswith("unstable")
    assert lines[2].endswith("<- best")
    assert "but spikes" in lines[-1]
    first = json.loads(path.with_name("results.json").read_text(encoding="utf-8"))[0]
    assert (first["trial"], first["stable"], first["loss_spikes"]) == ("lr=0.02", False, pytest.approx(1 / 24))

    bench.losses = spiky(0.02, depth=0.9)
    study, planned, _ = bench.run(grid=grid, name="clear")
    path = write_results(study, planned)
    assert load_config([bench.config, path]).optim.lr == 0.02
    assert "# unstable (its curves have spikes), but more than 1.00% better" in path.read_text(encoding="utf-8")


# --------------------------------------------------------------------------- what is promoted


def test_the_best_are_trained_again_in_the_second_config(bench: Bench) -> None:
    """At the new width the ranking is the other way round, and is what counts."""

    def losses(trial: Trial) -> list[float]:
        curve = smooth(trial)
        return [4 - loss / 2 for loss in curve[20:]] if trial.config.model.d_model == 64 else curve

    bench.losses = losses
    promote = {"top": 2, "steps": 20, "overrides": {"model.d_model": 64}}
    keys: dict[str, Any] = {"grid": {"optim.lr": [0.05, 0.01, 0.02, 0.03]}, "promote": promote}
    study, planned, promoted = bench.run(**keys)
    assert [trial.name for trial in promoted] == ["lr=0.01", "lr=0.02"]
    assert {(trial.config.model.d_model, trial.config.train.steps) for trial in promoted} == {(64, 20)}
    assert {trial.folder.parent for trial in promoted} == {bench.out / "promoted"}
    assert bench.started[4:] == ["lr=0.01", "lr=0.02"]
    path = write_results(study, planned, promoted)
    assert path == bench.out / "best.yaml"
    assert yaml.safe_load(path.read_text(encoding="utf-8")) == {"optim": {"lr": 0.02}}
    rows = json.loads(path.with_name("results.json").read_text(encoding="utf-8"))
    assert [row.get("promoted", {}).get("rank") for row in rows].count(None) == 2
    text = "\n".join(table_lines(study, planned, promoted))
    assert "promoted" in text
    assert "searched" in text
    assert text.count("<- best") == 1
    bench.run(**keys)
    assert len(bench.runs) == 6


def test_a_promotion_that_can_t_be_is_refused_before_any_trial(bench: Bench) -> None:
    grid = {"optim.lr": [0.05, 0.01]}
    with pytest.raises(MegamupError, match=r"promote: sets optim\.lr, which the study looks for"):
        bench.run(grid=grid, promote={"top": 1, "overrides": {"optim.lr": 1}})
    with pytest.raises(MegamupError, match=r"model\.d_modle: unknown key"):
        bench.run(grid=grid, promote={"top": 1, "overrides": {"model.d_modle": 1}})
    assert bench.runs == []


def test_the_shipped_search_is_a_valid_study() -> None:
    from megamup.sweep import known_trials

    study, base = load_study(Path("configs/studies/proxy_search.yaml"))
    assert study.promote is not None
    assert known_trials(study, base)
