"""Writing a corpus: shards are staged in a folder beside it, synced and read back, and renamed all together."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from megamup.data.manifest import Manifest, ShardEntry, TokenizerEntry, file_sha256, sample_sha256
from megamup.data.shards import CHUNK, Lengths, shard_path, token_dtype, write_index
from megamup.data.tokenizer import Ids
from megamup.errors import MegamupError
from megamup.files import sync_folder

UNSPLIT = 1 << 62
"""A shard size that nothing reaches."""


class StagedShard:
    """One shard on its way: `NAME.bin` and `NAME.idx` in a staging folder.

    Args:
        folder: where it is written; made if missing.
        name: without suffix.
        dtype: of the ids.

    Raises:
        MegamupError: from every method, where a file can't be written.
    """

    def __init__(self, folder: Path, name: str, dtype: np.dtype[Any]) -> None:
        self.name, self.dtype = name, dtype
        self.bin_path, self.idx_path = folder / f"{name}.bin", folder / f"{name}.idx"
        self._lengths_path = folder / f"{name}.len"
        self.documents = self.tokens = 0
        self._digest = hashlib.sha256()
        with writing(self.bin_path):
            folder.mkdir(parents=True, exist_ok=True)
            self._bin = open(self.bin_path, "wb", buffering=1 << 20)  # noqa: SIM115  closed by finish or close
            self._lengths = open(self._lengths_path, "wb", buffering=1 << 20)  # noqa: SIM115

    def write(self, ids: bytes | memoryview) -> None:
        """Append ids, as bytes of `dtype`."""
        with writing(self.bin_path):
            self._bin.write(ids)
        self._digest.update(ids)
        self.tokens += len(ids) // self.dtype.itemsize

    def end_documents(self, lengths: Lengths) -> None:
        """Say how the ids written fall into documents. Shape (documents,)."""
        with writing(self._lengths_path):
            self._lengths.write(lengths.astype("<i8").tobytes())
        self.documents += len(lengths)

    def finish(self) -> ShardEntry:
        """Write the index, bring both files to the disk and read them back.

        Raises:
            MegamupError: what the disk holds isn't what was written.
        """
        with writing(self.idx_path):
            self._bin.flush()
            os.fsync(self._bin.fileno())
            self._lengths.flush()
            with open(self.idx_path, "wb", buffering=1 << 20) as index:
                write_index(index, self.dtype, self._read_lengths)
                index.flush()
                os.fsync(index.fileno())
        self.close()
        written = file_sha256(self.bin_path)
        if written != self._digest.hexdigest():
            raise MegamupError(
                f"{self.bin_path}: what was read back isn't what was written (SHA-256 {written}, expected "
                f"{self._digest.hexdigest()}): the disk or the memory is failing"
            )
        self._lengths_path.unlink()
        return ShardEntry(
            name=self.name,
            documents=self.documents,
            tokens=self.tokens,
            bin_sha256=written,
            idx_sha256=file_sha256(self.idx_path),
            sample_sha256=sample_sha256(self.bin_path, self.idx_path),
        )

    def _read_lengths(self) -> Iterator[Lengths]:
        with open(self._lengths_path, "rb") as file:
            while block := file.read(8 * CHUNK):
                yield np.frombuffer(block, dtype="<i8").astype(np.int64, copy=False)

    def close(self) -> None:
        for file in (self._bin, self._lengths):
            with suppress(OSError):  # closing flushes, which fails again on a full disk
                file.close()


class writing:  # noqa: N801  reads as a statement
    """Turn an OSError of the block into a MegamupError that names the file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> None: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, OSError):
            raise MegamupError(
                f"{self.path}: cannot be written: {error.strerror}; nothing is lost: mend that, and start the same "
                "command again"
            ) from error


@dataclass(frozen=True)
class StagedCorpus:
    """Finished shards in a staging folder, and the manifest (with staged names) that they will get."""

    prefix: str
    folder: Path
    manifest: Manifest


