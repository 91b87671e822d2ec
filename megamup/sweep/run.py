"""A worker: takes trials from the journal, runs ``jobs`` of them at once, and waits until all workers are done."""

from __future__ import annotations

import copy
import hashlib
import json
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from megamup.config import merge, read_yaml
from megamup.errors import MegamupError
from megamup.files import write_json_atomic
from megamup.sweep import search
from megamup.sweep.journal import Board, Claim, Stage
from megamup.sweep.processes import Running, parallel_jobs, start_trial
from megamup.sweep.results import ranked, write_results
from megamup.sweep.stability import diverging
from megamup.sweep.study import Study
from megamup.sweep.trial import Record, Trial, make_trial, trials, tuning_study, tuning_trials

LOOK_S = 1.0
"""Seconds between looks at the journal while there is nothing to take from it."""


def complete(study: Study, base: dict[str, Any]) -> tuple[list[Trial], list[Trial]]:
    """Run a study to its end; any number of processes may do so at once, and share the trials.

    Returns:
        The trials of the grid or the search, and those promoted to a second stage.

    Raises:
        MegamupError: a point is no valid config (before any is run), or a trial failed; others' results are kept.
    """
    planned = known_trials(study, base)
    if study.tune:
        planned = trials(study, tuned(study, base))
    planned = run_study(study, planned) if study.search is None else run_search(study, base, planned[0])
    second = promoted(study, base, planned)
    return planned, run_study(study, second, "promoted") if second else []


def known_trials(study: Study, base: dict[str, Any]) -> list[Trial]:
    """The trials that are known beforehand: the grid's, or one corner of the search; with them their promotion."""
    if study.search is None:
        known = trials(study, base)
        tuning_trials(study, base)
    else:
        search.check_space(study, base)
        corner = {axis: search.draws(axis, values)[0] for axis, values in study.search.space.items()}
        known = [search.search_trial(study, base, corner)]
    for trial in known if study.promote else []:
        promote(study, base, trial)
    return known


def tuned(study: Study, base: dict[str, Any]) -> dict[str, Any]:
    """Run the grid of ``tune``, and write its own results; returns the configs with its best."""
    tuning = tuning_study(study)
    best = write_results(tuning, run_study(tuning, tuning_trials(study, base)))
    together = copy.deepcopy(base)
    merge(together, read_yaml(best))
    return together


def run_study(study: Study, planned: Sequence[Trial], stage: str = "grid") -> list[Trial]:
    """Run what isn't finished of given trials. A trial that diverges is a result; any other failure ends the study.

    Raises:
        MegamupError: a trial failed; the others' results are kept.
    """
    by_name = {trial.name: trial for trial in planned}
    folder = Path(planned[0].config.run.dir) / study.name
    if all(trial.finished() for trial in planned):
        print(f"{study.name}: {len(planned)} of {len(planned)} trials were finished before", flush=True)
        return list(planned)
    return run_stage(study, Stage(stage, folder, tuple(by_name), lambda name, _: by_name[name]), planned[0])


def run_search(study: Study, base: dict[str, Any], corner: Trial) -> list[Trial]:
    """Draw and run the trials of a search.

    Raises:
        MegamupError: a trial failed, or drawn values are no valid config; the others' results are kept.
    """
    assert study.search is not None
    space = study.search.model_dump(mode="json")["space"]
    compared = {key: value for key, value in base.items() if key not in ("run", "log")}
    what = hashlib.sha256(json.dumps([space, compared, study.metric], sort_keys=True).encode()).hexdigest()[:12]
    stage = Stage(
        name=f"search {what}",  # results of another space or config would mislead the sampler
        folder=Path(corner.config.run.dir) / study.name,
        points=tuple(str(index) for index in range(study.search.trials)),
        trial=lambda _, params: search.search_trial(study, base, params),
        space=search.distributions(study.search),
        sampler=search.sampler(study.search),
    )
    return run_stage(study, stage, corner)


def promoted(study: Study, base: dict[str, Any], planned: Sequence[Trial]) -> list[Trial]:
    """The best trials of the first stage as trials of the second, best first."""
    if study.promote is None:
        return []
    order = [row.trial for row in ranked(study, planned) if row.value < float("inf")]
    return [promote(study, base, trial) for trial in order[: study.promote.top]]


def promote(study: Study, base: dict[str, Any], trial: Trial) -> Trial:
    assert study.promote is not None
    both = sorted(trial.overrides.keys() & study.promote.settings.keys())
    if both:
        raise MegamupError(f"promote: sets {', '.join(both)}, which the study looks for; leave it out of one of them")
    return make_trial(f"{study.name}/promoted", base, trial.name, trial.overrides, study.promote.settings)


