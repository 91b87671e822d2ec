"""What `tools/shards.py` does with corpora: describe, verify, copy, and make them of other programs' files."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megamup.data.corpus import Corpus, text_counts
from megamup.data.manifest import Manifest, TokenizerEntry, file_sha256
from megamup.data.shards import Lengths, Shard, token_dtype
from megamup.data.tokenizer import Ids, Tokenizer, load_tokenizer, store_tokenizer
from megamup.data.writer import UNSPLIT, CorpusWriter
from megamup.errors import MegamupError

COPY_TOKENS = 1 << 24
LLM_C_MAGIC = 20240520
LLM_C_HEADER = 1024


@dataclass(frozen=True)
class Vocabulary:
    """What ids mean: the tokenizer, or as much as is known of it."""

    vocab_size: int
    eod_id: int
    entry: TokenizerEntry
    tokenizer: Tokenizer | None = None

    @staticmethod
    def of(tokenizer: Tokenizer) -> Vocabulary:
        entry = TokenizerEntry(tokenizer.name, tokenizer.sha256, backend=tokenizer.backend)
        return Vocabulary(tokenizer.vocab_size, tokenizer.eod_id, entry, tokenizer)

    def beside(self, prefix: str) -> TokenizerEntry:
        """Store the tokenizer beside a new corpus; the entry for its manifest."""
        if self.tokenizer is None:
            return self.entry
        folder = Path(f"{prefix}.tokenizer")
        store_tokenizer(self.tokenizer, folder)
        return TokenizerEntry(self.entry.name, self.entry.sha256, folder.name, self.entry.backend, self.entry.note)


def stored_tokenizer(corpus: Corpus) -> Tokenizer | None:
    """The tokenizer that lies beside a corpus, None if none does.

    Raises:
        MegamupError: it is another one than made the corpus.
    """
    if corpus.manifest is None or corpus.manifest.tokenizer.folder is None:
        return None
    entry = corpus.manifest.tokenizer
    folder = Path(corpus.prefix).parent / str(entry.folder)
    if not folder.is_dir():
        raise MegamupError(
            f"{folder}: missing: the tokenizer of {corpus.prefix!r} lay there; copy it back beside its shards"
        )
    tokenizer = load_tokenizer(str(folder))
    if tokenizer.sha256 != entry.sha256:
        raise MegamupError(
            f"{folder}: holds another tokenizer ({tokenizer.name}, SHA-256 {tokenizer.sha256[:16]}) than the one that "
            f"made {corpus.prefix!r} ({entry.name}, {entry.sha256[:16]}); restore it, or its ids mean something else"
        )
    return tokenizer


def vocabulary(corpora: Sequence[Corpus], spec: str | None) -> Vocabulary:
    """What the ids of all these corpora mean: by their manifests, and by `spec` for those without one.

    Raises:
        MegamupError: they don't agree, or nothing tells.
    """
    known = {
        corpus.prefix: corpus.manifest.tokenizer
        for corpus in corpora
        if corpus.manifest and corpus.manifest.tokenizer.sha256
    }
    given = Vocabulary.of(load_tokenizer(spec)) if spec else None
    hashes = {entry.sha256: prefix for prefix, entry in known.items()} | (
        {given.entry.sha256: str(spec)} if given else {}
    )
    if len(hashes) > 1:
        raise MegamupError(
            f"{' and '.join(hashes.values())}: made by different tokenizers; their ids don't mean the same"
        )
    if given:
        return given
    if len(known) < len(corpora):
        unknown = next(corpus.prefix for corpus in corpora if corpus.prefix not in known)
        raise MegamupError(f"{unknown!r}: nothing tells what its ids mean; name its tokenizer with --tokenizer")
    first = corpora[0]
    assert first.manifest is not None
    tokenizer, entry = stored_tokenizer(first), first.manifest.tokenizer
    return Vocabulary(first.manifest.vocab_size, first.manifest.eod_id, entry, tokenizer)


def verify(corpus: Corpus, advance: Callable[[int], None]) -> None:
    """Read all of a corpus; `advance` hears of bytes.

    Raises:
        MegamupError: a file is not what the manifest says, the index contradicts itself, an id is unknown,
            a document doesn't end with the end-of-document token, or another tokenizer lies beside it.
    """
    manifest = corpus.manifest
    for number, shard in enumerate(corpus.shards):
        shard.check()
        if manifest is not None:
            entry = manifest.shards[number]
            for path, expected in ((shard.idx_path, entry.idx_sha256), (shard.bin_path, entry.bin_sha256)):
                found = file_sha256(path, advance)
                if found != expected:
                    raise MegamupError(
                        f"{path}: damaged or replaced: SHA-256 {found}, the manifest says {expected}; restore it "
                        "from a copy, or write the corpus again"
                    )
            _check_ids(manifest, shard)
    if manifest is not None:
        counts = (sum(map(len, corpus.shards)), corpus.n_tokens)
        if counts != (manifest.documents, manifest.tokens):
            raise MegamupError(
                f"{corpus.prefix}.json: tells of {manifest.documents:,} documents and {manifest.tokens:,} tokens, its "
                f"shards hold {counts[0]:,} and {counts[1]:,}"
            )
        stored_tokenizer(corpus)


def _check_ids(manifest: Manifest, shard: Shard) -> None:
    first = 0
    for run, lengths in documents(shard):
        high, low = (int(run.max()), int(run.min())) if len(run) else (0, 0)
        if high >= manifest.vocab_size or high > manifest.max_id or low < 0:
            raise MegamupError(
                f"{shard.bin_path}: ids {low:,} to {high:,}; the manifest says at most {manifest.max_id:,}, of a "
                f"vocabulary of {manifest.vocab_size:,}"
            )
        ends = np.cumsum(lengths)[lengths > 0] - 1
        if manifest.tokenizer.folder is not None and len(ends) and (run[ends] != manifest.eod_id).any():
            place = first + int(np.flatnonzero(lengths > 0)[np.argmax(run[ends] != manifest.eod_id)])
            raise MegamupError(f"{shard.bin_path}: document {place:,} doesn't end with token {manifest.eod_id}")
        first += len(lengths)


def documents(shard: Shard) -> Iterator[tuple[Ids, Lengths]]:
    """Runs of whole documents, of `COPY_TOKENS` tokens or one document: ids (tokens,), lengths (documents,)."""
    start = 0
    for lengths in shard.lengths():
        ends, first = np.cumsum(lengths), 0
        while first < len(lengths):
            done = int(ends[first - 1]) if first else 0
            last = max(int(np.searchsorted(ends, done + COPY_TOKENS, side="right")), first + 1)
            stop = start + int(ends[last - 1]) - done
            yield shard.tokens(start, stop), lengths[first:last]
            first, start = last, stop


def merge(
    corpora: Sequence[Corpus], output: str, meaning: Vocabulary, shard_bytes: int, advance: Callable[[int], None]
) -> Manifest:
    """Write the documents of several corpora, one after the other, as one.

    Raises:
        MegamupError: the output is one of them or can't be written, or an id is outside the vocabulary.
    """
    _check_apart(corpora, [output])
    with CorpusWriter(output, token_dtype(meaning.vocab_size), shard_bytes) as writer:
        for corpus in corpora:
            for shard in corpus.shards:
                for ids, lengths in documents(shard):
                    writer.add(ids, lengths)
                    advance(ids.nbytes)
        counts = text_counts(corpora)
        return _finish(writer, meaning, corpora, text_bytes=counts.n_bytes, text_words=counts.n_words)


def split(corpus: Corpus, outputs: tuple[str, str], fraction: float, seed: int, meaning: Vocabulary) -> list[Manifest]:
    """Divide the documents of a corpus in two; about `fraction` of them go to the second.

    The choice is a hash of (seed, ids): equal documents are never on both sides.

    Raises:
        MegamupError: a side is left empty, an output is the corpus itself, or one can't be written.
    """
    _check_apart([corpus], outputs)
    dtype = token_dtype(meaning.vocab_size)
    with CorpusWriter(outputs[0], dtype) as first, CorpusWriter(outputs[1], dtype) as second:
        for shard in corpus.shards:
            for ids, lengths in documents(shard):
                ends = np.cumsum(lengths)
                chosen = np.array(
                    [_is_chosen(ids[end - n : end], fraction, seed) for end, n in zip(ends, lengths, strict=True)]
                )
                tokens = np.repeat(chosen, lengths)
                first.add(ids[~tokens], lengths[~chosen])
                second.add(ids[tokens], lengths[chosen])
        for writer in (first, second):
            if writer.max_id < 0:
                raise MegamupError(
                    f"no document fell into {writer.prefix!r} with --valid-fraction {fraction}: give another "
                    "fraction or --seed"
                )
        return [_finish(writer, meaning, [corpus]) for writer in (first, second)]


def _is_chosen(ids: Ids, fraction: float, seed: int) -> bool:
    digest = hashlib.blake2b(ids.astype("<i4").tobytes(), digest_size=8, key=str(seed).encode()).digest()
    return int.from_bytes(digest, "little") < fraction * 2**64


def _check_apart(corpora: Sequence[Corpus], outputs: Sequence[str]) -> None:
    for corpus in corpora:
        for output in outputs:
            if Path(corpus.prefix).absolute() == Path(output).absolute():
                raise MegamupError(f"output {output!r} is also an input; give it another name")


def _finish(
    writer: CorpusWriter, meaning: Vocabulary, corpora: Sequence[Corpus], text_bytes: int = 0, text_words: int = 0
) -> Manifest:
    sources: list[dict[str, Any]] = [
        {
            "path": corpus.prefix,
            "documents": len(corpus),
            "tokens": corpus.n_tokens,
            "content_hash": corpus.content_hash,
        }
        for corpus in corpora
    ]
    return writer.finish(
        vocab_size=meaning.vocab_size,
        eod_id=meaning.eod_id,
        tokenizer=meaning.beside(writer.prefix),
        text_bytes=text_bytes,
        text_words=text_words,
        sources=sources,
    )


def from_nanogpt(path: Path, output: str, meaning: Vocabulary, shard_bytes: int = UNSPLIT) -> Manifest:
    """nanoGPT's raw uint16 ids (`data/*/prepare.py`), or llm.c's with its header, as a corpus.

    Documents end with the end-of-document token; what follows the last of them is one document more.

    Raises:
        MegamupError: the file is missing, empty, no such file, or holds an id outside the vocabulary.
    """
    if not path.is_file() or path.stat().st_size == 0:
        raise MegamupError(f"{path}: {'empty' if path.is_file() else 'no such file'}; expected nanoGPT's train.bin")
    if not 0 <= meaning.eod_id < meaning.vocab_size:
        raise MegamupError(
            f"--eod-id {meaning.eod_id}: expected an id of the vocabulary, 0 to {meaning.vocab_size - 1:,}"
        )
    start = _llm_c_header(path)
    if (path.stat().st_size - start) % 2:
        raise MegamupError(f"{path}: {path.stat().st_size:,} bytes, an odd number: not uint16 ids, or cut short")
    ids: Ids = np.memmap(path, dtype="<u2", mode="r", offset=start).view(np.ndarray)
    with CorpusWriter(output, token_dtype(meaning.vocab_size), shard_bytes) as writer:
        open_since = at = 0
        for first in range(0, len(ids), COPY_TOKENS):
            ends = first + np.flatnonzero(ids[first : first + COPY_TOKENS] == meaning.eod_id) + 1
            if len(ends):
                at, lengths = int(ends[-1]), np.diff(ends, prepend=open_since)
                writer.add(ids[open_since:at], lengths)
                open_since = at
        if open_since < len(ids):
            writer.add(ids[open_since:], [len(ids) - open_since])
        return writer.finish(
            vocab_size=meaning.vocab_size,
            eod_id=meaning.eod_id,
            tokenizer=meaning.beside(output),
            sources=[{"path": str(path), "files": 1, "bytes": path.stat().st_size}],
        )


def _llm_c_header(path: Path) -> int:
    """Bytes before the ids: llm.c's files (and modded-nanogpt's) begin with 256 int32, which would be junk ids."""
    with open(path, "rb") as file:
        head = file.read(12)
    if len(head) < 12 or struct.unpack("<i", head[:4])[0] != LLM_C_MAGIC:
        return 0
    version, tokens = struct.unpack("<2i", head[4:])
    if version != 1 or LLM_C_HEADER + 2 * tokens != path.stat().st_size:
        raise MegamupError(
            f"{path}: llm.c's header says version {version} and {tokens:,} tokens, which the size of "
            f"{path.stat().st_size:,} bytes contradicts; only version 1 (uint16) is read"
        )
    return LLM_C_HEADER
