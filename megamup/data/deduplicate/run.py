"""A corpus without its duplicates, as JSON lines.

The input is read twice, in the units and pieces in which `preprocess` reads it: for signatures, and, when these have
told which documents stay, to write those. Each piece leaves a file in the work folder either time; one that is there
isn't made again, as long as neither the input nor an option has changed.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import sys
import uuid
from collections.abc import Container, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
import orjson

from megamup.data.deduplicate.duplicates import (
    Method,
    Signature,
    SignatureFiles,
    first_equals,
    keys_path,
    write_signatures,
)
from megamup.data.deduplicate.passes import PieceInfo, Pieces, Step, do_pass
from megamup.data.preprocess.pieces import NAMED_DOCUMENTS
from megamup.data.progress import ByteProgress
from megamup.data.reading.documents import ReadOptions
from megamup.data.reading.sources import Found
from megamup.data.reading.units import UNIT_BYTES, Unit, plan_units
from megamup.data.work.executors import Executor
from megamup.data.work.folder import WorkFolder
from megamup.data.writer import writing
from megamup.errors import MegamupError
from megamup.files import sync_folder, write_json_atomic

FORMAT = 1
"""Of what lies in the work folder: another number finds nothing of this one."""


@dataclass(frozen=True)
class Job:
    """What is to be made of what.

    Args:
        output: the folder that comes out.
        found: the input.
        options: how documents are read.
        method: what a duplicate is.
        compress: write zstd.

    Raises:
        MegamupError: there is something at the output's place.
    """

    output: str
    found: Found
    options: ReadOptions
    method: Method
    compress: bool = False

    def __post_init__(self) -> None:
        path = Path(self.output)
        if path.exists() and not (path.is_dir() and not any(path.iterdir())):
            raise MegamupError(f"--output {self.output}: exists already; remove it, or name another folder")

    @cached_property
    def units(self) -> list[tuple[int, Unit]]:
        """Each unit with the place of its input in `found.inputs`; none goes over two inputs."""
        units: list[tuple[int, Unit]] = []
        first = 0
        for place, entry in enumerate(self.found.inputs):
            sources = self.found.sources[first : first + entry["files"]]
            units += ((place, unit) for unit in plan_units(Found(sources)))
            first += len(sources)
        return units

    @cached_property
    def key(self) -> str:
        """Of all that the output depends on."""
        states = [(source.name, source.state) for source in self.found.sources]
        values = (FORMAT, UNIT_BYTES, asdict(self.options), self.compress, self.described_method(), states)
        return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:16]

    def described_method(self) -> dict[str, Any]:
        return {"name": type(self.method).__name__.lower(), **asdict(cast(Any, self.method))}


@dataclass(frozen=True)
class Sign:
    """Writes the signatures of a piece's documents."""

    method: Method
    name = "signed"

    def run(self, path: Path, texts: Iterator[tuple[str, bool]]) -> None:
        signer = self.method.signer()

        def signatures() -> Iterator[Signature]:
            for text, ends in texts:
                signer.add(text)
                if ends:
                    yield signer.finish()

        beside = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
        try:
            if write_signatures(beside, signatures(), self.method):
                os.replace(keys_path(beside), keys_path(_signatures_path(path)))
                os.replace(beside, _signatures_path(path))
        finally:
            beside.unlink(missing_ok=True)


def _signatures_path(path: Path) -> Path:
    return path.with_name(f"{path.name}.signatures")


def _dropped_path(path: Path) -> Path:
    """Where it stands which documents of a piece are duplicates, by number. Shape (duplicates,)."""
    return path.with_name(f"{path.name}.dropped.npy")


@dataclass(frozen=True)
class Write:
    """Writes the documents of a piece that stay, if any do, to a file of its own."""

    folder: Path
    compress: bool
    name = "written"

    def run(self, path: Path, texts: Iterator[tuple[str, bool]]) -> None:
        dropped = frozenset(np.load(_dropped_path(path)).tolist())
        numbers = path.name.partition("-")[2]
        target = self.folder / f"{numbers}.jsonl{'.zst' if self.compress else ''}"
        beside = target.with_name(f"{target.name}.{uuid.uuid4().hex}.tmp")
        try:
            with open(beside, "wb", buffering=1 << 20) as file:
                with _zstd(file) if self.compress else nullcontext(file) as lines:
                    stay = _write_lines(lines, texts, dropped)
                file.flush()
                os.fsync(file.fileno())
            if stay:
                os.replace(beside, target)
        finally:
            beside.unlink(missing_ok=True)


def _zstd(file: BinaryIO) -> Any:
    name = "compression.zstd" if sys.version_info >= (3, 14) else "backports.zstd"
    try:
        return importlib.import_module(name).ZstdFile(file, "w")
    except ImportError as error:
        raise MegamupError(f"--compress: {error}; pip install 'megamup[data]', or leave it out") from error