def run_stage(study: Study, stage: Stage, typical: Trial) -> list[Trial]:
    """Share a stage with other workers until all of it is done; returns its trials."""
    board = Board(stage, study.lease_s)
    total = len(stage.points)
    if board.finished:
        print(f"{study.name}: {len(board.finished)} of {total} trials were finished before", flush=True)
    with ExitStack() as everything:
        worker = Worker(study, board, everything)
        everything.callback(worker.give_up)  # once the processes have ended: others needn't wait for the lease
        bar = everything.enter_context(
            tqdm(total=0, unit="step", desc=study.name, mininterval=0.5 if sys.stderr.isatty() else 10)
        )
        look = 0.0
        while True:
            took = worker.poll()
            if took or time.monotonic() >= look:
                worker.take()
                show(bar, board, typical)
                look = time.monotonic() + LOOK_S
                if not worker.slots and (found := board.results()) is not None:
                    return found
            time.sleep(0.1)


def show(bar: tqdm[Any], board: Board, typical: Trial) -> None:
    """Steps of all workers' trials; what a search hasn't drawn yet counts as its first corner does."""
    total = steps = running = 0
    current = board.current()
    for at in board.stage.points:
        attempt = current.get(at)
        drawn = attempt is not None and (attempt.params.keys() == board.stage.space.keys())
        trial = board.stage.trial(at, attempt.params) if attempt is not None and drawn else typical
        planned = trial.config.train.steps
        total += planned
        if attempt is None or not drawn or attempt.state.name == "WAITING":
            continue
        running += attempt.state.name == "RUNNING"
        steps += last_step(trial) if attempt.state.name == "RUNNING" else planned
    if not bar.total:
        bar.initial = bar.n = steps
    bar.total = total
    bar.set_postfix_str(f"{running} trials running", refresh=False)
    bar.update(steps - bar.n)


def last_step(trial: Trial) -> int:
    records = trial.records()
    return int(records[-1]["step"]) if records else 0


@dataclass
class Slot:
    claim: Claim
    process: Running
    ending: ExitStack
    refreshed: float
    seen: tuple[int, int] = (0, 0)
    """Size and time of metrics.jsonl when it was last read."""


class Worker:
    """What this process runs of a stage."""

    def __init__(self, study: Study, board: Board, everything: ExitStack) -> None:
        self.study, self.board, self.everything = study, board, everything
        self.jobs = study.jobs or parallel_jobs(study.ranks)
        self.slots: dict[int, Slot] = {}

    def take(self) -> None:
        """Claim and start as many trials as there is room for; what is finished already is only told."""
        while len(self.slots) < self.jobs and (claim := self.board.claim()) is not None:
            if claim.trial.finished():
                self.board.done(claim, claim.trial.value(self.study.metric))
                continue
            ending = self.everything.enter_context(ExitStack())
            process = ending.enter_context(start_trial(self.study, claim.trial))
            self.slots[claim.number] = Slot(claim, process, ending, time.monotonic())

    def poll(self) -> bool:
        """Look after what runs; True where a trial ended."""
        before = len(self.slots)
        for number, slot in list(self.slots.items()):
            if time.monotonic() - slot.refreshed > self.study.lease_s / 4:
                slot.refreshed = time.monotonic()
                if not self.board.refresh(number):  # another worker's now
                    del self.slots[number]
                    slot.ending.close()
                    continue
            diverged = self.why_stop(slot)
            if diverged or self.ended(slot):
                self.end(slot, diverged)
        return len(self.slots) < before

    def ended(self, slot: Slot) -> bool:
        from megamup.train.loop import DivergedError

        try:
            return slot.process.poll()
        except DivergedError as error:
            self.end(slot, str(error))
            return False
        except Exception as error:
            trial = slot.claim.trial
            raise MegamupError(f"trial {trial.name}: {error}\nsee {trial.folder / 'log.txt'}") from error

    def end(self, slot: Slot, diverged: str | None) -> None:
        """End a trial's processes, and tell what came of it."""
        trial = slot.claim.trial
        slot.ending.close()
        if diverged:
            write_json_atomic(trial.folder / "diverged.json", {"error": diverged})
        self.board.done(slot.claim, trial.value(self.study.metric))
        del self.slots[slot.claim.number]

    def why_stop(self, slot: Slot) -> str | None:
        """Whether the run is diverging; metrics.jsonl is read where it has changed."""
        metrics = slot.claim.trial.folder / "metrics.jsonl"
        if self.study.prune is None or not metrics.is_file():
            return None
        status = metrics.stat()
        if slot.seen == (seen := (status.st_size, status.st_mtime_ns)):
            return None
        slot.seen = seen
        records: list[Record] = slot.claim.trial.records()
        return diverging(records, slot.claim.trial.config, self.study.prune)

    def give_up(self) -> None:
        for number in list(self.slots):
            self.board.give_up(number)
