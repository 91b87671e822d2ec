"""Files to shards: read in one process, tokenize in many, write in one, in the order of the input.

The output is the same for any number of workers. Memory is bounded: a few batches a worker are on their way
at a time, and a batch is about a megabyte or one document.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np

from megamup.data.progress import ByteProgress
from megamup.data.readers import Found, Record, parse, records
from megamup.data.shards import Manifest, ShardWriter, publish, token_dtype
from megamup.data.tokenizer import Ids, Tokenizer
from megamup.errors import MegamupError

BATCH_BYTES = 1 << 20
RECORD_OVERHEAD = 64  # bytes that a record costs beside its data, so that empty documents fill a batch too
NAMED_DOCUMENTS = 20  # unreadable documents that the report names; the others it counts


class EncodedPart(NamedTuple):
    """The documents of a batch that go to one shard."""

    ids: Ids  # (tokens,) documents one after the other, each with its end-of-document token
    lengths: list[int]  # (documents,)
    text_bytes: int


class EncodedBatch(NamedTuple):
    parts: list[EncodedPart]
    source_bytes: int
    empty: int
    unreadable: list[str]


@dataclass(frozen=True)
class Encoder:
    """What a worker does with a batch of records."""

    tokenizer: Tokenizer
    text_key: str = "text"
    valid_fraction: float = 0.0
    seed: int = 0
    on_error: Literal["stop", "skip"] = "stop"

    @property
    def n_parts(self) -> int:
        return 2 if self.valid_fraction else 1

    def part_of(self, document: int) -> int:
        """0 (train) or 1 (valid): a hash of (seed, index of the document in the input)."""
        if not self.valid_fraction:
            return 0
        digest = hashlib.blake2b(f"{self.seed}:{document}".encode(), digest_size=8).digest()
        return int(int.from_bytes(digest, "little") < self.valid_fraction * 2**64)

    def encode(self, first_document: int, batch: list[Record]) -> EncodedBatch:
        """Tokenize records; `first_document` is the index of the first in the whole input.

        Raises:
            MegamupError: a record can't be read, unless on_error is "skip".
        """
        dtype = token_dtype(self.tokenizer.vocab_size)
        end = np.array([self.tokenizer.eod_id], dtype=dtype)
        pieces: list[list[Ids]] = [[] for _ in range(self.n_parts)]
        lengths: list[list[int]] = [[] for _ in range(self.n_parts)]
        text_bytes = [0] * self.n_parts
        empty, unreadable = 0, []
        for document, record in enumerate(batch, start=first_document):
            try:
                text = parse(record, self.text_key)
            except MegamupError as error:
                if self.on_error == "stop":
                    raise
                unreadable.append(str(error))
                continue
            if not text:
                empty += 1
                continue
            ids = self.tokenizer.encode(text)
            part = self.part_of(document)
            pieces[part] += [ids.astype(dtype), end]
            lengths[part].append(len(ids) + 1)
            text_bytes[part] += len(text) if text.isascii() else len(text.encode())
        nothing = np.empty(0, dtype)
        parts = [
            EncodedPart(np.concatenate([nothing, *pieces[part]]), lengths[part], text_bytes[part])
            for part in range(self.n_parts)
        ]
        return EncodedBatch(parts, sum(record.source_bytes for record in batch), empty, unreadable)


@dataclass
class Report:
    """What `preprocess` did."""

    shards: dict[str, Manifest] = field(default_factory=dict)
    """By prefix."""
    empty: int = 0
    """Documents without text, left out."""
    unreadable: int = 0
    """Documents that couldn't be read, left out."""
    named: list[str] = field(default_factory=list)
    """What was wrong with the first of these."""


