"""Who runs which trial: one journal file that all workers of a study share, on one host or on many.

Optuna's journal is a log of JSON lines, appended under a lock that NFS keeps, so every worker replays the same history
and a claim has one winner. The truth about results stays in the run folders: a lost journal costs only the claims.

A point (of a grid, or number i of a search) is one or more of Optuna's trials, its attempts: a worker that died leaves
an attempt behind that others end, and the point is queued again with the same draw. Two workers may queue one at once;
of attempts at one point the first counts, on which all agree, and no lock is held while anyone thinks.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megamup.errors import MegamupError
from megamup.files import write_json_atomic
from megamup.sweep.search import Params
from megamup.sweep.trial import Trial

if TYPE_CHECKING:
    from optuna import Study as OptunaStudy
    from optuna.distributions import BaseDistribution
    from optuna.samplers import BaseSampler
    from optuna.storages import JournalStorage
    from optuna.trial import FrozenTrial
    from optuna.trial import Trial as OptunaTrial


@dataclass(frozen=True)
class Stage:
    """What workers share out among them."""

    name: str
    """Name in the journal; another name is another history."""
    folder: Path
    points: Sequence[str]
    trial: Callable[[str, Params], Trial]
    """(point, draw) -> trial."""
    space: Mapping[str, BaseDistribution] = field(default_factory=dict)
    """What is drawn for a point; a grid draws nothing."""
    sampler: BaseSampler | None = None


@dataclass(frozen=True)
class Claim:
    """A trial that this worker runs."""

    number: int
    trial: Trial


class Board:
    """The journal of one stage, as one worker sees it.

    Raises:
        MegamupError: the journal is damaged.
    """

    def __init__(self, stage: Stage, lease_s: float) -> None:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self.stage, self.lease_s = stage, lease_s
        self.mine: dict[int, OptunaTrial] = {}  # attempt -> Optuna's handle
        self.leases: dict[int, tuple[str, float]] = {}  # attempt -> (lease, when it was first seen, by our clock)
        path = (stage.folder / "study.journal").resolve()
        try:
            storage = open_journal(path)
            self.study: OptunaStudy = optuna.create_study(
                storage=storage, study_name=stage.name, sampler=stage.sampler, load_if_exists=True
            )
        except (ValueError, KeyError, AssertionError) as error:
            raise MegamupError(
                f"{path}: damaged ({error}); remove this file and start the study again: finished trials are read "
                "from their run folders"
            ) from None
        self.draws = self.known_draws()
        self.finished = {point for point, params in self.draws.items() if self.stage.trial(point, params).finished()}
        # The journal says done, the run folder doesn't: removed, or of another config. To be run again.
        self.stale = {t.number for t in self.attempts() if t.state.is_finished() and point(t) not in self.finished}

    def attempts(self) -> list[FrozenTrial]:
        return self.study.get_trials(deepcopy=False)

    def known_draws(self) -> dict[str, Params]:
        """Point -> draw: from the journal, and for those that it has lost from the run folders."""
        found: dict[str, Params] = {} if self.stage.space else {point: {} for point in self.stage.points}
        for path in sorted(self.stage.folder.glob("*/draw.json")) if self.stage.space else []:
            draw = json.loads(path.read_text(encoding="utf-8"))
            if draw["stage"] == self.stage.name:
                found[draw["point"]] = draw["params"]
        for attempt in self.attempts():
            if self.stage.space and attempt.params.keys() == self.stage.space.keys():
                found[point(attempt)] = attempt.params
        return {point: found[point] for point in self.stage.points if point in found}

    def current(self) -> dict[str, FrozenTrial]:
        """Point -> the attempt that counts: the first that is waiting, running, or ended with a result."""
        found: dict[str, FrozenTrial] = {}
        for attempt in self.attempts():
            failed = attempt.state.name == "FAIL" and "repeats" not in attempt.user_attrs
            if not failed and attempt.number not in self.stale and "point" in attempt.user_attrs:
                found.setdefault(point(attempt), attempt)
        return {point: found[point] for point in self.stage.points if point in found}

    def claim(self) -> Claim | None:
        """The next trial to run, this worker's from now on; None where there is none at the moment.

        Raises:
            MegamupError: the values that were drawn are no valid config.
        """
        self.end_abandoned()
        self.queue_missing()
        while any(attempt.state.name == "WAITING" for attempt in self.attempts()):
            handle = self.study.ask(dict(self.stage.space))
            at = str(handle.user_attrs.get("point"))
            self.mine[handle.number] = handle
            if at not in self.stage.points:  # a point that the study has no more, or what ask() makes of an empty queue
                self.give_up(handle.number)
                continue
            self.refresh(handle.number)
            try:
                trial = self.stage.trial(at, handle.params)
            except MegamupError:
                self.give_up(handle.number)
                raise
            if not self.is_repeat(handle, at, trial):
                return Claim(handle.number, trial)
            self.give_up(handle.number)
        return None

    def is_repeat(self, handle: OptunaTrial, at: str, trial: Trial) -> bool:
        """Another attempt at the same point counts, or another point drew the same values and is on its way."""
        if self.current()[at].number < handle.number:
            return True
        owner = at if not self.stage.space else self.owner(trial.folder / "draw.json", at, handle.params)
        if owner == at or trial.finished():
            return False
        handle.set_user_attr("repeats", owner)
        return True

    def owner(self, path: Path, at: str, params: Params) -> str:
        """The point whose run a folder holds: the first to put its draw there."""
        for _ in range(2):
            if path.is_file():
                draw = json.loads(path.read_text(encoding="utf-8"))
                if draw["stage"] == self.stage.name and draw["point"] in self.stage.points:
                    return str(draw["point"])
                path.unlink(missing_ok=True)  # of another search
            whole = path.with_name(f".draw-{os.getpid()}.json")
            write_json_atomic(whole, {"stage": self.stage.name, "point": at, "params": params})
            with contextlib.suppress(FileExistsError):  # another worker was faster: read again
                os.link(whole, path)
            whole.unlink()
        return at

    def queue_missing(self) -> None:
        """Queue every point that has no attempt that counts, with the draw that it had before, if any."""
        current = self.current()
        missing = [point for point in self.stage.points if point not in current]
        draws = self.known_draws() if missing else {}
        for at in missing:
            self.study.enqueue_trial(draws.get(at, {}), user_attrs={"point": at})

    def end_abandoned(self) -> None:
        """End the attempts whose worker is gone: at once where its process is seen to be dead, else when its lease
        stood still for ``lease_s`` by this worker's clock (clocks of two hosts need not agree)."""
        now = time.monotonic()
        for attempt in self.attempts():
            if attempt.state.name != "RUNNING" or attempt.number in self.mine:
                continue
            lease = attempt.user_attrs.get("lease", {})
            seen, since = self.leases.get(attempt.number, (None, now))
            if seen != json.dumps(lease):
                self.leases[attempt.number] = (json.dumps(lease), now)
                since = now
            dead = lease.get("host") == host() and not alive(lease["pid"])
            if dead or now - since > self.lease_s:
                self.tell(attempt.number, None, "FAIL")

    def refresh(self, number: int) -> bool:
        """Say that this worker is alive; False where it had been silent for so long that its claim was ended."""
        from optuna.exceptions import UpdateFinishedTrialError

        try:
            lease = {"host": host(), "pid": os.getpid(), "time": time.time()}
            self.mine[number].set_user_attr("lease", lease)
        except UpdateFinishedTrialError:
            del self.mine[number]
            return False
        return True

    def done(self, claim: Claim, value: float) -> None:
        """Tell what a claimed trial came to; infinite: it diverged."""
        if value == float("inf"):
            self.tell(claim.number, None, "PRUNED")
        else:
            self.tell(claim.number, value, "COMPLETE")

    def give_up(self, number: int) -> None:
        """End an attempt without a result; its point is queued again unless another attempt counts."""
        self.tell(number, None, "FAIL")

    def tell(self, number: int, value: float | None, state: str) -> None:
        from optuna.trial import TrialState

        self.mine.pop(number, None)
        try:
            self.study.tell(number, value, TrialState[state])
        except (ValueError, RuntimeError):  # another worker ended it first
            if self.study.get_trials(deepcopy=False)[number].state == TrialState.RUNNING:
                raise

    def results(self) -> list[Trial] | None:
        """The stage's trials in the order of its points, repeated draws once; None while some are not done."""
        current = self.current()
        if any(point not in current or not current[point].state.is_finished() for point in self.stage.points):
            return None
        found = [self.stage.trial(point, attempt.params) for point, attempt in current.items()]
        return list({trial.name: trial for trial in found}.values())