def _write_lines(lines: BinaryIO, texts: Iterator[tuple[str, bool]], dropped: Container[int]) -> int:
    """Write the documents that aren't `dropped` as lines of JSON; returns their number."""
    document = stay = 0
    begins = True
    for text, ends in texts:
        if document not in dropped:
            stay += ends
            lines.write(b'{"text":"' if begins else b"")
            lines.write(memoryview(orjson.dumps(text))[1:-1])  # escapes of texts joined are those of the whole
            lines.write(b'"}\n' if ends else b"")
        begins = ends
        document += ends
    return stay


class Run:
    """Work on a job.

    Args:
        job: what to do.
        work: its folder, held.
        executor: what reads and writes.
    """

    def __init__(self, job: Job, work: WorkFolder, executor: Executor) -> None:
        self.job, self.work, self.executor = job, work, executor
        self.pieces = Pieces(work.path / "pieces", job.key)
        self.documents = work.path / f"documents-{job.key}"

    def run(self) -> dict[str, Any]:
        """All of it; returns the report that is written beside the output.

        Raises:
            MegamupError: a document can't be read, there are none, the input changes meanwhile, or a file can't be
                written. What is done stays for the next run.
        """
        self._pass(Sign(self.job.method), "reading")
        read = self._infos(Sign.name)
        dropped = self._find_duplicates(read)
        with writing(self.documents):
            self.documents.mkdir(exist_ok=True)
        self._pass(Write(self.documents, self.job.compress), "writing")
        for (place, _, info), (_, _, again) in zip(read, self._infos(Write.name), strict=True):
            if info != again:
                raise MegamupError(f"{self.job.found.inputs[place]['path']}: changed while it was read; start again")
        report = self._report(read, dropped)
        self._publish(report)
        return report

    def _pass(self, step: Step, label: str) -> None:
        units = [unit for _, unit in self.job.units]
        with ByteProgress(label, self.job.found.total_bytes) as progress, self.work.alive() as alive:
            do_pass(step, self.pieces, units, self.job.options, self.executor, alive, progress)

    def _infos(self, step: str) -> list[tuple[int, Path, PieceInfo]]:
        """What a pass read of each piece, in order: (place of the input, path of the piece, info)."""
        return [
            (place, self.pieces.path(number, piece), info)
            for number, (place, _) in enumerate(self.job.units)
            for piece, info in enumerate(self.pieces.of_unit(number, step) or ())
        ]

    def _find_duplicates(self, read: list[tuple[int, Path, PieceInfo]]) -> list[int]:
        """Write down which documents of each piece are duplicates; returns how many."""
        counts = [info.documents for _, _, info in read]
        files = SignatureFiles([_signatures_path(path) for _, path, _ in read], counts, self.job.method)
        if not len(files):
            named = [line for _, _, info in read for line in info.named]
            raise MegamupError(
                "no documents in the input" + (f"; the first unreadable one: {named[0]}" if named else "")
            )
        print(f"comparing {len(files):,} documents", file=sys.stderr)
        duplicates = first_equals(files) != np.arange(len(files))
        dropped = [np.flatnonzero(part) for part in np.split(duplicates, np.cumsum(counts)[:-1])]
        for (_, path, _), documents in zip(read, dropped, strict=True):
            with writing(path):
                np.save(_dropped_path(path), documents)
        return list(map(len, dropped))

    def _report(self, read: list[tuple[int, Path, PieceInfo]], dropped: list[int]) -> dict[str, Any]:
        inputs = [
            {"path": entry["path"], "documents": 0, "duplicates": 0, "unreadable": 0} for entry in self.job.found.inputs
        ]
        for (place, _, info), duplicates in zip(read, dropped, strict=True):
            inputs[place]["documents"] += info.documents
            inputs[place]["duplicates"] += duplicates
            inputs[place]["unreadable"] += info.unreadable
        documents = sum(info.documents for _, _, info in read)
        return {
            "method": self.job.described_method(),
            "documents": documents,
            "duplicates": sum(dropped),
            "kept": documents - sum(dropped),
            "unreadable": sum(info.unreadable for _, _, info in read),
            "unreadable_named": [line for _, _, info in read for line in info.named][:NAMED_DOCUMENTS],
            "inputs": inputs,
        }

    def _publish(self, report: dict[str, Any]) -> None:
        """Give the output its name, after the report."""
        output = Path(self.job.output)
        with writing(output):
            write_json_atomic(report_path(self.job.output), report)
            sync_folder(self.documents)
            os.rename(self.documents, output)
            sync_folder(output.absolute().parent)
        self.work.discard()


def report_path(output: str) -> Path:
    """Where the report on an output lies: beside it, so that all in the folder is documents."""
    return Path(f"{output}.report.json")
