"""A corpus: the shards of one manifest as one stream of documents, or one shard of Megatron's."""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import numpy as np

from megamup.data.cache import cached_content_hash, cached_sha256
from megamup.data.manifest import SAMPLES, Manifest, ShardEntry, sample_sha256
from megamup.data.shards import Lengths, Shard, missing_hint, shard_path
from megamup.data.tokenizer import Ids
from megamup.errors import MegamupError

SAMPLE_TOKENS = 1024
"""Tokens of each sample of the stream."""


class Corpus:
    """What lies at a prefix: `PREFIX.json` and its shards, or else Megatron's `PREFIX.bin` and `PREFIX.idx`.

    Opening reads headers and a few blocks of each shard; nothing is held that grows with tokens or documents.

    Args:
        prefix: path without suffix.
        cache: folder for what is computed once about a corpus without a manifest; default the user's cache folder.

    Raises:
        MegamupError: a file is missing, broken, or another one than the manifest tells of.
    """

    def __init__(self, prefix: str, cache: Path | None = None) -> None:
        self.prefix = prefix
        self._cache = cache
        self.manifest, self.shards = open_shards(prefix)
        self.dtype = self.shards[0].dtype
        self._token_starts = list(accumulate((shard.n_tokens for shard in self.shards), initial=0))
        self._document_starts = list(accumulate(map(len, self.shards), initial=0))
        self.n_tokens = self._token_starts[-1]

    def __len__(self) -> int:
        """The number of documents."""
        return self._document_starts[-1]

    @property
    def eod_id(self) -> int | None:
        """The token that ends documents; Megatron's files don't tell."""
        return self.manifest.eod_id if self.manifest else None

    @property
    def content_hash(self) -> str:
        """Hex SHA-256 of the shards' files, whatever their path; without a manifest all is read, once."""
        if self.manifest:
            return self.manifest.content_hash
        return cached_content_hash(self.shards[0].bin_path, self.shards[0].idx_path, self._cache)

    @property
    def stream_sample(self) -> str:
        """Hash of the counts and of tokens spread over the stream: the same for the same documents in other shards."""
        digest = hashlib.sha256(repr((len(self), self.n_tokens)).encode())
        last = max(self.n_tokens - SAMPLE_TOKENS, 0)
        for place in range(SAMPLES):
            start = last * place // (SAMPLES - 1)
            digest.update(self.tokens(start, min(start + SAMPLE_TOKENS, self.n_tokens)).astype("<i8").tobytes())
        return digest.hexdigest()

    @property
    def files(self) -> list[Path]:
        """Of all shards, .bin and .idx in turn."""
        return [path for shard in self.shards for path in (shard.bin_path, shard.idx_path)]

    @property
    def state(self) -> str:
        """Changes when a file is written to or replaced, though the content may be the same."""
        status = [path.stat() for path in self.files]
        times = [(found.st_size, found.st_mtime_ns, found.st_ctime_ns) for found in status]
        return hashlib.sha256(repr(times).encode()).hexdigest()

    def check_content(self) -> None:
        """Compare all files with the hashes of the manifest; each state of a file is read once, then remembered.

        Raises:
            MegamupError: one is another.
        """
        entries = self.manifest.shards if self.manifest else ()
        expected = [hashed for entry in entries for hashed in (entry.bin_sha256, entry.idx_sha256)]
        for path, hashed in zip(self.files, expected, strict=False):
            found = cached_sha256(path, self._cache)
            if found != hashed:
                raise MegamupError(
                    f"{path}: SHA-256 {found}, its manifest says {hashed}: changed since it was written; restore it, "
                    "or write the corpus again"
                )

    def tokens(self, start: int, stop: int) -> Ids:
        """Ids `start` to before `stop` of the stream. Shape (stop - start,), read-only where it lies in one shard."""
        if not 0 <= start <= stop <= self.n_tokens:
            raise IndexError(f"tokens {start} to {stop} of {self.n_tokens}")
        place = self._shard_of(start)
        first = self._token_starts[place]
        if stop <= self._token_starts[place + 1]:
            return self.shards[place].tokens(start - first, stop - first)
        return np.concatenate([shard.tokens(low, high) for shard, low, high in self.spans(start, stop)])

    def spans(self, start: int, stop: int) -> Iterator[tuple[Shard, int, int]]:
        """The shards that hold tokens `start` to before `stop`, each with the range of its own tokens."""
        place = self._shard_of(start)
        while start < stop:
            first, end = self._token_starts[place : place + 2]
            yield self.shards[place], start - first, min(stop, end) - first
            start, place = end, place + 1

    def _shard_of(self, token: int) -> int:
        return min(bisect_right(self._token_starts, token), len(self.shards)) - 1

    def bounds(self, document: int) -> tuple[int, int]:
        """A document's tokens in the stream, as (start, stop)."""
        if not 0 <= document < len(self):
            raise IndexError(f"document {document} of {len(self)}")
        place = bisect_right(self._document_starts, document) - 1
        start, stop = self.shards[place].bounds(document - self._document_starts[place])
        return self._token_starts[place] + start, self._token_starts[place] + stop

    def document(self, index: int) -> Ids:
        """Ids of a document, its end-of-document token included. Shape (tokens,), read-only."""
        return self.tokens(*self.bounds(index))

    def documents_at(self, start: int, stop: int) -> range:
        """The documents that tokens `start` to before `stop` touch. O(log documents)."""
        if start == stop:
            return range(0)
        return range(self._document_at(start), self._document_at(stop - 1) + 1)

    def _document_at(self, token: int) -> int:
        place = self._shard_of(token)
        return self._document_starts[place] + self.shards[place].document_at(token - self._token_starts[place])

    def lengths(self) -> Iterator[Lengths]:
        """Tokens of every document, in pieces."""
        for shard in self.shards:
            yield from shard.lengths()


