"""Token shards in Megatron's indexed format: `PREFIX.bin`, `PREFIX.idx`, and a manifest `PREFIX.json`.

The .bin is all token ids one after the other. The .idx, little endian and unpadded, as
`megatron.core.datasets.indexed_dataset` reads and writes it:

    offset  bytes  what
    0       9      b"MMIDIDX\\0\\0"
    9       8      version, 1
    17      1      code of the ids' dtype
    18      8      number of sequences s
    26      8      number of documents + 1
    34      4 s    int32: tokens of each sequence
            8 s    int64: byte in the .bin where each sequence starts
            8 d+8  int64: the sequence at which each document starts, then s

A document that Megatron splits in sentences has several sequences; ours have one each.
"""

from __future__ import annotations

import difflib
import json
import struct
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from megamup.data.pending import PendingFile, sync_folder
from megamup.data.tokenizer import Ids
from megamup.errors import MegamupError

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
DTYPES: dict[int, np.dtype[Any]] = {
    code: np.dtype(name) for code, name in {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}.items()
}
DTYPE_CODES = {dtype: code for code, dtype in DTYPES.items()}


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """Megatron's choice (`DType.optimal_dtype`): uint16 for less than 65,500 tokens, else int32."""
    return np.dtype("<u2") if vocab_size < 65500 else np.dtype("<i4")


def shard_path(prefix: str, suffix: str) -> Path:
    """`prefix` may hold dots, so the suffix is added to the name as it is."""
    return Path(prefix + suffix)


@dataclass(frozen=True)
class Manifest:
    """What a shard holds and what it was made from; stored as `PREFIX.json`."""

    documents: int
    tokens: int
    dtype: str
    vocab_size: int
    max_id: int
    eod_id: int
    tokenizer: str
    tokenizer_sha256: str
    text_bytes: int
    """UTF-8 bytes of the documents' text."""
    bin_sha256: str
    idx_sha256: str
    sources: list[dict[str, Any]]

    @staticmethod
    def read(path: Path) -> Manifest:
        """Raises MegamupError where the file is broken or lacks a key."""
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            return Manifest(**{item.name: values[item.name] for item in fields(Manifest)})
        except (ValueError, TypeError, KeyError) as error:
            raise MegamupError(
                f"{path}: not a shard's manifest: {error!r}; remove it or write the shard again"
            ) from error


