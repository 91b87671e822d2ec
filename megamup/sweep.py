"""A study: the same run at every point of a grid over config keys, and which point was best.

A trial is an ordinary run folder, so a study that was interrupted goes on where it stopped: finished trials are read,
not run again.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Protocol

import yaml
from pydantic import ConfigDict, Field, ValidationError
from tqdm import tqdm

from megamup.config import Config, config_from, describe, dump_config, merge, parse_override, read_yaml
from megamup.errors import MegamupError
from megamup.files import write_json_atomic, write_text_atomic
from megamup.sections import Positive, Section

Scalar = str | int | float | bool | None
GridValue = Annotated[dict[str, Any], Field(min_length=1)] | Scalar | list[Any]


class Study(Section):
    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    """Folder of the trials, below ``run.dir``."""
    configs: tuple[str, ...]
    """Run configs, merged left to right; paths as the command sees them."""
    overrides: dict[str, Any] = Field(default={})
    """Config keys that all trials share (the base width, say); they are no finding, so best.yaml leaves them out."""
    grid: dict[str, Annotated[tuple[GridValue, ...], Field(min_length=1)]] = Field(min_length=1)
    """Axis -> values. An axis is a config key, or any name whose values are ``{key: value, ...}`` set together."""
    metric: str = "valid_loss"
    """Key of metrics.jsonl whose last value is minimised."""
    ranks: Positive = 1
    """Ranks of a trial."""
    jobs: Positive | None = None
    """Trials at once; default: as many as fit the cores at one rank each (one, with a GPU)."""
    launch: str | None = None
    """Launcher command of a trial, such as ``deepspeed --num_gpus 8``; default: forked ranks on this host."""


@dataclass(frozen=True)
class Trial:
    name: str
    overrides: dict[str, Any]
    config: Config

    @property
    def folder(self) -> Path:
        return self.config.run.folder

    def records(self) -> list[dict[str, Any]]:
        """What metrics.jsonl says so far."""
        path = self.folder / "metrics.jsonl"
        if not path.is_file():
            return []
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        return [json.loads(line) for line in lines if line.endswith("}")]

    def finished(self) -> bool:
        """The run is complete, and was run with this very config."""
        if (self.folder / "diverged.json").is_file():
            return self.same_config()
        records = self.records()
        return bool(records) and records[-1]["step"] == self.config.train.steps and self.same_config()

    def same_config(self) -> bool:
        path = self.folder / "config.yaml"
        return path.is_file() and config_from(read_yaml(path)) == self.config

    def value(self, metric: str) -> float:
        """The last value of the metric; infinite where the run diverged."""
        if (self.folder / "diverged.json").is_file():
            return math.inf
        found = [record[metric] for record in self.records() if metric in record]
        if not found:
            known = sorted({key for record in self.records() for key in record})
            raise MegamupError(f"metric={metric}: not in {self.folder / 'metrics.jsonl'}, which has {', '.join(known)}")
        return math.inf if math.isnan(found[-1]) else float(found[-1])


def load_study(path: Path, overrides: Sequence[str] = ()) -> tuple[Study, dict[str, Any]]:
    """Read a study file and its run configs; overrides go on top of these.

    Raises:
        MegamupError: a wrong key or value, one line each.
    """
    try:
        study = Study.model_validate(read_yaml(path))
    except ValidationError as error:
        raise MegamupError("\n".join(f"{path}: {describe(problem)}" for problem in error.errors())) from None
    merged: dict[str, Any] = {}
    for file in study.configs:
        merge(merged, read_yaml(Path(file)))
    for override in [*(f"{key}={json.dumps(value)}" for key, value in study.overrides.items()), *overrides]:
        merge(merged, parse_override(override))
    return study, merged


def trials(study: Study, base: dict[str, Any]) -> list[Trial]:
    """Every point of the grid as a checked config, in the order of the file.

    Raises:
        MegamupError: a point is no valid config; all are checked before any is run.
    """
    found = []
    for point in itertools.product(*study.grid.values()):
        overrides: dict[str, Any] = {}
        names = []
        for axis, value in zip(study.grid, point, strict=True):
            setting: dict[str, Any] = value if isinstance(value, dict) else {axis: value}
            overrides |= setting
            names.append(label(setting, study.grid[axis]))
        values: dict[str, Any] = {}
        merge(values, base)
        values = json.loads(json.dumps(values))  # a copy: merging below must not reach the base
        for key, value in overrides.items():
            merge(values, parse_override(f"{key}={json.dumps(value)}"))
        name = ",".join(names)
        values.setdefault("run", {})["name"] = f"{study.name}/{name}"
        try:
            found.append(Trial(name, overrides, config_from(values)))
        except MegamupError as error:
            raise MegamupError(f"trial {name}: {error}") from None
    return found


def label(setting: dict[str, Any], alternatives: Sequence[Any]) -> str:
    """What a folder's name says of one value of an axis: its first key, or all where the first doesn't tell."""
    first = next(iter(setting))
    others = [value[first] for value in alternatives if isinstance(value, dict) and first in value]
    shown = setting if others.count(setting[first]) > 1 else {first: setting[first]}
    return ",".join(f"{key.rsplit('.', 1)[-1]}={value}" for key, value in shown.items()).replace("/", "_")


# --------------------------------------------------------------------------- running


class Running(Protocol):
    def poll(self, timeout_s: float | None = 0.0) -> bool: ...


def run_study(study: Study, planned: Sequence[Trial]) -> None:
    """Run what isn't finished, ``jobs`` at a time. A trial that diverges is a result; any other failure ends the study.

    Raises:
        MegamupError: a trial failed; the others' results are kept.
    """
    waiting = [trial for trial in planned if not trial.finished()]
    if len(waiting) < len(planned):
        print(f"{study.name}: {len(planned) - len(waiting)} of {len(planned)} trials were finished before", flush=True)
    if not waiting:
        return
    jobs = study.jobs or parallel_jobs(study.ranks)
    total = sum(trial.config.train.steps for trial in waiting)
    with tqdm(total=total, unit="step", desc=study.name, mininterval=0.5 if sys.stderr.isatty() else 10) as bar:
        begun: list[Trial] = []
        running: dict[str, tuple[Trial, Running, ExitStack]] = {}
        with ExitStack() as everything:
            while waiting or running:
                while waiting and len(running) < jobs:
                    trial = waiting.pop(0)
                    ending = everything.enter_context(ExitStack())
                    running[trial.name] = (trial, ending.enter_context(start_trial(study, trial)), ending)
                    begun.append(trial)
                for name, (trial, process, ending) in list(running.items()):
                    if poll_trial(trial, process):
                        ending.close()
                        del running[name]
                steps = sum(
                    trial.config.train.steps if trial.name not in running else progress(trial) for trial in begun
                )
                bar.update(steps - bar.n)
                time.sleep(0.1)


def parallel_jobs(ranks: int) -> int:
    from megamup.train import distributed

    return 1 if distributed.has_cuda() else max(1, (os.cpu_count() or 1) // ranks)


def progress(trial: Trial) -> int:
    records = trial.records()
    return int(records[-1]["step"]) if records else 0


def poll_trial(trial: Trial, process: Running) -> bool:
    from megamup.train.loop import DivergedError

    try:
        return process.poll()
    except DivergedError as error:
        write_json_atomic(trial.folder / "diverged.json", {"error": str(error)})
        return True
    except Exception as error:
        raise MegamupError(f"trial {trial.name}: {error}\nsee {trial.folder / 'log.txt'}") from error


def start_trial(study: Study, trial: Trial) -> AbstractContextManager[Running]:
    """Start one run in its own folder, its output in log.txt there."""
    trial.folder.mkdir(parents=True, exist_ok=True)
    (trial.folder / "diverged.json").unlink(missing_ok=True)
    log = trial.folder / "log.txt"
    if study.launch is not None:
        return Launched(study.launch, trial, log)
    from megamup.train.fork import Ranks
    from megamup.train.loop import train

    threads = max(1, (os.cpu_count() or 1) // ((study.jobs or parallel_jobs(study.ranks)) * study.ranks))
    return Ranks(train, study.ranks, trial.config, threads=threads, log=str(log))


class Launched:
    """A trial under a launcher's command."""

    def __init__(self, launch: str, trial: Trial, log: Path) -> None:
        from megamup.cli import programs

        config = trial.folder / "trial.yaml"
        write_text_atomic(config, dump_config(trial.config))
        command = [*shlex.split(launch), str(programs()["pretrain"]), str(config)]
        self.trial, self.log = trial, log
        with open(log, "ab") as sink:
            self.process = subprocess.Popen(command, stdout=sink, stderr=sink, start_new_session=True)

    def poll(self, timeout_s: float | None = 0.0) -> bool:
        from megamup.train.loop import DivergedError

        try:
            code = self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return False
        if code and f"error: {DivergedError.LABEL}" in self.log.read_text(encoding="utf-8", errors="replace"):
            raise DivergedError("see log.txt")
        if code:
            raise MegamupError(f"{shlex.join(map(str, self.process.args))} exited with {code}")  # type: ignore[arg-type]
        return True

    def __enter__(self) -> Launched:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            self.process.wait()