class TextCounts(NamedTuple):
    """Of text that was tokenized; 0 where that isn't known of all of it."""

    n_bytes: int
    """In UTF-8."""
    n_words: int


def text_counts(corpora: Sequence[Corpus]) -> TextCounts:
    """Of several corpora together, as their manifests tell. Megatron's files don't, nor do other programs' ids."""
    manifests = [corpus.manifest for corpus in corpora]
    return total([TextCounts(found.text_bytes, found.text_words) if found else TextCounts(0, 0) for found in manifests])


def total(counts: Sequence[TextCounts]) -> TextCounts:
    n_bytes, n_words = zip(*counts, strict=True)
    return TextCounts(sum(n_bytes) if all(n_bytes) else 0, sum(n_words) if all(n_words) else 0)


def open_shards(prefix: str) -> tuple[Manifest | None, list[Shard]]:
    """The manifest at `prefix`, None if there is none, and its shards, each checked against it.

    Raises:
        MegamupError: see `Corpus`.
    """
    path = shard_path(prefix, ".json")
    if not path.is_file():
        if not shard_path(prefix, ".idx").exists() and not shard_path(prefix, ".bin").exists():
            raise MegamupError(
                f"shard {prefix!r}: no file {prefix + '.json'!r} or {prefix + '.idx'!r}{missing_hint(prefix)}"
            )
        return None, [Shard(prefix)]
    manifest = Manifest.read(path)
    shards = [Shard(str(path.parent / entry.name)) for entry in manifest.shards]
    for entry, shard in zip(manifest.shards, shards, strict=True):
        _check_entry(path, manifest, entry, shard)
    return manifest, shards


def _check_entry(path: Path, manifest: Manifest, entry: ShardEntry, shard: Shard) -> None:
    found = (len(shard), shard.n_tokens, shard.dtype.name)
    expected = (entry.documents, entry.tokens, manifest.dtype)
    if found != expected:
        raise MegamupError(
            f"{path}: tells of {entry.documents:,} documents and {entry.tokens:,} tokens ({manifest.dtype}) in "
            f"{entry.name!r}, which holds {len(shard):,} and {shard.n_tokens:,} ({shard.dtype.name}): "
            "it belongs to another shard; write the corpus again"
        )
    if sample_sha256(shard.bin_path, shard.idx_path) != entry.sample_sha256:
        raise MegamupError(
            f"{shard.bin_path}: it or its index is another than {path} was written for: changed, replaced or damaged; "
            "restore it, or write the corpus again (tools/shards.py verify says more)"
        )
