"""The units of the input as tasks for many workers."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from megamup.data.progress import ByteProgress
from megamup.data.reading.units import Unit
from megamup.data.work.executors import Executor
from megamup.errors import MegamupError

Item = TypeVar("Item")
Result = TypeVar("Result")

POLL_SECONDS = 0.2
MOST_LANES = 4
"""Lanes of a stream: each decompresses all of it, so that more would do little but that."""


class StoppedError(RuntimeError):
    """The run that this work is for has ended."""


@dataclass(frozen=True)
class Lane:
    """A task: of one unit, pieces `lane`, `lane + lanes`, ..."""

    unit: int
    lane: int
    lanes: int

    def has(self, piece: int) -> bool:
        return piece % self.lanes == self.lane


def while_alive(items: Iterable[Item], alive: Path) -> Iterator[Item]:
    """`items`, as long as the file `alive` is there: it is removed when the run ends, whereupon its workers stop.

    Raises:
        StoppedError: it isn't.
    """
    for item in items:
        if not alive.exists():
            raise StoppedError
        yield item


def divide(units: Sequence[Unit], numbers: Sequence[int], workers: int) -> Iterator[Lane]:
    """Tasks in order; a stream that is much of the work is divided among workers."""
    total = max(sum(units[number].source_bytes for number in numbers), 1)
    for number in numbers:
        unit = units[number]
        share = round(workers * unit.source_bytes / total) if unit.is_stream else 1
        lanes = min(max(share, 1), MOST_LANES)
        yield from (Lane(number, lane, lanes) for lane in range(lanes))


@dataclass(frozen=True)
class Schedule:
    """Has units worked on, those alone that aren't done.

    Args:
        units: of the input.
        executor: what works.
        start: submits a lane to it.
        is_done: whether all pieces of a unit are there.
        piece_bytes: input bytes of a piece (unit, number) that is there, None where it isn't.
        progress: hears of input bytes as pieces are done.
    """

    units: Sequence[Unit]
    executor: Executor
    start: Callable[[Lane], Future[None]]
    is_done: Callable[[int], bool]
    piece_bytes: Callable[[int, int], int | None]
    progress: ByteProgress

    def run(self, numbers: Sequence[int], look: Callable[[], None] = lambda: None) -> None:
        """Work on the units of these numbers; `look` is called now and then, and at the end.

        Raises:
            MegamupError: a unit can't be worked on; what is done stays for the next run.
        """
        waiting = deque(divide(self.units, numbers, self.executor.workers))
        active: dict[Future[None], Lane] = {}
        seen: dict[Lane, int] = {}
        while waiting or active:
            while waiting and len(active) < 2 * self.executor.workers:
                lane = waiting.popleft()
                if self.is_done(lane.unit):
                    self._count(lane, seen, self.progress.resume)
                else:
                    active[self.start(lane)] = lane
            ended = wait(active, POLL_SECONDS, FIRST_COMPLETED).done
            for lane in active.values():
                self._count(lane, seen, self.progress.advance)
            for future in ended:
                del active[future]
                result_of(future)
            look()

    def _count(self, lane: Lane, seen: dict[Lane, int], tell: Callable[[int], None]) -> None:
        """Tell of the pieces of a lane that are new."""
        piece = seen.get(lane, lane.lane)
        while (size := self.piece_bytes(lane.unit, piece)) is not None:
            tell(size)
            piece += lane.lanes
        seen[lane] = piece


def result_of(future: Future[Result]) -> Result:
    """Raises MegamupError where a worker process has died."""
    try:
        return future.result()
    except BrokenProcessPool as error:
        raise MegamupError(
            "a worker process died, most likely of too little memory; what is done is kept: start the same command "
            "again with fewer --workers"
        ) from error
