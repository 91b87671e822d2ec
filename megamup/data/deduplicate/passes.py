"""Passes over the input: something is done with each piece of each unit, by many workers, and isn't done again."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from megamup.data.preprocess.pieces import NAMED_DOCUMENTS
from megamup.data.progress import ByteProgress
from megamup.data.reading.documents import Batch, ReadOptions
from megamup.data.reading.units import Unit
from megamup.data.work.executors import Executor
from megamup.data.work.lanes import Lane, Schedule, while_alive
from megamup.data.writer import writing


@dataclass
class PieceInfo:
    """What was read of a piece."""

    documents: int = 0
    characters: int = 0
    source_bytes: int = 0
    unreadable: int = 0
    named: list[str] = field(default_factory=list)
    """What was wrong with the first unreadable documents."""


class Step(Protocol):
    """What a pass does with a piece. Picklable."""

    @property
    def name(self) -> str:
        """Tells the passes of a job apart."""
        ...

    def run(self, path: Path, texts: Iterator[tuple[str, bool]]) -> None:
        """Do it.

        Args:
            path: of the piece, without suffix.
            texts: its texts, and of each whether a document ends with it; to be used up.
        """
        ...


@dataclass(frozen=True)
class Pieces:
    """The pieces of a job, and what each pass has read of them.

    A marker `PIECE.PASS.json` is written when the other files of the pass are whole. One of the unit tells how many
    pieces it has.

    Args:
        folder: where they lie.
        job: a hash of all that they depend on.
    """

    folder: Path
    job: str

    def path(self, unit: int, piece: int | None = None) -> Path:
        """Of a piece, or of a unit; without suffix."""
        return self.folder / (f"{self.job}-{unit:07d}" + ("" if piece is None else f"-{piece:06d}"))

    def info(self, unit: int, piece: int, step: str) -> PieceInfo | None:
        """What a pass read of a piece, None while it isn't done."""
        values = _read_marker(self.path(unit, piece), step)
        return None if values is None else PieceInfo(**values)

    def of_unit(self, unit: int, step: str) -> list[PieceInfo] | None:
        """What a pass read of all pieces of a unit, None while it isn't done."""
        count = _read_marker(self.path(unit), step)
        infos = [self.info(unit, piece, step) for piece in range(count or 0)]
        whole = [info for info in infos if info is not None]
        return whole if len(whole) == count else None


def _read_marker(path: Path, step: str) -> Any:
    try:
        return json.loads(path.with_name(f"{path.name}.{step}.json").read_bytes())
    except (FileNotFoundError, ValueError):  # a torn marker is none
        return None


def _write_marker(path: Path, step: str, value: Any) -> None:
    beside = path.with_name(f"{path.name}.{step}.{uuid.uuid4().hex}.tmp")
    beside.write_text(json.dumps(value), encoding="utf-8")
    os.replace(beside, path.with_name(f"{path.name}.{step}.json"))


def work_on_lane(step: Step, pieces: Pieces, options: ReadOptions, unit: Unit, lane: Lane, alive: Path) -> None:
    """Do a step for the pieces of a lane that it isn't done for yet.

    Args:
        step: what to do.
        pieces: of the job.
        options: how documents are read.
        unit: the lane's.
        lane: which pieces.
        alive: see `while_alive`.

    Raises:
        MegamupError: a document can't be read, or a file not written.
    """

    def wanted(piece: int) -> bool:
        return lane.has(piece) and pieces.info(lane.unit, piece, step.name) is None

    count = 0
    for piece, batches in while_alive(unit.pieces(options, wanted), alive):
        count = piece + 1
        if wanted(piece):
            path, info = pieces.path(lane.unit, piece), PieceInfo()
            with writing(path):
                step.run(path, _texts(while_alive(batches, alive), info))
                _write_marker(path, step.name, asdict(info))
    with writing(pieces.path(lane.unit)):
        _write_marker(pieces.path(lane.unit), step.name, count)


def _texts(batches: Iterator[Batch], info: PieceInfo) -> Iterator[tuple[str, bool]]:
    """The texts, and of each whether a document ends with it; `info` tells of those gone by."""
    for batch in batches:
        info.source_bytes += batch.source_bytes
        info.unreadable += len(batch.unreadable)
        info.named += batch.unreadable[: NAMED_DOCUMENTS - len(info.named)]
        last = len(batch.texts) - 1
        for place, text in enumerate(batch.texts):
            ends = place < last or not batch.continues
            info.documents += ends
            info.characters += len(text)
            yield text, ends


def do_pass(
    step: Step,
    pieces: Pieces,
    units: Sequence[Unit],
    options: ReadOptions,
    executor: Executor,
    alive: Path,
    progress: ByteProgress,
) -> None:
    """Do a step for every piece of every unit that it isn't done for yet.

    Args:
        step: what to do.
        pieces: of the job.
        units: its plan.
        options: how documents are read.
        executor: what works.
        alive: a file that is removed when the run ends.
        progress: hears of input bytes as pieces are done.

    Raises:
        MegamupError: a document can't be read, or a file not written; what is done stays for the next run.
    """

    def start(lane: Lane) -> Future[None]:
        return executor.submit(work_on_lane, step, pieces, options, units[lane.unit], lane, alive)

    def is_done(unit: int) -> bool:
        return pieces.of_unit(unit, step.name) is not None

    def piece_bytes(unit: int, piece: int) -> int | None:
        info = pieces.info(unit, piece, step.name)
        return None if info is None else info.source_bytes

    Schedule(units, executor, start, is_done, piece_bytes, progress).run(range(len(units)))