def final_names(prefix: str, shards: int) -> list[str]:
    """Names of a corpus's shards: the prefix's own for one, numbered for more."""
    name = Path(prefix).name
    return [name] if shards == 1 else [f"{name}-{number:05d}" for number in range(shards)]


def publish(corpora: Sequence[StagedCorpus]) -> dict[str, Manifest]:
    """Put staged corpora in the place of earlier ones of their names, all of them together; returns their manifests.

    Old manifests and indices go first, new manifests come last: a process that dies in between leaves no manifest
    over tokens that aren't its own.

    Raises:
        MegamupError: a staged file is missing, or can't be renamed.
    """
    manifests = {}
    moves: dict[str, dict[Path, Path]] = {}
    for corpus in corpora:
        folder, entries = Path(corpus.prefix).parent, corpus.manifest.shards
        named = tuple(map(_renamed, entries, final_names(corpus.prefix, len(entries))))
        manifests[corpus.prefix] = replace(corpus.manifest, shards=named)
        moves[corpus.prefix] = {
            corpus.folder / (old.name + suffix): folder / (new.name + suffix)
            for old, new in zip(entries, named, strict=True)
            for suffix in (".bin", ".idx")
        }
    for prefix in moves:
        with writing(shard_path(prefix, ".json")):
            _remove(prefix)
    for prefix, files in moves.items():
        with writing(Path(prefix)):
            for staged, target in files.items():
                os.replace(staged, target)
            sync_folder(Path(prefix).parent)
    for prefix, manifest in manifests.items():
        with writing(shard_path(prefix, ".json")):
            manifest.write(shard_path(prefix, ".json"))
            sync_folder(Path(prefix).parent)
    return manifests


def _renamed(entry: ShardEntry, name: str) -> ShardEntry:
    return replace(entry, name=name)


def _remove(prefix: str) -> None:
    """Remove the corpus at `prefix`, its manifest first; Megatron's files of that name too."""
    path = shard_path(prefix, ".json")
    names = [Path(prefix).name]
    if path.is_file():
        with suppress(MegamupError):  # a broken manifest names nothing to remove
            names += [shard.name for shard in Manifest.read(path).shards]
        path.unlink()
        sync_folder(path.parent)
    for name in names:
        for suffix in (".idx", ".bin"):
            (path.parent / (name + suffix)).unlink(missing_ok=True)


def documents_that_fit(lengths: Lengths, used: int, limit: int) -> int:
    """How many of these documents a shard still takes that holds `used` of at most `limit` tokens.

    A shard without a token takes one, whatever its length. Lengths of shape (documents,).
    """
    ends = np.cumsum(lengths)
    fit = int(np.searchsorted(ends, limit - used, side="right"))
    if used == 0 and fit < len(lengths) and (fit == 0 or ends[fit - 1] == 0):
        fit += 1
    return fit