class Shard:
    """A shard on disk, memory-mapped: opening costs no more than its header, whatever its size.

    Raises:
        MegamupError: a file is missing, is no shard, is cut short or too long, or holds no tokens.
    """

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix
        self.bin_path, self.idx_path = shard_path(prefix, ".bin"), shard_path(prefix, ".idx")
        for path in (self.idx_path, self.bin_path):
            if not path.is_file():
                raise MegamupError(f"shard {prefix!r}: no file {str(path)!r}{_missing_hint(prefix)}")
        self._read_index()
        self.n_tokens = self._check_bin()
        self._tokens: Ids = np.memmap(self.bin_path, dtype=self.dtype, mode="r").view(np.ndarray)
        manifest_path = shard_path(prefix, ".json")
        self.manifest = Manifest.read(manifest_path) if manifest_path.is_file() else None
        if self.manifest and (self.manifest.documents, self.manifest.tokens) != (len(self), self.n_tokens):
            raise MegamupError(
                f"{manifest_path}: counts {self.manifest.documents:,} documents and {self.manifest.tokens:,} "
                f"tokens, the shard {len(self):,} and {self.n_tokens:,}: it belongs to another shard"
            )

    def _read_index(self) -> None:
        path, size = self.idx_path, self.idx_path.stat().st_size
        with open(path, "rb") as file:
            header = file.read(HEADER.size)
        if not header.startswith(MAGIC):
            raise MegamupError(f"{path}: not a shard's index: byte 0 reads {header[:9]!r}, expected {MAGIC!r}")
        if len(header) < HEADER.size:
            raise MegamupError(f"{path}: cut short: expected at least {HEADER.size} bytes of header, found {size}")
        _, version, code, sequences, ends = HEADER.unpack(header)
        if version != 1:
            raise MegamupError(f"{path}: version {version} at byte 9, expected 1")
        if code not in DTYPES:
            raise MegamupError(
                f"{path}: dtype code {code} at byte 17 is none of an integer; expected one of {list(DTYPES)}"
            )
        self.dtype = DTYPES[code]
        expected = HEADER.size + 12 * sequences + 8 * ends
        if size != expected:
            state = "cut short" if size < expected else "too long"
            raise MegamupError(f"{path}: {state}: expected {expected:,} bytes, found {size:,}")
        if ends < 2:
            raise MegamupError(f"{path}: the shard holds no documents")
        index = np.memmap(path, mode="r").view(np.ndarray)[HEADER.size :]
        lengths, pointers, documents = np.split(index, [4 * sequences, 12 * sequences])
        self._lengths = lengths.view("<i4")
        self._pointers = pointers.view("<i8")
        self._documents = documents.view("<i8")
        if self._documents[0] != 0 or self._documents[-1] != sequences:
            at = HEADER.size + 12 * sequences
            raise MegamupError(
                f"{path}: broken from byte {at:,}: documents span sequences {self._documents[0]:,} "
                f"to {self._documents[-1]:,}, expected 0 to {sequences:,}"
            )

    def _check_bin(self) -> int:
        """Tokens in the .bin, after its size is found to be what the index says."""
        size = self.bin_path.stat().st_size
        expected = int(self._pointers[-1]) + int(self._lengths[-1]) * self.dtype.itemsize
        if size != expected:
            state = "cut short" if size < expected else "too long"
            raise MegamupError(
                f"{self.bin_path}: {state}: expected {expected:,} bytes after its index, found {size:,}; "
                "write the shard again"
            )
        if size == 0:
            raise MegamupError(f"{self.bin_path}: the shard holds no tokens, only empty documents")
        return size // self.dtype.itemsize

    def __len__(self) -> int:
        """The number of documents."""
        return len(self._documents) - 1

    def _start(self, document: int) -> int:
        sequence = int(self._documents[document])
        if sequence == len(self._pointers):
            return self.n_tokens
        return int(self._pointers[sequence]) // self.dtype.itemsize

    def document(self, index: int) -> Ids:
        """Ids of document `index`, its end-of-document token included. Shape (tokens,), read-only."""
        if not 0 <= index < len(self):
            raise IndexError(f"document {index} of {len(self)}")
        return self.tokens(self._start(index), self._start(index + 1))

    def tokens(self, start: int, stop: int) -> Ids:
        """Ids `start` to before `stop` of the stream of all documents. Shape (stop - start,), read-only."""
        if not 0 <= start <= stop <= self.n_tokens:
            raise IndexError(f"tokens {start} to {stop} of {self.n_tokens}")
        return self._tokens[start:stop]


def _missing_hint(prefix: str) -> str:
    if prefix.endswith((".bin", ".idx")):
        return "; give the prefix, without .bin or .idx"
    path = Path(prefix)
    names = [file.name.removesuffix(".idx") for file in path.parent.glob("*.idx")]
    nearest = difflib.get_close_matches(path.name, names, n=1, cutoff=0.4)
    if nearest and nearest[0] != path.name:
        return f"; did you mean {str(path.parent / nearest[0])!r}?"
    return "; tools/preprocess_data.py writes shards"