# --------------------------------------------------------------------------- results


def ranked(study: Study, planned: Sequence[Trial]) -> list[tuple[float, Trial]]:
    """Trials by metric, best first."""
    return sorted(((trial.value(study.metric), trial) for trial in planned), key=lambda pair: pair[0])


def table_lines(study: Study, planned: Sequence[Trial]) -> Iterator[str]:
    """The study as text, best first."""
    width = max(len(trial.name) for trial in planned)
    yield f"{'trial':<{width}}  {study.metric}"
    for position, (value, trial) in enumerate(ranked(study, planned)):
        yield f"{trial.name:<{width}}  {value:.5f}" + ("  <- best" if position == 0 else "")


def write_results(study: Study, planned: Sequence[Trial]) -> Path:
    """Write ``results.json`` and ``best.yaml`` (what the best trial sets, ready to be merged after its configs)."""
    order = ranked(study, planned)
    best_value, best = order[0]
    if math.isinf(best_value):
        raise MegamupError(f"{study.name}: every trial diverged; lower optim.lr in the grid")
    folder = best.folder.parent
    results = [
        {"trial": trial.name, study.metric: None if math.isinf(value) else value, **trial.overrides}
        for value, trial in order
    ]
    write_json_atomic(folder / "results.json", results)
    nested: dict[str, Any] = {}
    for key, value in best.overrides.items():
        merge(nested, parse_override(f"{key}={json.dumps(value)}"))
    path = folder / "best.yaml"
    write_text_atomic(
        path, f"# best of {len(order)} trials: {study.metric} {best_value:.5f}\n" + yaml.safe_dump(nested)
    )
    return path
