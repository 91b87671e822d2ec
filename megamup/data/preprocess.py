"""Input to corpus: units are encoded into pieces by many workers, and pieces assembled into shards, in order.

What comes out is a function of the input and the options alone: not of the number of workers, of how the job is divided
among machines, or of how often it was killed and started again.
"""

from __future__ import annotations

import hashlib
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from megamup.data.assemble import Segment, ShardPlan, assemble, assembled
from megamup.data.documents import ReadOptions
from megamup.data.encode import Encoder
from megamup.data.executors import Executor
from megamup.data.manifest import Manifest, ShardEntry, TokenizerEntry
from megamup.data.pieces import NAMED_DOCUMENTS, PartInfo, PieceFolder, PieceInfo, piece_key
from megamup.data.progress import ByteProgress
from megamup.data.sources import Found
from megamup.data.tokenizer import store_tokenizer
from megamup.data.units import Unit
from megamup.data.work import encode_unit
from megamup.data.work_folder import WorkFolder
from megamup.data.writer import StagedCorpus, publish
from megamup.errors import MegamupError

PIECE_FORMAT = 1
"""Of what units and pieces mean: another number finds no pieces of this one."""
POLL_SECONDS = 0.2
SAMPLE_CHARACTERS = 1 << 18
SAMPLE_TEXT = 1 << 16
"""Characters of the first documents, together and each, on which a fast backend has to give the reference's ids."""
MOST_LANES = 4
"""Lanes of a stream: each decompresses all of it, so that more would do little but that."""


@dataclass(frozen=True)
class Job:
    """What is to be made of what."""

    prefix: str
    found: Found
    units: list[Unit]
    options: ReadOptions
    encoder: Encoder
    shard_bytes: int

    @property
    def prefixes(self) -> list[str]:
        """Of the corpora that come out."""
        return [self.prefix] if self.encoder.n_parts == 1 else [f"{self.prefix}_train", f"{self.prefix}_valid"]

    def described_options(self) -> dict[str, Any]:
        """The options that the output depends on, for the manifest."""
        return {
            "text_keys": list(self.options.text_keys),
            "key_separator": self.options.separator,
            "on_error": self.options.on_error,
            "filters": list(self.encoder.filters),
            "valid_fraction": self.encoder.valid_fraction,
            "seed": self.encoder.seed,
            "shard_bytes": self.shard_bytes,
        }

    @cached_property
    def keys(self) -> list[str]:
        """A hash for each unit of all that its pieces depend on; a unit that comes again has another."""
        common = (PIECE_FORMAT, self.options.text_keys, self.options.separator, self.encoder.digest)
        seen: Counter[str] = Counter()
        keys = []
        for unit in self.units:
            content = repr((common, unit))
            keys.append(hashlib.sha256(f"{content}{seen[content]}".encode()).hexdigest()[:32])
            seen[content] += 1
        return keys


@dataclass
class Outcome:
    """What became of a job's documents."""

    parts: list[PartInfo]
    left_out: Counter[str] = field(default_factory=Counter)
    named: list[str] = field(default_factory=list)
    """What was wrong with the first unreadable documents."""
    forced_cuts: int = 0

    def add(self, piece: PieceInfo) -> None:
        for total, part in zip(self.parts, piece.parts, strict=True):
            total.documents += part.documents
            total.tokens += part.tokens
            total.text_bytes += part.text_bytes
            total.max_id = max(total.max_id, part.max_id)
        self.left_out.update(piece.left_out)
        self.named += piece.named[: NAMED_DOCUMENTS - len(self.named)]
        self.forced_cuts += piece.forced_cuts


def first_texts(units: Sequence[Unit], options: ReadOptions) -> Iterator[str]:
    """The beginnings of the first documents, for a check of the tokenizer.

    Raises:
        MegamupError: a document can't be read.
    """
    left = SAMPLE_CHARACTERS
    for unit in units:
        for _, batches in unit.pieces(options, lambda piece: piece == 0):
            for text in (text for batch in batches for text in batch.texts):
                if left <= 0:
                    return
                yield text[: min(left, SAMPLE_TEXT)]
                left -= len(text[:SAMPLE_TEXT])
            break