def preprocess(found: Found, encoder: Encoder, prefix: str, workers: int = 1) -> Report:
    """Tokenize files into the shard `prefix`; with a valid fraction into `prefix`_train and `prefix`_valid.

    All shards appear together at the end, or none does.

    Raises:
        MegamupError: a document can't be read, nothing is left for a shard, or a shard can't be written.
    """
    report = Report()
    prefixes = [prefix] if encoder.n_parts == 1 else [f"{prefix}_train", f"{prefix}_valid"]
    text_bytes = [0] * len(prefixes)
    tokenizer = encoder.tokenizer
    with ExitStack() as stack:
        writers = [stack.enter_context(ShardWriter(name, tokenizer.vocab_size)) for name in prefixes]
        progress = stack.enter_context(ByteProgress("tokenizing", found.total_bytes))
        for encoded in _encoded_batches(_batches(found.files), encoder, workers):
            for place, part in enumerate(encoded.parts):
                writers[place].add(part.ids, part.lengths)
                text_bytes[place] += part.text_bytes
            report.empty += encoded.empty
            report.unreadable += len(encoded.unreadable)
            report.named += encoded.unreadable[: NAMED_DOCUMENTS - len(report.named)]
            progress.advance(encoded.source_bytes)
        _check_not_empty(writers, encoder, report)
        for writer, size in zip(writers, text_bytes, strict=True):
            report.shards[writer.prefix] = writer.finish(
                eod_id=tokenizer.eod_id,
                tokenizer=tokenizer.name,
                tokenizer_sha256=tokenizer.sha256,
                text_bytes=size,
                sources=found.sources,
            )
        publish(writers)
    return report


def _check_not_empty(writers: list[ShardWriter], encoder: Encoder, report: Report) -> None:
    empty = [writer.prefix for writer in writers if not writer.n_tokens]
    if len(empty) == len(writers):
        raise MegamupError(
            f"no documents: {report.empty:,} were empty and {report.unreadable:,} unreadable"
            + (f", the first: {report.named[0]}" if report.named else "")
        )
    if empty:
        raise MegamupError(
            f"no document fell into {empty[0]!r} with --valid-fraction {encoder.valid_fraction}: "
            "a document goes to one side whole; give more documents, another fraction or another --seed"
        )


def _batches(files: list[str]) -> Iterator[tuple[int, list[Record]]]:
    """Records by the megabyte, with the index of the first."""
    batch: list[Record] = []
    first, size = 0, 0
    for path in files:
        for record in records(path):
            batch.append(record)
            size += len(record.data) + RECORD_OVERHEAD
            if size >= BATCH_BYTES:
                yield first, batch
                first, size, batch = first + len(batch), 0, []
    if batch:
        yield first, batch


def _encoded_batches(
    batches: Iterator[tuple[int, list[Record]]], encoder: Encoder, workers: int
) -> Iterator[EncodedBatch]:
    """Encode in `workers` processes (1: in this one); results come in the order of the batches."""
    if workers == 1:
        for first, batch in batches:
            yield encoder.encode(first, batch)
        return
    # Spawned, not forked: a fork would inherit the open shards with their locks.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, context, initializer=_start_worker, initargs=(encoder,))
    waiting: deque[Future[EncodedBatch]] = deque()
    try:
        for first, batch in batches:
            waiting.append(_submit(pool, first, batch))
            if len(waiting) > 2 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool as error:
        raise MegamupError(
            "a worker process died, most likely of too little memory; use fewer --workers or split documents"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _submit(pool: ProcessPoolExecutor, first: int, batch: list[Record]) -> Future[EncodedBatch]:
    """Submit a batch, with Ctrl-C held back meanwhile.

    Ctrl-C reaches all processes of a terminal. Workers that `submit` starts inherit the held signal, so it is
    the parent alone that stops, and then stops them.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        return pool.submit(_work, first, batch)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


_encoder: Encoder


def _start_worker(encoder: Encoder) -> None:
    global _encoder
    _encoder = encoder
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    """A killed parent can't stop its workers: they would wait for work for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _work(first_document: int, batch: list[Record]) -> EncodedBatch:
    return _encoder.encode(first_document, batch)