class ShardWriter:
    """Writes a shard beside its name; `publish` makes it appear.

    Use as a context manager: left without `publish`, it removes what it wrote, and an earlier shard of that
    name stays as it was.

    Raises:
        MegamupError: from every method, where a file can't be written.
    """

    def __init__(self, prefix: str, vocab_size: int) -> None:
        self.prefix = prefix
        self.vocab_size = vocab_size
        self.dtype = token_dtype(vocab_size)
        self.n_tokens = 0
        self.max_id = -1
        self._lengths: list[npt.NDArray[np.int32]] = []
        self._files: dict[str, PendingFile] = {}
        self._open(".bin")

    def _open(self, suffix: str) -> PendingFile:
        self._files[suffix] = PendingFile(shard_path(self.prefix, suffix))
        return self._files[suffix]

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.discard()

    def add(self, ids: Ids, lengths: Sequence[int] | npt.NDArray[np.integer[Any]]) -> None:
        """Append documents.

        Args:
            ids: the documents' ids one after the other, end-of-document tokens included. Shape (tokens,).
            lengths: tokens of each document. Shape (documents,).

        Raises:
            ValueError: `lengths` don't add up to the number of ids, or an id is outside the vocabulary.
        """
        counts = np.asarray(lengths, dtype=np.int64)
        if counts.sum() != len(ids) or counts.max(initial=0) > np.iinfo(np.int32).max:
            raise ValueError(f"lengths add up to {counts.sum()}, for {len(ids)} ids (at most 2^31-1 each)")
        if len(ids):
            low, high = int(ids.min()), int(ids.max())
            if low < 0 or high >= self.vocab_size:
                raise ValueError(f"ids {low} to {high} outside a vocabulary of {self.vocab_size}")
            self.max_id = max(self.max_id, high)
        self._files[".bin"].write(np.ascontiguousarray(ids, dtype=self.dtype).view(np.uint8).data)
        self._lengths.append(counts.astype(np.int32))
        self.n_tokens += len(ids)

    def finish(
        self,
        *,
        eod_id: int,
        tokenizer: str,
        tokenizer_sha256: str,
        text_bytes: int,
        sources: list[dict[str, Any]],
    ) -> Manifest:
        """Write index and manifest, and bring all three files to the disk; `publish` comes next."""
        lengths = np.concatenate(self._lengths) if self._lengths else np.empty(0, np.int32)
        if not len(lengths):
            raise MegamupError(f"shard {self.prefix!r}: no documents to write")
        index = self._open(".idx")
        index.write(HEADER.pack(MAGIC, 1, DTYPE_CODES[self.dtype], len(lengths), len(lengths) + 1))
        index.write(lengths.astype("<i4").tobytes())
        ends = np.cumsum(lengths, dtype="<i8") * self.dtype.itemsize
        index.write((ends - lengths.astype("<i8") * self.dtype.itemsize).tobytes())
        index.write(np.arange(len(lengths) + 1, dtype="<i8").tobytes())
        manifest = Manifest(
            documents=len(lengths),
            tokens=self.n_tokens,
            dtype=self.dtype.name,
            vocab_size=self.vocab_size,
            max_id=self.max_id,
            eod_id=eod_id,
            tokenizer=tokenizer,
            tokenizer_sha256=tokenizer_sha256,
            text_bytes=text_bytes,
            bin_sha256=self._files[".bin"].sha256,
            idx_sha256=index.sha256,
            sources=sources,
        )
        self._open(".json").write((json.dumps(asdict(manifest), indent=2, ensure_ascii=False) + "\n").encode())
        for file in self._files.values():
            file.sync()
        return manifest

    def discard(self) -> None:
        """Remove the temporaries; nothing happens after `publish`."""
        for file in self._files.values():
            file.discard()

    def publish_file(self, suffix: str) -> None:
        self._files[suffix].publish()


def publish(writers: Sequence[ShardWriter]) -> None:
    """Put finished shards in the place of earlier ones of their names, all of them together.

    Old indices go first and new ones come last: a process that dies in between leaves shards without an
    index, which can't be opened, and never an old index over new tokens.
    """
    for writer in writers:
        index = shard_path(writer.prefix, ".idx")
        index.unlink(missing_ok=True)
        sync_folder(index.parent)
    for suffix in (".bin", ".json", ".idx"):
        for writer in writers:
            writer.publish_file(suffix)
