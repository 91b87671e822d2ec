"""A trial's processes: forked ranks of this host, or a launcher's command. Neither outlives the worker."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

from megamup.config import Config, dump_config
from megamup.errors import MegamupError
from megamup.files import write_text_atomic
from megamup.sweep import guard
from megamup.sweep.study import Study
from megamup.sweep.trial import Trial


class Running(Protocol):
    def poll(self, timeout_s: float | None = 0.0) -> bool: ...


def parallel_jobs(ranks: int) -> int:
    from megamup.train import distributed

    return 1 if distributed.has_cuda() else max(1, (os.cpu_count() or 1) // ranks)


def start_trial(study: Study, trial: Trial) -> AbstractContextManager[Running]:
    """Start one run in its own folder, its output in log.txt there."""
    trial.folder.mkdir(parents=True, exist_ok=True)
    (trial.folder / "diverged.json").unlink(missing_ok=True)
    log = trial.folder / "log.txt"
    if study.launch is not None:
        return Launched(study.launch, trial, log)
    from megamup.train.fork import Ranks

    ranks = (study.jobs or parallel_jobs(study.ranks)) * study.ranks
    threads = int(os.environ.get("OMP_NUM_THREADS", 0)) or max(1, (os.cpu_count() or 1) // ranks)
    return Ranks(train_under_worker, study.ranks, os.getpid(), trial.config, threads=threads, log=str(log))


def train_under_worker(worker: int, config: Config) -> dict[str, float]:
    from megamup.train.loop import train

    guard.end_with_parent(worker, signal.SIGKILL)
    return train(config)


class Launched:
    """A trial under a launcher's command."""

    def __init__(self, launch: str, trial: Trial, log: Path) -> None:
        from megamup.cli import programs

        config = trial.folder / "trial.yaml"
        write_text_atomic(config, dump_config(trial.config))
        self.command = [*shlex.split(launch), str(programs()["pretrain"]), str(config)]
        self.log = log
        guarded = [sys.executable, "-I", guard.__file__, str(os.getpid()), *self.command]
        with open(log, "ab") as sink:
            self.begin = sink.tell()  # an earlier attempt's last words are not this one's
            self.process = subprocess.Popen(guarded, stdout=sink, stderr=sink, start_new_session=True)

    def poll(self, timeout_s: float | None = 0.0) -> bool:
        from megamup.train.loop import DivergedError

        try:
            code = self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return False
        said = self.log.read_bytes()[self.begin :].decode(errors="replace") if code else ""
        if f"error: {DivergedError.LABEL}" in said:
            raise DivergedError("see log.txt")
        if code:
            raise MegamupError(f"{shlex.join(self.command)} exited with {code}")
        return True

    def __enter__(self) -> Launched:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            self.process.wait()