@dataclass(frozen=True)
class Lane:
    """A task: some of the pieces of one unit."""

    unit: int
    lane: int
    lanes: int


class Run:
    """One process's work on a job.

    Args:
        job: what to do.
        work: its folder, held.
        executor: what encodes and assembles.
        progress: hears of input bytes as pieces are done.
    """

    def __init__(self, job: Job, work: WorkFolder, executor: Executor, progress: ByteProgress) -> None:
        self.job, self.work, self.executor, self.progress = job, work, executor, progress
        self.pieces = PieceFolder(work.path / "pieces", job.options.on_error == "skip")
        n_parts = job.encoder.n_parts
        self.outcome = Outcome([PartInfo() for _ in range(n_parts)])
        self.entries: list[list[ShardEntry | None]] = [[] for _ in range(n_parts)]
        limit = job.shard_bytes // job.encoder.dtype.itemsize
        self._plans = [ShardPlan(limit, partial(self.pieces.lengths, part=part)) for part in range(n_parts)]
        self._next_unit = self._next_piece = 0
        self._encoding: dict[Future[None], Lane] = {}
        self._assembling: dict[Future[ShardEntry], tuple[int, int]] = {}
        self._seen: dict[Lane, int] = {}

    def encode(self, units: Iterable[int], *, assembling: bool) -> None:
        """Encode what isn't done of these units; with `assembling`, make shards of what is, on the way.

        Raises:
            MegamupError: input can't be read, or a file not written; what is done stays for the next run.
        """
        waiting = deque(self._lanes(list(units)))
        with self.work.alive() as alive:
            encoder_path = self.work.write_encoder(self.job.encoder)
            while waiting or self._encoding:
                while waiting and len(self._encoding) < 2 * self.executor.workers:
                    lane = waiting.popleft()
                    arguments = (self.job.keys[lane.unit], lane.lane, lane.lanes, alive)
                    unit = self.job.units[lane.unit]
                    future = self.executor.submit(encode_unit, encoder_path, self.job.options, unit, *arguments)
                    self._encoding[future] = lane
                wait([*self._encoding, *self._assembling], POLL_SECONDS, FIRST_COMPLETED)
                self._look(assembling)
            while self._assembling:
                wait(self._assembling, return_when=FIRST_COMPLETED)
                self._look(assembling)

    def _lanes(self, units: list[int]) -> list[Lane]:
        """Tasks in the order of the plan; a stream that is much of the work is divided among workers."""
        total = max(sum(self.job.units[number].source_bytes for number in units), 1)
        lanes = []
        for number in units:
            unit = self.job.units[number]
            share = min(round(self.executor.workers * unit.source_bytes / total), MOST_LANES) if unit.is_stream else 1
            of_unit = [Lane(number, lane, max(share, 1)) for lane in range(max(share, 1))]
            if self._is_done(number):
                for lane in of_unit:
                    self._advance(lane)
            else:
                lanes += of_unit
        return lanes

    def _is_done(self, number: int) -> bool:
        """Whether all pieces of a unit are there."""
        key = self.job.keys[number]
        count = self.pieces.stream_end(key) if self.job.units[number].is_stream else 1
        return count is not None and all(self.pieces.info(piece_key(key, piece)) for piece in range(count))

    def _advance(self, lane: Lane) -> None:
        """Count the pieces of a lane that are new."""
        piece = self._seen.get(lane, lane.lane)
        while info := self.pieces.info(piece_key(self.job.keys[lane.unit], piece)):
            self.progress.advance(info.source_bytes)
            piece += lane.lanes
        self._seen[lane] = piece

    def _look(self, assembling: bool) -> None:
        """Take note of what has become ready."""
        for lane in self._encoding.values():
            self._advance(lane)
        for future in [future for future in self._encoding if future.done()]:
            del self._encoding[future]
            self._result(future)
        for shard in [future for future in self._assembling if future.done()]:
            part, number = self._assembling.pop(shard)
            self.entries[part][number] = self._result(shard)
        if assembling:
            self.feed()

    def _result(self, future: Future[Any]) -> Any:
        try:
            return future.result()
        except BrokenProcessPool as error:
            raise MegamupError(
                "a worker process died, most likely of too little memory; what is done is kept: start the same command "
                "again with fewer --workers"
            ) from error

    def feed(self) -> None:
        """Hand on the pieces that are ready, in order, and start on the shards that they fill."""
        while self._next_unit < len(self.job.units):
            unit, unit_key = self.job.units[self._next_unit], self.job.keys[self._next_unit]
            end = self.pieces.stream_end(unit_key) if unit.is_stream else 1
            if self._next_piece == end:
                self._next_unit, self._next_piece = self._next_unit + 1, 0
                continue
            key = piece_key(unit_key, self._next_piece)
            info = self.pieces.info(key)
            if info is None:
                return
            self.outcome.add(info)
            for part, plan in enumerate(self._plans):
                for segments in plan.feed(key, info.parts[part]):
                    self._assemble(part, segments)
            self._next_piece += 1

    def _assemble(self, part: int, segments: list[Segment]) -> None:
        number = len(self.entries[part])
        self.entries[part].append(assembled(self.work.path, part, segments))
        if self.entries[part][number] is None:
            future = self.executor.submit(assemble, self.work.path, part, segments, self.job.encoder.dtype)
            self._assembling[future] = part, number

    def finish(self) -> dict[str, Manifest]:
        """Make the last shards and publish all; returns the manifests by prefix.

        Raises:
            MegamupError: a unit isn't done, or nothing is left for a corpus.
        """
        self.feed()
        if self._next_unit < len(self.job.units):
            raise MegamupError(
                f"{self.work.path}: {self.job.units[self._next_unit].name} isn't tokenized yet; run the parts that are "
                "missing (--part) before --merge"
            )
        self._check_not_empty()
        for part, plan in enumerate(self._plans):
            if plan.segments:
                self._assemble(part, plan.finish())
        self.encode([], assembling=False)
        return self._publish()

    def _check_not_empty(self) -> None:
        prefixes, outcome = self.job.prefixes, self.outcome
        empty = [prefix for prefix, part in zip(prefixes, outcome.parts, strict=True) if not part.documents]
        if not empty:
            return
        self.work.discard()  # nothing in it can become anything
        if len(empty) == len(prefixes):
            reasons = (
                ", ".join(f"{count:,} {reason}" for reason, count in sorted(outcome.left_out.items())) or "no text"
            )
            raise MegamupError(
                f"no documents are left: {reasons}" + (f"; the first: {outcome.named[0]}" if outcome.named else "")
            )
        raise MegamupError(
            f"no document fell into {empty[0]!r} with --valid-fraction {self.job.encoder.valid_fraction}: "
            "a document goes to one side whole; give more documents, another fraction or another --seed"
        )

    def _publish(self) -> dict[str, Manifest]:
        tokenizer, outcome = self.job.encoder.tokenizer, self.outcome
        folder = Path(f"{self.job.prefix}.tokenizer")
        entry = TokenizerEntry(
            tokenizer.name, tokenizer.sha256, folder.name, tokenizer.backend, tokenizer.note
        )
        staged = []
        for prefix, part, entries in zip(self.job.prefixes, outcome.parts, self.entries, strict=True):
            manifest = Manifest(
                documents=part.documents,
                tokens=part.tokens,
                dtype=self.job.encoder.dtype.name,
                vocab_size=tokenizer.vocab_size,
                max_id=part.max_id,
                eod_id=tokenizer.eod_id,
                text_bytes=part.text_bytes,
                tokenizer=entry,
                shards=tuple(shard for shard in entries if shard is not None),
                sources=self.job.found.inputs,
                options=self.job.described_options(),
                left_out=dict(sorted(outcome.left_out.items())),
                forced_cuts=outcome.forced_cuts,
            )
            staged.append(StagedCorpus(prefix, self.work.path / "shards", manifest))
        store_tokenizer(tokenizer, folder)
        manifests = publish(staged)
        self.work.discard()
        return manifests
