"""Input to corpus: units are encoded into pieces by many workers, and pieces assembled into shards, in order.

What comes out is a function of the input and the options alone: not of the number of workers, of how the job is divided
among machines, or of how often it was killed and started again.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from megamup.data.manifest import Manifest, ShardEntry, TokenizerEntry
from megamup.data.preprocess.assemble import Segment, ShardPlan, assemble, assembled
from megamup.data.preprocess.encode import Encoder
from megamup.data.preprocess.pieces import NAMED_DOCUMENTS, PartInfo, PieceFolder, PieceInfo, piece_key
from megamup.data.preprocess.worker import encode_lane, write_encoder
from megamup.data.progress import ByteProgress
from megamup.data.reading.documents import TEXT_OVERHEAD, ReadOptions
from megamup.data.reading.sources import Found
from megamup.data.reading.units import Unit
from megamup.data.tokenizer import store_tokenizer
from megamup.data.work.executors import Executor
from megamup.data.work.folder import WorkFolder
from megamup.data.work.lanes import Lane, Schedule, result_of
from megamup.data.writer import StagedCorpus, publish
from megamup.errors import MegamupError

PIECE_FORMAT = 2
"""Of what units and pieces mean: another number finds no pieces of this one."""
SAMPLE_CHARACTERS = 1 << 18
SAMPLE_TEXT = 1 << 16
"""Characters of the first documents, together and each, on which a fast backend has to give the reference's ids."""


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
    inexact_cuts: int = 0

    def add(self, piece: PieceInfo) -> None:
        for total, part in zip(self.parts, piece.parts, strict=True):
            total.documents += part.documents
            total.tokens += part.tokens
            total.text_bytes += part.text_bytes
            total.text_words += part.text_words
            total.max_id = max(total.max_id, part.max_id)
        self.left_out.update(piece.left_out)
        self.named += piece.named[: NAMED_DOCUMENTS - len(self.named)]
        self.inexact_cuts += piece.inexact_cuts


def first_texts(units: Sequence[Unit], options: ReadOptions) -> Iterator[str]:
    """The beginnings of the first documents, for a check of the tokenizer. Those that can't be read are left out.

    Raises:
        MegamupError: a file can't be read.
    """
    left = SAMPLE_CHARACTERS
    for unit in units:
        for _, batches in unit.pieces(replace(options, on_error="skip"), lambda piece: piece == 0):
            for text in (text for batch in batches for text in batch.texts):
                if left <= 0:
                    return
                yield text[: min(left, SAMPLE_TEXT)]
                left -= len(text[:SAMPLE_TEXT]) + TEXT_OVERHEAD
            break


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
        self._assembling: dict[Future[ShardEntry], tuple[int, int]] = {}

    def encode(self, numbers: Sequence[int], *, assembling: bool) -> None:
        """Encode what isn't done of these units; with `assembling`, make shards of what is, on the way.

        Raises:
            MegamupError: input can't be read, or a file not written; what is done stays for the next run.
        """
        job = self.job
        with self.work.alive() as alive:
            encoder_path = write_encoder(job.encoder, self.work.path)

            def start(lane: Lane) -> Future[None]:
                unit, key = job.units[lane.unit], job.keys[lane.unit]
                return self.executor.submit(encode_lane, encoder_path, job.options, unit, key, lane, alive)

            schedule = Schedule(job.units, self.executor, start, self._is_done, self._piece_bytes, self.progress)
            schedule.run(numbers, self._assemble_what_is_ready if assembling else lambda: None)

    def _is_done(self, number: int) -> bool:
        """Whether all pieces of a unit are there."""
        count = self._n_pieces(number)
        return count is not None and all(self._piece_bytes(number, piece) is not None for piece in range(count))

    def _n_pieces(self, number: int) -> int | None:
        """How many pieces a unit has, None while it isn't known."""
        return self.pieces.stream_end(self.job.keys[number]) if self.job.units[number].is_stream else 1

    def _piece_bytes(self, number: int, piece: int) -> int | None:
        info = self.pieces.info(piece_key(self.job.keys[number], piece))
        return None if info is None else info.source_bytes

    def _assemble_what_is_ready(self) -> None:
        for shard in [future for future in self._assembling if future.done()]:
            part, number = self._assembling.pop(shard)
            self.entries[part][number] = result_of(shard)
        self.feed()

    def feed(self) -> None:
        """Hand on the pieces that are ready, in order, and start on the shards that they fill."""
        while self._next_unit < len(self.job.units):
            if self._next_piece == self._n_pieces(self._next_unit):
                self._next_unit, self._next_piece = self._next_unit + 1, 0
                continue
            key = piece_key(self.job.keys[self._next_unit], self._next_piece)
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
        wait(self._assembling)
        self._assemble_what_is_ready()
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
        entry = TokenizerEntry(tokenizer.name, tokenizer.sha256, folder.name, tokenizer.backend, tokenizer.note)
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
                inexact_cuts=outcome.inexact_cuts,
                text_words=part.text_words,
            )
            staged.append(StagedCorpus(prefix, self.work.path / "shards", manifest))
        store_tokenizer(tokenizer, folder)
        manifests = publish(staged)
        self.work.discard()
        return manifests
