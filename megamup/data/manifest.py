"""What a corpus of token shards holds and what it was made from; stored as `PREFIX.json`."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from megamup.errors import MegamupError
from megamup.files import write_json_atomic

SAMPLES = 8
SAMPLE_BYTES = 4096


@dataclass(frozen=True)
class TokenizerEntry:
    """What turned text into these ids."""

    name: str
    sha256: str
    """Of all that determines ids; equal hashes mean equal ids."""
    folder: str | None = None
    """Name of the folder beside the manifest that holds the tokenizer's files."""
    backend: str = ""
    """Library that encoded, after it was checked to give the reference's ids."""
    note: str = ""
    """What that check found."""

    @staticmethod
    def unknown() -> TokenizerEntry:
        """Of a corpus made by a program that doesn't tell; equal to every other."""
        return TokenizerEntry("unknown", "")


@dataclass(frozen=True)
class ShardEntry:
    """One pair of files NAME.bin, NAME.idx beside the manifest."""

    name: str
    documents: int
    tokens: int
    bin_sha256: str
    idx_sha256: str
    sample_sha256: str
    """Of `SAMPLES` blocks spread over each file: a check that is cheap enough for every opening."""


@dataclass(frozen=True)
class Manifest:
    """A corpus: its shards in order, and where they come from."""

    documents: int
    tokens: int
    dtype: str
    vocab_size: int
    max_id: int
    eod_id: int
    text_bytes: int
    """UTF-8 bytes of the documents' text; 0 where they weren't counted."""
    tokenizer: TokenizerEntry
    shards: tuple[ShardEntry, ...]
    sources: list[dict[str, Any]] = field(default_factory=list)
    options: dict[str, Any] = field(default_factory=dict)
    left_out: dict[str, int] = field(default_factory=dict)
    """Documents that were read and are not here, by reason."""
    inexact_cuts: int = 0
    """Places where a long document was encoded in two parts whose tokens there aren't those of the whole."""
    text_words: int = 0
    """Words of the documents' text, as white space parts them; 0 where they weren't counted."""

    @property
    def content_hash(self) -> str:
        """Of the shards' files, in order; names and paths have no part in it. The same documents in other shards
        have another."""
        digest = hashlib.sha256()
        for shard in self.shards:
            digest.update(bytes.fromhex(shard.bin_sha256) + bytes.fromhex(shard.idx_sha256))
        return digest.hexdigest()

    def write(self, path: Path) -> None:
        """Raises OSError where the folder can't be written."""
        write_json_atomic(path, asdict(self))

    @staticmethod
    def read(path: Path) -> Manifest:
        """Raises MegamupError where the file is broken or lacks a key."""
        try:
            values = {"text_words": 0} | json.loads(path.read_text(encoding="utf-8"))  # older ones don't count them
            known = {item.name: values[item.name] for item in fields(Manifest)}
            known["tokenizer"] = TokenizerEntry(**values["tokenizer"])
            known["shards"] = tuple(ShardEntry(**shard) for shard in values["shards"])
            manifest = Manifest(**known)
            _check_names(manifest)
        except (ValueError, TypeError, KeyError) as error:
            raise MegamupError(
                f"{path}: not the manifest of a corpus: {error!r}; write the corpus again, or remove this file to read "
                "the shard of this name as Megatron's"
            ) from error
        return manifest


def _check_names(manifest: Manifest) -> None:
    """Shards lie beside the manifest: a name with a folder in it would read files from elsewhere."""
    for shard in manifest.shards:
        if os.path.basename(shard.name) != shard.name or not shard.name:
            raise ValueError(f"shard name {shard.name!r}")
    if not manifest.shards:
        raise ValueError("no shards")


def sample_sha256(*paths: Path) -> str:
    """SHA-256 of files' sizes and of `SAMPLES` blocks of each, spread evenly from its start to its end.

    Raises:
        OSError: a file can't be read.
    """
    digest = hashlib.sha256()
    for path in paths:
        size = path.stat().st_size
        digest.update(str(size).encode())
        last = max(size - SAMPLE_BYTES, 0)
        with open(path, "rb", buffering=0) as file:
            for place in range(SAMPLES):
                file.seek(last * place // (SAMPLES - 1))
                digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()


def file_sha256(path: Path, advance: Callable[[int], None] = lambda n_bytes: None) -> str:
    """SHA-256 of a file; `advance` hears of every few bytes read.

    Raises:
        OSError: the file can't be read.
    """
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        while block := file.read(1 << 22):
            digest.update(block)
            advance(len(block))
    return digest.hexdigest()