def point(attempt: FrozenTrial) -> str:
    return str(attempt.user_attrs.get("point"))


def host() -> str:
    """Where process ids mean the same: the host, and on it the namespace (containers share host names)."""
    try:
        return f"{socket.gethostname()} {os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return socket.gethostname()


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        return True
    return True


def open_journal(path: Path) -> JournalStorage:
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock

    class Backend(JournalFileBackend):
        """Optuna's, but a line that a killed worker or a full disk cut short isn't continued by the next writer:
        the two would be one line that nobody can read, and the study would be lost."""

        def append_logs(self, logs: list[dict[str, Any]]) -> None:
            if torn(path) is not None:
                lock.acquire()
                try:
                    whole = torn(path)  # again: what looked torn may have been a line in the making
                    if whole is not None:
                        os.truncate(path, whole)
                finally:
                    lock.release()
            super().append_logs(logs)

    path.parent.mkdir(parents=True, exist_ok=True)
    lock = JournalFileOpenLock(str(path))
    return JournalStorage(Backend(str(path), lock))


def torn(path: Path) -> int | None:
    """Where the last line begins if it is no JSON object with a newline after it, else None."""
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        start = max(0, size - 65_536)
        file.seek(start)
        tail = file.read()
    begin = tail.rfind(b"\n", 0, -1) + 1
    line = tail[begin:]
    if start and not begin:
        return None  # longer than any that is written here
    try:
        whole = not line or (line.endswith(b"\n") and isinstance(json.loads(line), dict))
    except ValueError:
        whole = False
    return None if whole else start + begin