class CorpusWriter:
    """Write documents to a corpus in shards of a bounded size; `finish` makes it appear.

    Use as a context manager: left without `finish`, it removes what it wrote, and an earlier corpus of that name
    stays as it was.

    Args:
        prefix: of the corpus.
        dtype: of the ids.
        shard_bytes: a new shard begins before the document that would make a .bin larger than this.

    Raises:
        MegamupError: from every method, where a file can't be written.
    """

    def __init__(self, prefix: str, dtype: np.dtype[Any], shard_bytes: int = UNSPLIT) -> None:
        self.prefix, self.dtype = prefix, dtype
        self.folder = Path(f"{prefix}.staging-{os.getpid()}")
        self.max_id = -1
        self._limit = max(shard_bytes // dtype.itemsize, 1)
        self._shard: StagedShard | None = None
        self._entries: list[ShardEntry] = []

    def __enter__(self) -> CorpusWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._shard is not None:
            self._shard.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def add(self, ids: Ids, lengths: npt.ArrayLike) -> None:
        """Append documents.

        Args:
            ids: the documents' ids one after the other, end-of-document tokens included. Shape (tokens,).
            lengths: tokens of each document. Shape (documents,).

        Raises:
            ValueError: `lengths` don't add up to the number of ids, or `dtype` can't hold an id.
        """
        counts: Lengths = np.asarray(lengths, dtype=np.int64)
        if counts.sum() != len(ids) or counts.min(initial=0) < 0:
            raise ValueError(f"lengths add up to {counts.sum()}, for {len(ids)} ids")
        if len(ids):
            low, high, bounds = int(ids.min()), int(ids.max()), np.iinfo(self.dtype)
            if low < 0 or high > bounds.max:
                raise ValueError(f"ids {low} to {high} don't fit in {self.dtype.name}")
            self.max_id = max(self.max_id, high)
        start = 0
        for first, last in self._runs(counts):
            stop = start + int(counts[first:last].sum())
            assert self._shard is not None
            self._shard.write(np.ascontiguousarray(ids[start:stop], dtype=self.dtype).view(np.uint8).data)
            self._shard.end_documents(counts[first:last])
            start = stop

    def _runs(self, counts: Lengths) -> Iterator[tuple[int, int]]:
        """Documents as (first, last) that go to one shard, which is then the current one."""
        first = 0
        while first < len(counts):
            if self._shard is None:
                self._shard = StagedShard(self.folder, f"{len(self._entries):05d}", self.dtype)
            last = first + documents_that_fit(counts[first:], self._shard.tokens, self._limit)
            if last > first:
                yield first, last
            if last < len(counts):
                self._close_shard()
            first = last

    def _close_shard(self) -> None:
        if self._shard is not None:
            self._entries.append(self._shard.finish())
            self._shard = None

    def finish(
        self,
        *,
        vocab_size: int,
        eod_id: int,
        tokenizer: TokenizerEntry,
        text_bytes: int = 0,
        text_words: int = 0,
        sources: list[dict[str, Any]] | None = None,
    ) -> Manifest:
        """Bring everything to the disk and publish it.

        Raises:
            MegamupError: no documents, or an id outside the vocabulary.
        """
        self._close_shard()
        if not any(entry.tokens for entry in self._entries):
            raise MegamupError(f"{self.prefix!r}: no documents to write")
        if self.max_id >= vocab_size:
            raise MegamupError(f"{self.prefix!r}: token id {self.max_id:,} outside a vocabulary of {vocab_size:,}")
        manifest = Manifest(
            documents=sum(entry.documents for entry in self._entries),
            tokens=sum(entry.tokens for entry in self._entries),
            dtype=self.dtype.name,
            vocab_size=vocab_size,
            max_id=self.max_id,
            eod_id=eod_id,
            text_bytes=text_bytes,
            text_words=text_words,
            tokenizer=tokenizer,
            shards=tuple(self._entries),
            sources=sources or [],
        )
        return publish([StagedCorpus(self.prefix, self.folder, manifest)])[self.prefix]


def write_corpus(
    prefix: str,
    documents: Iterable[Sequence[int] | Ids],
    vocab_size: int,
    eod_id: int,
    tokenizer: TokenizerEntry | None = None,
    shard_bytes: int = UNSPLIT,
) -> Manifest:
    """Write documents of ids, which end themselves with `eod_id`, as a corpus of the vocabulary's dtype.

    Raises:
        MegamupError: see `CorpusWriter`.
    """
    with CorpusWriter(prefix, token_dtype(vocab_size), shard_bytes) as writer:
        for document in documents:
            ids = np.asarray(document, dtype=np.int64)
            writer.add(ids, [len(ids)])
        return writer.finish(vocab_size=vocab_size, eod_id=eod_id, tokenizer=tokenizer or TokenizerEntry.unknown())
